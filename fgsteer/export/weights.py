"""Which weights of a model write to its residual stream, and whether they can be changed and saved.

linear, reason = linear_writer(model, Hookpoint(2, "mlp_out"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fgsteer.errors import SteeringError
from fgsteer.errors.wording import a
from fgsteer.models.hookpoints import Hookpoint, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The last layer of each sublayer, by the names that architectures give it, and the flags by which configs give it a
# bias. tests/test_folding.py compares every architecture that folds with hooks, through a saved checkpoint.
_WRITERS = {
    "attn_out": ("o_proj", "c_proj", "dense", "out_proj", "attention.out_proj"),
    "mlp_out": ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out"),
}


def check_weights(model: PreTrainedModel, verb: str) -> None:
    """Raises SteeringError for a model whose weights cannot be changed and saved as they are."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = getattr(model, "config", None)
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not type(model):
        raise SteeringError(
            a(type(model).__name__),
            "a model of a class that AutoModelForCausalLM loads",
            "take the model out of its wrapper, or load it with AutoModelForCausalLM",
        )
    if "generate" in vars(model):
        raise SteeringError(
            "a model that is being steered", "a model without hooks", "leave the block of fgsteer.steer first"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise SteeringError(
            "a quantised model", "floating-point weights", f"{verb} the original model, and quantise the result"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SteeringError(
            "a model with adapters",
            "a model without adapters",
            "transformers would save the adapters alone: merge them into the weights first",
        )
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    is_plain = all(
        type(p) is nn.Parameter and type(p.data) is Tensor and p.is_floating_point() and not p.is_meta
        for p in model.parameters()
    )
    if len(devices) > 1 or not is_plain:
        raise SteeringError(
            "a model whose weights are sharded, offloaded or not floating-point",
            "floating-point weights on one device",
            'load the model on one device: device_map="cpu" if no GPU has room for it',
        )


def linear_writer(model: nn.Module, at: Hookpoint) -> tuple[nn.Module | None, str]:
    """The linear layer whose output a block adds at attn_out or mlp_out, and the reason if there is none."""
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
