"""SAEs at z and transcoders in models of every family; what pairing refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.interventions import apply
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
    with pytest.raises(fg.HookpointError, match="linear"):
        fg.residual_direction(model, reads, vector.direction)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_clamps_of_a_transcoder_read_what_the_mlp_reads(family_model, tokenizer, activation):
    reads, writes = fg.Hookpoint(1, "mlp_in"), fg.Hookpoint(1, "mlp_out")
    coder = replace(make_sae(activation), hookpoint=writes, reads=reads)
    ids = tokenizer("a dog sat", return_tensors="pt")["input_ids"]
    below = fg.SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(5)), fg.Hookpoint(0)).add(2.0)
    with fg.steer(family_model, below):
        acts = fg.record(family_model, ids, None, [reads, writes])
    edits = {1: 2.0, 4: "off", 7: ("plus", 1.5), 9: ("times", 0.5), 12: ("at_most", 0.2)}
    with fg.steer(family_model, [below, fg.edit(coder, edits)]):
        steered = fg.record(family_model, ids, None, [reads, writes])
    assert torch.equal(steered[reads], acts[reads])
    for token in range(ids.shape[1]):
        expected = acts[writes][0, token].double()
        if token > 0:
            f = coder.encode(acts[reads][0, token])
            plain = {feature: float(f[feature]) for feature in edits}
            changed = {1: 2.0, 4: 0.0, 7: max(plain[7] + 1.5, 0.0), 9: plain[9] / 2, 12: min(plain[12], 0.2)}
            for feature, activation_after in changed.items():
                expected = expected + (activation_after - plain[feature]) * coder.W_dec[feature].double()
        # sums of a few float32 terms of size 1 to 10
        assert torch.allclose(steered[writes][0, token].double(), expected, atol=2e-5)


def test_clamps_of_a_transcoder_while_texts_are_generated(llama, tokenizer):
    """By row, in a batch with padding, with a cache, and with what steers the MLP's input itself, as plain hooks do."""
    reads, writes = fg.Hookpoint(1, "mlp_in"), fg.Hookpoint(1, "mlp_out")
    coder = replace(make_sae("jumprelu"), hookpoint=writes, reads=reads)
    add = fg.SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(6)), reads).add(1.5)
    clamp = fg.ClampFeature(sae=coder, hookpoint=writes, targets={2: 9.0, 5: 0.0}, scope="generated")
    prompts = ["the man sat", "a dog"]
    together = fg.generate(llama, tokenizer, prompts, steering=[[add, clamp], None], max_new_tokens=6, do_sample=False)
    alone = [
        fg.generate(llama, tokenizer, [prompt], steering=entry, max_new_tokens=6, do_sample=False)[0]
        for prompt, entry in zip(prompts, ([add, clamp], None), strict=True)
    ]
    assert together == alone
    assert together[0] != fg.generate(llama, tokenizer, prompts[:1], steering=add, max_new_tokens=6, do_sample=False)[0]

    seen: list[Any] = []
    state = {"past": 0}

    def before(_, args):
        h = args[0].clone()
        h[:, max(0, 1 - state["past"]) :] += 1.5 * add.direction  # all but BOS
        seen.append(h)
        return (h,)

    def after(_, args, output):
        if state["past"] == 0:  # the prompt
            return output
        f = coder.encode(seen[-1])
        return output + (9.0 - f[..., 2:3]) * coder.W_dec[2] + (0.0 - f[..., 5:6]) * coder.W_dec[5]

    ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    mlp, length = llama.model.layers[1].mlp, ids.shape[1]
    handles = [mlp.register_forward_pre_hook(before), mlp.register_forward_hook(after)]
    try:
        cache = None
        step, out = ids, []
        for _ in range(6):
            with torch.no_grad():
                result = llama(step, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            state["past"] += step.shape[1]
            step = result.logits[:, -1:].argmax(-1)
            out.append(int(step))
    finally:
        for handle in handles:
            handle.remove()
    assert length > 1
    assert tokenizer.decode(out, skip_special_tokens=True) in together[0]


@pytest.mark.parametrize("reads", [fg.Hookpoint(0, "mlp_in"), fg.Hookpoint(0), fg.Hookpoint(1, "resid_pre")], ids=str)
def test_a_transcoder_that_reads_in_a_lower_block(llama, tokenizer, reads):
    """Likelihoods of several entries run the blocks below all steering once, and those that are read are steering's."""
    coder = replace(make_sae("relu"), hookpoint=fg.Hookpoint(2, "mlp_out"), reads=reads)
    clamp = fg.edit(coder, {3: 9.0, 5: "off"}, bos=True)
    pairs = [("the man", " sat down"), ("a dog", " sat")]
    together = fg.log_probabilities(llama, tokenizer, pairs, [None, clamp, clamp]).sums
    alone = fg.log_probabilities(llama, tokenizer, pairs, [clamp]).sums
    assert torch.equal(together[1], together[2])
    assert torch.allclose(together[1], alone[0], atol=1e-5)  # of two passes, one of which goes on from a block
    assert not torch.allclose(together[0], alone[0], atol=1e-3)


def test_a_transcoder_that_reads_above_the_place_where_it_writes_is_refused():
    coder = replace(make_sae(), hookpoint=fg.Hookpoint(1, "mlp_out"), reads=fg.Hookpoint(2, "mlp_in"))
    with pytest.raises(fg.PairingError, match="reads before it writes"):
        fg.ClampFeature(sae=coder, hookpoint=coder.hookpoint, targets={2: 9.0})
    clamp = fg.edit(replace(coder, reads=fg.Hookpoint(1, "mlp_in")), {2: 9.0})
    with pytest.raises(fg.SteeringError, match="activations without those at"):
        apply(torch.zeros(1, 2, 32), clamp.update())


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
