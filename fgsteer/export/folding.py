"""Folding: steering written into a checkpoint's own biases, without hooks and at no cost.

An Add changes every token alike, and so does the bias of a layer that writes to the
residual stream. A layer without one gets it where the architecture's config offers a
flag, such as Llama's ``mlp_bias``. What no bias equals exactly is refused.

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
from fgsteer.interventions import Ablate, Add, Intervention
from fgsteer.methods.provenance import library_version
from fgsteer.models.hookpoints import Hookpoint, Site, blocks_of, resolve, why_not_added
from fgsteer.models.pairing import check_pairing
from fgsteer.models.unembedding import residual_direction
from fgsteer.steering.ranges import check_amount
from fgsteer.storage.files import tensor_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The last layer of each sublayer, and what a config may call a bias of it. tests/test_folding.py
# checks every architecture that folds against hooks, through a saved checkpoint.
_WRITERS = {
    "attn_out": ("o_proj", "c_proj", "dense", "out_proj", "attention.out_proj"),
    "mlp_out": ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out"),
}
_FLAGS = ("mlp_bias", "attention_bias", "use_bias", "enable_bias", "bias")
# Blocks that add both sublayers to one sum, so that either's bias serves; the others that do have both.
_PARALLEL = ("CohereDecoderLayer", "Cohere2DecoderLayer", "GPTJBlock", "CodeGenBlock")
# The last module of blocks that do not add their sublayers' outputs, where its bias is added as it is.
_LAST = {"BloomBlock": "mlp.dense_4h_to_h", "OPTDecoderLayer": "final_layer_norm"}
_INSTEAD = "use steer(), which adds it with a hook"


@checked
def fold(
    model: PreTrainedModel, interventions: Intervention | Sequence[Intervention] | None, *, copy: bool = True
) -> PreTrainedModel:
    """A model of the same class with the Adds inside: ``bias += Σ c·v``; it saves as an ordinary checkpoint.

    It computes what ``steer`` with the same interventions does, and plain transformers loads what
    its ``save_pretrained`` writes. ``resid_post`` goes into the bias of the block's last layer,
    ``resid_pre`` into that of the block before, ``attn_out`` and ``mlp_out`` into their own
    (``z`` through W_O). Where the layer has no bias, a flag of the config gives one to every
    layer of its kind, zero elsewhere. ``config.fgsteer`` says what was folded.

    A bias acts on every token, so the interventions need ``bos=True``. It is kept in the layer's
    dtype: a bfloat16 bias is rounded by up to 2⁻⁹ of each entry (``config.fgsteer["rounding"]``:
    the largest ``‖error‖/‖change‖`` of a bias). ``copy=False`` changes the model that is given, and spares
    the memory of a second one. Nothing to add (no item, c = 0) leaves every weight as it is.

    Raises SteeringError for what a bias does not equal (other interventions, scopes, entries by
    row; a norm, a router or a multiplier in the way; no bias in the architecture) and for models
    that are quantised, sharded, wrapped or being steered; HookpointError and PairingError as ``steer``.
    """
    terms = _terms(interventions)
    _check_model(model)
    for item in terms:
        check_pairing(model, item.hookpoint, item.d_model, item.model_name, "Add")
    offers = _offers(model)
    changes: dict[str, Tensor] = {}
    told = []
    for item in terms:
        if item.coefficient == 0 or not bool(item.direction.any()):
            continue
        name = _bias(model, item.hookpoint, offers)
        change = item.coefficient * residual_direction(model, item.hookpoint, item.direction).cpu().double()
        changes[name] = changes[name] + change if name in changes else change
        told.append(_describe(item, name))
    biases, rounding = _rounded(model, changes)
    target: PreTrainedModel = deepcopy(model) if copy else model
    if not told:
        return target
    _gain(target, {offers[name] for name in changes if name in offers})
    with torch.no_grad():
        for name, value in biases.items():
            target.get_parameter(name).copy_(value)
    before: Mapping[str, Any] = getattr(target.config, "fgsteer", None) or {}
    target.config.fgsteer = {
        "version": library_version(),
        "folded": [*before.get("folded", ()), *told],
        "rounding": max(rounding, before.get("rounding", 0.0)),
    }
    return target


def _terms(interventions: Intervention | Sequence[Intervention] | None) -> list[Add]:
    """The Adds that a bias equals. Raises SteeringError for anything else."""
    given = [interventions] if isinstance(interventions, Intervention) else list(interventions or ())
    terms = []
    for item in given:
        if not isinstance(item, Intervention):
            raise SteeringError(
                f"{a(type(item).__name__)} among the interventions",
                "one list of interventions: a checkpoint steers every row alike",
                "fold one row's interventions at a time",
            )
        what = f"{type(item).__name__} at {item.hookpoint}"
        if not isinstance(item, Add):
            reason = "its change depends on the activation, and a bias is the same for every token"
            if isinstance(item, Ablate):
                reason += "; orthogonalised weights would ablate at every earlier hookpoint too"
            raise SteeringError(f"{what}: {reason}", "Add", "use steer(), which applies it with a hook")
        if item.scope != "all":
            raise SteeringError(
                f"{what} with scope {item.scope!r}", 'scope "all": a bias acts on every token', _INSTEAD
            )
        if not item.bos:
            raise SteeringError(
                f"{what} with bos=False, which leaves position 0 alone",
                "bos=True: a bias acts on every token, position 0 too",
                "write vec.add(coefficient, bos=True), and choose the coefficient with that",
            )
        terms.append(item.detach())
    return terms


def _check_model(model: PreTrainedModel) -> None:
    """Refuse a model whose weights cannot be changed and saved as they are. Raises SteeringError."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = getattr(model, "config", None)
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not type(model):
        raise SteeringError(
            a(type(model).__name__),
            "a model that AutoModelForCausalLM loads",
            "fold the plain one, without wrappers",
        )
    if "generate" in vars(model):
        raise SteeringError("a model that is being steered", "a plain one", "leave the steer() block first")
    if getattr(config, "quantization_config", None) is not None:
        raise SteeringError("a quantised model", "plain weights", "fold the original, then quantise that")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SteeringError("a model with adapters, which alone would be saved", "plain weights", "merge them first")
    where = set((getattr(model, "hf_device_map", None) or {}).values())
    plain = all(
        type(p) is nn.Parameter and type(p.data) is Tensor and p.is_floating_point() and not p.is_meta
        for p in model.parameters()
    )
    if len(where) > 1 or not plain:
        raise SteeringError(
            "a model whose weights are sharded, offloaded or not floating-point",
            "plain weights on one device",
            'load it in one piece, with device_map="cpu" where no other device holds it',
        )


