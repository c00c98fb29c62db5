"""steer() and generate(): every way that generate runs gives what a naive full recompute gives."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import GenerationConfig

import fgsteer as fg
from fgsteer.interventions import SCOPES
from tests.helpers.saes import make_sae
from tests.helpers.steering import NEW, PROMPTS, batch, naive_greedy, rows_of, run, vector
from tests.helpers.tiny import LAYERS


def count_hooks(model):
    """Hooks on all modules (transformers leaves some of its own)."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.filterwarnings("ignore:A prompt without all tokens")  # no prompt has a tenth
@pytest.mark.parametrize("scope", [*SCOPES, "first:2", "last:2", "ends:1,2", "at:0,2,9"])
def test_every_scope_and_cache_equals_the_recompute(family_model, tokenizer, scope):
    items = [vector(1).add(2.0, scope=scope), vector(2, layer=0).affine(0.7, scope=scope)]
    expected = rows_of(family_model, tokenizer, [items] * 3)
    inputs = batch(tokenizer)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
        assert run(family_model, inputs, items, **options) == expected, options


def test_interventions_change_what_is_generated(llama, tokenizer):
    inputs = batch(tokenizer)
    assert run(llama, inputs, vector().add(2.0)) != run(llama, inputs, None)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "gated"])
def test_one_entry_per_row(llama, tokenizer, activation):
    sae = make_sae(activation)
    clamp = fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={3: 4.0, 7: 0.0})
    entries = [[clamp, vector(4).add(1.0, scope="generated")], None, [vector(5).affine(1.0), vector(6).ablate()]]
    expected = rows_of(llama, tokenizer, [e or [] for e in entries])
    for options in ({}, {"use_cache": False}):
        assert run(llama, batch(tokenizer), entries, **options) == expected


