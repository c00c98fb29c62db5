"""Steering specs for EasySteer (vLLM), with the GGUF files that they name.

    write([vec.add(8.0)], "love.json")                   love.json and love.gguf
    vllm serve … --steering-config love.json

A spec selects tokens, and keeps the strength apart from the direction, which stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgsteer.errors import FormatError, SteeringError
from fgsteer.export import gguf
from fgsteer.export.requirements import Interventions, block_output, kind_of, listed
from fgsteer.export.table import ExportInputs
from fgsteer.interventions import Ablate, Add, Intervention
from fgsteer.storage.json_files import write_json

_APPLY: dict[str, dict[str, Any]] = {
    "all": {"prompt": "all", "generation": "all"},
    "prompt": {"prompt": "all"},
    "generated": {"generation": "all"},
    "reply": {"prompt_positions": [-1], "generation": "all"},
    "last_prompt": {"prompt_positions": [-1]},
}


def write(
    interventions: Interventions, path: str | Path, *, model_type: str = "", folder: str | Path | None = None
) -> list[Path]:
    """Write a spec and, beside it, one GGUF file for each intervention.

    Add becomes ``direct`` with its coefficient as ``scale``, Ablate becomes ``erase``; every scope can be expressed,
    and leaving position 0 alone. EasySteer leaves the token there alone whatever it is: pass ``bos=True`` for a
    model whose tokenizer puts no start token before a text. Written after EasySteer's source, not run in it.

    Args:
        interventions: Adds and Ablates in the residual stream.
        path: The spec, a file named .json.
        model_type: The Hugging Face model type ("llama"), a hint in the GGUF files.
        folder: Where the engine will find the GGUF files; None stands for where they are written.

    Returns:
        The paths of all files, the spec first.

    Raises:
        SteeringError: An intervention is of another kind, or at another site than the residual stream.
        PairingError: The interventions are made for two models.
        FormatError: The spec is not named .json, or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise FormatError(f"the name {path.name}", "a name that ends in .json, for the spec beside its .gguf files")
    items = listed(interventions)
    entries, files = [], []
    for number, item in enumerate(items, 1):
        file = path.with_name(f"{path.stem}{f'-{number}' if len(items) > 1 else ''}.gguf")
        source = Path(folder) / file.name if folder is not None else file.resolve()
        entries.append(_entry(item, source))
        files.append(file)
    for item, file in zip(items, files, strict=True):
        assert isinstance(item, Add | Ablate)
        directions = {block_output(item, "EasySteer"): item.direction}
        gguf.write_directions(file, directions, model_type=model_type, model_name=item.model_name, baked=[])
    write_json(path, {"vectors": entries, "conflict": "sequential"})
    return [path, *files]


def export(interventions: Sequence[Intervention], path: Path, inputs: ExportInputs) -> list[Path]:
    """The exporter of the table of exports."""
    return write(interventions, path, model_type=inputs.model_type, folder=inputs.options["folder"])


def _entry(item: Intervention, source: Path) -> dict[str, Any]:
    """One vector of the spec. Raises SteeringError for what a spec cannot express."""
    if not isinstance(item, Add | Ablate):
        raise SteeringError(
            kind_of(item),
            "an Add or an Ablate",
            "EasySteer sets no projections and has no SAE: export a Clamp or an Affine to lm-eval, "
            "or steer with fgsteer.steer",
        )
    if item.scope not in _APPLY:
        raise SteeringError(
            f"{kind_of(item)} with scope={item.scope!r}",
            f"one of the scopes {', '.join(_APPLY)}",
            "EasySteer counts no tokens of prompts: steer with fgsteer.steer",
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