def _bias(model: nn.Module, hookpoint: Hookpoint, offers: Mapping[str, str]) -> str:
    """Name of the parameter that adds what an Add at the hookpoint adds. Raises SteeringError."""
    at = hookpoint
    if hookpoint.site == "resid_pre" and hookpoint.layer > 0:
        at = Hookpoint(hookpoint.layer - 1, "resid_post")
    writers, reason = _writers(model, at)
    names = {module: name for name, module in model.named_modules()}
    biases = [f"{names[writer]}.bias" for writer in writers]
    there = [bias for bias, writer in zip(biases, writers, strict=True) if getattr(writer, "bias", None) is not None]
    for bias in (*there, *(bias for bias in biases if bias in offers)):
        return bias
    kind = type(blocks_of(model)[hookpoint.layer]).__name__
    reason = reason or "the layer that writes there has no bias, and no setting of its config gives it one"
    raise SteeringError(f"an Add at {hookpoint} of {a(kind)}: {reason}", "a bias that adds the same", _INSTEAD)


def _writers(model: nn.Module, at: Hookpoint) -> tuple[list[nn.Module], str]:
    """(modules whose bias is added to the residual stream at a site, best first; why there is none)."""
    block = blocks_of(model)[at.layer]
    kind = type(block).__name__
    if at.site in ("resid_pre", "mlp_in"):
        return [], "nothing adds a bias before block 0" if at.site == "resid_pre" else "a nonlinearity follows it"
    if getattr(model.config, "slow_but_exact", False):
        return [], "its slow_but_exact sums leave the bias out"  # BLOOM
    if unadded := why_not_added(block):  # check_pairing has refused every site but resid_post
        return ([block.get_submodule(_LAST[kind])], "") if kind in _LAST else ([], unadded)
    own: Site = "attn_out" if at.site in ("attn_out", "z") else "mlp_out"
    writer, reason = _writer(model, Hookpoint(at.layer, own))
    found = [writer]
    if kind in _PARALLEL:
        found.append(_writer(model, Hookpoint(at.layer, "mlp_out" if own == "attn_out" else "attn_out"))[0])
    return [module for module in found if module is not None], reason


