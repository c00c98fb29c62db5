"""Models, SAEs, vectors and texts, loaded as the options say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """A model as --model, --device, --dtype, --revision and --trust-remote-code name it; ``fetch``: from the hub."""

    name: str
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    fetch: bool = True


def load_model(options: ModelOptions) -> tuple[Any, Any]:
    """Load a model and its tokenizer as the options say.

    Raises:
        DataError: The dtype or the device is unknown, or a revision is given for files that have none.
        MissingError: There is no such model.
    """
    from transformers.utils import logging

    import fgsteer as fg
    from fgsteer.models.shipped import find_shipped

    logging.disable_progress_bar()  # that of loading weights; downloads keep theirs
    name, device, revision = options.name, options.device, options.revision
    shipped = find_shipped(name)
    check_device(device, options.dtype)
    keywords: dict[str, Any] = {} if options.fetch else {"local_files_only": True}
    if revision is not None:
        if shipped is not None or Path(name).exists():
            raise DataError(
                f"--revision {revision:.80} for {name}",
                "a model on the hub",
                "files on this machine have no revisions: leave --revision out",
            )
        keywords["revision"] = revision
    if shipped is not None and shipped.is_packed():
        say(f"note: The weights of {name} are unpacked once, which takes half a minute.", err=True)
    keywords |= {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    model, tokenizer = fg.load_model(name, device=device, **keywords)
    return model, tokenizer


def check_device(device: str | None, dtype: str | None) -> None:
    """Raises DataError for a device that this machine does not have or that stores no numbers, or an unknown dtype."""
    import torch

    from fgsteer.models.devices import device_error
    from fgsteer.models.loading import as_dtype

    try:
        if dtype is not None:
            as_dtype(dtype)
    except DataError as error:
        raise DataError(f"--dtype {dtype:.100}", error.expected) from error
    if device in (None, "auto"):
        return
    try:
        actual = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:  # unknown, missing, full, or no name
        raise device_error(f"--device {device:.100}", error) from error
    if actual.type == "meta":
        raise DataError(
            f"--device {device}, which stores no numbers",
            "a device of this machine",
            "use --device cpu or --device cuda",
        )


def check_fit(vectors: Mapping[Path, Any], model: str, revision: str | None = None) -> None:
    """Check that vectors fit the model of --model, by its config. Raises PairingError for those of another model.

    A model passes whose config cannot be read, or only by running code of its own: loading it says why.
    """
    if not vectors:
        return
    from transformers import AutoConfig

    from fgsteer.models.shipped import find_shipped
    from fgsteer.storage.network import hub_or_cache

    shipped = find_shipped(model)
    folder = model if shipped is None else shipped.model_folder()
    try:
        with hub_or_cache(folder):
            config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False).get_text_config()
        layers, width = int(config.num_hidden_layers), int(config.hidden_size)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, ImportError):
        return
    for path, vector in vectors.items():
        if vector.hookpoint.layer < layers and (vector.hookpoint.site == "z" or vector.d_model == width):
            continue
        name = model_of(vector.provenance)
        raise PairingError(
            f"{path}, made for {name or 'another model'}, of width {vector.d_model} at {vector.hookpoint}",
            f"a vector for the model {model!r}, which has layers 0 to {layers - 1} of width {width}",
            f"name the model that the vector was made for: --model {name or 'NAME'}",
        )


def sae_name(name: str | None, model: str) -> str:
    """The name of the SAE: that of --sae, else that of a shipped model. Raises DataError for another model."""
    from fgsteer.models.shipped import SHIPPED, find_shipped

    if name is not None:
        return name
    shipped = find_shipped(model or "default")
    if shipped is None:
        raise DataError(
            f"no --sae for the model {model!r}",
            "an SAE that was trained on this model",
            f"the shipped SAEs were trained on {' and '.join(SHIPPED)}; fgsteer saes --model {Path(model).name} lists "
            "those of this model, which --sae RELEASE --sae-id ID names, and --sae FOLDER takes your own",
        )
    return shipped.name


def model_of(about: Mapping[str, Any]) -> str:
    """The name of the model in the provenance of a vector or in the reading of statistics; "" where it is unknown."""
    model = about.get("model")
    return str(model.get("name") or "") if isinstance(model, Mapping) else ""


def load_sae(name: str | None, sae_id: str | None, model: str) -> Any:
    """Load the SAE of the options. Raises DataError where none is named for a model without shipped ones."""
    import fgsteer as fg

    return fg.load_sae(sae_name(name, model), sae_id)


def load_steering_file(path: Path, sae: str | None, sae_id: str | None, model: str) -> list[Any]:
    """The interventions of a file that ``save_steering`` wrote. Raises FormatError, PairingError as it does."""
    import fgsteer as fg

    return fg.load_steering(path, [] if sae is None and sae_id is None else [load_sae(sae, sae_id, model)])


def load_effects(source: str, sae_id: str | None = None) -> Any:
    """Load the effects of a file, or of a shipped model those of the SAE of --sae-id. Raises FormatError."""
    import fgsteer as fg
    from fgsteer.models.shipped import find_shipped

    return fg.load_effects(source, None if find_shipped(source) is None else sae_id)


def load_vectors(
    paths: list[Path] | None,
    coefficients: list[float] | None,
    operation: str = "add",
    model: str | None = None,
    revision: str | None = None,
) -> list[tuple[Any, float]]:
    """Load vectors, each with its coefficient, which is 1 where none is given; a note then says so.

    Raises:
        DataError: There are not as many coefficients as vectors.
        FormatError: A file is damaged, or holds no vector.
        PairingError: A vector was made for another model.
    """
    paths = paths or []
    strengths = coefficients or [1.0] * len(paths)
    if len(strengths) != len(paths):
        raise DataError(
            f"{count(len(strengths), 'coefficient')} for {count(len(paths), 'vector')}",
            "one coefficient for each vector, in the same order",
            "give -c as often as vectors are given",
        )
    loaded = load_vector_files(paths, model, revision)
    if not coefficients:
        note_default_strength(loaded, operation)
    return list(zip(loaded, strengths, strict=True))


def load_vector_files(paths: list[Path], model: str | None, revision: str | None) -> list[Any]:
    """Load vectors. Raises FormatError for a file that holds none, PairingError for a vector of another model."""
    import fgsteer as fg

    loaded = [fg.SteeringVector.load(path) for path in paths]
    if model is not None:
        check_fit(dict(zip(paths, loaded, strict=True)), model, revision)
    return loaded


def note_default_strength(vectors: Sequence[Any], operation: str) -> None:
    """Say that vectors without a coefficient, where the operation takes one, get 1."""
    if vectors and operation in OPERATIONS and intervention_spec(operation).amount:
        norms = ", ".join(f"{vector.norm:.3g}" for vector in vectors)
        say(f"note: No --coefficient is given, so it is 1, for a vector of norm {norms}.", err=True)


def interventions(vectors: list[tuple[Any, float]], operation: str, scope: str, *, bos: bool = False) -> list[Any]:
    """The vectors as interventions of one operation. Raises DataError, SteeringError."""
    if operation not in OPERATIONS:
        raise DataError(f"--op {operation:.80}", f"one of {', '.join(OPERATIONS)} after --op")
    spec = intervention_spec(operation)
    return [spec.make(vector, coefficient, scope=scope, bos=bos) for vector, coefficient in vectors]


def documents(path: Path, field: str) -> list[str]:
    """The documents of a file. Raises DataError for a file without documents, or one that cannot be read."""
    from fgsteer.data.corpora import read_documents

    texts = list(read_documents(path, field))
    if not texts:
        raise _no_documents(path)
    return texts


def _no_documents(path: Path) -> DataError:
    """The error for a file without documents."""
    return DataError(f"{path} holds no documents.", "at least one document", "name another file")


def count_documents(corpus: Path, field: str) -> int:
    """How many documents a corpus has, all of which are read. Raises DataError as ``documents`` does."""
    from fgsteer.data.corpora import read_documents

    total = sum(1 for _ in read_documents(corpus, field))
    if not total:
        raise _no_documents(corpus)
    return total


def work_folder(work: Path | None, out: Path) -> Path | None:
    """The folder for finished parts: that of --work, else one beside the output if several processes share the work."""
    shared = Ranks.from_env().world > 1
    return work or (out.with_name(out.name + ".parts") if shared else None)
