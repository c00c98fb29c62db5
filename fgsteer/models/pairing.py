"""Check whether a vector or an SAE was made for the model that is loaded."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from fgsteer.errors import HookpointError, PairingError, PairingWarning
from fgsteer.errors.checks import warn
from fgsteer.errors.wording import a
from fgsteer.models.hookpoints import Hookpoint, blocks_of, resolve
from fgsteer.models.names import bare_name
from fgsteer.models.properties import d_model
from fgsteer.models.shipped import ShippedModel, find_shipped


def model_identity(model: nn.Module) -> dict[str, Any]:
    """Return what a vector notes of its model: name, revision, type, d_model, layers."""
    config = getattr(model, "config", None)
    return {
        "name": str(getattr(config, "_name_or_path", "") or ""),
        "revision": getattr(config, "_commit_hash", None),
        "type": str(getattr(config, "model_type", type(model).__name__)),
        "d_model": d_model(model),
        "layers": len(blocks_of(model)),
    }


def check_pairing(model: nn.Module, hookpoint: Hookpoint, width: int, made_for: str, what: str) -> None:
    """Refuse a vector, SAE or intervention that cannot belong to the model; warn of one that may not.

    Args:
        model: The model that is loaded.
        hookpoint: Where the vector or SAE belongs.
        width: Its width.
        made_for: The name of the model that it was made for, "" where that is not known.
        what: What it is, for the message, such as "SAE".

    Raises:
        HookpointError: The model lacks the hookpoint.
        PairingError: The model has another width there.

    Warns:
        PairingWarning: It was made for a model of another name; once, where the model is the original of one that
            fgsteer ships SAEs for with packed weights.
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    is_other = bool(made_for and name and bare_name(made_for) != bare_name(name))
    advice = f"load the model that it was made for: fg.load_model({made_for!r})" if is_other else ""
    made = f" made for {made_for}" if made_for else ""
    try:
        needed = width_at(model, hookpoint)
    except HookpointError as error:
        if not is_other:
            raise
        expected = f"a hookpoint that {name} has: {error.expected}"
        raise HookpointError(f"{a(what)}{made} at {hookpoint}", expected, advice) from error
    if width != needed:
        raise PairingError(
            f"{a(what)} of d_model {width}{made}",
            f"d_model {needed}, that of {name or type(model).__name__} at {hookpoint}",
            advice,
        )
    if is_other:
        shipped = find_shipped(made_for)
        if shipped is not None and bare_name(shipped.original) == bare_name(name):
            _warn_of_original(what, shipped, name)
        else:
            warn(f"The {what} was made for {made_for!r} and the model is {name!r}.", PairingWarning)


@cache
def _warn_of_original(what: str, shipped: ShippedModel, name: str) -> None:
    """Warn, once, that something was made with the packed weights of a model, and not with those that are loaded."""
    warn(
        f"The {what} was made for {shipped.model_name!r} ({shipped.description}, on which the shipped SAEs were "
        f"trained), and the model is the original, {name!r}, whose activations differ a little.",
        PairingWarning,
    )


def width_at(model: nn.Module, hookpoint: Hookpoint) -> int:
    """Return the width of the activations at a hookpoint: d_model, or n_heads · d_head at z. Raises HookpointError."""
    module, _ = resolve(model, hookpoint)
    if hookpoint.site != "z":
        return d_model(model)
    width = getattr(module, "in_features", None)  # a Conv1D, as in GPT-2, has none, and weight (in, out)
    return int(module.weight.shape[0] if width is None else width)  # type: ignore[index]
