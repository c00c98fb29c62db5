"""Steering a model: hooks on, whatever happens hooks off.

``steer`` works on the user's own model and under everything that ``generate`` does:
caches of any kind or none, left and right padding, beams, several sequences per
prompt, assisted decoding, compilation. While it is active ``model.generate`` is shadowed by a
function that notes where the prompt ends and then calls the original.

    with steer(model, vec.add(8.0)):
        model.generate(**inputs)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fgsteer.activations.outputs import hidden_states_of, replace_hidden_states, reshape_by_token
from fgsteer.activations.prompt_ends import pass_key
from fgsteer.errors import SteeringError, UntouchedWarning
from fgsteer.errors.checks import checked, warn
from fgsteer.errors.wording import a
from fgsteer.interventions import Intervention
from fgsteer.models.claims import Claim
from fgsteer.models.hookpoints import Hookpoint, decoder_of, resolve, uncompiled
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import input_device, start_token_finder, virtual_tokens, warn_of_dropout
from fgsteer.steering.blocks import Block
from fgsteer.steering.groups import Group, check_amounts, grouped
from fgsteer.steering.positions import Positions, column_counts
from fgsteer.steering.recomputation import Recomputation
from fgsteer.steering.shadows import refuse, refuse_copies, shadow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Entry = Intervention | Sequence[Intervention] | None
Steering = Intervention | Sequence[Entry] | None
Link = tuple[nn.Module, str, nn.Module]  # a module, the name of one that it holds, and that one

CACHES = ("past_key_values", "cache_params", "state")  # what decoders call the state that a pass goes on from
_IN_THREADS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def _entries(steering: Steering, per_row: bool | None) -> list[list[Intervention]]:
    """Interventions per row; one row for a composition that serves every row. Raises SteeringError."""
    if steering is None:
        return [[]]
    if isinstance(steering, Intervention):
        return [[steering]]
    if not isinstance(steering, list | tuple):
        hint = "call .add(coefficient), .affine(alpha) or the like on a vector"
        raise SteeringError(f"steering by {a(type(steering).__name__)}", "interventions", hint)
    by_row = any(not isinstance(entry, Intervention) for entry in steering) if per_row is None else per_row
    if not by_row:
        return [listed(steering)]
    return [listed(entry) for entry in steering]


def listed(entry: Any) -> list[Intervention]:
    """The interventions of one entry. Raises SteeringError for anything else among them."""
    if entry is None or isinstance(entry, Intervention):
        return [] if entry is None else [entry]
    items = list(entry) if isinstance(entry, list | tuple) else [entry]
    for item in items:
        if not isinstance(item, Intervention):
            raise SteeringError(
                f"{a(type(item).__name__)} among interventions",
                "Add, Ablate, Clamp, Affine or ClampFeature",
                "call .add(coefficient), .affine(alpha) or the like on a vector",
            )
    return items


def _links(model: nn.Module, modules: Sequence[nn.Module]) -> list[Link]:
    """Every module on the way from the model to these, with what holds it and by which name."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Link] = {}
    for path in (names[id(module)] for module in modules if names.get(id(module))):
        holder = model
        for end, part in enumerate(parts := path.split("."), 1):
            inner = holder._modules[part]
            assert inner is not None  # a path of named_modules
            found[".".join(parts[:end])] = (holder, part, uncompiled(inner))
            holder = inner
    return list(found.values())


