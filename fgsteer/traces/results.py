"""A trace, as a value, as JSON and as a page.

found.texts[0].tokens[5].kl_steered_unsteered
found.write("trace.json")
fg.Trace.from_dict(json.loads(answer)).write("trace.html")       # what a server answered, or a file holds
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fgsteer.display.tables import Table
from fgsteer.errors import FormatError
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.json_files import write_json
from fgsteer.storage.json_values import value_of
from fgsteer.traces.page import trace_page
from fgsteer.traces.parts import TracedFeature, TracedIntervention, TracedText


@dataclass(frozen=True, repr=False)
class Trace(OneLineRepr):
    """What steering did to each token of some texts.

    Args:
        prompts: The prompts, of a conversation its last message.
        texts: Each prompt with its completions.
        interventions: What steered.
        features: The features whose activations the tokens hold.
        hookpoint: Where the features are read, "" without an SAE.
        settings: What was asked for, as plain JSON.
    """

    prompts: tuple[str, ...]
    texts: tuple[TracedText, ...]
    interventions: tuple[TracedIntervention, ...]
    features: tuple[TracedFeature, ...] = ()
    hookpoint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The trace as plain JSON: its fields, by name. A number that is not finite is None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @classmethod
    def from_dict(cls, plain: Any) -> Trace:
        """The trace of what ``as_dict`` gives, which a file of JSON or the answer of ``fgsteer serve`` holds.

        Raises FormatError for anything else.
        """
        try:
            found: Trace = value_of(cls, plain, "trace", nan_for_null=True)
        except (TypeError, ValueError, KeyError) as error:
            raise FormatError(f"This is no trace: {error!s:.200}.", "what Trace.as_dict() gives") from error
        for text in found.texts:
            if not (0 <= text.prompt < len(found.prompts) and 0 <= text.prompt_tokens <= len(text.tokens)):
                raise FormatError(
                    f"a text of prompt {text.prompt} with {text.prompt_tokens} tokens of it",
                    f"one of {len(found.prompts)} prompts, and no more tokens than the {len(text.tokens)} of the text",
                )
            for token in text.tokens:
                sizes = {len(token.features_before), len(token.features_after)}
                if sizes != {len(found.features)} or len(token.actions) not in (0, len(found.interventions)):
                    raise FormatError(
                        "a trace whose tokens hold other features or interventions than it has itself",
                        "what Trace.as_dict() gives",
                    )
        return found

    def page(self) -> str:
        """The trace as one HTML page that stands alone, without a script."""
        return trace_page(self)

    def write(self, path: str | Path) -> None:
        """Write a file in full or not at all: a page where its name ends in .html, JSON where it ends in .json.

        Raises FormatError for another name, or where the file cannot be written.
        """
        suffix = check_trace_name(path)
        if suffix == ".json":
            write_json(path, self.as_dict())
            return
        text = self.page()
        with atomic_write(path) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))

    def __str__(self) -> str:
        parts = [str(Table(self.texts))]
        parts += [str(Table(self.features))] if self.features else []
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        return Table(self.texts)._repr_html_() + (Table(self.features)._repr_html_() if self.features else "")


def check_trace_name(path: str | Path) -> str:
    """The ending of a file for a trace, ".html" or ".json". Raises FormatError for any other."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".html", ".json"):
        raise FormatError(
            f"{str(path)!r:.100} as the file of a trace", "a name that ends in .html or .json", "name it trace.html"
        )
    return suffix


def _plain(value: Any) -> Any:
    """A value for JSON: tuples as lists, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
