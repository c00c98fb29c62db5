"""Which model a vector or an SAE was made for, and whether it fits the one that is loaded."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fgsteer.errors import (
    HookpointError,
    PairingError,
    PairingWarning,
)
from fgsteer.errors.checks import warn
from fgsteer.errors.wording import a
from fgsteer.models.hookpoints import Hookpoint, blocks_of, resolve
from fgsteer.models.properties import d_model


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What a vector remembers of its model: name, revision, type, d_model, layers."""
    config = getattr(model, "config", None)
    return {
        "name": str(getattr(config, "_name_or_path", "") or ""),
        "revision": getattr(config, "_commit_hash", None),
        "type": str(getattr(config, "model_type", type(model).__name__)),
        "d_model": d_model(model),
        "layers": len(blocks_of(model)),
    }


def check_pairing(model: nn.Module, hookpoint: Hookpoint, width: int, made_for: str, what: str) -> None:
    """Refuse a vector, SAE or intervention that cannot belong to the model; warn by name of one that may not.

    Raises HookpointError for a place the model lacks, PairingError for another d_model;
    warns PairingWarning when it was made for a model of another name.
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    another = bool(made_for and name and bare_name(made_for) != bare_name(name))
    advice = f"load the model that it was made for: fg.load_model({made_for!r})" if another else ""
    made = f" made for {made_for}" if made_for else ""
    try:
        needed = width_at(model, hookpoint)
    except HookpointError as error:
        if not another:
            raise
        loaded = f"a place in the model that is loaded, {name}: {error.expected}"
        raise HookpointError(f"{a(what)}{made} at {hookpoint}", loaded, advice) from error
    if width != needed:
        raise PairingError(
            f"{a(what)} of d_model {width}{made}",
            f"{needed}, the width of {name or type(model).__name__} at {hookpoint}",
            advice,
        )
    if another:
        warn(f"the {what} was made for {made_for!r} and the model is {name!r}", PairingWarning)


def width_at(model: nn.Module, hookpoint: Hookpoint) -> int:
    """Width of the activations at a hookpoint: d_model, or n_heads · d_head at z. Raises HookpointError."""
    module, _ = resolve(model, hookpoint)
    if hookpoint.site != "z":
        return d_model(model)
    width = getattr(module, "in_features", None)  # a Conv1D, as in GPT-2, has none, and weight (in, out)
    return int(module.weight.shape[0] if width is None else width)  # type: ignore[index]


_ALIASES = {"gpt2-small": "gpt2", "mistral-7b": "mistral-7b-v0.1"}  # TransformerLens's names


_SNAPSHOT = re.compile(r"models--[^/]*?--([^/]+)/snapshots/[^/]+")  # a folder of the Hugging Face cache


def bare_name(model: str) -> str:
    """A model's name without organisation, folder or snapshot, in lower case: one for all its spellings."""
    name = _SNAPSHOT.sub(r"\1", model.replace("\\", "/").rstrip("/")).rsplit("/", 1)[-1].lower()
    return _ALIASES.get(name, name).removeprefix("meta-")
