"""Vectors saved by the steering-vectors library, read without unpickling anything.

    torch.save(vector, "love.pt")                        # with steering-vectors
    for vector in read("love.pt"): ...

``torch.load(weights_only=True)`` makes tensors and plain containers only. A class of this module takes the place of
the library's class, so neither the library nor any class that the file names is imported.
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

SAVED_CLASS = "steering_vectors.steering_vector.SteeringVector"
_DAMAGE = (OSError, EOFError, RuntimeError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError)


class _SavedVector:
    """What the library's dataclass becomes when it is read: its fields, and none of its code."""

    layer_activations: Any = None
    layer_type: Any = None


def read(path: str | Path) -> list[SteeringVector]:
    """The vectors of a ``torch.save``d SteeringVector, or of its {layer: tensor (d_model,)}, in the order of layers.

    The library adds each to the output of a block, at every token, as ``vector.add(multiplier, bos=True)`` does.

    Args:
        path: A file that ``torch.save`` wrote.

    Returns:
        One vector for each layer.

    Raises:
        FormatError: The file is anything else, such as a file of ``pickle.dump``, or has another layer type.
    """
    try:
        with torch.serialization.safe_globals([(_SavedVector, SAVED_CLASS)]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FormatError(f"There is no file {path}.") from error
    except (*_DAMAGE, UnpicklingError) as error:
        raise FormatError(
            f"{path} cannot be read without running code that it names.",
            "a file that torch.save(vector, path) wrote from a SteeringVector of steering-vectors",
            "if you trust the file, load it with the library that wrote it, and write the tensors alone with "
            "torch.save(vector.layer_activations, path)",
        ) from error
    layer_type = "decoder_block"
    if isinstance(content, _SavedVector):
        content, layer_type = content.layer_activations, content.layer_type
    if layer_type != "decoder_block":
        raise FormatError(
            f"{path} holds vectors of the layer type {layer_type!r:.60}.",
            "the layer type decoder_block",
            "outputs of other modules mean different things in different families of models: "
            "train the vector with layer_type='decoder_block'",
        )
    if not isinstance(content, Mapping) or not content:
        empty = isinstance(content, Mapping)
        raise FormatError(
            f"{path} holds {'no vector' if empty else a(type(content).__name__)}.", "{layer: tensor (d_model,)}"
        )
    try:
        return [_vector(layer, content[layer], Path(path)) for layer in sorted(content)]
    except (FgsteerError, *_DAMAGE) as error:
        reason = str(error).rstrip(".")
        raise FormatError(
            f"{path} holds a vector that cannot be used: {reason}.", "{layer: tensor (d_model,)}"
        ) from error


def _vector(layer: Any, direction: Any, path: Path) -> SteeringVector:
    """One vector. Raises ValueError, or what SteeringVector raises."""
    if not isinstance(layer, int) or not isinstance(direction, Tensor):
        raise ValueError(f"{layer!r:.60} with {a(type(direction).__name__)}.")
    if direction.nbytes > direction.untyped_storage().nbytes():
        raise ValueError(f"a tensor of {direction.nbytes} bytes stored in {direction.untyped_storage().nbytes()}.")
    about = {"method": "steering-vectors", "file": path.name}
    return SteeringVector(direction, Hookpoint(layer), provenance=about)
