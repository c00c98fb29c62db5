"""Names of models, one for all spellings. This module loads no torch."""

from __future__ import annotations

import re

_ALIASES = {"gpt2-small": "gpt2", "mistral-7b": "mistral-7b-v0.1"}  # TransformerLens's names
_SNAPSHOT = re.compile(r"models--[^/]*?--([^/]+)/snapshots/[^/]+")  # a folder of the Hugging Face cache


def bare_name(model: str) -> str:
    """Return a model's name without organisation, folder or snapshot, in lower case: the same for all spellings."""
    name = _SNAPSHOT.sub(r"\1", model.replace("\\", "/").rstrip("/")).rsplit("/", 1)[-1].lower()
    return _ALIASES.get(name, name).removeprefix("meta-")
