"""Methods: activation statistics or feature ids in, a SteeringVector out.

vec = build("fgaa", stats=stats, sae=sae)        # the same as fgaa(stats, sae)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fgsteer.errors import SelectionError
from fgsteer.methods.difference import ace, caa, pca
from fgsteer.methods.named import fgaa, from_features, sae_ts, sta
from fgsteer.methods.scores import SCORES
from fgsteer.methods.selection import select_features
from fgsteer.vector import SteeringVector

METHODS: dict[str, Callable[..., SteeringVector]] = {
    "caa": caa,
    "ace": ace,
    "pca": pca,
    "sta": sta,
    "fgaa": fgaa,
    "sae_ts": sae_ts,
    "from_features": from_features,
}
_INPUTS = ("stats", "sae", "effects", "features")


def build(name: str, **inputs: Any) -> SteeringVector:
    """A vector by the name of its method, for loops and the command line.

    ``stats``, ``sae``, ``effects`` and ``features`` that the method does not take are ignored,
    so that one call serves every method; any other keyword must be one of its own.
    Raises SelectionError for an unknown method, a missing input or an unknown keyword.
    """
    method = METHODS.get(name)
    if method is None:
        raise SelectionError(f"method {name!r}", f"one of {', '.join(METHODS)}")
    parameters = inspect.signature(method).parameters
    given = {key: value for key, value in inputs.items() if key in parameters or key not in _INPUTS}
    unknown = [key for key in given if key not in parameters]
    required = [key for key, p in parameters.items() if p.default is p.empty]
    missing = [key for key in required if given.get(key) is None]
    if unknown or missing:
        problem = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
        raise SelectionError(f"build({name!r}) with {problem}", f"the parameters {', '.join(parameters)}")
    return method(**given)


__all__ = [
    "METHODS",
    "SCORES",
    "ace",
    "build",
    "caa",
    "fgaa",
    "from_features",
    "pca",
    "sae_ts",
    "select_features",
    "sta",
]
