"""Folding: steering that becomes part of a checkpoint's biases, without hooks and at no cost.

An Add changes every token in the same way, and so does the bias of a layer that writes to the residual stream. A layer
without a bias gets one where the architecture's config has a flag for it, such as Llama's ``mlp_bias``. Whatever no
bias does exactly is refused.

    fold(model, vec.add(8.0, bos=True)).save_pretrained("steered")
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgsteer.errors import SteeringError
from fgsteer.errors.checks import checked
from fgsteer.errors.wording import a
from fgsteer.export.requirements import refuse_gate
from fgsteer.export.weights import check_weights, linear_writer
from fgsteer.interventions import Ablate, Add, Intervention
from fgsteer.models.hookpoints import Hookpoint, Site, blocks_of, why_not_added
from fgsteer.models.pairing import check_pairing
from fgsteer.models.unembedding import residual_direction
from fgsteer.steering.ranges import check_amount
from fgsteer.storage.files import tensor_sha256
from fgsteer.storage.version import library_version

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLAGS = ("mlp_bias", "attention_bias", "use_bias", "enable_bias", "bias")
# Blocks that add both sublayers to one sum, so that the bias of either will do, where only one of them has a bias.
_PARALLEL = ("CohereDecoderLayer", "Cohere2DecoderLayer", "GPTJBlock", "CodeGenBlock")
# The last module of blocks that do not add their sublayers' outputs but add this module's bias unchanged.
_LAST = {"BloomBlock": "mlp.dense_4h_to_h", "OPTDecoderLayer": "final_layer_norm"}
_INSTEAD = "steer with a hook instead: fgsteer.steer"


@checked
def fold(
    model: PreTrainedModel, interventions: Intervention | Sequence[Intervention] | None, *, copy: bool = True
) -> PreTrainedModel:
    """A model of the same class with the Adds inside, which saves as an ordinary checkpoint: ``bias += Σ c·v``.

    It computes what ``steer`` does with the same interventions, and plain transformers loads what its
    ``save_pretrained`` writes. ``resid_post`` goes into the bias of the block's last layer, ``resid_pre`` into that of
    the block before, ``attn_out`` and ``mlp_out`` into their own (``z`` through W_O). Where the layer has no bias, a
    flag of the config gives one to every layer of its kind, zero elsewhere. ``config.fgsteer`` says what was folded.

    A bias acts on every token, so the interventions need ``bos=True``. It has the layer's dtype: a bfloat16 bias is
    rounded by up to 2⁻⁹ of each entry (``config.fgsteer["rounding"]`` is the largest ``‖error‖/‖change‖`` of a bias).
    Where there is nothing to add (no item, c = 0), every weight stays as it is.

    Args:
        model: A causal language model with plain floating-point weights on one device.
        interventions: Adds in scope "all" with ``bos=True``.
        copy: Whether to leave ``model`` as it is; False changes it, and spares the memory of a second one.

    Returns:
        The folded model.

    Raises:
        SteeringError: No bias does what is asked (another intervention, a scope, a list by rows; a norm, a router or a
            multiplier in the way; no bias in the architecture), or the model is quantised, sharded, wrapped or being
            steered.
        HookpointError: The model has no such hookpoint.
        PairingError: An intervention is made for another model.
    """
    terms = _terms(interventions)
    check_weights(model, "fold")
    for item in terms:
        check_pairing(model, item.hookpoint, item.d_model, item.model_name, "Add")
    flags = _flags_of_missing_biases(model)
    changes: dict[str, Tensor] = {}
    records = []
    for item in terms:
        if item.coefficient == 0 or not bool(item.direction.any()):
            continue
        name = _bias(model, item.hookpoint, flags)
        change = item.coefficient * residual_direction(model, item.hookpoint, item.direction).cpu().double()
        changes[name] = changes[name] + change if name in changes else change
        records.append(_describe(item, name))
    biases, rounding = _rounded(model, changes)
    target: PreTrainedModel = deepcopy(model) if copy else model
    if not records:
        return target
    _add_biases(target, {flags[name] for name in changes if name in flags})
    with torch.no_grad():
        for name, value in biases.items():
            target.get_parameter(name).copy_(value)
    before: Mapping[str, Any] = getattr(target.config, "fgsteer", None) or {}
    target.config.fgsteer = {
        "version": library_version(),
        "folded": [*before.get("folded", ()), *records],
        "rounding": max(rounding, before.get("rounding", 0.0)),
    }
    return target


def _terms(interventions: Intervention | Sequence[Intervention] | None) -> list[Add]:
    """The Adds, each of which a bias can do. Raises SteeringError for anything else."""
    items = [interventions] if isinstance(interventions, Intervention) else list(interventions or ())
    terms = []
    for item in items:
        if not isinstance(item, Intervention):
            raise SteeringError(
                f"{a(type(item).__name__)} among the interventions",
                "one list of interventions",
                "a checkpoint steers every row in the same way: fold the interventions of one row at a time",
            )
        what = f"{a(type(item).__name__)} at {item.hookpoint}"
        refuse_gate(item)
        if not isinstance(item, Add):
            reason = "the change by any other intervention depends on the activation, and a bias does not"
            if isinstance(item, Ablate):
                reason += " (orthogonalised weights would ablate at every earlier hookpoint too)"
            raise SteeringError(what, "an Add", f"{reason}: {_INSTEAD}")
        if item.scope != "all":
            raise SteeringError(
                f"{what} with scope={item.scope!r}", 'scope="all"', f"a bias acts on every token: {_INSTEAD}"
            )
        if not item.bos:
            raise SteeringError(
                f"{what} with bos=False, which leaves position 0 alone",
                "bos=True",
                "a bias acts on every token, that at position 0 too: write vec.add(coefficient, bos=True), and choose "
                "the coefficient with bos=True",
            )
        terms.append(item.detach())
    return terms


def _bias(model: nn.Module, hookpoint: Hookpoint, flags: Mapping[str, str]) -> str:
    """Name of the parameter that adds what an Add at the hookpoint adds. Raises SteeringError."""
    at = hookpoint
    if hookpoint.site == "resid_pre" and hookpoint.layer > 0:
        at = Hookpoint(hookpoint.layer - 1, "resid_post")
    writers, reason = _writers(model, at)
    names = {module: name for name, module in model.named_modules()}
    biases = [f"{names[writer]}.bias" for writer in writers]
    existing = [name for name, writer in zip(biases, writers, strict=True) if getattr(writer, "bias", None) is not None]
    possible = [*existing, *(name for name in biases if name in flags)]
    if possible:
        return possible[0]
    kind = type(blocks_of(model)[hookpoint.layer]).__name__
    reason = reason or "the layer that writes there has no bias, and no flag of its config gives it one"
    raise SteeringError(f"No bias of {a(kind)} does what an Add at {hookpoint} does: {reason}.", "", _INSTEAD)


def _writers(model: nn.Module, at: Hookpoint) -> tuple[list[nn.Module], str]:
    """The modules whose bias is added to the residual stream at a site, best first, and the reason if there is none."""
    block = blocks_of(model)[at.layer]
    kind = type(block).__name__
    if at.site in ("resid_pre", "mlp_in"):
        return [], "nothing adds a bias before block 0" if at.site == "resid_pre" else "a nonlinearity follows it"
    if getattr(model.config, "slow_but_exact", False):
        return [], "the option slow_but_exact of its config leaves the bias out of its sums"  # BLOOM
    if unadded := why_not_added(block):  # check_pairing has refused every site but resid_post
        return ([block.get_submodule(_LAST[kind])], "") if kind in _LAST else ([], unadded)
    own: Site = "attn_out" if at.site in ("attn_out", "z") else "mlp_out"
    writer, reason = linear_writer(model, Hookpoint(at.layer, own))
    candidates = [writer]
    if kind in _PARALLEL:
        candidates.append(linear_writer(model, Hookpoint(at.layer, "mlp_out" if own == "attn_out" else "attn_out"))[0])
    return [module for module in candidates if module is not None], reason


def _rounded(model: nn.Module, changes: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The new biases in their dtypes, and the largest ‖error‖/‖change‖. Raises SteeringError where one overflows."""
    biases, rounding = {}, 0.0
    for name, change in changes.items():
        module = model.get_submodule(name.rpartition(".")[0])
        weight: Tensor = module.weight  # type: ignore[assignment]
        bias = getattr(module, "bias", None)
        old = torch.zeros_like(change) if bias is None else bias.detach().cpu().double()
        new = (old + change).to(weight.dtype)
        check_amount(float(change.abs().amax()), weight.dtype, len(change), f"an Add in {name}")
        size = float(change.norm())
        rounding = max(rounding, float((new.double() - old - change).norm()) / size if size else 0.0)
        biases[name] = new
    return biases, rounding


