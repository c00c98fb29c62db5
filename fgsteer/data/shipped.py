"""The contrast sets and neutral texts that ship with the package."""

from __future__ import annotations

from pathlib import Path

from fgsteer.storage.json_files import read_json

SHIPPED = Path(__file__).resolve().parent / "contrast_sets"
_NEUTRAL = SHIPPED.with_name("neutral.json")


def shipped_contrasts() -> list[str]:
    """Return the names of the contrast sets that ship with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load_neutral() -> tuple[list[str], list[str]]:
    """Load the shipped neutral sentences and neutral prompts, which are on no behavior in particular."""
    value = read_json(_NEUTRAL)
    return list(value["texts"]), list(value["prompts"])


def load_bench_prompts() -> list[str]:
    """Load the prompts that a benchmark draws from: those of ``load_neutral``, then more than as many again."""
    value = read_json(_NEUTRAL)
    return [*value["prompts"], *value["more_prompts"]]
