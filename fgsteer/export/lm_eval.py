"""Files for the ``steered`` model of lm-evaluation-harness.

    write([vec.add(8.0, bos=True)], "love.pt", model)
    lm_eval --model steered --model_args pretrained=…,steer_path=love.pt --tasks …

lm-eval unpickles such files, so trust where they come from. What they cannot say, ``fgsteer eval`` can.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgsteer.errors import FormatError, SteeringError
from fgsteer.export.places import Interventions, called, checked, every_token
from fgsteer.interventions import Ablate, Add, Affine, Clamp, Intervention
from fgsteer.models.hookpoints import Hookpoint, resolve
from fgsteer.models.pairing import check_pairing
from fgsteer.storage.atomic import atomic_write

ENGINE = "lm-eval's steered model"


def write(interventions: Interventions, path: str | Path, model: nn.Module) -> None:
    """Write {module: operation}, by the names that modules have in ``model.base_model``.

    Add is ``add``; Clamp, Ablate and Affine are ``clamp`` of the projection of ``h − bias`` to t, 0 and
    ``α‖r‖`` (bias: none, none and ``r⁻``). Tested with lm-eval 0.4.13. Raises SteeringError for ClampFeature,
    a scope, a spared position 0, a site that is no module's output, and two operations at one;
    HookpointError, PairingError for another model's; FormatError for a file not named .pt or .pth.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        raise FormatError(f"a file named {Path(path).name}", "one named .pt or .pth: lm-eval goes by the name")
    config: dict[str, dict[str, Any]] = {}
    for item in checked(interventions):
        check_pairing(model, item.hookpoint, item.d_model, item.model_name, type(item).__name__)
        every_token(item, ENGINE)
        name = _module_name(item, model)
        if name in config:
            raise SteeringError(
                f"two operations at {name}",
                f"one: {ENGINE} keeps one for each module",
                "add vectors up first, a + b, or run fgsteer eval, which steers with hooks",
            )
        config[name] = {"head_index": None, **_operation(item)}
    buffer = io.BytesIO()
    torch.save(config, buffer)  # into a file it fails in words of its own where the disk is full
    with atomic_write(path) as beside:
        beside.write_bytes(buffer.getvalue())


def _module_name(item: Intervention, model: nn.Module) -> str:
    """The module whose output is acted on, within ``model.base_model``. Raises SteeringError."""
    hookpoint = item.hookpoint
    if hookpoint.site == "resid_pre" and hookpoint.layer > 0:
        hookpoint = Hookpoint(hookpoint.layer - 1)
    module, is_input = resolve(model, hookpoint)
    base: nn.Module = model.base_model  # type: ignore[assignment]
    names: list[str] = [name for name, other in base.named_modules() if other is module]
    if is_input or not names:
        raise SteeringError(
            f"{called(item)} at {hookpoint}",
            f"one at the output of a module of model.base_model: {ENGINE} acts on nothing else",
            "run fgsteer eval, which steers with hooks",
        )
    return names[0]


def _operation(item: Intervention) -> dict[str, Any]:
    """An intervention in lm-eval's words. Raises SteeringError for one that it has no words for."""
    if isinstance(item, Add):
        return _entry("add", item.direction, float(item.coefficient))
    if isinstance(item, Ablate):
        return _entry("clamp", item.direction, 0.0)
    if isinstance(item, Clamp):
        return _entry("clamp", item.direction, float(item.target))
    if isinstance(item, Affine):
        return _entry("clamp", item.direction, float(item.alpha) * float(item.direction.norm()), item.reference)
    raise SteeringError(
        called(item), f"an Add, Ablate, Clamp or Affine: {ENGINE} reads no SAE", "run fgsteer eval, which does"
    )


def _entry(action: str, direction: Tensor, coefficient: float, bias: Tensor | None = None) -> dict[str, Any]:
    return {
        "action": action,
        "steering_vector": direction.cpu().clone(),
        "steering_coefficient": coefficient,
        "bias": None if bias is None else bias.cpu().clone(),
    }
