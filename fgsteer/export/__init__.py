"""Interventions in the formats of other engines, and vectors from the files of other libraries.

    import fgsteer as fg
    fg.export.gguf.write([vec.add(8.0, bos=True)], "love.gguf")      # llama-cli --control-vector love.gguf …

Each format is a module, and a row of the table in ``table.py``, which ``fgsteer export`` reads; ``register`` adds one.
A writer refuses what its engine cannot express, and names what can. A reader unpickles nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fgsteer.export.table import Exporter, ExportInputs, ExportOption, ExportSpec, register, rows, spec, specs

if TYPE_CHECKING:
    from fgsteer.export import checkpoint, easysteer, gguf, lm_eval, neuronpedia, steering_vectors

_FORMATS = ("checkpoint", "easysteer", "gguf", "lm_eval", "neuronpedia", "steering_vectors")
__all__ = [
    "ExportInputs",
    "ExportOption",
    "ExportSpec",
    "Exporter",
    "checkpoint",
    "easysteer",
    "gguf",
    "lm_eval",
    "neuronpedia",
    "register",
    "rows",
    "spec",
    "specs",
    "steering_vectors",
]

if not TYPE_CHECKING:  # with it, type checkers would take any name

    def __getattr__(name: str) -> Any:  # formats load torch, which help texts do without
        if name in _FORMATS:
            return import_module(f"fgsteer.export.{name}")
        raise AttributeError(f"module 'fgsteer.export' has no attribute {name!r}")
