"""Passes that go on from the last one by a token: steered as if all were found out anew, with less work."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import DynamicCache

import fgsteer as fg
from fgsteer.steering.positions import Positions
from tests.helpers.saes import make_sae
from tests.helpers.steering import PROMPTS, batch, run, vector

LOW_SAE, LOW_TOPK = make_sae("jumprelu", layer=0), make_sae("topk", layer=0)
ROWS = [vector().add(2.0), [vector(2).add(1.0), vector(3).clamp(at_most=0.0)], None]


def steerings():
    """Steerings whose decisions are of each kind: none, of rows, of prompts, of tokens, and several at once."""
    token = fg.Projection(vector(1, layer=0)) > 0.0
    prompt = fg.Cosine(vector(2, layer=0)).mean() > 0.0
    sae = make_sae("jumprelu")
    clamp = fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={3: 2.0, 5: 1.0})
    return {
        "add": vector().add(2.0),
        "prompt scope": [vector().add(2.0, scope="prompt"), vector(2).add(1.0, scope="generated")],
        "ablate and add": [vector(1).ablate(), vector(2).add(2.0)],
        "cap": vector().clamp(at_most=0.0),
        "adaptive": fg.AdaptiveAdd(direction=vector().direction, read=vector(2).direction, hookpoint=1),
        "turn": fg.Rotate(direction=vector(1).direction, other=vector(2).direction, to=20.0, hookpoint=1),
        "relative, keeping norm": [vector().add_relative(0.5), vector(2).add_keeping_norm(2.0)],
        "features": clamp,
        "gate on tokens": vector().add(2.0, when=token),
        "gate on prompts": vector().add(2.0, when=prompt),
        "not on prompts": vector().add(2.0, when=~prompt),
        "gate on both": [vector().add(2.0, when=prompt & token), vector(3).add(1.0, when=prompt | ~token)],
        "gate on features": vector().add(2.0, when=(fg.Feature(LOW_SAE, 3) > 0.0) | (fg.Feature(LOW_SAE, 5) > 0.2)),
        "gate on topk": vector().add(2.0, when=~(fg.Feature(LOW_TOPK, 3) > 0.1)),
        "ahead": vector().add(2.0, when=fg.Preview(fg.Projection(vector(3, 2))) < 0.0),
        "strength by prompt": fg.AddByPrompt(
            direction=vector().direction, reading=fg.Projection(vector(2, 0)).last(), hookpoint=1
        ),
    }


@pytest.fixture
def whole(monkeypatch):
    """How many passes were looked at whole, so far."""
    counts = []
    original = Positions.begin_pass

    def begin_pass(self, *args, **kwargs):
        counts.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Positions, "begin_pass", begin_pass)
    return counts


@pytest.fixture
def always_whole(monkeypatch):
    """A function that has every later pass looked at whole."""
    return lambda: monkeypatch.setattr(Positions, "go_on", lambda *_: False)


def decoded(model, ids, steering, steps=4, **options):
    """The logits of a prompt and of some steps of decoding, by plain passes with one cache."""
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad(), fg.steer(model, steering, **options):
        found.append(model(input_ids=ids, past_key_values=cache).logits)
        for step in range(steps):
            token = (ids[:, :1] + step) % 40 + 4
            found.append(model(input_ids=token, past_key_values=cache).logits)
    return torch.cat(found, 1)


@pytest.fixture
def ids(tokenizer):
    """Prompts of one length."""
    return torch.tensor([tokenizer(prompt)["input_ids"] for prompt in ("the man sat", "a dog ran", "she took it")])


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
@pytest.mark.parametrize("name", steerings())
def test_steps_are_steered_as_if_found_out_anew(llama, tokenizer, ids, whole, always_whole, name):
    item = steerings()[name]
    plain, texts = decoded(llama, ids, item), run(llama, batch(tokenizer), item)
    assert len(whole) == 4, "a prompt and its first step are looked at whole, twice"
    always_whole()
    assert torch.equal(decoded(llama, ids, item), plain), "bit for bit, as both do the same sums"
    assert run(llama, batch(tokenizer), item) == texts
    assert len(whole) > 8


def test_rows_and_beams(llama, tokenizer, ids, whole, always_whole):
    beams = {"num_beams": 2, "num_return_sequences": 2}
    gated = [vector().add(2.0, when=fg.Cosine(vector(2, layer=0)).mean() > 0.0), None, vector(3).add(1.0)]
    got = [run(llama, batch(tokenizer), rows, **beams) for rows in (ROWS, gated)], decoded(llama, ids, ROWS)
    seen = len(whole)
    always_whole()
    expected = [run(llama, batch(tokenizer), rows, **beams) for rows in (ROWS, gated)], decoded(llama, ids, ROWS)
    assert got[0] == expected[0]
    assert torch.equal(got[1], expected[1])
    assert seen == 6


def test_another_prompt_batch_cache_or_mask_is_looked_at(llama, ids, whole, always_whole):
    """Of these passes, five are one more token after such a pass; all others are found out anew."""
    token = ids[:, -1:]

    @torch.no_grad()
    def steps(item):
        cache, other, found = DynamicCache(config=llama.config), DynamicCache(config=llama.config), []

        def step(tokens, past=cache, **more):
            found.append(llama(input_ids=tokens, past_key_values=past, **more).logits[:, -1])

        with fg.steer(llama, item):
            step(ids)
            for _ in range(3):
                step(token)
            step(token, attention_mask=torch.ones(3, cache.get_seq_length() + 1, dtype=torch.long))
            for _ in range(3):
                step(token)
            cache.crop(2 - cache.get_seq_length())  # to a part of the prompt, after which all counts as generated
            for _ in range(2):
                step(token)
            step(token, other)
            step(token, other)
            step(token, None)
            cache.batch_select_indices(torch.tensor([0, 1]))
            step(token[:2])
            step(torch.cat([token, token], 1)[:2])
        return found

    items = [vector().add(4.0, scope=scope) for scope in ("prompt", "generated", "all", "reply")]
    got = [steps(item) for item in items]
    assert len(whole) == len(items) * (15 - 5)
    always_whole()
    for item, steered in zip(items, got, strict=True):
        assert all(map(torch.equal, steered, steps(item)))


def test_a_second_call_of_generate_on_the_same_cache(llama, tokenizer, always_whole):
    def turns():
        found = []
        with fg.steer(llama, vector().add(4.0, scope="prompt")):
            inputs = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
            cache, ids = DynamicCache(config=llama.config), inputs["input_ids"]
            for _ in range(2):
                ids = llama.generate(ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
                ids = torch.cat([ids, ids[:, 1:2]], 1)
                found.append(ids.tolist())
        return found

    got = turns()
    always_whole()
    assert got == turns()


def test_a_step_of_another_thread_is_refused(llama, ids):
    failures = []
    cache = DynamicCache(config=llama.config)

    def other():
        try:
            with torch.no_grad():
                llama(input_ids=ids[:, -1:], past_key_values=cache)
        except fg.SteeringError as error:
            failures.append(str(error))

    with torch.no_grad(), fg.steer(llama, vector().add(2.0)):
        llama(input_ids=ids, past_key_values=cache)
        for _ in range(2):
            llama(input_ids=ids[:, -1:], past_key_values=cache)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread" in failures[0]


def test_a_block_alone_after_a_step_is_what_it_was(llama, ids):
    """Outside of a pass the hooks know of no other tokens than the last pass had."""
    cache, block = DynamicCache(config=llama.config), llama.model.layers[1]
    with torch.no_grad(), fg.steer(llama, vector().add(2.0)):
        llama(input_ids=ids, past_key_values=cache)
        for _ in range(2):
            llama(input_ids=ids[:, -1:], past_key_values=cache)
        h = torch.zeros(3, 5, llama.config.hidden_size)
        with pytest.raises(fg.HookpointError, match="one vector for each of 3 x 1 tokens"):
            block(h, position_embeddings=llama.model.rotary_emb(h, torch.arange(5)[None]))


def test_gradients_of_steps_are_those_of_whole_passes(llama, ids, always_whole):
    def gradient():
        strength = torch.tensor(2.0, requires_grad=True)
        cache = DynamicCache(config=llama.config)
        item = fg.Add(direction=vector().direction, coefficient=strength, hookpoint=1)
        with fg.steer(llama, item):
            llama(input_ids=ids, past_key_values=cache)
            for _ in range(3):
                out = llama(input_ids=ids[:, -1:], past_key_values=cache).logits
            (found,) = torch.autograd.grad(out.square().sum(), strength)
        return found

    got = gradient()
    always_whole()
    assert torch.equal(got, gradient())