def _writer(model: nn.Module, at: Hookpoint) -> tuple[nn.Module | None, str]:
    """(the linear layer whose output a block adds at attn_out or mlp_out, why there is none)."""
    sublayer, _ = resolve(model, at)
    if isinstance(sublayer, nn.Linear):  # OPT's fc2
        return sublayer, ""
    modules = dict(sublayer.named_modules())
    for name in _WRITERS[at.site]:
        if name in modules:
            return modules[name], ""
    if "norm" in type(sublayer).__name__.lower():
        return None, "a norm without a bias follows the layer that writes there"
    if "experts" in modules:
        return None, "a router weighs the experts that write there, so no bias of theirs adds the same to every token"
    return None, "the layer that writes there is not known"


def _rounded(model: nn.Module, changes: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """(new biases in their dtypes, largest ‖error‖/‖change‖). Raises SteeringError where one overflows."""
    biases, rounding = {}, 0.0
    for name, change in changes.items():
        module = model.get_submodule(name.rpartition(".")[0])
        weight: Tensor = module.weight  # type: ignore[assignment]
        given = getattr(module, "bias", None)
        old = torch.zeros_like(change) if given is None else given.detach().cpu().double()
        new = (old + change).to(weight.dtype)
        check_amount(float(change.abs().amax()), weight.dtype, len(change), f"an Add in {name}")
        size = float(change.norm())
        rounding = max(rounding, float((new.double() - old - change).norm()) / size if size else 0.0)
        biases[name] = new
    return biases, rounding


def _parameters(model: nn.Module, flags: Collection[str]) -> dict[str, torch.Size]:
    """Shapes of the parameters that the model's class has with flags of its config set, by name."""
    config = deepcopy(model.config)
    for flag in flags:
        setattr(config.get_text_config(), flag, True)  # type: ignore[operator, union-attr]
    with torch.device("meta"):
        bare = type(model)(config)
    return {name: parameter.shape for name, parameter in bare.named_parameters(remove_duplicate=False)}


def _offers(model: nn.Module) -> dict[str, str]:
    """Biases that the model lacks, each with the flag of its config that gives it."""
    have = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    unset = [flag for flag in _FLAGS if getattr(config, flag, None) is False]
    return {name: flag for flag in unset for name in _parameters(model, [flag]).keys() - have}


def _gain(model: nn.Module, flags: Collection[str]) -> None:
    """Set flags of the model's config, and give it the biases that they bring, all zero."""
    if not flags:
        return
    have = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, shape in _parameters(model, flags).items():
        if name not in have:
            module = model.get_submodule(name.rpartition(".")[0])
            weight: Tensor = module.weight  # type: ignore[assignment]
            module.bias = nn.Parameter(weight.new_zeros(shape), requires_grad=weight.requires_grad)
    for flag in flags:
        setattr(model.config.get_text_config(), flag, True)  # type: ignore[operator, union-attr]


def _describe(item: Add, bias: str) -> dict[str, Any]:
    """What ``config.fgsteer`` keeps of an Add."""
    return {
        "hookpoint": str(item.hookpoint),
        "method": item.method,
        "coefficient": item.coefficient,
        "norm": float(item.direction.norm()),
        "direction_sha256": tensor_sha256(item.direction),
        "bias": bias,
    }
