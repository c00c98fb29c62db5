"""Ordinary Hugging Face checkpoints with the steering inside, which every engine that loads the model runs.

write([vec.add(8.0, bos=True)], "steered", model, tokenizer)         vllm serve steered
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fgsteer.export.folding import fold
from fgsteer.export.requirements import Interventions, listed
from fgsteer.export.table import ExportInputs
from fgsteer.interventions import Intervention
from fgsteer.storage.atomic import atomic_folder
from fgsteer.storage.targets import new_folder_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write(
    interventions: Interventions,
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    copy: bool = True,
) -> PreTrainedModel:
    """Write ``fold(model, interventions)`` and the tokenizer into a new folder, all of it or nothing.

    Args:
        interventions: The Adds to fold into the model's biases.
        folder: The folder to make. It may be there if it is empty.
        model: The model that is steered.
        tokenizer: Its tokenizer, which is written as it was before it padded; None writes the model alone.
        copy: Whether to leave ``model`` as it is, at the cost of the memory of a second one.

    Returns:
        The folded model.

    Raises:
        FormatError: The folder is not free or cannot be written.
        SteeringError, HookpointError, PairingError: As ``fold`` raises them.
    """
    new_folder_target(folder)
    folded = fold(model, listed(interventions), copy=copy)
    save(folded, folder, tokenizer)
    return folded


def save(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a model, such as an orthogonalised one, and its tokenizer into a new folder, all of it or nothing.

    Args:
        model: The model.
        folder: The folder to make. It may be there if it is empty.
        tokenizer: Its tokenizer, which is written as it was before it padded; None writes the model alone.

    Raises:
        FormatError: The folder is not free or cannot be written.
    """
    if tokenizer is not None:
        tokenizer = _as_saved(tokenizer, model)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def export(interventions: Sequence[Intervention], path: Path, inputs: ExportInputs) -> list[Path]:
    """The exporter of the table of exports: ``write`` into the model that is loaded."""
    new_folder_target(path)
    model, tokenizer = inputs.load_model()
    write(interventions, path, model, tokenizer, copy=False)
    return [path]


def _as_saved(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer as its files have it: loaded again, at the model's revision if it is the model's own.

    Code of its own runs only where it has run already: the class of this tokenizer came from it.
    """
    from transformers import AutoTokenizer

    name = tokenizer.name_or_path
    if not name:
        return tokenizer
    is_models_own = name == getattr(model.config, "_name_or_path", None)
    has_own_code = type(tokenizer).__module__.startswith("transformers_modules.")
    revision = getattr(model.config, "_commit_hash", None) if is_models_own else None
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name, revision=revision, trust_remote_code=has_own_code
    )
    return loaded
