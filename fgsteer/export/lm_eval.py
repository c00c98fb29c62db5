"""Files for the steered model of lm-evaluation-harness.

    write([vec.add(8.0, bos=True)], "love.pt", model)
    lm_eval --model steered --model_args pretrained=…,steer_path=love.pt --tasks …

lm-eval unpickles such files, so use only files whose origin you trust. What they cannot express, ``fgsteer eval`` can.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgsteer.errors import FormatError, SteeringError
from fgsteer.export.requirements import Interventions, every_token, kind_of, listed
from fgsteer.export.table import ExportInputs
from fgsteer.interventions import Ablate, Add, Affine, Clamp, Intervention
from fgsteer.models.hookpoints import Hookpoint, resolve
from fgsteer.models.pairing import check_pairing
from fgsteer.storage.atomic import atomic_write

ENGINE = "lm-eval's steered model"


def write(interventions: Interventions, path: str | Path, model: nn.Module) -> None:
    """Write {module: operation}, by the names that modules have in ``model.base_model``.

    Add becomes ``add``; Clamp, Ablate and Affine become ``clamp`` of the projection of ``h − bias`` to t, 0 and
    ``α‖r‖`` (with the bias ``r⁻`` for Affine, none for the others). Tested with lm-eval 0.4.13.

    Args:
        interventions: Interventions on every token, at most one at each module.
        path: The file, named .pt or .pth.
        model: The model that is steered.

    Raises:
        SteeringError: An intervention is a ClampFeature, has a scope, leaves position 0 alone, acts elsewhere than on
            the output of a module, or is the second at its module.
        HookpointError: The model has no such hookpoint.
        PairingError: An intervention is made for another model.
        FormatError: The file has another name, or cannot be written.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        raise FormatError(
            f"the name {Path(path).name}",
            "a name that ends in .pt or .pth",
            "lm-eval tells such files by their names: choose another name",
        )
    config: dict[str, dict[str, Any]] = {}
    for item in listed(interventions):
        check_pairing(model, item.hookpoint, item.d_model, item.model_name, type(item).__name__)
        every_token(item, ENGINE)
        name = _module_name(item, model)
        if name in config:
            raise SteeringError(
                f"two operations at the module {name}",
                f"one operation at each module, which is all that {ENGINE} keeps",
                "add the vectors up first (a + b), or run fgsteer eval, which steers with hooks",
            )
        config[name] = {"head_index": None, **_operation(item)}
    buffer = io.BytesIO()
    torch.save(config, buffer)  # in memory first: torch words a full disk in its own way
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def export(interventions: Sequence[Intervention], path: Path, inputs: ExportInputs) -> list[Path]:
    """The exporter of the table of exports."""
    model, _ = inputs.load_model()
    write(interventions, path, model)
    return [path]


def _module_name(item: Intervention, model: nn.Module) -> str:
    """The name in ``model.base_model`` of the module whose output is acted on. Raises SteeringError."""
    hookpoint = item.hookpoint
    if hookpoint.site == "resid_pre" and hookpoint.layer > 0:
        hookpoint = Hookpoint(hookpoint.layer - 1)
    module, is_input = resolve(model, hookpoint)
    base: nn.Module = model.base_model  # type: ignore[assignment]
    names: list[str] = [name for name, other in base.named_modules() if other is module]
    if is_input or not names:
        raise SteeringError(
            f"{kind_of(item)} at {hookpoint}",
            f"an intervention on the output of a module of model.base_model, which is all that {ENGINE} acts on",
            "run fgsteer eval instead, which steers with hooks",
        )
    return names[0]


def _operation(item: Intervention) -> dict[str, Any]:
    """An intervention as lm-eval has it. Raises SteeringError for one that lm-eval does not have."""
    if isinstance(item, Add):
        return _entry("add", item.direction, float(item.coefficient))
    if isinstance(item, Ablate):
        return _entry("clamp", item.direction, 0.0)
    if isinstance(item, Clamp) and item.target is not None:
        return _entry("clamp", item.direction, float(item.target))
    if isinstance(item, Affine):
        return _entry("clamp", item.direction, float(item.alpha) * float(item.direction.norm()), item.reference)
    raise SteeringError(
        kind_of(item),
        "an Add, an Ablate, a Clamp to a target or an Affine",
        f"run fgsteer eval instead, which does what {ENGINE} does not",
    )


def _entry(action: str, direction: Tensor, coefficient: float, bias: Tensor | None = None) -> dict[str, Any]:
    return {
        "action": action,
        "steering_vector": direction.cpu().clone(),
        "steering_coefficient": coefficient,
        "bias": None if bias is None else bias.cpu().clone(),
    }
