"""Steering a model: hooks are set when a block begins, and come off whatever happens in it.

``steer`` works on the user's own model and under everything that ``generate`` does: caches of any kind or none, left
and right padding, beams, several sequences per prompt, assisted decoding, compilation. While a block is open,
``model.generate`` is shadowed by a function that notes where the prompt ends and then calls the original.

    with steer(model, vec.add(8.0)):
        model.generate(**inputs)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from fgsteer.activations.outputs import hidden_states_of, replace_hidden_states, reshape_by_token
from fgsteer.activations.prompt_ends import pass_key, reads_ahead
from fgsteer.errors import SteeringError, UntouchedWarning
from fgsteer.errors.changes import Changes
from fgsteer.errors.checks import checked, warn
from fgsteer.errors.wording import count
from fgsteer.interventions.base import Intervention
from fgsteer.interventions.cached import SteeringItem
from fgsteer.models.claims import Claim
from fgsteer.models.hookpoints import Hookpoint, decoder_of, resolve, uncompiled
from fgsteer.models.properties import input_device, start_token_finder, virtual_tokens, warn_of_dropout
from fgsteer.models.registering import register
from fgsteer.steering.blocks import Block
from fgsteer.steering.caching import CacheChanges
from fgsteer.steering.entries import Steering, checked_rows
from fgsteer.steering.gating import Readings
from fgsteer.steering.groups import Site, UpdateGroup, check_amounts, group_by_update
from fgsteer.steering.positions import Positions, parse_prompt_lengths
from fgsteer.steering.previews import Previews
from fgsteer.steering.recomputation import Recomputation
from fgsteer.steering.shadows import as_new_function, refuse, refuse_copies, shadow
from fgsteer.steering.watching import watcher_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Link = tuple[nn.Module, str, nn.Module]  # a module, the name of a submodule that it holds, and that submodule

CACHE_ARGUMENTS = ("past_key_values", "cache_params", "state")  # what decoders call the state that a pass goes on from
_THREADED_GENERATION = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def _links(model: nn.Module, modules: Sequence[nn.Module]) -> list[Link]:
    """Every module on the way from the model to these modules, with its holder and the name that it has there."""
    names = {id(module): name for name, module in model.named_modules()}
    links: dict[str, Link] = {}
    for path in (names[id(module)] for module in modules if names.get(id(module))):
        holder = model
        for end, part in enumerate(parts := path.split("."), 1):
            inner = holder._modules[part]
            assert inner is not None  # a path of named_modules
            links[".".join(parts[:end])] = (holder, part, uncompiled(inner))
            holder = inner
    return list(links.values())


class SteeringHooks:
    """The hooks of one ``steer`` block.

    The hooks may run inside a compiled graph. What changes between blocks is then a tensor, and no number that changes
    between passes is read back: either would compile the graph again.

    Args:
        model: The model to steer.
        rows: What steers each row; one row serves every row of a batch.
        prompt_lengths: The columns before each row's first completion token, (batch,), where the caller names them.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[Sequence[SteeringItem]], prompt_lengths: Tensor | None = None
    ) -> None:
        interventions = [[item for item in items if isinstance(item, Intervention)] for items in rows]
        self.model, self.rows, self.groups = model, len(rows), group_by_update(interventions)
        masks = list({id(group.tokens): group.tokens for group in self.groups}.values())
        self.positions = Positions(masks, start_token_finder(model), self.rows, prompt_lengths, pass_key(model))
        self.readings = Readings(self.positions)
        for number, group in enumerate(self.groups):
            group.number, group.watcher = number, watcher_of(self.positions.key)
            group.node, group.source = self.readings.add(group.gate), self.readings.source(group.update.source)
            group.place = None if group.reading is None else self.readings.place(group.reading)
        self.previews = Previews(model, self.readings)
        self.cache_changes = CacheChanges(model, rows, self.positions, self.readings)
        virtual_tokens(model)  # raises for what cannot be placed, before any pass
        self.is_peft = hasattr(model, "active_peft_config")  # PEFT may put virtual tokens before texts
        self.claim = Claim(model)
        self.recomputation = Recomputation(self.positions, self.readings, self.claim)
        self.any_pass = False
        self.handles: list[RemovableHandle] = []
        self.links: list[Link] = []
        self.decoder_arguments = [n for n in inspect.signature(decoder_of(model).forward).parameters if n != "self"]

    def install(self, changes: Changes) -> None:
        """Set every hook, until the changes are undone."""
        if not (self.groups or self.cache_changes):
            return
        self.claim.take(changes)
        self.cache_changes.install(changes)
        decoder = decoder_of(self.model)
        self.handles.append(register(changes, decoder, True, self._begin_pass))
        if self.readings.prompt is not None:
            register(changes, decoder, False, self._end_pass)
        shadow(decoder, "forward", as_new_function(decoder.forward), changes)
        self.recomputation.install(decoder, changes)
        changed = {id(module): module for module in (self.model, decoder)}
        groups_at: dict[Hookpoint, list[UpdateGroup]] = {}
        for group in self.groups:
            groups_at.setdefault(group.hookpoint, []).append(group)
        for hookpoint in dict.fromkeys([*groups_at, *self.readings.hookpoints]):
            groups = groups_at.get(hookpoint, [])
            site = Site(groups, self.readings.places_at(hookpoint), self.readings.sources_at(hookpoint))
            module, is_input = resolve(self.model, hookpoint)
            hook = self._input_hook(site) if is_input else self._output_hook(site)
            # first in line, so that hidden states which others record are the steered ones
            self.handles.append(register(changes, module, is_input, hook, prepend=True))
            shadow(module, "forward", as_new_function(module.forward), changes)
            changed[id(module)] = module
            weight = next(module.parameters(), None)
            if weight is not None and weight.is_floating_point() and not weight.is_meta:
                site.prepare(weight.device, weight.dtype)
        if callable(getattr(self.model, "generate", None)):
            shadow(self.model, "generate", self._noting_prompt(self.model.generate), changes)  # type: ignore[arg-type]
        for name in _THREADED_GENERATION:
            refuse(
                self.model,
                name,
                changes,
                f"{name} on a model that is being steered, which generates in a thread of its own",
                "generation in the thread that steers",
                "call model.generate, or fgsteer.generate with one entry per prompt",
            )
        self.links = _links(self.model, list(changed.values()))
        for module in changed.values():
            refuse_copies(module, changes)

    def _begin_pass(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the decoder is about to run on."""
        if reads_ahead(self.positions.key):
            self.positions.goes_on = False
            return
        self.recomputation.begin()
        arguments = dict(zip(self.decoder_arguments, args, strict=False)) | kwargs if args else kwargs
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        tokens: Tensor = arguments["inputs_embeds"] if ids is None else ids
        if not is_compiling() and self.positions.go_on(tokens, arguments.get("past_key_values"), mask):
            self.readings.go_on()
            return
        self.cache_changes.check_pass()
        if not (is_compiling() or self.positions.generating):
            self.warn_replaced()
        batch = tokens.shape[0]
        if self.rows > 1 and (batch % self.rows if self.positions.generating else batch != self.rows):
            raise SteeringError(
                f"{count(self.rows, 'entry')} for a batch of {count(batch, 'row')}",
                "one entry per row",
                "pass as many entries as rows, with None for a row that is not steered",
            )
        self._refuse_mixed_rows(arguments, batch, tokens.shape[1])
        cache = next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)
        virtual = virtual_tokens(self.model) if self.is_peft else 0
        self.positions.begin_pass(tokens, cache, mask, arguments.get("position_ids"), virtual)
        self.readings.begin_pass(cache)
        self.previews.begin_pass(ids)
        self.any_pass = True

    def _end_pass(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Note the cache that the decoder filled."""
        if not (self.positions.goes_on or self.positions.generating):
            self.readings.end_pass(
                next((c for n in CACHE_ARGUMENTS if (c := getattr(output, n, None)) is not None), None)
            )

    def _refuse_mixed_rows(self, arguments: dict[str, Any], batch: int, length: int) -> None:
        """Raises SteeringError where transformers' RWKV would run several rows from a state, which mixes them."""
        if batch == 1 or "state" not in self.decoder_arguments:
            return
        if (arguments.get("state") is not None and length == 1) or (
            self.positions.generating and arguments.get("use_cache")
        ):
            raise SteeringError(
                f"a batch of {batch} rows that {type(self.model).__name__} decodes from a state",
                "one row, or no state, because transformers mixes the rows of such a batch, steered or not",
                "generate for one prompt at a time, or pass use_cache=False",
            )

    def _apply(self, site: Site, h: Tensor) -> Tensor:
        """Apply what acts at a site to hidden states of any layout."""
        batch, length = self.positions.batch, self.positions.pass_columns
        repeats = 1 if self.rows == 1 else batch // self.rows
        fits = h.shape[:-1] == (batch, length)
        if not is_compiling() and self.positions.goes_on and fits and self.recomputation.is_same_pass():
            return site.go_on(h, repeats)
        if reads_ahead(self.positions.key):
            return h
        self.recomputation.check()  # a pass may have begun before the hooks were set
        if fits:
            return site.apply_to(h, repeats)
        return site.apply_to(reshape_by_token(h, batch, length), repeats).reshape(h.shape)

    def _output_hook(self, site: Site) -> Callable[..., Any]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, Tensor):
                return self._apply(site, output)
            return replace_hidden_states(output, self._apply(site, hidden_states_of(output)))

        return hook

    def _input_hook(self, site: Site) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (self._apply(site, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._apply(site, kwargs["hidden_states"])}

        return hook

    def _noting_prompt(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The model's ``generate``, which notes where the prompt ends before it runs."""

        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if not self._steers_call(kwargs.get("streamer")):
                return original(*args, **kwargs)
            positions = self.positions
            if positions.generating:  # the model drafts for itself: the same rows, the same prompt
                return original(*args, **kwargs)
            self.warn_replaced()
            prompt = self._prompt(args, kwargs)
            self.cache_changes.check_prompt(*prompt)
            virtual = virtual_tokens(self.model)
            try:
                positions.begin_generate(*prompt, virtual)
                return original(*args, **kwargs)
            finally:
                positions.end_generate()

        return generate

    def _steers_call(self, streamer: Any) -> bool:
        """Whether the block steers this call of ``generate``, which someone may have kept beyond the block.

        Raises SteeringError in another thread or task. A streamer is ended first, so that its reader does not wait for
        ever, and the error comes to the thread of the block as well.
        """
        if self.claim.left():
            return False
        try:
            self.claim.check("generate")
        except SteeringError as error:
            if streamer is None:
                raise
            self.claim.failure = SteeringError(
                f"A call of generate with a streamer was refused. {error}",
                change="to read a text as it is generated, call fgsteer.stream(model, tokenizer, prompt, steering=…)",
            )
            streamer.end()
            raise self.claim.failure from error
        return True

    def _prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Tensor | None]:
        """The prompt length of a call of ``generate``, and the mask of real tokens or None. Raises SteeringError."""
        ids = args[0] if args else kwargs.get("inputs")
        ids = kwargs.get("input_ids") if ids is None else ids
        tokens = ids if ids is not None else kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask")
        if tokens is None:
            return 1, None
        if self.rows > 1 and len(tokens) != self.rows:
            raise SteeringError(
                f"{count(self.rows, 'entry')} for {count(len(tokens), 'prompt')}",
                "one entry per prompt",
                "pass as many entries as prompts, with None for a prompt that is not steered",
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
        ends = [] if eos is None else torch.as_tensor(eos, device="cpu").flatten().tolist()
        if pad is None or int(pad) in ends or ids.ndim != 2 or ids.is_floating_point():
            return None
        return ids.ne(pad)

    def warn_replaced(self) -> None:
        """Warn, once, of a hooked module that is no longer the model's, and of a hook that was taken off."""
        replaced = [
            f"{parent}'s {name!r}" if (parent := type(holder).__name__) != "ModuleList" else f"block {name}"
            for holder, name, module in self.links
            if uncompiled(holder._modules.get(name)) is not module
        ]
        if replaced or any(handle.id not in (handle.hooks_dict_ref() or ()) for handle in self.handles):
            self.links, self.handles = [], []
            what = f"{replaced[0]} was replaced" if replaced else "hooks of the block were taken off by other code"
            warn(
                f"{what} inside the steer block, so that what runs there now is not steered, or only in part. "
                "Change the model before the block.",
                UntouchedWarning,
            )

    def warn_untouched(self) -> None:
        """Warn of updates that changed no token or missed positions, if any pass ran on the modules that are hooked."""
        short: list[str] = []
        for group in self.groups if self.any_pass and self.links else ():
            if not group.has_changed_tokens():
                warn(
                    f"An intervention at {group.hookpoint} with scope {group.tokens.scope!r} touched no token. "
                    "Padding is skipped, and so is a start token at position 0 unless bos=True.",
                    UntouchedWarning,
                )
            elif group.met_short_prompts():
                short.append(repr(str(group.tokens.scope)))
        if short:
            scopes = ", ".join(dict.fromkeys(short))
            warn(f"A prompt without all tokens of the scopes {scopes} was steered in part.", UntouchedWarning)


@checked
def steer(
    model: PreTrainedModel,
    steering: Steering,
    *,
    per_row: bool | None = None,
    prompt_lengths: Sequence[int] | Tensor | None = None,
) -> Block[PreTrainedModel]:
    """Steer every forward pass of the model inside the block.

    The prompt is what ``generate`` was given, and in other forward passes what was fed to an empty cache. Under
    ``generate`` entries belong to prompts, and beams or several sequences of a prompt share its entry. Nested blocks on
    one model compose, the inner one acting first. Unsteered rows and tokens keep their activations bit for bit.

    Models may be compiled, before or inside the block; another block that differs in its numbers alone compiles
    nothing. Gradients flow through the block to the model and to values that require grad, with gradient checkpointing
    too.

    The hooks come off whatever ends the block. Ctrl-C during an operator that is the last of it, such as ``a @ b``, is
    raised by Python when the block is over and before it is left: they then come off with the traceback.

    A block belongs to the thread that enters it, and to its asyncio task with those started inside: meanwhile, steer
    blocks and forward passes of others on that model raise SteeringError (not passes that are compiled as a whole), and
    so do ``generate_batch`` and copies of the model. A block that is left before one that was entered inside it comes
    off whole and raises SteeringError, as do the passes that the other still runs. Each call is entered once; as a
    decorator, once for each call of the function.

    Args:
        model: A Hugging Face causal language model.
        steering: One intervention; a list of them, which compose in order; or a list with one entry per batch row,
            each an intervention, a list, or None for an unsteered row. A ``CacheSteering`` may stand for any
            intervention, and acts under ``generate`` alone.
        per_row: Whether a list has one entry per row; by default, whether it holds None or lists.
        prompt_lengths: For passes over prompt and completion at once: for each batch row, how many columns, padding
            included, stand before its first completion token. The tokens are then steered as if the prompt were read
            first and the completion generated.

    Returns:
        A context manager that gives the model, or a decorator of a function.

    Raises:
        HookpointError: The model does not have the hookpoint; raised before anything is hooked, as is PairingError.
        PairingError: An intervention has another width than the model.
        SteeringError: There are other numbers of entries or prompt lengths than rows; prompt lengths are no counts,
            exceed a pass or meet ``generate``; or a strength makes activations of the model's dtype overflow.

    Warns UntouchedWarning when an intervention touched no token, a prompt lacked a position of its scope or a steered
    module was replaced inside the block, and FgsteerWarning of a model in train mode with dropout.
    """
    return Block(lambda changes: _steered(changes, model, steering, per_row, prompt_lengths))


def _steered(
    changes: Changes,
    model: PreTrainedModel,
    steering: Steering,
    per_row: bool | None,
    prompt_lengths: Sequence[int] | Tensor | None,
) -> Iterator[PreTrainedModel]:
    warn_of_dropout(model)
    rows, lengths = checked_rows(model, steering, per_row), parse_prompt_lengths(prompt_lengths)
    if lengths is not None and len(rows) > 1 and len(rows) != len(lengths):
        raise SteeringError(
            f"{len(rows)} entries and {len(lengths)} prompt_lengths",
            "one entry and one prompt length for each row",
            "pass as many of both as the batch has rows",
        )
    block_hooks = SteeringHooks(uncompiled(model), rows, None if lengths is None else lengths.to(input_device(model)))
    check_amounts(model, block_hooks.groups)
    try:
        block_hooks.install(changes)
        yield model
        block_hooks.warn_replaced()
    except GeneratorExit:  # the generator that the block stands in is closed, which is a way to leave it
        changes.undo()
        block_hooks.claim.report()
        raise
    changes.undo()
    block_hooks.claim.report()
    block_hooks.warn_untouched()
