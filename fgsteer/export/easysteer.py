"""Steering specs for EasySteer (vLLM), with the GGUF files that they name.

    write([vec.add(8.0)], "love.json")                   love.json and love.gguf
    vllm serve … --steering-config love.json

A spec selects tokens and keeps strength apart from the direction, which stays as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fgsteer.errors import FormatError, SteeringError
from fgsteer.export import gguf
from fgsteer.export.places import Interventions, block_output, called, checked
from fgsteer.interventions import Ablate, Add, Intervention
from fgsteer.storage.json_files import write_json

_APPLY: dict[str, dict[str, Any]] = {
    "all": {"prompt": "all", "generation": "all"},
    "prompt": {"prompt": "all"},
    "generated": {"generation": "all"},
    "last_prompt_on": {"prompt_positions": [-1], "generation": "all"},
}


def write(
    interventions: Interventions, path: str | Path, *, model_type: str = "", folder: str | Path | None = None
) -> list[Path]:
    """Write the spec and, beside it, one GGUF for each intervention; returns all paths, the spec first.

    Add is ``direct`` with its coefficient as ``scale``, Ablate is ``erase``; every scope and a spared
    position 0 are said. EasySteer spares the token there whatever it is: pass ``bos=True`` for a model whose
    tokenizer puts no start token before a text. ``folder`` is where the engine will find the GGUF files
    (default: where they are now). Written after EasySteer's source, not run against it. Raises
    SteeringError for other interventions and for other sites than the residual stream, PairingError for
    those of two models, FormatError for a spec not named .json.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise FormatError(f"a spec named {path.name}", "one named .json, beside which the .gguf files go")
    items = checked(interventions)
    entries, files = [], []
    for number, item in enumerate(items, 1):
        file = path.with_name(f"{path.stem}{f'-{number}' if len(items) > 1 else ''}.gguf")
        source = Path(folder) / file.name if folder is not None else file.resolve()
        entries.append(_entry(item, source))
        files.append(file)
    for item, file in zip(items, files, strict=True):
        assert isinstance(item, Add | Ablate)
        directions = {block_output(item, "EasySteer"): item.direction}
        gguf.write_directions(file, directions, model_type=model_type, model_name=item.model_name, applied=[])
    write_json(path, {"vectors": entries, "conflict": "sequential"})
    return [path, *files]


def _entry(item: Intervention, source: Path) -> dict[str, Any]:
    """One vector of the spec. Raises SteeringError for what it cannot say."""
    if not isinstance(item, Add | Ablate):
        raise SteeringError(
            called(item),
            "an Add or Ablate: EasySteer sets no projection and reads no SAE",
            "export a Clamp or Affine to lm-eval, or steer here: fgsteer.steer",
        )
    select = dict(_APPLY[item.scope])
    if not item.bos and item.scope != "generated":
        select["exclude_prompt_positions"] = [0]
    return {
        "source": str(source),
        "algorithm": "direct" if isinstance(item, Add) else "erase",
        "scale": item.coefficient if isinstance(item, Add) else 1.0,
        "layers": [block_output(item, "EasySteer")],
        "normalize": False,
        "apply": select,
        "params": {},
    }
