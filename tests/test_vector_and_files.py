"""Vectors: arithmetic, files, checks; hookpoints; contrast data; every damaged file is a typed error."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.data.corpora import read_documents
from fgsteer.interventions import apply
from fgsteer.models.hookpoints import resolve
from fgsteer.storage.files import write_tensors

AT = "blocks.1.hook_resid_post"


def vector(**extra):
    return fg.SteeringVector(torch.arange(4.0) + 1, AT, features={3: 2.0, 1: -3.0}, **extra)


def test_arithmetic():
    a, b = vector(), fg.SteeringVector(torch.ones(4), AT, features={3: 1.0})
    assert torch.equal((a + b).direction, a.direction + 1)
    assert torch.equal((a - b * 2).direction, a.direction - 2)
    assert torch.equal((-a).direction, (a * -1).direction)
    assert (2 * a).features == {3: 4.0, 1: -6.0}
    assert (a - b).features == {3: 1.0, 1: -3.0}
    assert a.unit().norm == pytest.approx(1.0, abs=1e-6)
    assert [f.id for f in a.top_features(1)] == [1]
    with pytest.raises(fg.PairingError, match="one hookpoint"):
        _ = a + fg.SteeringVector(torch.ones(4), "blocks.0.hook_resid_post")


def test_the_callers_tensor_is_not_shared():
    x = torch.ones(4)
    v = fg.SteeringVector(x, AT)
    x.mul_(5)
    assert v.norm == 2.0


def test_round_trip(tmp_path):
    v = vector(reference=torch.zeros(4), provenance={"method": "ace", "model": {"name": "m"}})
    v.save(tmp_path / "v.safetensors")
    back = fg.SteeringVector.load(tmp_path / "v.safetensors")
    assert torch.equal(back.direction, v.direction)
    assert torch.equal(back.reference, v.reference)
    assert (back.hookpoint, back.features, back.provenance) == (v.hookpoint, v.features, v.provenance)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.safetensors"]


def test_a_vector_whose_strength_depends_on_the_token(tmp_path):
    """What it adds is relu(a·h + b) times its direction, after a round trip and for a multiple of it too."""
    read = torch.tensor([0.5, -1.0, 2.0, 0.0])
    v = vector(read=read, bias=0.25)
    v.save(tmp_path / "v.safetensors")
    back = fg.SteeringVector.load(tmp_path / "v.safetensors")
    assert (back.bias, torch.equal(back.read, read)) == (0.25, True)
    h = torch.tensor([[[1.0, 0.0, 1.0, 3.0], [0.0, 4.0, 0.0, 0.0]]])
    for made, factor in ((back.adaptive_add(3.0), 3.0), ((2 * back).adaptive_add(), 2.0)):
        after = apply(h, made.update())
        assert torch.equal(after[0, 0], h[0, 0] + factor * 2.75 * v.direction)  # 0.5 + 2 + 0.25, exact in float32
        assert torch.equal(after[0, 1], h[0, 1]), "−4 + 0.25 is below 0"
    assert back.adaptive_add(scope="generated").scope == "generated"
    for wrong in (vector(), back + back):
        with pytest.raises(fg.SteeringError, match="vector with read"):
            wrong.adaptive_add()
    with pytest.raises(fg.PairingError, match="read"):
        vector(read=torch.ones(3))
    with pytest.raises(fg.SteeringError, match="without read"):
        vector(bias=2.0)
    with pytest.raises(fg.SteeringError, match="bias"):
        vector(read=read, bias=float("nan"))


def test_checked_against_the_model(llama):
    with pytest.raises(fg.PairingError, match="d_model 4"):
        vector().check(llama)
    llama.config._name_or_path = "tiny/llama"
    other = fg.SteeringVector(torch.ones(32), AT, provenance={"model": {"name": "gpt2"}})
    try:
        with pytest.warns(fg.PairingWarning, match="gpt2"):
            other.check(llama)
    finally:
        llama.config._name_or_path = ""
    with pytest.raises(fg.SteeringError, match="reference"):
        vector().affine(1.0)


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_damaged_files_are_typed_errors(tmp_path, cut):
    path = tmp_path / "v.safetensors"
    vector().save(path)
    path.write_bytes(path.read_bytes()[:cut])
    for load in (
        fg.SteeringVector.load,
        fg.ContrastStatistics.load,
        fg.FeatureDensity.load,
        fg.EffectApproximator.load,
    ):
        with pytest.raises(fg.FormatError):
            load(path)


def test_hostile_headers_are_typed_errors(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "v.safetensors"
    good = {"kind": "vector", "hookpoint": AT, "features": {}, "provenance": {}}
    for bad in (
        None,
        [],
        {**good, "hookpoint": 5},
        {**good, "features": {"x": 1}},
        {**good, "features": {"1": 10**400}},
        {**good, "provenance": 3},
        {**good, "kind": "statistics"},
    ):
        save_file({"direction": torch.ones(4)}, path, metadata={"fgsteer": json.dumps(bad)})
        with pytest.raises(fg.FormatError):
            fg.SteeringVector.load(path)
    with pytest.raises(fg.FormatError, match="no file"):
        fg.SteeringVector.load(tmp_path / "none")


def test_hostile_statistics_density_and_effects_are_typed_errors(tmp_path):
    from safetensors.torch import save_file

    one = torch.ones(3, dtype=torch.float64)
    key = f"residual/{AT}/positive"
    cases = []
    for count, parts in ((float("inf"), (one, one, one)), (0, (one, one, one)), (2, (one, one[:2], one))):
        tensors = {f"{key}/{n}": t.clone() for n, t in zip(("mean", "m2", "fired"), parts, strict=True)}
        header = {"kind": "statistics", "reading": {}, "data": [], "counts": {key: count}}
        cases.append((fg.ContrastStatistics, tensors, header))
    cases.append((fg.ContrastStatistics, {"x": one}, {"kind": "statistics", "reading": None, "data": [], "counts": {}}))
    density: dict[str, Any] = {"kind": "density", "tokens": 5, "sae_sha256": "x", "max_density": None, "corpus": {}}
    names = ("fired", "documents", "first")
    changes: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({"tokens": float("inf")}, (3, 3, 3)),
        ({"max_density": "x"}, (3, 3, 3)),
        ({}, (3, 2, 3)),
    ]
    for extra, widths in changes:
        tensors = {n: torch.ones(w) for n, w in zip(names, widths, strict=True)}
        cases.append((fg.FeatureDensity, tensors, {**density, **extra}))
    effects = {"kind": "effects", "hookpoint": AT, "sae_sha256": "x", "about": {}}
    cases.append((fg.EffectApproximator, {"M": torch.ones(3), "b": torch.ones(3)}, effects))
    for owner, tensors, header in cases:
        path = tmp_path / "f.safetensors"
        save_file(tensors, path, metadata={"fgsteer": json.dumps(header)})
        with pytest.raises(fg.FormatError):
            owner.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    from fgsteer.storage.atomic import atomic_write

    path = tmp_path / "f"
    path.write_text("old")

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_hookpoint_names():
    assert fg.Hookpoint.parse("blocks.12.hook_resid_post") == fg.Hookpoint.parse("model.layers.12")
    for name, expected in (
        ("transformer.h.3.output", fg.Hookpoint(3)),
        ("gpt_neox.layers.3.input", fg.Hookpoint(3, "resid_pre")),
        ("model.language_model.layers.3", fg.Hookpoint(3)),
        ("layers.3.mlp", fg.Hookpoint(3, "mlp_out")),
        ("transformer.h.3.attn.output", fg.Hookpoint(3, "attn_out")),
        ("model.layers.3.post_feedforward_layernorm.output", fg.Hookpoint(3, "mlp_out")),
    ):
        assert fg.Hookpoint.parse(name) == expected
        assert fg.Hookpoint.parse(str(expected)) == expected
    for wrong in ("blocks.1.hook_z", "layer 3", "blocks.x.hook_resid_post", "model.layers.3.mlp.input"):
        with pytest.raises(fg.HookpointError, match="resid_pre"):
            fg.Hookpoint.parse(wrong)
    with pytest.raises(fg.HookpointError, match="in some families"):
        fg.Hookpoint.parse("model.layers.3.post_attention_layernorm.output")
    for tower in ("model.vision_tower.encoder.layers.0", "visual.layers.1.mlp", "model.encoder.layers.2"):
        with pytest.raises(fg.HookpointError):
            fg.Hookpoint.parse(tower)


def test_unknown_architecture_is_refused():
    with pytest.raises(fg.HookpointError, match="get_decoder"):
        resolve(torch.nn.Linear(2, 2), fg.Hookpoint(0))


def test_contrast_files(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    rows = [
        {"prompt": "p", "positive": "a", "negative": "b"},
        {"prompt": "p", "chosen": "a\u2028c", "rejected": "b"},
        {"question": "q", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"},
    ]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    assert [p.prompt for p in fg.load_contrast(write("r.jsonl", lines)).pairs] == ["p", "p", "q"]
    assert fg.load_contrast(write("r.json", json.dumps(rows))).count(True) == 3
    two = fg.load_contrast(write("t.json", json.dumps({"positive": ["a", "b"], "negative": ["c"]})))
    assert (two.count(True), two.count(False)) == (2, 1)
    for name, text, match in (
        ("a.jsonl", '{"positive": "a"}', r"line 1, which has no field 'negative'"),
        (
            "b.jsonl",
            '{"positive": "a", "negative": "b"}\n{"prompt": "p", "chosen": 3, "rejected": "x"}',
            r"line 2, field 'chosen'",
        ),
        ("c.jsonl", "{", "line 1 is not JSON"),
        ("d.json", '{"positive": ["a", 3], "negative": ["b"]}', r"field 'positive'\[1\]"),
        ("e.json", "{", "line 1"),
        ("f.json", '{"positive": []}', "positive"),
    ):
        with pytest.raises(fg.DataError, match=match):
            fg.load_contrast(write(name, text))
    with pytest.raises(fg.DataError, match="wedding"):
        fg.load_contrast("nothing")


def test_shipped_sets_are_whole_and_disjoint():
    names = fg.shipped_contrasts()
    assert len(names) >= 14
    seen = set()
    for name in names:
        contrast = fg.load_contrast(name)
        assert (contrast.count(True), contrast.count(False)) == (40, 40)
        assert (contrast.held_out.count(True), contrast.held_out.count(False)) == (20, 20)
        texts = [*contrast.positives, *contrast.negatives, *contrast.held_out.positives, *contrast.held_out.negatives]
        assert len(set(texts)) == 120
        assert not seen & set(texts)
        seen |= set(texts)


def test_documents_of_windows_files(tmp_path):
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes("\ufeffOne day.\r\n\r\nTwo days.\r\n".encode())
    assert list(read_documents(text)) == ["One day.", "Two days."]
    rows.write_bytes('\ufeff{"text": "One day."}\r\n{"text"\r\n'.encode())
    with pytest.raises(fg.DataError, match="line 2 is not JSON"):
        list(read_documents(rows))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(fg.FormatError, match=r"Cannot write .*v\.safetensors: "):
        write_tensors(tmp_path / "file" / "v.safetensors", {}, kind="vector", header={})
