"""The contrast sets, neutral texts and questions that ship with the package."""

from __future__ import annotations

from pathlib import Path

from fgsteer.storage.json_files import read_json

_DATA = Path(__file__).resolve().parent
SHIPPED, _REPLIES = _DATA / "contrast_sets", _DATA / "chat_sets"
_NEUTRAL, _CHOICES = _DATA / "neutral.json", _DATA / "multiple_choice.json"


def shipped_contrasts(*, chat: bool = False) -> list[str]:
    """Return the names of the contrast sets that ship with the package.

    Args:
        chat: Return those of a chat model's replies, which need a tokenizer with a chat template, in place of those of
            sentences.
    """
    return sorted(path.stem for path in (_REPLIES if chat else SHIPPED).glob("*.json"))


def shipped_path(name: str) -> Path | None:
    """Return the file of a contrast set that ships with the package, or None for another name."""
    for chat, folder in ((False, SHIPPED), (True, _REPLIES)):
        if name in shipped_contrasts(chat=chat):
            return folder / f"{name}.json"
    return None


def load_neutral() -> tuple[list[str], list[str]]:
    """Load the shipped neutral sentences and neutral prompts, which are on no behavior in particular."""
    value = read_json(_NEUTRAL)
    return list(value["texts"]), list(value["prompts"])


def load_bench_prompts() -> list[str]:
    """Load the prompts that a benchmark draws from: those of ``load_neutral``, then more than as many again."""
    value = read_json(_NEUTRAL)
    return [*value["prompts"], *value["more_prompts"]]


def load_chat_prompts() -> list[list[dict[str, str]]]:
    """Load the questions that a benchmark asks a chat model, each as messages, on no behavior in particular."""
    return [[{"role": "user", "content": question}] for question in read_json(_NEUTRAL)["questions"]]


def load_choices() -> list[tuple[str, list[str], int]]:
    """Load the shipped questions of common knowledge, each with four answers and the number of the right one."""
    return [(row["question"], list(row["answers"]), row["correct"]) for row in read_json(_CHOICES)["questions"]]
