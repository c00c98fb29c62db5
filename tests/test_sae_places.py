"""SAEs at z and transcoders in models of every family; what pairing refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fgsteer as fg
from fgsteer.models.pairing import width_at
from tests.helpers.saes import make_sae


def test_z_steers_through_the_output_projection(family_model, tokenizer):
    place = fg.Hookpoint(1, "z")
    model = family_model
    sae = replace(make_sae("jumprelu", d_model=width_at(model, place)), hookpoint=place)
    ids = tokenizer("the man sat", return_tensors="pt")["input_ids"]
    attention = fg.Hookpoint(1, "attn_out")
    vector = fg.from_features(sae, [3])
    with fg.steer(model, vector.add(2.0)):
        steered = fg.record(model, ids, None, [place, attention])
    plain = fg.record(model, ids, None, [place, attention])
    change = steered[place] - plain[place]
    assert torch.allclose(change[0, 1:], 2.0 * vector.direction.expand(3, -1), atol=1e-5)
    if model.config.model_type == "gemma2":  # a norm stands between
        with pytest.raises(fg.HookpointError, match="linear"):
            fg.residual_direction(model, place, vector.direction)
    else:
        through = fg.residual_direction(model, place, vector.direction)
        moved = (steered[attention] - plain[attention])[0, 1:]
        assert through.norm() > 0.1
        assert torch.allclose(moved, 2.0 * through.expand_as(moved), atol=1e-4)  # float32 sums of the projection
    stats = fg.collect(model, tokenizer, fg.ContrastSet("x", positives=["a dog sat"], negatives=["the cat"]), sae=sae)
    acts = sae.encode(fg.record(model, tokenizer("a dog sat", return_tensors="pt")["input_ids"], None, [place])[place])
    assert torch.allclose(stats.at("feature")[1].positive.mean.float(), acts[0, 1:].mean(0), atol=1e-5)
    clamp = fg.ClampFeature(hookpoint=place, sae=sae, targets={3: 4.0})
    with fg.steer(model, clamp):
        fg.record(model, ids, None, [place])
    with pytest.raises(fg.PairingError, match=str(width_at(model, place))):
        fg.collect(model, tokenizer, fg.ContrastSet("x", positives=["a"], negatives=["b"]),
                   sae=replace(make_sae(d_model=20), hookpoint=place))  # fmt: skip


def test_transcoder_reads_the_mlps_input_and_steers_its_output(family_model, tokenizer):
    model = family_model
    reads, writes = fg.Hookpoint(1, "mlp_in"), fg.Hookpoint(1, "mlp_out")
    coder = replace(make_sae("jumprelu"), hookpoint=writes, reads=reads)
    data = fg.ContrastSet("x", positives=["a dog sat"], negatives=["the cat"])
    stats = fg.collect(model, tokenizer, data, sae=coder)
    ids = tokenizer("a dog sat", return_tensors="pt")["input_ids"]
    acts = fg.record(model, ids, None, [reads, writes])
    at, features = stats.at("feature")
    assert at == writes
    assert set(stats.residual) == {writes}
    assert torch.allclose(features.positive.mean.float(), coder.encode(acts[reads])[0, 1:].mean(0), atol=1e-5)
    residual = stats.at("residual")[1].positive.mean.float()
    assert torch.allclose(residual, acts[writes][0, 1:].mean(0), atol=1e-5)
    density = fg.measure_density(model, tokenizer, coder, ["a dog sat"])
    assert torch.equal(density.fired, (coder.encode(acts[reads])[0, 1:] > 0).sum(0).double())
    vector = fg.fgaa(stats, coder, density=density, max_density=1.0)
    assert vector.hookpoint == writes
    with fg.steer(model, vector.add(3.0)):
        steered = fg.record(model, ids, None, [writes])[writes]
    assert torch.allclose((steered - acts[writes])[0, 1:], 3.0 * vector.direction.expand(3, -1), atol=1e-5)
    with pytest.raises(fg.PairingError, match="transcoder"):
        fg.ClampFeature(hookpoint=writes, sae=coder, targets={1: 2.0})
    with pytest.raises(fg.HookpointError, match="linear"):
        fg.residual_direction(model, reads, vector.direction)


def test_mlp_in_is_the_norms_output_with_its_gain(llama):
    ids = torch.tensor([[0, 5, 6]])
    found = fg.record(
        llama, ids, None, [fg.Hookpoint(1, "mlp_in"), fg.Hookpoint(1, "resid_pre"), fg.Hookpoint(1, "attn_out")]
    )
    block = llama.model.layers[1]
    middle = found[fg.Hookpoint(1, "resid_pre")] + found[fg.Hookpoint(1, "attn_out")]
    assert torch.allclose(found[fg.Hookpoint(1, "mlp_in")], block.post_attention_layernorm(middle), atol=1e-5)


def test_pairing_names_what_is_wrong(llama, tokenizer):
    data = fg.ContrastSet("x", positives=["a dog"], negatives=["the cat"])
    with pytest.raises(fg.PairingError, match=r"d_model 20 made for other"):
        fg.collect(llama, tokenizer, data, sae=make_sae(d_model=20, model_name="other"))
    with pytest.raises(fg.HookpointError, match="layer 7"):
        fg.collect(llama, tokenizer, data, sae=make_sae(layer=7))
    llama.config._name_or_path = "google/gemma-2-2b-it"
    try:
        with pytest.warns(fg.PairingWarning, match="gemma-2-2b-it"):
            fg.collect(llama, tokenizer, data, sae=make_sae(model_name="gemma-2-2b"))
        llama.config._name_or_path = "hub/models--google--gemma-2-2b/snapshots/c5ebcd40"
        fg.collect(llama, tokenizer, data, sae=replace(make_sae(), model_name="gemma-2-2b"))  # warnings are errors here
    finally:
        llama.config._name_or_path = ""