def test_beams_and_several_sequences_share_the_prompts_entry(llama, tokenizer):
    entries = [vector(1).add(2.0), None, vector(2).clamp(3.0)]
    inputs = batch(tokenizer)
    with fg.steer(llama, entries, per_row=True):
        together = llama.generate(**inputs, max_new_tokens=NEW, num_beams=3, num_return_sequences=2, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
    for n, entry in enumerate(entries):
        single = tokenizer(PROMPTS[n], return_tensors="pt", return_token_type_ids=False)
        with fg.steer(llama, entry):
            alone = llama.generate(**single, max_new_tokens=NEW, num_beams=3, num_return_sequences=2, do_sample=False)
        assert together[2 * n : 2 * n + 2].tolist() == alone[:, single["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("drafting", ["assistant", "lookup", "itself"])
def test_assisted_decoding(models, tokenizer, scope, drafting):
    model = models["llama"]
    options = {
        "assistant": {"assistant_model": models["qwen2"]},
        "lookup": {"prompt_lookup_num_tokens": 2, "eos_token_id": -1},  # never made; older versions need one
        "itself": {"assistant_early_exit": 2},
    }[drafting]
    item = vector(3).add(2.0, scope=scope)
    ids = tokenizer(PROMPTS[1], return_tensors="pt", return_token_type_ids=False)
    assert run(model, ids, item, **options) == [naive_greedy(model, ids["input_ids"][0].tolist(), [item])]


def test_padding_is_inferred_as_generate_does(llama, tokenizer):
    item = vector(1).add(2.0, scope="prompt")
    inputs = batch(tokenizer)
    expected = run(llama, inputs, item)
    bare = {"input_ids": inputs["input_ids"]}
    for options in (
        {"pad_token_id": 1, "eos_token_id": torch.tensor([79, 3])},
        {"generation_config": GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=1)},
    ):
        with fg.steer(llama, item):
            options = {"max_new_tokens": NEW, "do_sample": False, **options} if "pad_token_id" in options else options
            out = llama.generate(**bare, **options)[:, bare["input_ids"].shape[1] :].tolist()
        assert out == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_forward_touches_real_tokens_only(family_model, tokenizer, side):
    inputs = batch(tokenizer, side)
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    at = fg.Hookpoint(LAYERS - 1)
    plain = fg.record(family_model, inputs["input_ids"], inputs["attention_mask"], [at])[at]
    with fg.steer(family_model, vector(1, layer=LAYERS - 1).add(1.0)):
        family_model(**inputs, position_ids=position_ids, use_cache=False)
        steered = fg.record(family_model, inputs["input_ids"], inputs["attention_mask"], [at])[at]
    real = inputs["attention_mask"].bool()
    first = real & (real.cumsum(1) == 1)
    changed = (steered != plain).any(-1)
    assert torch.equal(changed, real & ~first)


def test_manual_decoding_with_a_cache(llama, tokenizer):
    item = vector(1).add(2.0, scope="generated")
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    expected = naive_greedy(llama, ids[0].tolist(), [item])
    got = []
    with fg.steer(llama, item), torch.no_grad():
        out = llama(ids, use_cache=True)
        for _ in range(NEW):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            got.append(int(token))
            out = llama(token, past_key_values=out.past_key_values, use_cache=True)
    assert got == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_ops_are_bit_identical(models, tokenizer, dtype):
    import copy

    model = copy.deepcopy(models["llama"]).to(dtype)
    inputs = batch(tokenizer)
    plain = model(**inputs).logits
    for steering in (vector().add(0.0, bos=True), [], None, [None, None, None]):
        with fg.steer(model, steering), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(model(**inputs).logits, plain)
    with fg.steer(model, [vector().add(5.0), None, vector(2).affine(1.0)]):
        mixed = model(**inputs).logits
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(mixed[0], plain[0])


def test_hidden_states_are_the_steered_ones(llama, tokenizer):
    inputs = batch(tokenizer)
    item = vector(1, layer=1).clamp(5.0, bos=True)
    with fg.steer(llama, item):
        states = llama(**inputs, output_hidden_states=True).hidden_states[2]
    unit = item.direction / item.direction.norm()
    # float32 sums over 32 terms of size ~10
    assert torch.allclose((states @ unit)[inputs["attention_mask"].bool()], torch.tensor(5.0), atol=1e-4)


def test_everything_comes_off(llama, tokenizer):
    inputs = batch(tokenizer)
    plain = llama(**inputs).logits
    before = count_hooks(llama)
    with pytest.raises(RuntimeError, match="mine"), fg.steer(llama, vector().add(9.0)):
        raise RuntimeError("mine")
    assert "generate" not in vars(llama)
    assert count_hooks(llama) == before
    assert torch.equal(llama(**inputs).logits, plain)


def test_untouched_warns_and_names_the_place(llama, tokenizer):
    inputs = batch(tokenizer)
    with pytest.warns(fg.UntouchedWarning, match="generated"), fg.steer(llama, vector().add(1.0, scope="generated")):
        llama(**inputs)
    bos_only = tokenizer(["", "the man"], return_tensors="pt", padding=True, return_token_type_ids=False)
    with pytest.warns(fg.UntouchedWarning), fg.steer(llama, [vector().add(1.0), None]):
        llama(**bos_only)


def test_refusals(llama, tokenizer):
    inputs = batch(tokenizer)
    before = count_hooks(llama)
    with pytest.raises(fg.HookpointError, match="0 to 2"), fg.steer(llama, vector(layer=9).add(1.0)):
        pass
    wide = fg.SteeringVector(torch.ones(7), "blocks.1.hook_resid_post")
    with pytest.raises(fg.PairingError, match="7"), fg.steer(llama, wide.add(1.0)):
        pass
    with pytest.raises(fg.SteeringError, match="2 entries"), fg.steer(llama, [vector().add(1.0), None]):
        llama(**inputs)
    with pytest.raises(fg.SteeringError, match="2 entries"), fg.steer(llama, [vector().add(1.0), None]):
        llama.generate(**inputs, max_new_tokens=1)
    for wrong in (vector(), [vector()]):
        with pytest.raises(fg.SteeringError, match="add"), fg.steer(llama, wrong):
            pass
    with pytest.raises(fg.SteeringError, match="prompts"):
        fg.generate(llama, tokenizer, PROMPTS, steering=[None])
    with pytest.raises(fg.DataError, match="prompt 0"):
        fg.generate(llama, tokenizer, [1])
    assert count_hooks(llama) == before


def test_generate_returns_continuations_in_order(llama, tokenizer):
    texts = fg.generate(
        llama, tokenizer, PROMPTS, steering=[None, vector().add(3.0), None], max_new_tokens=NEW, do_sample=False
    )
    expected = rows_of(llama, tokenizer, [[], [vector().add(3.0)], []])
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    chat = [[{"role": "user", "content": "the man"}]]
    assert len(fg.generate(llama, tokenizer, chat, max_new_tokens=2, num_return_sequences=2, do_sample=True)) == 2


def test_nested_blocks_compose(llama, tokenizer):
    inputs = batch(tokenizer)
    a, b = vector(1).add(1.0), vector(2).add(1.5)
    with fg.steer(llama, a), fg.steer(llama, b):
        nested = llama(**inputs).logits
    with fg.steer(llama, [b, a]):
        listed = llama(**inputs).logits
    assert torch.equal(nested, listed)
