"""A vector in a folder or a Hugging Face repository: its file, its model card, and how a benchmark measured it.

vec.push_to_hub("me/wedding", run=load_run("bench.jsonl"))
SteeringVector.from_pretrained("me/wedding").add(8.0)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fgsteer.errors import DataError, FormatError
from fgsteer.errors.escaping import escape_markdown, markdown_code, redact
from fgsteer.evaluation.drawing import rendered
from fgsteer.evaluation.runs.plots import setting_curves
from fgsteer.models.shipped import find_shipped
from fgsteer.receipts.record import PROVENANCE, parse_receipt
from fgsteer.storage.atomic import atomic_folder, atomic_write
from fgsteer.storage.network import describe_unreachable, hub_is_reachable, hub_or_cache
from fgsteer.vector import FEATURE_FACTS, FILE_NAME, MeasuredRun, SteeringVector
from fgsteer.vector.provenance import part_of

if TYPE_CHECKING:
    from fgsteer.evaluation.runs.records import Setting

CARD = "README.md"
CURVE = "curve.png"
MAX_FEATURES = 20  # rows of a card's table of features
_LABELLED = ("| id | label | weight | density |", "|---|---|---|---|")  # heads of the table of features
_UNLABELLED = ("| id | weight | density |", "|---|---|---|")
MEASURES = ("behavior", "coherence", "bcs")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)  # another name is put in no address and in no code


def save_folder(
    vector: SteeringVector, folder: str | Path, run: MeasuredRun | None = None, method: str | None = None
) -> None:
    """Write a new folder with the vector, its card and, given a ``run`` of bench that measured it, its BCS curve.

    ``method`` is what the run calls the vector's method, by default what the vector's provenance says. Raises DataError
    for a run that did not measure it at this layer, FormatError where the folder cannot be written.
    """
    settings = [] if run is None else _measured(vector, run, method)
    files = {CARD: card(vector, settings, run).encode()}
    if run is not None:
        files[CURVE] = rendered(setting_curves(run, settings), "png")
    with atomic_folder(folder) as new_folder:
        vector.save(new_folder / FILE_NAME)
        for name, data in files.items():
            with atomic_write(new_folder / name) as temporary:
                temporary.write_bytes(data)


def push(
    vector: SteeringVector,
    repo_id: str,
    run: MeasuredRun | None,
    method: str | None,
    *,
    token: str | None = None,
    private: bool | None = None,
    **upload: Any,
) -> str:
    """Upload what ``save_folder`` writes, as one commit, and return its address. Raises FormatError."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not hub_is_reachable():
        raise FormatError(
            f"{repo_id} was not written. {constants.ENDPOINT} cannot be reached.",
            "a connection to the hub",
            "connect, or write a folder with save_pretrained and upload it later",
        )
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save_folder(vector, Path(folder) / "vector", run, method)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=Path(folder) / "vector",
                **{"commit_message": "Steering vector by fgsteer", **upload},
            )
            return str(commit.commit_url)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = _reason(error, token)
    raise FormatError(
        f"{repo_id} was not written. {_as_sentence(reason)}",
        "a repository that your token may write to",
        "log in with hf auth login, or pass token=",
    )


def _reason(error: Exception, token: str | None) -> str:
    """The first line of the hub's own message, with the token cut out of it.

    Our error is raised after the except block: inside it, the hub's error would be attached and show the token.
    """
    from huggingface_hub import get_token

    return redact(token or get_token() or "", str(error).strip()).partition("\n")[0]


def _as_sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


def fetch(source: str | Path, filename: str, revision: str | None, token: str | None) -> Path:
    """The path of a vector's file in a folder, or downloaded from a repository or found in the cache.

    Raises FormatError where there is no such file, or it cannot be read.
    """
    if (folder := Path(source)).is_dir():
        return folder / filename
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with hub_or_cache(source) as reachable:
        try:
            return Path(hf_hub_download(str(source), filename, revision=revision, token=token))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = _reason(error, token) if reachable else describe_unreachable()
    raise FormatError(
        f"There is no {filename} in {source}. {_as_sentence(reason)}",
        "a folder, or a repository that push_to_hub wrote",
        "name the file with filename=, or log in with hf auth login where the repository is private",
    )


def _measured(vector: SteeringVector, run: MeasuredRun, method: str | None) -> list[Setting]:
    """The run's settings of this vector, by coefficient. Raises DataError for none."""
    concept, name = _concept(vector), method or str(vector.provenance.get("method"))
    wanted = (concept, name, vector.hookpoint.layer)
    settings = [s for s in run.settings if s[:3] == wanted and s.matched is None]
    if not settings:
        measured = sorted(
            {f"{s.method} at layer {s.layer}" for s in run.settings if s.concept == concept and s.layer is not None}
        )
        raise DataError(
            f"a run that has {', '.join(measured) or 'other concepts'}",
            f"a run that measured {name} of {concept or 'an unnamed concept'} at layer {vector.hookpoint.layer}",
            "pass method= as the run calls it, or no run",
        )
    return sorted(settings, key=lambda setting: setting.coefficient)


def _concept(vector: SteeringVector) -> str:
    """The name of the concept that a vector was made from, "" where it is not known."""
    data = vector.provenance.get("data")
    first = data[0] if isinstance(data, Sequence) and data else {}
    return str(first.get("name") or "") if isinstance(first, Mapping) else ""


