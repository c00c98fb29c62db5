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
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fgsteer.activations import by_token, ends_key, primary
from fgsteer.chat import Text
from fgsteer.checks import checked, shown
from fgsteer.data import check_text
from fgsteer.errors import DataError, SteeringError, UntouchedWarning
from fgsteer.hookpoints import Hookpoint, decoder_of, resolve, uncompiled
from fgsteer.interventions import Intervention, Scope, Update, apply, stack
from fgsteer.models import (
    check_pairing,
    context_window,
    input_device,
    start_marker,
    virtual_tokens,
    warn_of_dropout,
)
from fgsteer.positions import Place, Positions, column_counts
from fgsteer.threads import check_thread, claim
from fgsteer.tokens import encode_prompts
from fgsteer.wording import a, count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Entry = Intervention | Sequence[Intervention] | None
Steering = Intervention | Sequence[Entry] | None

CACHES = ("past_key_values", "cache_params", "state")  # what decoders call the state that a pass goes on from


@dataclass(eq=False)
class Group:
    """One update at one hookpoint, the tokens it is for, and whether any pass came by."""

    hookpoint: Hookpoint
    place: Place
    update: Update
    serves: Tensor  # mask (rows,) of the rows it is for
    select: bool  # whether the mask must be applied: the update has one row, for some of several
    reached: bool = False
    key: tuple[torch.device, torch.dtype, int] | None = None  # what it was made ready for
    ready: tuple[Update, Tensor] | None = None

    def act(self, h: Float[Tensor, "batch tokens d_model"], repeats: int) -> Tensor:
        """The updated hidden states; h itself where the pass holds none of the tokens."""
        if self.place.empty:
            return h
        self.reached = True
        update, serves = self.prepare(h.device, h.dtype, repeats)
        where = self.place.mask
        if where is not None:
            where = where.to(h.device)
        if self.select:
            rows = serves[:, None]
            where = rows.expand(h.shape[:2]) if where is None else where & rows
        return apply(h, update, where)

    def prepare(self, device: torch.device, dtype: torch.dtype, repeats: int = 1) -> tuple[Update, Tensor]:
        """The update and row mask for hidden states of a dtype on a device, each row repeated."""
        key = (device, dtype, repeats)
        if self.ready is None or self.key != key:
            serves = self.serves.repeat_interleave(repeats).to(device)
            self.key, self.ready = key, (self.update.prepare(device, dtype, repeats), serves)
        return self.ready

    def touched(self) -> bool:
        """Whether it has changed any token. Waits for the device."""
        met = self.place.met
        return self.reached and (met if isinstance(met, bool) else bool((met.cpu() & self.serves).any()))


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
        return [_interventions(steering)]
    return [_interventions(entry) for entry in steering]


def _interventions(entry: Any) -> list[Intervention]:
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


def _groups(rows: Sequence[Sequence[Intervention]]) -> list[Group]:
    """Updates in order of application: the n-th intervention of every row at a hookpoint together."""
    table: dict[tuple[Hookpoint, int, Scope, bool], list[Intervention | None]] = {}
    for number, items in enumerate(rows):
        depth: dict[Hookpoint, int] = {}
        for item in items:
            turn = depth.get(item.hookpoint, 0)
            depth[item.hookpoint] = turn + 1
            key = (item.hookpoint, turn, item.scope, item.bos)
            table.setdefault(key, [None] * len(rows))[number] = item
    places: dict[tuple[Scope, bool], Place] = {}
    groups = []
    for (hookpoint, _, scope, bos), column in sorted(table.items(), key=lambda entry: entry[0][:2]):
        place = places.setdefault((scope, bos), Place(scope, bos))
        for update, numbers in stack(column):
            serves = torch.zeros(len(rows), dtype=torch.bool)
            serves[numbers] = True
            groups.append(Group(hookpoint, place, update, serves, len(rows) > 1 and len(update.write) == 1))
    return groups


def _shadow(module: nn.Module, name: str, value: Callable[..., Any], hooks: ExitStack) -> None:
    """Set a function on the module itself until the stack closes."""
    own = vars(module).get(name)
    setattr(module, name, value)
    hooks.callback(delattr, module, name) if own is None else hooks.callback(setattr, module, name, own)


