"""Models, SAEs, vectors and texts, loaded as the options say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgsteer.cli.printing import say
from fgsteer.errors import DataError, PairingError
from fgsteer.errors.wording import count
from fgsteer.interventions.table import OPERATIONS, intervention_spec
from fgsteer.storage.ranks import Ranks


@dataclass(frozen=True)
class ModelOptions:
    """A model as --model, --device, --dtype, --revision and --trust-remote-code name it."""

    name: str
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def load_model(options: ModelOptions) -> tuple[Any, Any]:
    """Model and tokenizer of the options.

    Raises DataError for an unknown dtype or device and a revision of a folder, MissingError for a model.
    """
    import torch
    from transformers.utils import logging

    import fgsteer as fg
    from fgsteer.models.embedded import DEFAULT

    logging.disable_progress_bar()  # of reading weights; downloads keep theirs
    name, device, revision = options.name, options.device, options.revision
    check_device(device, options.dtype)
    keywords: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
    if revision is not None:
        if name == DEFAULT or Path(name).exists():
            raise DataError(f"--revision {revision} of {name}", "a model of the hub: files have no revisions")
        keywords["revision"] = revision
    model, tokenizer = fg.load_model(name, dtype=options.dtype, trust_remote_code=options.trust_remote_code, **keywords)
    try:
        if device != "auto":
            model = model.to(device or _own_device(torch.cuda.device_count()))
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is unknown, missing or full
        raise DataError(f"--device {device}: {error}".partition("\n")[0], "a device of this machine") from error
    return model, tokenizer


def _own_device(gpus: int) -> str:
    """A GPU where there is one: of those of this machine, the one for this process."""
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}" if gpus else "cpu"


def check_device(device: str | None, dtype: str | None) -> None:
    """Raises DataError for a device that this machine lacks or that keeps no numbers, or a dtype that is none."""
    import torch

    from fgsteer.models.loading import as_dtype

    try:
        if dtype is not None:
            as_dtype(dtype)
    except DataError as error:
        raise DataError(f"--dtype {dtype:.100}", error.expected) from error
    if device in (None, "auto"):
        return
    try:
        kept = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:  # unknown, missing, full, or no text
        raise DataError(f"--device {device:.100}: {error}".partition("\n")[0], "a device of this machine") from error
    if kept.type == "meta":
        raise DataError(f"--device {device}, which keeps no numbers", "a device of this machine")


def check_fit(vectors: Mapping[Path, Any], model: str, revision: str | None = None) -> None:
    """Refuse vectors of another model than --model by what its config tells. Raises PairingError.

    A model whose config cannot be read, or not without running code of its own, passes: loading it says why.
    """
    if not vectors:
        return
    from transformers import AutoConfig

    from fgsteer.models.embedded import DEFAULT, pretrained_dir
    from fgsteer.storage.network import hub_or_cache

    folder = pretrained_dir() / "model" if model == DEFAULT else model
    try:
        with hub_or_cache(folder):
            config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False).get_text_config()
        layers, width = int(config.num_hidden_layers), int(config.hidden_size)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, ImportError):
        return
    for path, vector in vectors.items():
        if vector.hookpoint.layer < layers and (vector.hookpoint.site == "z" or vector.d_model == width):
            continue
        made = vector.provenance.get("model")
        name = str(made.get("name") or "") if isinstance(made, Mapping) else ""
        raise PairingError(
            f"{path}, made for {name or 'another model'}: width {vector.d_model} at {vector.hookpoint}",
            f"a vector for {model!r}, the model to load, which has layers 0 to {layers - 1} of width {width}",
            f"pass the vector's model: --model {name or 'NAME'}",
        )


def sae_name(name: str | None, model: str) -> str:
    """The SAE of --sae, by default the embedded model's own. Raises DataError where none is named for another model."""
    from fgsteer.models.embedded import DEFAULT, model_name

    if name is None and model not in ("", DEFAULT, model_name()):
        raise DataError(
            f"no --sae for {model!r}: the default SAE was trained on the default model",
            "an SAE of this model",
            f"fgsteer saes --model {Path(model).name} lists them: --sae RELEASE --sae-id ID, or --sae FOLDER",
        )
    return name or DEFAULT


def model_of(about: Mapping[str, Any]) -> str:
    """The name of the model that a vector's provenance or statistics' reading remembers, or ""."""
    made = about.get("model")
    return str(made.get("name") or "") if isinstance(made, Mapping) else ""


def load_sae(name: str | None, sae_id: str | None, model: str) -> Any:
    """The SAE of the options, for the model of --model. Raises DataError where none is named for it."""
    import fgsteer as fg

    return fg.load_sae(sae_name(name, model), sae_id)


def load_vectors(
    paths: list[Path] | None,
    coefficients: list[float] | None,
    operation: str = "add",
    model: str | None = None,
    revision: str | None = None,
) -> list[tuple[Any, float]]:
    """Vectors with their coefficients, which are 1, and said to be, where none are given.

    Raises DataError for unequal numbers of them, FormatError, PairingError for vectors of another model.
    """
    import fgsteer as fg

    paths = paths or []
    strengths = coefficients or [1.0] * len(paths)
    if len(strengths) != len(paths):
        told = f"{count(len(strengths), 'coefficient')} for {count(len(paths), 'vector')}"
        raise DataError(told, "one each, in the same order")
    loaded = [fg.SteeringVector.load(path) for path in paths]
    if model is not None:
        check_fit(dict(zip(paths, loaded, strict=True)), model, revision)
    if loaded and not coefficients and operation in OPERATIONS and intervention_spec(operation).amount:
        norms = ", ".join(f"{vector.norm:.3g}" for vector in loaded)
        say(f"note: no --coefficient given: 1 is used, of a vector of norm {norms}", err=True)
    return list(zip(loaded, strengths, strict=True))


def interventions(vectors: list[tuple[Any, float]], operation: str, scope: str, *, bos: bool = False) -> list[Any]:
    """The vectors as interventions of one operation. Raises DataError, SteeringError."""
    if operation not in OPERATIONS:
        raise DataError(f"--op {operation}", f"one of {', '.join(OPERATIONS)}")
    spec = intervention_spec(operation)
    return [spec.make(vector, coefficient, scope=scope, bos=bos) for vector, coefficient in vectors]


def documents(path: Path, field: str) -> list[str]:
    """The texts of a file. Raises DataError for none, or one that cannot be read."""
    from fgsteer.data.corpora import read_documents

    found = list(read_documents(path, field))
    if not found:
        raise DataError(f"{path} has no document", "one at least")
    return found


def count_documents(corpus: Path, field: str) -> int:
    """How many documents a corpus has, every line read. Raises DataError for none or one that cannot be read."""
    from fgsteer.data.corpora import read_documents

    total = sum(1 for _ in read_documents(corpus, field))
    if not total:
        raise DataError(f"{corpus} has no document", "one at least")
    return total


def work_folder(work: Path | None, out: Path) -> Path | None:
    """Where parts of the work are kept: as asked, else beside the output where several processes share the work."""
    shared = Ranks.from_env().world > 1
    return work or (out.with_name(out.name + ".parts") if shared else None)
