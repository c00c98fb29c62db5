"""A vector in a folder or a Hugging Face repository: its file, a card, and what was measured of it.

vec.push_to_hub("me/wedding", run=load_run("bench.jsonl"))
SteeringVector.from_pretrained("me/wedding").add(8.0)
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fgsteer.errors import DataError, FormatError
from fgsteer.errors.escaping import escape_markdown, markdown_code, redact
from fgsteer.models.embedded import model_name
from fgsteer.storage.atomic import atomic_folder, atomic_write
from fgsteer.storage.network import describe_unreachable, hub_is_reachable, hub_or_cache
from fgsteer.vector import FILE_NAME, OF_FEATURES, MeasuredRun, SteeringVector

if TYPE_CHECKING:
    from fgsteer.evaluation.runs.records import Setting

CARD = "README.md"
CURVE = "curve.png"
FEATURES = 20
_LABELLED = ("| id | label | weight | density |", "|---|---|---|---|")  # heads of the table of features
_UNLABELLED = ("| id | weight | density |", "|---|---|---|")
MEASURES = ("behavior", "coherence", "bcs")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)  # all else stands in no address and in no code


def save_folder(
    vector: SteeringVector, folder: str | Path, run: MeasuredRun | None = None, method: str | None = None
) -> None:
    """A new folder with the vector, its card and, given a ``run`` of bench that has it, its BCS curve.

    ``method`` is what the run calls it, by default what the vector's provenance says. Raises
    DataError for a run without that method at this layer, FormatError where it cannot be written.
    """
    points = [] if run is None else _measured(vector, run, method)
    files = {CARD: card(vector, points, run).encode()}
    if run is not None:
        files[CURVE] = _picture(points, run)
    with atomic_folder(folder) as inside:
        vector.save(inside / FILE_NAME)
        for name, data in files.items():
            with atomic_write(inside / name) as beside:
                beside.write_bytes(data)


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
    """Upload what ``save_folder`` makes, as one commit; the address of the commit. Raises FormatError."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not hub_is_reachable():
        raise FormatError(f"{repo_id} was not written: {constants.ENDPOINT} cannot be reached", "a network")
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save_folder(vector, Path(folder) / "vector", run, method)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            told = api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=Path(folder) / "vector",
                **{"commit_message": "Steering vector by fgsteer", **upload},
            )
            return str(told.commit_url)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            why = _told(error, token)
    raise FormatError(
        f"{repo_id} was not written: {why}",
        "a repository that your token may write to",
        "hf auth login, or pass token=",
    )


def _told(error: Exception, token: str | None) -> str:
    """What the hub says of an error, without the token, were it to say that.

    What is raised of it is raised after the except block: in one, the error would go along and say it all.
    """
    from huggingface_hub import get_token

    return redact(token or get_token() or "", str(error).strip()).partition("\n")[0]


def fetch(source: str | Path, filename: str, revision: str | None, token: str | None) -> Path:
    """The vector's file in a folder, or downloaded from a repository (from the cache where it is there).

    Raises FormatError with what to do.
    """
    if (folder := Path(source)).is_dir():
        return folder / filename
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with hub_or_cache(source) as reachable:
        try:
            return Path(hf_hub_download(str(source), filename, revision=revision, token=token))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            why = _told(error, token) if reachable else describe_unreachable()
    raise FormatError(
        f"no {filename} in {source}: {why}",
        "a folder, or a repository written by push_to_hub",
        "name the file with filename=, or log in where it is private",
    )


def _measured(vector: SteeringVector, run: MeasuredRun, method: str | None) -> list[Setting]:
    """The run's settings of this vector, by coefficient. Raises DataError for none."""
    concept, name = _concept(vector), method or str(vector.provenance.get("method"))
    here = (concept, name, vector.hookpoint.layer)
    found = [s for s in run.settings if s[:3] == here and s.matched is None]
    if not found:
        had = sorted(
            {f"{s.method} at layer {s.layer}" for s in run.settings if s.concept == concept and s.layer is not None}
        )
        raise DataError(
            f"a run without {name} of {concept or 'an unnamed concept'} at layer {vector.hookpoint.layer}",
            f"one that measured it: this one has {', '.join(had) or 'other concepts'}",
            "pass method= as the run calls it, or no run",
        )
    return sorted(found, key=lambda setting: setting.coefficient)


def _concept(vector: SteeringVector) -> str:
    data = vector.provenance.get("data")
    first = data[0] if isinstance(data, Sequence) and data else {}
    return str(first.get("name") or "") if isinstance(first, Mapping) else ""


def _made(vector: SteeringVector, key: str) -> Mapping[str, Any]:
    """A part of the provenance, empty where a file holds something else there."""
    value = vector.provenance.get(key)
    return value if isinstance(value, Mapping) else {}