def _renewed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function under another name: compiled graphs do not watch for new hooks, but for another forward."""

    @wraps(forward)
    def steered(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return steered


def _check_range(model: nn.Module, groups: Sequence[Group]) -> None:
    """Refuse a set amount that a float16 model cannot hold. Raises SteeringError."""
    if getattr(model, "dtype", None) != torch.float16:
        return
    largest = torch.finfo(torch.float16).max
    for group in groups:
        amount = float((group.update.const.float()[..., None] * group.update.write.float()).abs().amax())
        if amount > largest:
            raise SteeringError(
                f"a change of {amount:.3g} at {group.hookpoint}",
                f"at most {largest:g}, what float16 holds",
                "a smaller coefficient, or the model in bfloat16 or float32",
            )


class _Session:
    """The hooks of one ``steer`` block.

    The hooks may run inside a compiled graph. What changes between blocks is then a tensor, and no
    number that changes between passes is read back: either would compile the graph again.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[Sequence[Intervention]], prompt_lengths: Tensor | None = None
    ) -> None:
        self.model, self.rows, self.groups = model, len(rows), _groups(rows)
        places = list({id(g.place): g.place for g in self.groups}.values())
        self.positions = Positions(places, start_marker(model), self.rows, prompt_lengths, ends_key(model))
        virtual_tokens(model)  # raises for what cannot be placed, before any pass
        self.learned = hasattr(model, "active_peft_config")  # PEFT's, which may put virtual tokens before texts
        self.ran = False
        self.thread = threading.get_ident()
        self.names = [n for n in inspect.signature(decoder_of(model).forward).parameters if n != "self"]

    def __deepcopy__(self, _: dict[int, Any]) -> Any:
        raise SteeringError("a copy of a model that is being steered", "one made before or after the block")

    def install(self, hooks: ExitStack) -> None:
        """Register every hook; all come off when the stack closes."""
        if not self.groups:
            return
        hooks.enter_context(claim(self.model))
        decoder = decoder_of(self.model)
        hooks.callback(decoder.register_forward_pre_hook(self.observe, with_kwargs=True).remove)
        _shadow(decoder, "forward", _renewed(decoder.forward), hooks)
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
            _shadow(module, "forward", _renewed(module.forward), hooks)
            weight = next(module.parameters(), None)
            if weight is not None and weight.is_floating_point() and not weight.is_meta:
                for group in groups:  # before any pass, so that no graph holds it
                    group.prepare(weight.device, weight.dtype)
        if callable(getattr(self.model, "generate", None)):
            _shadow(self.model, "generate", self._generate(self.model.generate), hooks)  # type: ignore[arg-type]

    def observe(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the decoder is about to run on."""
        check_thread(self.thread)
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
        check_thread(self.thread)  # a pass may have begun before the hooks were set
        batch, length = self.positions.batch, self.positions.length
        repeats = 1 if self.rows == 1 else batch // self.rows
        changed = h if h.shape[:-1] == (batch, length) else by_token(h, batch, length)
        for group in groups:
            changed = group.act(changed, repeats)
        return changed if changed.shape == h.shape else changed.reshape(h.shape)

    def _output_hook(self, groups: Sequence[Group]) -> Callable[..., Any]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            changed = self.act(groups, primary(output))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def _input_hook(self, groups: Sequence[Group]) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (self.act(groups, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self.act(groups, kwargs["hidden_states"])}

        return hook

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``generate`` that notes where the prompt ends."""

        def generate(*args: Any, **kwargs: Any) -> Any:
            check_thread(self.thread)
            positions = self.positions
            if positions.generating:  # the model drafts for itself: the same rows, the same prompt
                return original(*args, **kwargs)
            positions.generate(*self._prompt(args, kwargs), virtual_tokens(self.model))
            try:
                return original(*args, **kwargs)
            finally:
                positions.finish()

        return generate

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

    def warn_untouched(self) -> None:
        """Warn of every update that touched no token, if anything ran."""
        for group in self.groups if self.ran else ():
            if not group.touched():
                warnings.warn(
                    f"an intervention at {group.hookpoint} with scope {group.place.scope!r} touched no token; "
                    "padding is skipped, and a start token at position 0 unless bos=True",
                    UntouchedWarning,
                    stacklevel=4,
                )


@checked
@contextmanager
def steer(
    model: PreTrainedModel,
    steering: Steering,
    *,
    per_row: bool | None = None,
    prompt_lengths: Sequence[int] | Tensor | None = None,
) -> Iterator[PreTrainedModel]:
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
    block; another block that differs in its numbers alone compiles nothing. One thread steers a
    model at a time: while it does, other threads' steer blocks and forward passes on that model
    raise SteeringError (not passes that are compiled as a whole). No copies are made of a steered model.

    ``HookpointError`` and ``PairingError`` are raised before anything is hooked;
    ``SteeringError`` for another number of rows than entries or prompt lengths, for prompt lengths that
    are no counts, exceed a pass or meet ``generate``, or, on a float16 model, c·v beyond
    65504 (a sum h + c·v beyond it still becomes inf). Warns UntouchedWarning when an intervention
    touched no token, FgsteerWarning of a model in train mode with dropout.
    """
    warn_of_dropout(model)
    rows, lengths = _entries(steering, per_row), column_counts(prompt_lengths)
    if lengths is not None and len(rows) > 1 and len(rows) != len(lengths):
        raise SteeringError(f"{len(rows)} entries and {len(lengths)} prompt_lengths", "one of each per row")
    for item in {id(i): i for items in rows for i in items}.values():
        check_pairing(model, item.hookpoint, item.d_model, item.model_name, type(item).__name__)
    session = _Session(uncompiled(model), rows, None if lengths is None else lengths.to(input_device(model)))
    _check_range(model, session.groups)
    with ExitStack() as hooks:
        session.install(hooks)
        yield model
    session.warn_untouched()


@checked
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[Text],
    *,
    steering: Steering = None,
    per_row: bool | None = None,
    **options: Any,
) -> list[str]:
    """Continuations of the prompts, without the prompts, in their order.

    ``steering`` means what it means to ``steer``: one intervention, a list of them that compose on every
    prompt, or, where a list holds None or lists, one entry per prompt (an intervention, a list to
    compose, or None). ``per_row`` says outright which; a list of as many interventions as prompts
    could be either and needs it. Prompts are strings or conversations, of which the assistant's last message is
    continued; other keywords go to ``model.generate``. With ``num_return_sequences = n`` the n
    continuations of a prompt stand together. BOS stands before a prompt once, also where its text brings it.
    Raises ArgumentError for a model or tokenizer of another type, DataError for prompts that are neither,
    empty ones without a BOS and ones beyond the model's window, SteeringError for another number of entries
    than prompts.
    """
    given = _prompts(prompts)
    if not given:
        return []
    per_row = _by_prompt(steering, len(given), per_row)
    inputs = _inputs(model, tokenizer, given)
    if tokenizer.pad_token_id is not None:
        options.setdefault("pad_token_id", tokenizer.pad_token_id)
    with steer(model, steering, per_row=per_row):
        output = model.generate(**inputs, **options)
    ids = output if isinstance(output, Tensor) else output.sequences
    return list(tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]
) -> dict[str, Int[Tensor, "prompts tokens"]]:
    """What ``model.generate`` takes, on the model's device. Raises DataError for a prompt beyond the window."""
    ids, mask = encode_prompts(tokenizer, prompts)
    window = context_window(model)
    if window is not None and ids.shape[1] > window:
        number = int(mask.sum(1).argmax())
        raise DataError(
            f"prompt {number} has {int(mask[number].sum())} tokens",
            f"at most {window}, the model's window",
            "shorten it, or drop its beginning yourself",
        )
    device = input_device(model)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _prompts(prompts: str | Sequence[Text]) -> list[Text]:
    """The prompts, all of them strings or all conversations. Raises DataError."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise DataError(f"prompts is {shown(prompts)}", "a text, or a list of texts or of conversations")
    given = [check_text(prompt, f"prompt {number}", empty=True) for number, prompt in enumerate(prompts)]
    if len({isinstance(prompt, str) for prompt in given}) > 1:
        raise DataError("strings and chat messages among the prompts", "all of one kind")
    return given


def _by_prompt(steering: Steering, prompts: int, per_row: bool | None) -> bool | None:
    """Whether a list of steering has an entry for each prompt; as ``steer`` reads it. Raises SteeringError."""
    if not isinstance(steering, list | tuple):
        return None
    flat = all(isinstance(entry, Intervention) for entry in steering)
    if per_row is None and flat and len(steering) == prompts > 1:
        raise SteeringError(
            f"a list of {len(steering)} interventions for {prompts} prompts",
            "a list that says whether every prompt gets all of them or one each",
            "pass per_row=False to apply all of them to every prompt, per_row=True for one a prompt",
        )
    by_prompt = not flat if per_row is None else per_row
    if by_prompt and len(steering) != prompts:
        raise SteeringError(
            f"{count(len(steering), 'steering entry')} for {count(prompts, 'prompt')}",
            "one entry per prompt",
            "wrap interventions that compose in a list of their own: [[a, b], None, …]",
        )
    return by_prompt
