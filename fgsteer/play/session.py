"""Sessions: a model with its SAEs, effects, excerpts and vectors, as the page uses them.

session = PlaySession.load("default")
session.sae("layer_2"), session.effects("layer_2"), session.vector_names()
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fgsteer.effects.approximator import EffectApproximator, load_effects
from fgsteer.errors import DataError, FormatError
from fgsteer.evaluation.judges.protocols import Judge
from fgsteer.models.chat import is_chat_model
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import check_pairing
from fgsteer.models.shipped import find_shipped
from fgsteer.play.plan import MAX_NAME_CHARS
from fgsteer.saes.examples import FeatureExamples
from fgsteer.saes.loading import load_examples, load_sae
from fgsteer.saes.sae import SAE
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Made = TypeVar("Made")
MAX_KEPT = 64
"""How many results of each kind are kept: contrasts, curves, unsteered texts."""
MAX_VECTORS = 256
_NAME = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9_.-]{{0,{MAX_NAME_CHARS - 1}}}")


@dataclass(frozen=True)
class SAESource:
    """Where an SAE comes from, as ``fg.load_sae`` takes it."""

    source: str
    sae_id: str | None = None


@dataclass(repr=False)
class PlaySession:
    """What the page plays with.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        model_name: What ``fg.load_model`` calls the model, for the code that the page shows.
        sources: Where each SAE comes from, by its key on the page.
        saes: The SAEs that are loaded, by key; others are loaded when they are first used.
        first_sae: The key of the SAE that the page begins with.
        dtype: The dtype that the model was loaded with, where one was asked for.
        folder: A folder of vectors, which are loaded from it and saved to it; None keeps them in memory alone.
        judge: What scores behavior, with the name of the concept; None where there is none.
        server: A served model that writes the texts, in place of the local model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model_name: str
    sources: Mapping[str, SAESource]
    saes: dict[str, SAE] = field(default_factory=dict)
    first_sae: str = ""
    dtype: str | None = None
    folder: Path | None = None
    judge: tuple[Judge, str] | None = None
    server: Any = None
    vectors: dict[str, SteeringVector] = field(default_factory=dict)
    _files: set[str] = field(default_factory=set)
    _kept: dict[str, OrderedDict[Hashable, Any]] = field(default_factory=dict)
    _effects: dict[str, EffectApproximator | None] = field(default_factory=dict)
    _examples: dict[str, FeatureExamples | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first_sae = self.first_sae or next(iter(self.sources))
        self.chats = is_chat_model(self.model, self.tokenizer)
        if self.folder is not None:
            for path in sorted(self.folder.glob("*.safetensors"))[:MAX_VECTORS]:
                self._take_file(path)

    def _take_file(self, path: Path) -> None:
        """Take the vector of a file, where it is one that fits the model; other files in the folder are left alone."""
        try:
            vector = SteeringVector.load(path)
            self.add_vector(path.stem, vector, save=False)
            self._files.add(path.stem)
        except (FormatError, DataError, ValueError):
            return

    def sae(self, key: str) -> SAE:
        """The SAE of a key, loaded on the model's device. Raises DataError for an unknown key."""
        if key not in self.saes:
            if key not in self.sources:
                raise DataError(f"the SAE {key!r:.80}", f"one of {', '.join(self.sources)}", "choose another SAE")
            source = self.sources[key]
            sae = load_sae(source.source, source.sae_id)
            check_pairing(self.model, sae.hookpoint, sae.d_model, sae.model_name, "SAE")
            self.saes[key] = sae
        return self.saes[key]

    def effects(self, key: str) -> EffectApproximator | None:
        """The effects measured on the SAE of a key; None where there are none."""
        if key not in self._effects:
            source = self.sources.get(key)
            shipped = None if source is None else find_shipped(source.source)
            measured = shipped is not None and source is not None and shipped.has_effects(source.sae_id)
            self._effects[key] = load_effects(source.source, source.sae_id) if measured and source else None
        return self._effects[key]

    def examples(self, key: str) -> FeatureExamples | None:
        """The excerpts of the SAE of a key; None where there are none."""
        if key not in self._examples:
            self._examples[key] = load_examples(self.sae(key))
        return self._examples[key]

    def vector(self, name: str) -> SteeringVector:
        """The vector of a name. Raises DataError for an unknown one."""
        if name not in self.vectors:
            raise DataError(
                f"the vector {name!r:.80}", f"one of {', '.join(self.vectors) or 'none'}", "load or save it first"
            )
        return self.vectors[name]

    def add_vector(self, name: str, vector: SteeringVector, *, save: bool = True) -> None:
        """Keep a vector under a name, and save it to the folder where there is one.

        Raises DataError for a name that files are not called by, or by which the folder has a file that is none of the
        page's vectors, PairingError for a vector that does not fit the model.
        """
        if not _NAME.fullmatch(name):
            raise DataError(
                f"the name {name!r:.80}",
                f"at most {MAX_NAME_CHARS} letters, digits, _, - and . (not first)",
                "choose another name",
            )
        check_pairing(self.model, vector.hookpoint, vector.d_model, "", "vector")
        if name not in self.vectors and len(self.vectors) >= MAX_VECTORS:
            raise DataError(f"{len(self.vectors)} vectors", f"at most {MAX_VECTORS}", "take one off the list first")
        if save and self.folder is not None:
            path = self.folder / f"{name}.safetensors"
            if name not in self._files and path.exists():
                raise DataError(f"the name {name}, which another file in the folder has", "a new name")
            vector.save(path)
            self._files.add(name)
        if name in self.vectors:
            self._kept.pop("curve", None)  # what the vector of this name cost that was here before
        self.vectors[name] = vector

    def forget_vector(self, name: str) -> None:
        """Take a vector off the list; a file of it stays. Raises DataError for an unknown name."""
        self.vector(name)
        del self.vectors[name]
        self._files.discard(name)
        self._kept.pop("curve", None)  # another vector may come under this name

    def file_of(self, name: str) -> Path | None:
        """The file in the folder that holds the vector of a name; None for one that is not saved there."""
        return self.folder / f"{name}.safetensors" if self.folder is not None and name in self._files else None

    def take_vector(self, name: str, vector: SteeringVector, *, save: bool = True) -> str:
        """Keep a vector from elsewhere, and return its name: the given one, or with a number where another has that.

        Raises as ``add_vector`` does.
        """
        names = (f"{name[: MAX_NAME_CHARS - 4]}-{number}" for number in count(2))
        free = next(n for n in (name, *islice(names, MAX_VECTORS)) if n not in self.vectors or self._is(n, vector))
        if free not in self.vectors:
            self.add_vector(free, vector, save=save)
        return free

    def _is(self, name: str, vector: SteeringVector) -> bool:
        """Whether the vector of a name steers as another does."""
        own = self.vectors[name]
        parts = [(own.direction, vector.direction), (own.reference, vector.reference)]
        values = [[None if part is None else part.tolist() for part in pair] for pair in parts]
        return own.hookpoint == vector.hookpoint and all(a == b for a, b in values)

    def kept(self, kind: str, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made of a key before, or is made now; of each kind the last ``MAX_KEPT`` are kept."""
        of_kind = self._kept.setdefault(kind, OrderedDict())
        if key not in of_kind:
            of_kind[key] = make()
        of_kind.move_to_end(key)
        while len(of_kind) > MAX_KEPT:
            of_kind.popitem(last=False)
        made: Made = of_kind[key]
        return made

    def layers(self) -> int:
        """How many blocks the model has."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def hookpoint(self, key: str, layer: int | None) -> Hookpoint:
        """Where a vector without features acts: at the end of a layer, or where an SAE does."""
        return self.sae(key).hookpoint if layer is None else Hookpoint.parse(layer)


def sae_sources(model: str, sae: str | None, sae_ids: list[str]) -> tuple[dict[str, SAESource], str]:
    """Where the SAEs of a model come from, by key, and the key of the first.

    Args:
        model: The model's name.
        sae: A folder or a release; by default that of a shipped model, with all its SAEs.
        sae_ids: Ids within it.

    Raises:
        DataError: The model is not shipped, and no SAE is named.
        FormatError: The shipped SAEs are not installed.
    """
    shipped = find_shipped(model if sae is None else sae)
    if shipped is not None and not sae_ids:
        ids = shipped.sae_ids()  # by layer: the page begins in the middle, from where steering reaches most of a text
        return {key: SAESource(shipped.name, key) for key in ids}, ids[len(ids) // 2]
    if sae is None and shipped is None:
        raise DataError(
            f"no SAE for the model {model!r:.80}",
            "an SAE that was trained on this model",
            "pass --sae with a folder or a release, and --sae-id",
        )
    source = shipped.name if shipped is not None else str(sae)
    keys: list[str | None] = [*sae_ids] or [None]
    sources = {key or Path(source).name: SAESource(source, key) for key in keys}
    return sources, next(iter(sources))