def _renewed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function under another name: compiled graphs do not watch for new hooks, but for another forward."""

    @wraps(forward)
    def steered(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return steered


class _Session:
    """The hooks of one ``steer`` block.

    The hooks may run inside a compiled graph. What changes between blocks is then a tensor, and no
    number that changes between passes is read back: either would compile the graph again.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[Sequence[Intervention]], prompt_lengths: Tensor | None = None
    ) -> None:
        self.model, self.rows, self.groups = model, len(rows), grouped(rows)
        places = list({id(g.place): g.place for g in self.groups}.values())
        self.positions = Positions(places, start_token_finder(model), self.rows, prompt_lengths, pass_key(model))
        virtual_tokens(model)  # raises for what cannot be placed, before any pass
        self.learned = hasattr(model, "active_peft_config")  # PEFT's, which may put virtual tokens before texts
        self.claim = Claim(model)
        self.recomputation = Recomputation(self.positions, self.claim)
        self.ran = False
        self.handles: list[RemovableHandle] = []
        self.links: list[Link] = []
        self.names = [n for n in inspect.signature(decoder_of(model).forward).parameters if n != "self"]

    def install(self, hooks: ExitStack) -> None:
        """Register every hook; all come off when the stack closes."""
        if not self.groups:
            return
        self.claim.take(hooks)
        decoder = decoder_of(self.model)
        handle = decoder.register_forward_pre_hook(self.observe, with_kwargs=True)
        hooks.callback(handle.remove)
        self.handles.append(handle)
        shadow(decoder, "forward", _renewed(decoder.forward), hooks)
        self.recomputation.install(decoder, hooks)
        changed = {id(module): module for module in (self.model, decoder)}
        at: dict[Hookpoint, list[Group]] = {}
        for group in self.groups:
            at.setdefault(group.hookpoint, []).append(group)
        for hookpoint, groups in at.items():
            module, is_input = resolve(self.model, hookpoint)
            # first in line, so that hidden states which others record are the steered ones
            if is_input:
                hook = self._input_hook(groups)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            else:
                handle = module.register_forward_hook(self._output_hook(groups), prepend=True)
            hooks.callback(handle.remove)
            self.handles.append(handle)
            shadow(module, "forward", _renewed(module.forward), hooks)
            changed[id(module)] = module
            weight = next(module.parameters(), None)
            if weight is not None and weight.is_floating_point() and not weight.is_meta:
                for group in groups:  # before any pass, so that no graph holds it
                    group.prepare(weight.device, weight.dtype)
        if callable(getattr(self.model, "generate", None)):
            shadow(self.model, "generate", self._generate(self.model.generate), hooks)  # type: ignore[arg-type]
        for name in _IN_THREADS:
            refuse(
                self.model,
                name,
                hooks,
                f"{name} on a model that is being steered: it generates in a thread of its own",
                "generate, in the thread that steers",
                "call model.generate, or fgsteer.generate with one entry per prompt",
            )
        self.links = _links(self.model, list(changed.values()))
        for module in changed.values():
            refuse_copies(module, hooks)

    def observe(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the decoder is about to run on."""
        self.recomputation.begin()
        if not (torch.compiler.is_compiling() or self.positions.generating):
            self.warn_replaced()
        given = dict(zip(self.names, args, strict=False)) | kwargs if args else kwargs
        ids = given.get("input_ids")
        tokens: Tensor = given["inputs_embeds"] if ids is None else ids
        batch = tokens.shape[0]
        if self.rows > 1 and (batch % self.rows if self.positions.generating else batch != self.rows):
            raise SteeringError(
                f"{self.rows} entries for a batch of {batch} rows", "one entry per row", "pass as many entries as rows"
            )
        self._refuse_mixed_rows(given, batch, tokens.shape[1])
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        virtual = virtual_tokens(self.model) if self.learned else 0
        self.positions.begin(tokens, cache, given.get("attention_mask"), given.get("position_ids"), virtual)
        self.ran = True

    def _refuse_mixed_rows(self, given: dict[str, Any], batch: int, length: int) -> None:
        """Raises SteeringError where transformers' RWKV would run several rows from a state, which mixes them."""
        if batch == 1 or "state" not in self.names:
            return
        if (given.get("state") is not None and length == 1) or (self.positions.generating and given.get("use_cache")):
            raise SteeringError(
                f"a batch of {batch} rows that {type(self.model).__name__} decodes from a state",
                "one row, or no state: transformers mixes the rows of such a batch, steered or not",
                "one prompt at a time, or use_cache=False",
            )

    def act(self, groups: Sequence[Group], h: Tensor) -> Tensor:
        """Apply the groups in order to hidden states of any layout."""
        self.recomputation.check()  # a pass may have begun before the hooks were set
        batch, length = self.positions.batch, self.positions.length
        repeats = 1 if self.rows == 1 else batch // self.rows
        changed = h if h.shape[:-1] == (batch, length) else reshape_by_token(h, batch, length)
        for group in groups:
            changed = group.act(changed, repeats)
        return changed if changed.shape == h.shape else changed.reshape(h.shape)

    def _output_hook(self, groups: Sequence[Group]) -> Callable[..., Any]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            return replace_hidden_states(output, self.act(groups, hidden_states_of(output)))

        return hook

    def _input_hook(self, groups: Sequence[Group]) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (self.act(groups, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self.act(groups, kwargs["hidden_states"])}

        return hook

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``generate`` that notes where the prompt ends."""

        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if not self._admits(kwargs.get("streamer")):
                return original(*args, **kwargs)
            positions = self.positions
            if positions.generating:  # the model drafts for itself: the same rows, the same prompt
                return original(*args, **kwargs)
            self.warn_replaced()
            positions.generate(*self._prompt(args, kwargs), virtual_tokens(self.model))
            try:
                return original(*args, **kwargs)
            finally:
                positions.finish()

        return generate

    def _admits(self, streamer: Any) -> bool:
        """Whether the block steers this call of ``generate``: not one that someone kept and calls after the block.

        Raises SteeringError in another thread or task. A streamer is ended first, so that who
        reads it does not wait for ever, and the error comes to the thread of the block as well.
        """
        if self.claim.left():
            return False
        try:
            self.claim.check("generate")
        except SteeringError as error:
            if streamer is None:
                raise
            self.claim.failure = SteeringError(
                f"generate with a streamer: {error}",
                change="fgsteer.stream(model, tokenizer, prompt, steering=…) yields the text as it is generated",
            )
            streamer.end()
            raise self.claim.failure from error
        return True

    def _prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Tensor | None]:
        """(prompt length, mask of real tokens or None) of a generate call. Raises SteeringError."""
        ids = args[0] if args else kwargs.get("inputs")
        ids = kwargs.get("input_ids") if ids is None else ids
        tokens = ids if ids is not None else kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask")
        if tokens is None:
            return 1, None
        if self.rows > 1 and len(tokens) != self.rows:
            raise SteeringError(
                f"{self.rows} entries for {len(tokens)} prompts", "one entry per prompt", "pass as many of both"
            )
        if mask is None and ids is not None:
            mask = self._infer_mask(
                ids, kwargs.get("generation_config") or (args[1] if len(args) > 1 else None), kwargs
            )
        return max(tokens.shape[1], 0 if mask is None else mask.shape[1]), mask

    def _infer_mask(self, ids: Tensor, config: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """The mask that ``generate`` infers: pad tokens are padding unless they also end texts."""
        configs = (config, getattr(self.model, "generation_config", None))

        def setting(name: str) -> Any:
            values = [kwargs.get(name), *(getattr(c, name, None) for c in configs)]
            return next((value for value in values if value is not None), None)

        pad, eos = setting("pad_token_id"), setting("eos_token_id")
        ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        if pad is None or int(pad) in ends or ids.ndim != 2 or ids.is_floating_point():
            return None
        return ids.ne(pad)

    def warn_replaced(self) -> None:
        """Warn, once, of a hook that stands on a module which is no longer the model's, or that was taken off."""
        gone = [
            f"{parent}'s {name!r}" if (parent := type(holder).__name__) != "ModuleList" else f"block {name}"
            for holder, name, module in self.links
            if uncompiled(holder._modules.get(name)) is not module
        ]
        if gone or any(handle.id not in (handle.hooks_dict_ref() or ()) for handle in self.handles):
            self.links, self.handles = [], []
            what = f"{gone[0]} was replaced" if gone else "hooks of the block were taken off by other code"
            warn(
                f"{what} inside the steer block: what runs there now is not steered, or only a part of it; "
                "change the model before the block",
                UntouchedWarning,
            )

    def warn_untouched(self) -> None:
        """Warn of every update that touched no token, if anything ran, and ran on the modules that are hooked."""
        for group in self.groups if self.ran and self.links else ():
            if not group.touched():
                warn(
                    f"an intervention at {group.hookpoint} with scope {group.place.scope!r} touched no token; "
                    "padding is skipped, and a start token at position 0 unless bos=True",
                    UntouchedWarning,
                )


@checked
def steer(
    model: PreTrainedModel,
    steering: Steering,
    *,
    per_row: bool | None = None,
    prompt_lengths: Sequence[int] | Tensor | None = None,
) -> Block[PreTrainedModel]:
    """Steer every forward pass of the model inside the block; hooks always come off.

    ``steering`` is one intervention, a list of them (composed in order), or one entry per
    batch row, each an intervention, a list, or None for an unsteered row. A list that holds
    None or lists is read by row; ``per_row`` says it outright. Under ``generate`` entries
    belong to prompts, and beams or several sequences of a prompt share its entry.

    The prompt is what ``generate`` was given, and in other forward passes what was fed to an empty
    cache. For passes over prompt and completion at once, ``prompt_lengths`` says for each batch row how
    many columns, padding included, stand before its first completion token: the tokens are then
    steered as if the prompt were read first and the completion generated.

    Nested blocks on one model compose, the inner one acting first. Unsteered rows and
    tokens keep their activations bit for bit. Models may be compiled, before or inside the
    block; another block that differs in its numbers alone compiles nothing. Gradients flow through
    the block to the model and to values that require grad, with gradient checkpointing too.

    A block belongs to the thread that enters it, and to its asyncio task with those started inside:
    meanwhile, steer blocks and forward passes of others on that model raise SteeringError (not
    passes that are compiled as a whole), and so do ``generate_batch`` and copies of the model. A block
    that is left before one that was entered inside it comes off whole and raises SteeringError, as do the
    passes that the other still runs. Each call is entered once; as a decorator, once for each call of the function.

    ``HookpointError`` and ``PairingError`` are raised before anything is hooked;
    ``SteeringError`` for another number of rows than entries or prompt lengths, for prompt lengths that
    are no counts, exceed a pass or meet ``generate``, or for an amount at which activations of the
    model's dtype overflow (c·v or a target beyond ``ranges.largest``). Warns UntouchedWarning when an intervention
    touched no token, or a module that is steered was replaced inside the block, FgsteerWarning of a
    model in train mode with dropout.
    """
    return Block(partial(_steered, model, steering, per_row, prompt_lengths))


@contextmanager
def _steered(
    model: PreTrainedModel, steering: Steering, per_row: bool | None, prompt_lengths: Sequence[int] | Tensor | None
) -> Iterator[PreTrainedModel]:
    """One block. A generator: one that is dropped without being left is closed, and its hooks come off."""
    warn_of_dropout(model)
    rows, lengths = checked_rows(model, steering, per_row), column_counts(prompt_lengths)
    if lengths is not None and len(rows) > 1 and len(rows) != len(lengths):
        raise SteeringError(f"{len(rows)} entries and {len(lengths)} prompt_lengths", "one of each per row")
    session = _Session(uncompiled(model), rows, None if lengths is None else lengths.to(input_device(model)))
    check_amounts(model, session.groups)
    try:
        with ExitStack() as hooks:
            session.install(hooks)
            yield model
            session.warn_replaced()
    except GeneratorExit:  # the generator that the block stands in is closed, which is a way to leave it
        session.claim.report()
        raise
    session.claim.report()
    session.warn_untouched()


def checked_rows(model: PreTrainedModel, steering: Steering, per_row: bool | None) -> list[list[Intervention]]:
    """Interventions per row. Raises SteeringError, HookpointError, PairingError for what the model cannot be."""
    rows = _entries(steering, per_row)
    for item in {id(i): i for items in rows for i in items}.values():
        check_pairing(model, item.hookpoint, item.d_model, item.model_name, type(item).__name__)
    return rows
