"""Interventions in the formats of other engines, and vectors from the files of other libraries.

    import fgsteer as fg
    fg.export.gguf.write([vec.add(200.0, bos=True)], "love.gguf")      # llama-cli --control-vector love.gguf …

Each format is a module, and a row of the table in ``table.py``, which ``fgsteer export`` reads; ``register`` adds one.
A writer refuses what its engine cannot express, and names what can. A reader unpickles nothing.

    table.py             the rows, one for each format
    requirements.py      what most engines require of interventions
    gguf.py              control vectors for llama.cpp, repeng and EasySteer, written and read
    lm_eval.py           the steered model of lm-evaluation-harness
    easysteer.py         EasySteer
    neuronpedia.py       Neuronpedia's steering API
    checkpoint.py        a checkpoint with the steering inside
    folding.py           ``fold``: steering as biases of a model
    orthogonalizing.py   ``orthogonalize``: a model whose weights do not write a direction
    weights.py           which weights write to the residual stream
    steering_vectors.py  reads vectors of the steering-vectors library
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
