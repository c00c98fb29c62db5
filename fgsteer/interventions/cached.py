"""Steering of cached keys and values: an intervention at the cache of a prompt instead of at an activation.

CacheSteering(layers=[1], keys=torch.zeros(1, 3, 64), values=v[None], value_coefficient=6.0, d_model=576)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import PairingError, SteeringError
from fgsteer.errors.checks import check_range, describe_value
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.base import Intervention, set_fields
from fgsteer.interventions.values import finite_number


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class CacheSteering(OneLineRepr):
    """Changes the cache of a prompt once, before its last token is read (arXiv 2507.08799).

    In every layer ℓ of ``layers``, the keys and values (n_kv_heads, d_head) that are cached of the last token but one
    of each prompt become ``K_ℓ + c_K·S^K_ℓ`` and ``V_ℓ + c_V·S^V_ℓ``. The prompt is therefore read in two parts: all
    of it but its last token, and then that token, which is the first to attend to what was changed. Nothing is changed
    after that. In ``generate``, ``stream`` and ``steer`` it stands wherever an intervention may, alone, in a list that
    composes, or as the entry of one prompt. Where both coefficients are 0 the prompt is read at once, as without it;
    prompts of a batch that are not steered beside those that are differ by the rounding of two parts. Of hidden states
    and attentions that ``generate`` is asked for, those of the prompt are of its last token alone.

    Keys are cached after their rotary embedding, so that they hold the position of their token. A difference of keys
    of prompts with different lengths mixes these positions, and is right at none: values alone are steered by default.

    Args:
        layers: The layers that are changed, from 0.
        keys: The changes S^K of the cached keys, (layers, n_kv_heads, d_head), in units of the keys.
        values: The changes S^V of the cached values, (layers, n_kv_heads, d_head), in units of the values.
        key_coefficient: The strength c_K; the paper uses 0 to 0.2.
        value_coefficient: The strength c_V; the paper uses 1 to 10.
        d_model: The width of the model that it was made for.
        model_name: The model that it was made for, where known.
        method: How it was made, where known.

    Raises:
        PairingError: The keys or values are no floating-point tensor with one entry a layer, or have other heads.
        SteeringError: There is no layer or one twice, or keys, values or a coefficient are not finite.
        ArgumentError: A layer or the width is no whole number, or a coefficient no number.
    """

    layers: Sequence[int]
    keys: Float[Tensor, "layers n_kv_heads d_key"]
    values: Float[Tensor, "layers n_kv_heads d_value"]
    key_coefficient: float = 0.0
    value_coefficient: float = 1.0
    d_model: int
    model_name: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        for layer in self.layers if isinstance(self.layers, list | tuple | range) else ():
            check_range("a layer", layer, 0, MAX_COUNT, whole=True)
        if not isinstance(self.layers, list | tuple | range) or not len(set(self.layers)) == len(self.layers) > 0:
            raise SteeringError(f"layers = {self.layers!r:.60}", "a list of layers, each once", "pass layers=[1, 2]")
        check_range("d_model", self.d_model, 1, MAX_COUNT, whole=True)
        set_fields(
            self,
            layers=tuple(int(layer) for layer in self.layers),
            keys=_changes("keys", self.keys, len(self.layers)),
            values=_changes("values", self.values, len(self.layers)),
            key_coefficient=finite_number("key_coefficient", self.key_coefficient),
            value_coefficient=finite_number("value_coefficient", self.value_coefficient),
            d_model=int(self.d_model),
        )
        if self.keys.shape[1] != self.values.shape[1]:
            raise PairingError(
                f"keys of {self.keys.shape[1]} heads and values of {self.values.shape[1]}",
                "as many heads of keys as of values",
                "pass keys and values of the same layers of one model",
            )

    @property
    def changes_nothing(self) -> bool:
        """Whether both coefficients are 0."""
        return self.key_coefficient == 0 == self.value_coefficient


def _changes(name: str, value: Tensor, layers: int) -> Tensor:
    """A float32 copy of changes (layers, n_kv_heads, d_head). Raises PairingError, SteeringError."""
    if not isinstance(value, Tensor) or value.ndim != 3 or len(value) != layers or not value.is_floating_point():
        is_tensor = isinstance(value, Tensor)
        raise PairingError(
            f"{name} of shape {tuple(value.shape)} and {value.dtype}" if is_tensor else describe_value(value),
            f"floating-point {name} of shape ({layers}, n_kv_heads, d_head), one entry for each of the layers",
            "build them with fg.cache_steering, or stack those of the layers with torch.stack",
        )
    if not bool(torch.isfinite(value).all()):
        raise SteeringError(
            f"nan or inf in the {name}",
            "finite values",
            "look at the model that they were read from: one in float16 may have overflowed",
        )
    return value.detach().float().clone()


SteeringItem = Intervention | CacheSteering  # what steers one row, alone or in a list that composes
