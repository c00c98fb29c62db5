"""Steering a model: hooks on, whatever happens hooks off.

``steer`` works on the user's own model and under everything that ``generate`` does:
caches of any kind or none, left and right padding, beams, several sequences per
prompt, assisted decoding. While it is active ``model.generate`` is shadowed by a
function that notes where the prompt ends and then calls the original.

    with steer(model, vec.add(8.0)):
        model.generate(**inputs)
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fgsteer.activations import by_token, primary
from fgsteer.data import Text, check_text
from fgsteer.errors import DataError, SteeringError, UntouchedWarning
from fgsteer.hookpoints import Hookpoint, decoder_of, resolve
from fgsteer.interventions import Intervention, Scope, Update, apply, stack
from fgsteer.models import check_pairing, input_device, warn_of_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Entry = Intervention | Sequence[Intervention] | None
Steering = Intervention | Sequence[Entry] | None
Where = Tensor | Literal["every", "none"]


@dataclass
class Group:
    """One update at one hookpoint, the tokens it is for, and whether it has touched any."""

    hookpoint: Hookpoint
    scope: Scope
    bos: bool
    update: Update
    serves: Tensor  # mask (rows,) of the rows it is for
    select: bool  # whether the mask must be applied: the update has one row, for some of several
    touched: bool = False
    counted: Tensor | None = None  # on the device, read once at the end
    placed: dict[tuple[torch.device, int], tuple[Update, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device, repeats: int) -> tuple[Update, Tensor]:
        """The update and row mask on a device, each row repeated."""
        key = (device, repeats)
        if key not in self.placed:
            self.placed[key] = (
                self.update.to(device).rows(repeats),
                self.serves.repeat_interleave(repeats).to(device),
            )
        return self.placed[key]


class Positions:
    """Which tokens the running forward pass holds: prompt or generated, real or padding, position 0.

    Outside ``generate`` the prompt is what was fed to an empty cache. Inside, it is what
    ``generate`` was given, so passes without a cache, chunked prefill and several
    candidate tokens at once are placed right.
    """

    def __init__(self) -> None:
        self.generating = False
        self.prompt_mask: Tensor | None = None  # (rows, prompt tokens), 1 where real
        self.prompt_length: int | None = None
        self.batch = self.start = self.length = 0
        self.mask: Tensor | None = None  # (batch, tokens so far) of this pass
        self.cache: dict[tuple[Scope, bool, torch.device], Where] = {}

    def begin(self, batch: int, length: int, start: int, mask: Tensor | None) -> None:
        """Note a forward pass of ``length`` tokens after ``start`` cached ones."""
        self.batch, self.length, self.start = batch, length, start
        self.cache = {}
        if self.generating:
            given = self.prompt_mask
            self.mask = None if given is None else given.repeat_interleave(max(1, batch // len(given)), 0)
            return
        self.mask = mask
        if start == 0:
            self.prompt_length = length
            self.prompt_mask = mask
        elif self.prompt_length is None or self.prompt_length > start:
            self.prompt_length = start  # the prompt was read before steering began
            self.prompt_mask = None if mask is None else mask[:, :start]

    def where(self, scope: Scope, bos: bool, device: torch.device) -> Where:
        """Mask (batch, length) of the tokens in a scope, or "every" or "none"."""
        key = (scope, bos, device)
        if key not in self.cache:
            self.cache[key] = self._where(scope, bos, device)
        return self.cache[key]

    def _where(self, scope: Scope, bos: bool, device: torch.device) -> Where:
        prompt_length = self.prompt_length or 0
        only_generated = self.start >= max(1, prompt_length)
        if only_generated and scope == "prompt":
            return "none"
        if only_generated and (self.generating or self.mask is None):
            return "every"
        place = torch.arange(self.start, self.start + self.length, device=device)[None]
        real, first, last = self._landmarks(place, prompt_length)
        where = real & ((place >= first) if bos else (place > first))
        if scope == "prompt":
            where &= place < prompt_length
        elif scope == "generated":
            where &= place >= prompt_length
        elif scope == "last_prompt_on":
            where &= place >= last
        return where.expand(self.batch, -1)

    def _landmarks(self, place: Tensor, prompt_length: int) -> tuple[Tensor, Tensor, Tensor]:
        """(which places are real, first real place, last real prompt place), by row."""
        if self.mask is None:
            one = torch.ones_like(place)
            return one.bool(), one * 0, one * (prompt_length - 1)
        mask = self.mask.to(place.device).bool()
        width = mask.shape[1]
        known = mask[:, place[0].clamp(max=width - 1)]
        real = known | (place >= width)
        count = torch.arange(width, device=place.device)
        first = torch.where(mask, count, width).amin(1, keepdim=True)
        prompt = mask & (count < prompt_length)
        last = torch.where(prompt, count, -1).amax(1, keepdim=True)
        return real, first, last


def _plain_mask(mask: Any, total: int) -> Tensor | None:
    """A (batch, total) mask of real tokens from any attention mask that a model accepts."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4:  # a key is real when some query of this pass may see it
        seen = mask if mask.dtype == torch.bool else mask >= 0
        mask = seen.flatten(1, 2).any(1)
    if mask.shape[1] < total:  # covers the new tokens only
        mask = torch.cat([mask.new_ones(mask.shape[0], total - mask.shape[1]), mask], 1)
    plain: Tensor = mask[:, :total]
    return plain