def _parameters(model: nn.Module, flags: Collection[str]) -> dict[str, torch.Size]:
    """{name: shape} of the parameters that the model's class has with these flags of its config set."""
    config = deepcopy(model.config)
    for flag in flags:
        setattr(config.get_text_config(), flag, True)  # type: ignore[operator, union-attr]
    with torch.device("meta"):
        empty_model = type(model)(config)
    return {name: parameter.shape for name, parameter in empty_model.named_parameters(remove_duplicate=False)}


def _flags_of_missing_biases(model: nn.Module) -> dict[str, str]:
    """{bias that the model lacks: the flag of its config that adds it}."""
    existing = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    unset = [flag for flag in _FLAGS if getattr(config, flag, None) is False]
    return {name: flag for flag in unset for name in _parameters(model, [flag]).keys() - existing}


def _add_biases(model: nn.Module, flags: Collection[str]) -> None:
    """Set flags of the model's config, and add the biases that they stand for, all zero."""
    if not flags:
        return
    existing = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, shape in _parameters(model, flags).items():
        if name not in existing:
            module = model.get_submodule(name.rpartition(".")[0])
            weight: Tensor = module.weight  # type: ignore[assignment]
            module.bias = nn.Parameter(weight.new_zeros(shape), requires_grad=weight.requires_grad)
    for flag in flags:
        setattr(model.config.get_text_config(), flag, True)  # type: ignore[operator, union-attr]


def _describe(item: Add, bias: str) -> dict[str, Any]:
    """What ``config.fgsteer`` says of an Add."""
    return {
        "hookpoint": str(item.hookpoint),
        "method": item.method,
        "coefficient": item.coefficient,
        "norm": float(item.direction.norm()),
        "direction_sha256": tensor_sha256(item.direction),
        "bias": bias,
    }