def card(vector: SteeringVector, points: Sequence[Setting] = (), run: MeasuredRun | None = None) -> str:
    """The model card: what the vector does and is made of, how it was measured, how to load it.

    Names in it come from files: each is escaped for where it stands.
    """
    import yaml

    model = str(_made(vector, "model").get("name") or "")
    embedded = model == model_name()
    hub_model = model if _HUB_ID.fullmatch(model) and not embedded else ""
    best = max(points, key=lambda s: run.mean(s, "tune"), default=None) if run is not None else None
    head: dict[str, Any] = {"library_name": "fgsteer", **({"base_model": hub_model} if hub_model else {})}
    head["tags"] = ["steering-vector", "activation-steering", "sparse-autoencoder"]
    lines = ["---", yaml.safe_dump(head, sort_keys=False) + "---", "", *_summary(vector, model), *_features(vector)]
    if run is not None and best is not None:
        lines += _table(points, run, best)
    lines += _use("default" if embedded else hub_model or "…", best)
    told = {key: value for key, value in vector.provenance.items() if key not in OF_FEATURES}
    made = json.dumps(told, indent=1, default=str)  # no line of it begins with what would end the block
    return "\n".join([*lines, "Made with fgsteer. How it was made, in full:", "", "```json", made, "```", ""])


def _summary(vector: SteeringVector, model: str) -> list[str]:
    """What the vector does, and which SAE's features it is made of."""
    concept, method = (
        escape_markdown(_concept(vector)),
        escape_markdown(vector.provenance.get("method") or "a bare vector"),
    )
    sae, given = _made(vector, "sae"), _made(vector, "hyperparameters")
    plain = ", ".join(f"{key} = {value}" for key, value in given.items() if isinstance(value, int | float | str))
    lines = [
        f"# {concept or 'Steering vector'}",
        "",
        f"Steers {markdown_code(model) if model else 'a model'}{f' towards **{concept}**' if concept else ''}: "
        f"a direction of width {vector.d_model} and norm {vector.norm:.4g} at `{vector.hookpoint}`, "
        f"made by {method}{f' ({markdown_code(plain)})' if plain else ''}.",
    ]
    if sae:
        source = markdown_code(sae.get("source") or "unnamed")
        lines += ["", f"Features are those of the SAE {source} ({escape_markdown(sae.get('d_sae', '?'))} features)."]
    return lines


def _features(vector: SteeringVector) -> list[str]:
    if not vector.features:
        return []
    top = vector.top_features(FEATURES)
    labelled = any(feature.label for feature in top)
    lines = ["", "## Features", "", *(_LABELLED if labelled else _UNLABELLED)]
    for feature in top:
        density = "" if feature.density is None else f"{feature.density:.3%}"
        label = f" {escape_markdown(feature.label)} |" if labelled else ""
        lines.append(f"| {feature.id} |{label} {feature.weight:.4g} | {density} |")
    if len(vector.features) > FEATURES:
        lines.append(f"\nand {len(vector.features) - FEATURES} more of smaller weight.")
    return lines


def _use(model: str, best: Setting | None) -> list[str]:
    """Code that loads the model and the vector, and generates."""
    coefficient = "fg.calibrate(model, tokenizer, vector.add, fg.load_neutral()[0][:16], target_ce_rise=0.5)"
    if best is not None:
        coefficient = f"{best.coefficient:.4g}  # the best on texts that the table leaves out"
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


def _table(points: Sequence[Setting], run: MeasuredRun, best: Setting) -> list[str]:
    """What the run's half that chose nothing says of every coefficient."""
    judge = (run.header.get("plan") or {}).get("judge")
    name = escape_markdown(judge.get("name") or "unnamed") if isinstance(judge, Mapping) else "unnamed"
    lines = [
        "",
        "## Measured",
        "",
        f"![BCS by coefficient]({CURVE})",
        "",
        f"Behavior (judge: {name}), coherence and their product BCS, each in [0, 1], of texts "
        "that chose nothing; the coefficient in bold was the best on others.",
        "",
        "| coefficient | behavior | coherence | BCS |",
        "|---|---|---|---|",
    ]
    for setting in points:
        mark = "**" if setting is best else ""
        numbers = " | ".join(f"{run.mean(setting, measure=m):.3f}" for m in MEASURES)
        lines.append(f"| {mark}{setting.coefficient:.4g}{mark} | {numbers} |")
    return lines


def _picture(points: Sequence[Setting], run: MeasuredRun) -> bytes:
    """Behavior, coherence and BCS by coefficient, as PNG, the same bytes every time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), dpi=150, layout="constrained")
    axes = figure.subplots()
    for measure, style in zip(MEASURES, (":", "--", "-"), strict=True):
        values = [run.mean(setting, measure=measure) for setting in points]
        axes.plot(
            [setting.coefficient for setting in points],
            values,
            style,
            marker="o",
            markersize=3,
            label=measure.replace("bcs", "BCS"),
        )
    axes.set(xlabel="coefficient", ylim=(0, 1))
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