def _entries(steering: Steering, per_row: bool | None) -> list[list[Intervention]]:
    """Interventions per row; one row for a composition that serves every row. Raises SteeringError."""
    if steering is None:
        return [[]]
    if isinstance(steering, Intervention):
        return [[steering]]
    if not isinstance(steering, list | tuple):
        hint = "call .add(coefficient), .affine(alpha) or the like on a vector"
        raise SteeringError(f"steering by {type(steering).__name__}", "interventions", hint)
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
                f"a {type(item).__name__} among interventions",
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
    groups = []
    for (hookpoint, _, scope, bos), column in sorted(table.items(), key=lambda entry: entry[0][:2]):
        for update, numbers in stack(column):
            serves = torch.zeros(len(rows), dtype=torch.bool)
            serves[numbers] = True
            groups.append(Group(hookpoint, scope, bos, update, serves, len(rows) > 1 and len(update.write) == 1))
    return groups


def _is_compiled(module: nn.Module) -> bool:
    """Whether hooks set on the module now would be skipped by a graph compiled before."""
    forward = vars(module).get("forward")
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


class _Session:
    """The hooks of one ``steer`` block."""

    def __init__(self, model: nn.Module, rows: Sequence[Sequence[Intervention]]) -> None:
        self.model, self.rows, self.groups = model, len(rows), _groups(rows)
        self.positions = Positions()
        self.passes = 0
        decoder = decoder_of(model)
        self.names = [n for n in inspect.signature(decoder.forward).parameters if n != "self"]

    def install(self, stack_: ExitStack) -> None:
        """Register every hook; all come off when the stack closes."""
        if not self.groups:
            return
        add = decoder_of(self.model).register_forward_pre_hook(self.observe, with_kwargs=True)
        stack_.callback(add.remove)
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
            stack_.callback(handle.remove)
        if "generate" not in vars(self.model) and callable(getattr(self.model, "generate", None)):
            self.model.generate = self._generate(self.model.generate)  # type: ignore[assignment, arg-type]
            stack_.callback(delattr, self.model, "generate")
        elif "generate" in vars(self.model):
            original: Any = self.model.generate
            self.model.generate = self._generate(original)  # type: ignore[assignment]
            stack_.callback(setattr, self.model, "generate", original)

    def observe(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the decoder is about to run on."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        ids = given.get("input_ids")
        tokens: Tensor = given["inputs_embeds"] if ids is None else ids
        batch, length = tokens.shape[:2]
        past = given.get("past_key_values")
        start = int(past.get_seq_length()) if past is not None else 0
        generating = self.positions.generating
        if self.rows > 1 and (batch % self.rows if generating else batch != self.rows):
            raise SteeringError(
                f"{self.rows} entries for a batch of {batch} rows", "one entry per row", "pass as many entries as rows"
            )
        mask = None if generating else _plain_mask(given.get("attention_mask"), start + length)
        self.positions.begin(batch, length, start, mask)
        self.passes += 1

    def act(self, groups: Sequence[Group], h: Tensor) -> Tensor:
        """Apply the groups in order to hidden states of any layout."""
        positions = self.positions
        shape = h.shape
        h = by_token(h, positions.batch, positions.length)
        repeats = 1 if self.rows == 1 else positions.batch // self.rows
        for group in groups:
            where = positions.where(group.scope, group.bos, h.device)
            if isinstance(where, str) and where == "none":
                continue
            update, serves = group.on(h.device, repeats)
            if group.select:
                rows = serves[:, None].expand(-1, positions.length)
                where = rows if isinstance(where, str) else where & rows
            if isinstance(where, Tensor):
                touched = (where & serves[:, None]).any()
                group.counted = touched if group.counted is None else group.counted | touched.to(group.counted.device)
                h = apply(h, update, where)
            else:
                group.touched = True
                h = apply(h, update)
        return h.reshape(shape)

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
            positions = self.positions
            if positions.generating:  # the model drafts for itself: the same rows, the same prompt
                return original(*args, **kwargs)
            positions.prompt_length, positions.prompt_mask = self._prompt(args, kwargs)
            positions.generating = True
            if next(self.model.parameters()).device.type != "cpu":
                kwargs.setdefault("disable_compile", True)  # a compiled graph would skip hooks set after it
            try:
                return original(*args, **kwargs)
            finally:
                positions.generating = False
                positions.prompt_length = positions.prompt_mask = None

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
        for group in self.groups if self.passes else ():
            if not (group.touched or (group.counted is not None and bool(group.counted))):
                warnings.warn(
                    f"an intervention at {group.hookpoint} with scope {group.scope!r} touched no token in "
                    f"{self.passes} forward pass(es); padding is skipped, and position 0 unless bos=True",
                    UntouchedWarning,
                    stacklevel=4,
                )


@contextmanager
def steer(model: PreTrainedModel, steering: Steering, *, per_row: bool | None = None) -> Iterator[PreTrainedModel]:
    """Steer every forward pass of the model inside the block; hooks always come off.

    ``steering`` is one intervention, a list of them (composed in order), or one entry per
    batch row, each an intervention, a list, or None for an unsteered row. A list that holds
    None or lists is read by row; ``per_row`` says it outright. Under ``generate`` entries
    belong to prompts, and beams or several sequences of a prompt share its entry.

    Nested blocks on one model compose, the inner one acting first. Unsteered rows and
    tokens keep their activations bit for bit. ``HookpointError`` and ``PairingError`` are
    raised before anything is hooked; ``SteeringError`` for a compiled model or another
    number of rows than entries. Warns UntouchedWarning when an intervention touched no token,
    FgsteerWarning of a model in train mode with dropout.
    """
    warn_of_dropout(model)
    rows = _entries(steering, per_row)
    if any(_is_compiled(module) for module in model.modules()):
        raise SteeringError(
            "a compiled model", "the plain one: hooks set after compilation are skipped", "steer model._orig_mod"
        )
    for item in {id(i): i for items in rows for i in items}.values():
        check_pairing(model, item.hookpoint, item.d_model, item.model_name, type(item).__name__)
    session = _Session(model, rows)
    with ExitStack() as hooks:
        session.install(hooks)
        yield model
    session.warn_untouched()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[Text],
    *,
    steering: Steering = None,
    **options: Any,
) -> list[str]:
    """Continuations of the prompts, without the prompts, in their order.

    ``steering``: one intervention for all prompts, or a list with one entry per prompt
    (an intervention, a list to compose, or None). Prompts are strings or chat messages;
    other keywords go to ``model.generate``. With ``num_return_sequences = n`` the n
    continuations of a prompt stand together. Raises DataError for prompts that are neither,
    SteeringError for another number of entries than prompts.
    """
    given: list[Text] = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        return []
    chat = [not isinstance(prompt, str) for prompt in given]
    if any(chat) and not all(chat):
        raise DataError("strings and chat messages among the prompts", "all of one kind")
    for number, prompt in enumerate(given):
        check_text(prompt, f"prompt {number}", empty=True)
    listed = isinstance(steering, list | tuple)
    if isinstance(steering, list | tuple) and len(steering) != len(given):
        raise SteeringError(
            f"{len(steering)} steering entries for {len(given)} prompts",
            "one entry per prompt",
            "wrap interventions that compose in a list of their own: [[a, b], None, …]",
        )
    texts: list[Any] = given
    if any(chat):
        texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in given]
    if tokenizer.pad_token_id is None and len(texts) > 1:
        raise DataError(
            "a tokenizer without a pad token", "one that can pad", "set tokenizer.pad_token = tokenizer.eos_token"
        )
    inputs = tokenizer(
        texts,
        return_tensors="pt",
        padding=len(texts) > 1,
        padding_side="left",
        add_special_tokens=not any(chat),
        return_token_type_ids=False,
    ).to(input_device(model))
    if tokenizer.pad_token_id is not None:
        options.setdefault("pad_token_id", tokenizer.pad_token_id)
    with steer(model, steering, per_row=listed):
        output = model.generate(**inputs, **options)
    ids = output if isinstance(output, Tensor) else output.sequences
    return list(tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
