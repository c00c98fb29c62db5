"""Which pretrained SAEs there are: sae-lens's registry, read without importing sae-lens.

    for row in registry(model="gemma-2-2b", layer=12): print(row.release, row.sae_id)

Releases name layer, site and width in their ids, each in its own way. What the names do not tell is left empty, and
is known once the SAE is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fgsteer.display.tables import Cell, Table
from fgsteer.errors import FormatError
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.models.names import bare_name

_HOOK = re.compile(r"blocks\.\d+\.(?:attn\.)?hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out|z)(?![a-z])")
_LAYER = re.compile(r"(?:blocks\.|layer_?|^l)(\d+)")
_WIDTH = re.compile(r"width[_-](\d+[km]|2pow\d+)|[-_]w?(\d+k)(?![a-z0-9])")
# (conversion, pattern in repository or path, hook that the SAE writes); the first that matches decides
_SITES: tuple[tuple[str, str, str], ...] = (
    ("gemma_2", r"-res/(?!.*embedding)", "hook_resid_post"),
    ("gemma_2", r"-mlp/", "hook_mlp_out"),
    ("gemma_2", r"-att/", "attn.hook_z"),
    ("gemma_3", r"/resid_post", "hook_resid_post"),
    ("gemma_3", r"/attn_out", "attn.hook_z"),
    ("gemma_3", r"/(mlp_out|transcoder)", "hook_mlp_out"),
    ("llama_scope", r"L\d+R", "hook_resid_post"),
    ("llama_scope", r"L\d+A", "hook_attn_out"),
    ("llama_scope", r"L\d+M", "hook_mlp_out"),
    ("llama_scope_r1_distill", r"L\d+R", "hook_resid_post"),
    ("gemma_2_transcoder", r"", "hook_mlp_out"),
    ("mwhanna_transcoder", r"", "hook_mlp_out"),
    ("mntss_clt_layer_transcoder", r"", "hook_mlp_out"),
    ("dictionary_learning_1", r"resid_post_layer", "hook_resid_post"),
    ("qwen_scope", r"", "hook_resid_post"),
    ("goodfire", r"", "hook_resid_post"),
)


@dataclass(frozen=True, repr=False)
class RegistryRow(OneLineRepr):
    """One pretrained SAE: the arguments of ``load_sae(release, sae_id)``, and what its names tell.

    Attributes:
        release: The release.
        sae_id: The SAE in the release.
        model: The model that it was trained on.
        hookpoint: Where it writes, "" where the names do not tell.
        layer: Its 0-based layer, None where the names do not tell.
        width: Its number of features as it is named ("16k", "2pow14").
        l0: Mean number of active features on a token.
        neuronpedia: Its id on Neuronpedia.
        repo_id: Its Hugging Face repository.
        path: Its folder there.
        conversion: The layout of its files, by sae-lens's name.
        norm_scaling_factor: The factor on its input, where the registry has one.
        overrides: Fields of its config that the registry sets.
    """

    release: str
    sae_id: str
    model: str
    hookpoint: str = ""
    layer: int | None = None
    width: str = ""
    l0: float | None = None
    neuronpedia: str = ""
    repo_id: str = ""
    path: str = ""
    conversion: str = "sae_lens"
    norm_scaling_factor: float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON."""
        return asdict(self)

    def cells(self) -> dict[str, Cell]:
        """Return what a table shows of the row."""
        names = ("release", "sae_id", "model", "hookpoint", "width")
        return {**{name: getattr(self, name) for name in names}, "L0": self.l0}


def registry(model: str | None = None, layer: int | None = None, search: str = "") -> Table[RegistryRow]:
    """List the pretrained SAEs of sae-lens's registry.

    Args:
        model: Only those of this model. Names match whatever the organisation or the spelling (gpt2 and gpt2-small),
            or else by a part (qwen3: every Qwen 3).
        layer: Only those of this 0-based layer.
        search: Only those with every word of it in their names.

    Returns:
        Rows sorted by release, layer and id, numbers as numbers.

    Raises:
        FormatError: sae-lens is not installed.
    """
    words, models = search.lower().split(), None if model is None else models_named(model)
    rows = [
        row
        for name, release in _releases().items()
        if models is None or bare_name(str(release["model"])) in models
        for row in _rows(name, release)
        if (layer is None or row.layer == layer)
        and all(word in f"{row.release} {row.sae_id} {row.hookpoint} {row.neuronpedia}".lower() for word in words)
    ]
    return Table(sorted(rows, key=lambda row: (row.release, _natural(row.sae_id))))


