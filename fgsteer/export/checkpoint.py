"""Ordinary Hugging Face checkpoints with the steering inside, which every engine that loads the model runs.

write([vec.add(8.0, bos=True)], "steered", model, tokenizer)         vllm serve steered
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fgsteer.export.folding import fold
from fgsteer.export.places import Interventions, checked
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
    """Write ``fold(model, interventions)`` and the tokenizer whole into a new folder; returns the folded model.

    Raises as ``fold`` does, FormatError for a folder that is not free or cannot be written.
    """
    new_folder_target(folder)
    if tokenizer is not None:
        tokenizer = _as_it_was(tokenizer, model)
    folded = fold(model, checked(interventions), copy=copy)
    with atomic_folder(folder) as beside:
        folded.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
    return folded


def _as_it_was(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer before it padded: read again, at the model's revision if it is the model's own.

    Code of its own runs only where it has run already: the class of this one came from it.
    """
    from transformers import AutoTokenizer

    name = tokenizer.name_or_path
    if not name:
        return tokenizer
    own = name == getattr(model.config, "_name_or_path", None)
    ran = type(tokenizer).__module__.startswith("transformers_modules.")
    revision = getattr(model.config, "_commit_hash", None) if own else None
    again: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=ran)
    return again