def card(vector: SteeringVector, settings: Sequence[Setting] = (), run: MeasuredRun | None = None) -> str:
    """The model card: what the vector does and is made of, how it was measured, and how to load it.

    Names in it come from files, so each is escaped for the place where it stands.
    """
    import yaml

    model = str(part_of(vector.provenance, "model").get("name") or "")
    shipped = find_shipped(model)
    hub_model = shipped.original if shipped is not None else model if _HUB_ID.fullmatch(model) else ""
    best = max(settings, key=lambda s: run.mean(s, "tune"), default=None) if run is not None else None
    head: dict[str, Any] = {"library_name": "fgsteer", **({"base_model": hub_model} if hub_model else {})}
    head["tags"] = ["steering-vector", "activation-steering", "sparse-autoencoder"]
    lines = ["---", yaml.safe_dump(head, sort_keys=False) + "---", "", *_summary(vector, model), *_features(vector)]
    if run is not None and best is not None:
        lines += _table(settings, run, best)
    lines += _receipt(vector)
    lines += _use(hub_model or "…" if shipped is None else shipped.name, best)
    left_out = (*FEATURE_FACTS, PROVENANCE)
    provenance = {key: value for key, value in vector.provenance.items() if key not in left_out}
    block = json.dumps(provenance, indent=1, default=str)  # no line of it begins with what would end the block
    return "\n".join([*lines, "Made with fgsteer. How it was made, in full:", "", "```json", block, "```", ""])


def _summary(vector: SteeringVector, model: str) -> list[str]:
    """The lines that say what the vector does, and which SAE's features it is made of."""
    concept, method = (
        escape_markdown(_concept(vector)),
        escape_markdown(vector.provenance.get("method") or "a bare vector"),
    )
    sae, hyperparameters = part_of(vector.provenance, "sae"), part_of(vector.provenance, "hyperparameters")
    simple = [(key, value) for key, value in hyperparameters.items() if isinstance(value, int | float | str)]
    values = ", ".join(f"{key} = {value}" for key, value in simple)
    lines = [
        f"# {concept or 'Steering vector'}",
        "",
        f"Steers {markdown_code(model) if model else 'a model'}{f' towards **{concept}**' if concept else ''}: "
        f"a direction of width {vector.d_model} and norm {vector.norm:.4g} at `{vector.hookpoint}`, "
        f"made by {method}{f' ({markdown_code(values)})' if values else ''}.",
    ]
    if sae:
        source = markdown_code(sae.get("source") or "unnamed")
        lines += ["", f"Features are those of the SAE {source} ({escape_markdown(sae.get('d_sae', '?'))} features)."]
    return lines


def _features(vector: SteeringVector) -> list[str]:
    """The lines of the table of features, none for a vector without any."""
    if not vector.features:
        return []
    top = vector.top_features(MAX_FEATURES)
    labelled = any(feature.label for feature in top)
    lines = ["", "## Features", "", *(_LABELLED if labelled else _UNLABELLED)]
    for feature in top:
        density = "" if feature.density is None else f"{feature.density:.3%}"
        label = f" {escape_markdown(feature.label)} |" if labelled else ""
        lines.append(f"| {feature.id} |{label} {feature.weight:.4g} | {density} |")
    if len(vector.features) > MAX_FEATURES:
        lines.append(f"\nand {len(vector.features) - MAX_FEATURES} more of smaller weight.")
    return lines


def _receipt(vector: SteeringVector) -> list[str]:
    """The lines of the receipt that a vector holds, none for a vector without one, or with something else there."""
    try:
        receipt = parse_receipt(vector.provenance.get(PROVENANCE))
    except (TypeError, ValueError):
        return []
    if receipt.hookpoint != str(vector.hookpoint) or not math.isclose(receipt.norm, vector.norm, rel_tol=1e-4):
        return []  # of the vector before it was scaled
    facts = receipt.facts()
    lines = [
        "",
        "## Receipt",
        "",
        "What the vector does besides, at the strength that is named.",
        "",
        "| | |",
        "|---|---|",
    ]
    return [*lines, *(f"| {escape_markdown(name)} | {escape_markdown(fact)} |" for name, fact in facts.items())]


def _use(model: str, best: Setting | None) -> list[str]:
    """The lines of code that load the model and the vector, and generate."""
    coefficient = "fg.calibrate(model, tokenizer, vector.add, fg.load_neutral()[0][:16], target_ce_rise=0.5)"
    if best is not None:
        coefficient = f"{best.coefficient:.4g}  # the best one, chosen on texts that the table leaves out"
    return [
        "",
        "## Use",
        "",
        "```python",
        "import fgsteer as fg",
        "",
        f"model, tokenizer = fg.load_model({model!r})",
        "vector = fg.SteeringVector.from_pretrained('…')  # this repository",
        f"coefficient = {coefficient}",
        "print(fg.generate(model, tokenizer, 'I think', steering=vector.add(coefficient), max_new_tokens=40))",
        "```",
        "",
    ]


def _table(settings: Sequence[Setting], run: MeasuredRun, best: Setting) -> list[str]:
    """The lines of the table of measures by coefficient, on the half of the texts that chose nothing."""
    judge = (run.header.get("plan") or {}).get("judge")
    name = escape_markdown(judge.get("name") or "unnamed") if isinstance(judge, Mapping) else "unnamed"
    lines = [
        "",
        "## Measured",
        "",
        f"![BCS by coefficient]({CURVE})",
        "",
        f"Behavior (judge: {name}), coherence and their product BCS, each in [0, 1]. The coefficient in bold was "
        "chosen on other texts than those of this table.",
        "",
        "| coefficient | behavior | coherence | BCS |",
        "|---|---|---|---|",
    ]
    for setting in settings:
        mark = "**" if setting is best else ""
        numbers = " | ".join(f"{run.mean(setting, measure=m):.3f}" for m in MEASURES)
        lines.append(f"| {mark}{setting.coefficient:.4g}{mark} | {numbers} |")
    return lines
