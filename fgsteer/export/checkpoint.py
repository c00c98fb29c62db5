"""Ordinary Hugging Face checkpoints with the steering inside, which every engine that loads the model runs.

write([vec.add(8.0, bos=True)], "steered", model, tokenizer)         vllm serve steered
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fgsteer.export.places import Interventions, checked
from fgsteer.files import whole_folder
from fgsteer.folding import fold
from fgsteer.targets import new_folder

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
    new_folder(folder)
    if tokenizer is not None and tokenizer.name_or_path:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)  # as it was before it padded
    folded = fold(model, checked(interventions), copy=copy)
    with whole_folder(folder) as beside:
        folded.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
    return folded
