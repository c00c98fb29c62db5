"""Vectors saved by the steering-vectors library, read without unpickling anything.

    torch.save(vector, "love.pt")                        with steering-vectors
    for vector in read("love.pt"): ...

``torch.load(weights_only=True)`` builds tensors and plain containers alone. A stand-in here takes the
library's place, so neither the library nor a class named in the file is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from fgsteer.errors import FgsteerError, FormatError
from fgsteer.errors.wording import a
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.vector import SteeringVector

SAVED = "steering_vectors.steering_vector.SteeringVector"
_DAMAGE = (OSError, EOFError, RuntimeError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError)


class _Saved:
    """What the library's dataclass becomes when it is read: its fields, none of its code."""

    layer_activations: Any = None
    layer_type: Any = None


def read(path: str | Path) -> list[SteeringVector]:
    """The vectors of a ``torch.save``d SteeringVector, or of its {layer: tensor (d_model,)}, by layer.

    The library adds each to the output of a block, at every token: ``vector.add(multiplier, bos=True)``.
    Raises FormatError for anything else: a file by ``pickle.dump``, other layer types, objects of other classes.
    """
    try:
        with torch.serialization.safe_globals([(_Saved, SAVED)]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FormatError(f"no file {path}") from error
    except (*_DAMAGE, UnpicklingError) as error:
        raise FormatError(
            f"{path} cannot be read without running code that it names",
            "torch.save(vector, path) of a steering-vectors SteeringVector",
            "where you trust it, load it there and torch.save(vector.layer_activations, path)",
        ) from error
    kind = "decoder_block"
    if isinstance(found, _Saved):
        found, kind = found.layer_activations, found.layer_type
    if kind != "decoder_block":
        raise FormatError(
            f"{path} holds vectors for layer type {kind!r:.60}",
            "decoder_block: other modules' outputs mean different things in different families",
            "train it with layer_type='decoder_block'",
        )
    if not isinstance(found, Mapping) or not found:
        raise FormatError(f"{path} holds {type(found).__name__}", "{layer: tensor}")
    try:
        return [_vector(layer, found[layer], Path(path)) for layer in sorted(found)]
    except (FgsteerError, *_DAMAGE) as error:
        raise FormatError(f"{path}: {error}", "{layer: tensor (d_model,)}") from error


def _vector(layer: Any, direction: Any, path: Path) -> SteeringVector:
    """One vector. Raises ValueError, or what SteeringVector raises."""
    if not isinstance(layer, int) or not isinstance(direction, Tensor):
        raise ValueError(f"{layer!r:.60} and {a(type(direction).__name__)}")
    if direction.nbytes > direction.untyped_storage().nbytes():
        raise ValueError(f"a tensor of {direction.nbytes} bytes in {direction.untyped_storage().nbytes()}")
    about = {"method": "steering-vectors", "file": path.name}
    return SteeringVector(direction, Hookpoint(layer), provenance=about)
