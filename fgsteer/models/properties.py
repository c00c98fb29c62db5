"""Properties of a model: its width, its window, its device, its special and virtual tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fgsteer.errors import DataError, FgsteerWarning, HookpointError
from fgsteer.errors.checks import warn
from fgsteer.models.hookpoints import decoder_of

LEARNED_POSITIONS = ("wpe", "positions_embed", "embed_positions", "position_embeddings")


def d_model(model: nn.Module) -> int:
    """Return the width of the residual stream."""
    return int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]


def context_window(model: nn.Module) -> int | None:
    """Return the most tokens of a text that the model was made for, None where its config sets no limit."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    window = getattr(config, "max_position_embeddings", None)
    return window - virtual_tokens(model) if isinstance(window, int) and window > 0 else None


def check_window(model: nn.Module, tokens: int, what: str) -> None:
    """Raise DataError for more tokens than a model with learned positions has; others run beyond their window."""
    window = context_window(model)
    if window is None or tokens <= window:
        return
    decoder = decoder_of(model)
    if any(isinstance(getattr(decoder, name, None), nn.Embedding) for name in LEARNED_POSITIONS):
        raise DataError(
            f"{what} of {tokens} tokens",
            f"at most {window} tokens, as many as the model has positions",
            "shorten the text, or pass max_tokens= where the function takes it",
        )


def input_device(model: nn.Module) -> torch.device:
    """Return the device that token ids go to: that of the input embedding, wherever the blocks are."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    if weight.device.type != "meta":
        return torch.device(weight.device)
    devices = [p.device for p in model.parameters() if p.device.type != "meta"]
    return devices[0] if devices else torch.device("cpu")


def start_ids(model: nn.Module) -> frozenset[int]:
    """Return the ids of tokens that may stand before a text: BOS and EOS of the model's and its generation config."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    return bos_eos_ids(config, text, getattr(model, "generation_config", None))


def eos_ids(model: nn.Module) -> frozenset[int]:
    """Return the ids of tokens at which generation stops: EOS of the model's generation config, or of its own."""
    generation = special_ids(("eos_token_id",), getattr(model, "generation_config", None))
    return generation or special_ids(("eos_token_id",), getattr(model, "config", None))


def bos_eos_ids(*configs: Any) -> frozenset[int]:
    """Return the ids of BOS and EOS that any of these configs, objects or dicts, names."""
    return special_ids(("bos_token_id", "eos_token_id"), *configs)


def special_ids(names: tuple[str, ...], *configs: Any) -> frozenset[int]:
    """Return the ids that any of these configs, objects or dicts, has under any of the names."""
    ids: list[Any] = []
    for config in configs:
        for name in names:
            value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
            value = value.flatten().tolist() if isinstance(value, torch.Tensor) else value
            ids.extend(value if isinstance(value, list | tuple) else [value])
    return frozenset(i for i in ids if isinstance(i, int))


def start_token_finder(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that finds start tokens among ids (batch, tokens) or embeddings (batch, tokens, width).

    It returns a mask (batch, tokens). An embedding is a start token's where it equals that token's row of the
    model's input embedding.
    """
    ids = torch.tensor(sorted(start_ids(model)), dtype=torch.long, device=input_device(model))
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    @torch.no_grad()
    def is_start(tokens: torch.Tensor) -> torch.Tensor:
        if not tokens.is_floating_point():
            return (tokens[..., None] == ids.to(tokens.device)).any(-1)
        known = ids[(ids >= 0) & (ids < len(embedding.weight))]  # type: ignore[arg-type]
        rows: torch.Tensor = embedding(known).to(tokens.device)
        return (tokens[..., None, :] == rows).all(-1).any(-1)

    return is_start


def virtual_tokens(model: nn.Module) -> int:
    """Count the tokens that a model with prompt, p- or prefix tuning (PEFT) puts before every text; 0 for others.

    Raises HookpointError for prompt learning that differs by task.
    """
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False) or getattr(model, "_adapters_disabled", False):
        return 0
    kind = str(getattr(config.peft_type, "value", config.peft_type))  # type: ignore[union-attr]
    if kind == "MULTITASK_PROMPT_TUNING":
        raise HookpointError(
            f"a model with {kind}, whose virtual tokens differ by task",
            "a model with PROMPT_TUNING, P_TUNING or PREFIX_TUNING",
            "train or convert the prompt of the one task as PROMPT_TUNING",
        )
    return int(config.num_virtual_tokens)  # type: ignore[union-attr]


def warn_of_dropout(model: nn.Module) -> None:
    """Warn FgsteerWarning of a model in train mode whose dropout is not zero: its activations are random."""
    if not model.training:
        return
    config = getattr(model, "config", None)
    settings = config.get_text_config().to_dict() if config is not None else {}
    active = re.compile(r"(?!classifier|summary).*(?:drop|jitter)")  # but no rate of a head that language models lack
    rates = [rate for name, rate in settings.items() if active.match(name) and isinstance(rate, float)]
    if any(rates) or any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        message = "The model is in train mode and drops activations at random. Call model.eval() first."
        warn(message, FgsteerWarning)
