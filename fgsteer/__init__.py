"""fgsteer: steer language models with the features of sparse autoencoders.

    import fgsteer as fg
    model, tokenizer = fg.load_model("default")
    sae = fg.load_sae("default")
    stats = fg.collect(model, tokenizer, fg.load_contrast("love"), sae=sae)
    vec = fg.fgaa(stats, sae)
    print(fg.generate(model, tokenizer, ["I think"], steering=[vec.add(200.0)], max_new_tokens=32))

The public names stand in ``__init__.pyi``, where type checkers and editors find them with their types. Each is
loaded when it is first used, so that importing fgsteer costs nothing.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULE_OF = {name.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for name in node.names}

__all__ = sorted(_MODULE_OF.keys() - {"export"})  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from fgsteer.storage.version import library_version

        return library_version()
    if name == "export":  # one module for each format: fgsteer.export.gguf.write
        return import_module("fgsteer.export")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fgsteer' has no attribute {name!r}")
    value = getattr(import_module(str(_MODULE_OF[name])), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__", "export"]
