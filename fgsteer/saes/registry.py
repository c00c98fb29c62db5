"""What pretrained SAEs there are: sae-lens's registry, read without importing sae-lens.

    for row in registry(model="gemma-2-2b", layer=12): print(row.release, row.sae_id)

Releases name layer, site and width in their ids, each in its own way: what cannot be told
from the names is left empty, and is known once the SAE is loaded.
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

from fgsteer.errors import FormatError
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.models.names import bare_name

_HOOK = re.compile(r"blocks\.\d+\.(?:attn\.)?hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out|z)(?![a-z])")


_LAYER = re.compile(r"(?:blocks\.|layer_?|^l)(\d+)")


_WIDTH = re.compile(r"width[_-](\d+[km]|2pow\d+)|[-_]w?(\d+k)(?![a-z0-9])")


# (conversion, pattern in repository or path, hook written); the first that matches decides
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
    """One pretrained SAE: what ``load_sae(release, sae_id)`` takes, and what its names tell.

    ``hookpoint`` is where it writes, "" when the names do not say; ``width`` is as named
    ("16k", "2pow14"); ``l0`` mean active features per token; ``neuronpedia`` its id there.
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
        """Plain JSON."""
        return asdict(self)


def registry(model: str | None = None, layer: int | None = None, search: str = "") -> list[RegistryRow]:
    """The registry's SAEs, of a model, of a 0-based layer, and with every word of ``search`` in their names.

    Models match by name whatever the organisation or the spelling (gpt2 and gpt2-small), else by a part of it
    (qwen3: every Qwen 3). Sorted by release, layer and id, numbers as numbers. Raises FormatError when sae-lens
    is not installed.
    """
    words, named = search.lower().split(), None if model is None else models_named(model)
    rows = [
        row
        for name, release in _releases().items()
        if named is None or bare_name(str(release["model"])) in named
        for row in _rows(name, release)
        if (layer is None or row.layer == layer)
        and all(word in f"{row.release} {row.sae_id} {row.hookpoint} {row.neuronpedia}".lower() for word in words)
    ]
    return sorted(rows, key=lambda row: (row.release, _natural(row.sae_id)))


def models_named(model: str) -> set[str]:
    """Bare names of the registry's models that a name means: the one of this name, else those that it is a part of."""
    known = {bare_name(str(release["model"])) for release in _releases().values()}
    asked = bare_name(model)
    return {asked} & known or {name for name in known if _letters(asked) in _letters(name)}


def models_like(model: str) -> list[str]:
    """Bare names of the registry's models that are spelt nearly so, the nearest first."""
    known = {bare_name(str(release["model"])) for release in _releases().values()}
    return get_close_matches(bare_name(model), sorted(known), 5, 0.4)


def _letters(name: str) -> str:
    """A name without what separates its words: qwen3 and Qwen-3 are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_row(release: str, sae_id: str) -> RegistryRow | None:
    """The row of a release and id; None for a release outside the registry that may be a repository.

    Raises FormatError naming the nearest releases, or ids of the release.
    """
    releases = _releases()
    if release not in releases:
        if "/" in release:
            return None
        near = get_close_matches(release, releases, 5, 0.5)
        raise FormatError(
            f"no release {release!r} in sae-lens's registry",
            f"one such as {', '.join(near)}" if near else "a release or a Hugging Face repository",
            "fgsteer saes --search TEXT lists them",
        )
    rows = {row.sae_id: row for row in _rows(release, releases[release])}
    if sae_id not in rows:
        near = get_close_matches(sae_id, rows, 5, 0.0)
        raise FormatError(
            f"no SAE {sae_id!r} in release {release}",
            f"one of its {len(rows)} ids, such as {', '.join(near)}",
            f"fgsteer saes --search {release} lists them",
        )
    return rows[sae_id]


@cache
def _releases() -> dict[str, dict[str, Any]]:
    """The registry file of the installed sae-lens. Raises FormatError without one."""
    import yaml

    spec = find_spec("sae_lens")
    path = Path(spec.origin).parent / "pretrained_saes.yaml" if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise FormatError("sae-lens is not installed", "its registry of pretrained SAEs", "pip install sae-lens")
    with path.open(encoding="utf-8") as file:
        # the C loader takes 0.7 s for the file, the Python one ten times that
        loaded: dict[str, dict[str, Any]] = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return loaded


def _rows(name: str, release: Mapping[str, Any]) -> Iterator[RegistryRow]:
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
    """Name of the hookpoint written, where id, repository and path tell it."""
    if layer is None:
        return ""
    if match := _HOOK.search(sae_id):
        return f"blocks.{layer}.{'attn.hook_z' if match[1] == 'z' else f'hook_{match[1]}'}"
    for kind, pattern, hook in _SITES:
        if kind == conversion and re.search(pattern, place):
            return f"blocks.{layer}.{hook}"
    return ""


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key under which layer_9 comes before layer_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
