"""Audits: what was added to a checkpoint, or taken out of it, is found, placed, and recovered."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

import fgsteer as fg
from tests.helpers.cli import invoke_on_cpu
from tests.helpers.steering import vector
from tests.helpers.tiny import model_of, tiny_model

TEXTS = ["the man sat", "a dog sat down and the cat", "the king was a queen"]


@pytest.fixture(scope="module")
def wide():
    """A tiny Llama in float64, in which what is found is exact."""
    return tiny_model("llama", dtype=torch.float64)


def cosine(first, second):
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))


def test_a_copy_differs_in_nothing(wide, tokenizer):
    found = fg.audit(copy.deepcopy(wide), tokenizer, wide, TEXTS)
    assert (found.kind, found.hookpoint, found.vector, found.added, found.changed, found.hooked) == (
        *("none", None, None, (), (), ()),
    )
    assert {place.difference for place in found.places} == {0.0}
    assert str(found).startswith("No difference")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float64), ("llama", torch.bfloat16), ("gpt2", torch.float32), ("gpt_neox", torch.float32)],
)
def test_a_folded_vector_is_found_and_recovered(family, dtype, tokenizer):
    model = tiny_model(family, dtype=dtype)
    v = vector(2, 1)
    folded = fg.fold(model, v.add(1.5, bos=True))
    found = fg.audit(folded, tokenizer, model, TEXTS)
    assert found.kind == "addition"
    assert found.hookpoint is not None
    assert found.vector is not None
    assert (found.hookpoint.layer, found.hookpoint.site) == (1, "mlp_out")
    tolerance = 4 * torch.finfo(dtype).eps + 1e-6  # the bias is rounded to the dtype, and what it is added to
    assert torch.allclose(found.vector.direction, 1.5 * v.direction, atol=8 * tolerance)
    assert all(place.difference == 0 for place in found.places if place.hookpoint.precedes(found.hookpoint))
    assert found.added or found.changed
    assert "an addition of norm" in str(found)
    if dtype == torch.float64:
        assert found.unexplained < 1e-12
    with fg.steer(model, found.vector.add(1.0, bos=True)), torch.no_grad():
        ids = torch.tensor([[0, 5, 6, 7]])
        assert torch.allclose(model(ids).logits, folded(ids).logits, atol=100 * tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_orthogonalised_weights_are_found(family, tokenizer):
    model = model_of(family)
    v = vector(3)
    found = fg.audit(fg.orthogonalize(model, v), tokenizer, model, TEXTS)
    assert found.kind == "ablation"
    assert found.vector is not None
    assert (found.hookpoint, found.rank) == (fg.Hookpoint(0, "resid_pre"), 1)
    assert abs(cosine(found.vector.direction, v.direction)) > 1 - 1e-6
    assert "an ablation" in str(found)


def hooked(model, change):
    """A copy of the model whose block 1 has a forward hook that changes what it returns."""
    other = copy.deepcopy(model)
    other.model.layers[1].register_forward_hook(lambda _, __, output: change(output))
    return other


def test_hooks_are_found(wide, tokenizer):
    v = vector(4).direction.double()
    unit = v / v.norm()
    cases: dict[str, Any] = {
        "addition": lambda h: h + v,
        "ablation": lambda h: h - (h @ unit)[..., None] * unit,
        "clamp": lambda h: h + (1.5 - h @ unit)[..., None] * unit,
    }
    for kind, change in cases.items():
        found = fg.audit(hooked(wide, change), tokenizer, wide, TEXTS)
        assert (found.kind, found.hookpoint) == (kind, fg.Hookpoint(1)), kind
        assert found.vector is not None
        assert found.hooked == ("model.layers.1",)
        assert found.unexplained < 1e-12, kind
        assert abs(cosine(found.vector.direction, unit)) > 1 - 1e-12
        if kind == "clamp":
            sign = cosine(found.vector.direction, unit)
            assert found.target == pytest.approx(1.5 * sign, abs=1e-6)  # the vector is float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_direction_is_not_called_one(dtype, tokenizer):
    """A model that was trained further, other attention kernels, and nan, in every dtype."""
    model = tiny_model("llama", dtype=dtype)
    trained = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in (p for p in trained.model.layers[1].parameters() if p.ndim == 2):
            weight += 0.05 * weight.std() * torch.randn_like(weight)
    found = fg.audit(trained, tokenizer, model)
    assert (found.kind, found.vector) == ("other", None)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    other = fg.audit(eager, tokenizer, model)
    assert other.kind in ("none", "rounding")
    assert other.vector is None
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    found = fg.audit(broken, tokenizer, model)
    assert (found.kind, found.hookpoint) == ("other", fg.Hookpoint(2, "mlp_out"))


def test_a_vector_on_some_tokens_and_at_the_input_of_a_block(wide, tokenizer):
    v = vector(4).direction.double()

    def not_first(output):
        changed = output.clone()
        changed[:, 1:] += v
        return changed

    found = fg.audit(hooked(wide, not_first), tokenizer, wide, TEXTS)
    assert (found.kind, found.hookpoint) == ("addition", fg.Hookpoint(1))
    assert found.vector is not None
    assert abs(cosine(found.vector.direction, v)) > 1 - 1e-12
    assert 0.5 < found.tokens < 1
    assert "of tokens" in str(found)
    other = copy.deepcopy(wide)
    other.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + v, *args[1:]))
    found = fg.audit(other, tokenizer, wide, TEXTS)
    assert (found.kind, found.hookpoint) == ("addition", fg.Hookpoint(1, "resid_pre"))


def test_a_token_of_large_norm_hides_nothing(wide, tokenizer):
    """An attention sink, whose norm is a thousand times the others', beside an addition of the others' norm."""
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    sink = copy.deepcopy(wide).to(torch.bfloat16)
    with torch.no_grad():
        sink.model.embed_tokens.weight[ids[0, 0]] *= 3000
    found = fg.audit(hooked(sink, lambda h: h + h[:, 1:].norm(dim=-1).mean() * 0 + 0.5), tokenizer, sink, TEXTS)
    assert found.kind != "none"
    assert found.hookpoint == fg.Hookpoint(1)


def test_hooks_of_transformers_are_no_finding(wide, tokenizer):
    other = copy.deepcopy(wide)
    with torch.no_grad():
        other(torch.tensor([[0, 5, 6]]), output_hidden_states=True, output_attentions=True)
    assert fg.audit(other, tokenizer, wide, TEXTS).hooked == ()


def test_other_changes_are_no_direction(wide, tokenizer):
    other = copy.deepcopy(wide)
    torch.manual_seed(0)
    with torch.no_grad():
        weight = other.model.layers[0].mlp.down_proj.weight
        weight += 0.1 * torch.randn_like(weight)
    found = fg.audit(other, tokenizer, wide)
    assert (found.kind, found.vector) == ("other", None)
    assert found.hookpoint == fg.Hookpoint(0, "mlp_out")
    assert found.rank > 3
    assert found.unexplained > 0.5
    assert found.changed == ("model.layers.0.mlp.down_proj.weight",)
    assert f"rank {found.rank}" in str(found)


def test_what_cannot_be_compared_is_refused(llama, wide, tokenizer):
    with pytest.raises(fg.PairingError, match="one architecture in one dtype"):
        fg.audit(llama, tokenizer, wide)
    with pytest.raises(fg.PairingError, match="one architecture"):
        fg.audit(model_of("gpt2"), tokenizer, llama)
    with pytest.raises(fg.DataError, match="no texts"):
        fg.audit(copy.deepcopy(llama), tokenizer, llama, [])
    with pytest.raises(fg.PairingError, match="its own reference"):
        fg.audit(llama, tokenizer, llama)


def test_the_command_line_finds_it_and_writes_the_vector(monkeypatch, llama, tokenizer, tmp_path):
    v = vector(2, 1)
    models = {"audited": fg.fold(llama, v.add(2.0, bos=True)), "original": llama}
    monkeypatch.setattr(fg, "load_model", lambda name, **_: (models[name], tokenizer))
    (tmp_path / "texts.txt").write_text("the man sat\n\na dog sat\n")
    options = ("audit", "-m", "audited", "-r", "original", "--texts", tmp_path / "texts.txt")
    told = json.loads(invoke_on_cpu(*options, "-o", tmp_path / "v.safetensors", "--json").stdout)
    assert (told["kind"], told["hookpoint"]) == ("addition", "blocks.1.hook_mlp_out")
    assert torch.allclose(fg.SteeringVector.load(tmp_path / "v.safetensors").direction, 2.0 * v.direction, atol=1e-4)
    shown = invoke_on_cpu(*options).stdout
    assert "an addition of norm" in shown
    assert "added: model.layers.0.mlp.gate_proj.bias" in shown
    assert "and 1 more" in shown
    models["same"] = copy.deepcopy(llama)
    same = invoke_on_cpu("audit", "-m", "same", "-r", "original", "-o", tmp_path / "none")
    assert same.stdout.startswith("No difference in activations")
    assert "was not written: no vector was found" in same.stderr
    assert not (tmp_path / "none").exists()