def models_named(model: str) -> set[str]:
    """Return the bare names of models that a name means: the one of this name, else those that it is a part of."""
    known = {bare_name(str(release["model"])) for release in _releases().values()}
    bare = bare_name(model)
    return {bare} & known or {name for name in known if _letters(bare) in _letters(name)}


def models_like(model: str) -> list[str]:
    """Return the bare names of models that are spelt similarly, the nearest first."""
    known = {bare_name(str(release["model"])) for release in _releases().values()}
    return get_close_matches(bare_name(model), sorted(known), 5, 0.4)


def _letters(name: str) -> str:
    """Return a name without what separates its words: qwen3 and Qwen-3 become the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_row(release: str, sae_id: str) -> RegistryRow | None:
    """Find the row of a release and id; None for a release outside the registry that may be a repository.

    Raises FormatError naming the nearest releases, or ids of the release.
    """
    releases = _releases()
    if release not in releases:
        if "/" in release:
            return None
        near = get_close_matches(release, releases, 5, 0.5)
        raise FormatError(
            f"There is no release {release!r} in sae-lens's registry.",
            f"a release such as {', '.join(near)}" if near else "a release or a Hugging Face repository",
            "list the releases with fgsteer saes --search TEXT",
        )
    rows = {row.sae_id: row for row in _rows(release, releases[release])}
    if sae_id not in rows:
        near = get_close_matches(sae_id, rows, 5, 0.0)
        raise FormatError(
            f"There is no SAE {sae_id!r} in the release {release}.",
            f"one of its {len(rows)} ids, such as {', '.join(near)}",
            f"list them with fgsteer saes --search {release}",
        )
    return rows[sae_id]


def need_sae_lens(what: str) -> Path:
    """Return the folder of the package sae-lens, which alone reads ``what``. Raises FormatError without it."""
    spec = find_spec("sae_lens")
    if spec is None or not spec.origin:
        raise FormatError(
            f"{what} is read by sae-lens, which is not installed.", change="install it with pip install sae-lens"
        )
    return Path(spec.origin).parent


@cache
def _releases() -> dict[str, dict[str, Any]]:
    """Load the registry file of the installed sae-lens. Raises FormatError without one."""
    import yaml

    path = need_sae_lens("The registry of pretrained SAEs") / "pretrained_saes.yaml"
    with path.open(encoding="utf-8") as file:
        # the C loader takes 0.7 s for the file, the Python one ten times that
        loaded: dict[str, dict[str, Any]] = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return loaded


def _rows(name: str, release: Mapping[str, Any]) -> Iterator[RegistryRow]:
    """Yield the rows of a release."""
    for entry in release["saes"]:
        sae_id, path, repo_id = str(entry["id"]), str(entry["path"]), str(release["repo_id"])
        conversion = str(release.get("conversion_func") or "sae_lens")
        neuronpedia = str(entry.get("neuronpedia") or "")
        match = _LAYER.search(sae_id) or _LAYER.search(path)
        layer = int(match[1]) if match else None
        width = _WIDTH.search(f"{sae_id} {path}") or _WIDTH.search(f"{neuronpedia} {name}")
        yield RegistryRow(
            release=name,
            sae_id=sae_id,
            model=str(release["model"]),
            hookpoint=_hookpoint(conversion, sae_id, f"{repo_id}/{path}", layer),
            layer=layer,
            width=(width[1] or width[2]) if width else "",
            l0=float(entry["l0"]) if entry.get("l0") else None,
            neuronpedia=neuronpedia,
            repo_id=repo_id,
            path=path,
            conversion=conversion,
            norm_scaling_factor=entry.get("norm_scaling_factor"),
            overrides={**(release.get("config_overrides") or {}), "neuronpedia_id": neuronpedia or None},
        )


def _hookpoint(conversion: str, sae_id: str, place: str, layer: int | None) -> str:
    """Return the name of the hookpoint that an SAE writes, where id, repository and path tell it, else ""."""
    if layer is None:
        return ""
    if match := _HOOK.search(sae_id):
        return f"blocks.{layer}.{'attn.hook_z' if match[1] == 'z' else f'hook_{match[1]}'}"
    for kind, pattern, hook in _SITES:
        if kind == conversion and re.search(pattern, place):
            return f"blocks.{layer}.{hook}"
    return ""


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a sort key under which layer_9 comes before layer_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
