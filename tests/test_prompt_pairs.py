"""Activation addition: against plain hooks, the paper's own checks, and prompts that are too short for it."""

from __future__ import annotations

import warnings

import pytest
import torch

import fgsteer as fg
from fgsteer.activations.tokens import encode_prompts
from fgsteer.models.hookpoints import blocks_of
from tests.helpers.steering import NEW, PROMPTS, batch, run, vector
from tests.helpers.tiny import D_MODEL, model_of, tiny_model
from tests.reference import prompt_pairs as reference

POSITIVE, NEGATIVE = "the happy wedding", "the war"
PLACE = "blocks.1.hook_resid_pre"
PAD, EOS = 1, 2  # of the word tokenizer
LONG = ["she took the ring of the king", "a dog sat on the bread", "the old man ran to the sea and sat"]


def ids_of(tokenizer, prompt):
    return encode_prompts(tokenizer, [prompt])[0][0].tolist()


def act_add(model, tokenizer, positive=POSITIVE, negative=NEGATIVE, c=2.0, **options):
    return fg.act_add(model, tokenizer, positive, negative, PLACE, c, **options)


def expected(model, tokenizer, prompt, c=2.0, pad=PAD):
    """Logits over a prompt and greedy tokens after it."""
    block, ids = blocks_of(model)[1], ids_of(tokenizer, prompt)
    added = reference.vectors(model, block, ids_of(tokenizer, POSITIVE), ids_of(tokenizer, NEGATIVE), c, pad)
    return reference.logits(model, block, added, ids, len(ids)), reference.greedy(model, block, added, ids, NEW)


def test_it_equals_plain_hooks(family_model, tokenizer):
    items, other = (act_add(family_model, tokenizer, c=c) for c in (8.0, -3.0))
    inputs = tokenizer(LONG, return_tensors="pt", padding=True, return_token_type_ids=False)
    each = [expected(family_model, tokenizer, prompt, c=8.0) for prompt in LONG]
    for prompt, (logits, _) in zip(LONG, each, strict=True):
        ids = torch.tensor([ids_of(tokenizer, prompt)])
        with torch.no_grad(), fg.steer(family_model, items):
            steered = family_model(ids).logits[0]
        # float32: vectors of a batch of two against those of single passes, times 8, through three blocks
        torch.testing.assert_close(steered, logits, atol=5e-4, rtol=1e-3)
        assert float((family_model(ids).logits[0] - logits).detach().abs().amax()) > 0.1
    rows = [tokens for _, tokens in each]
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert run(family_model, inputs, items, **options) == rows
    mixed = run(family_model, inputs, [items, None, other])
    last = expected(family_model, tokenizer, LONG[2], c=-3.0)[1]
    assert mixed == [rows[0], run(family_model, inputs, None)[1], last]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_prompts_keep_every_bit(dtype, tokenizer):
    model = tiny_model("llama", dtype=dtype)
    inputs = batch(tokenizer)
    with torch.no_grad():
        plain = model(**inputs).logits
    items = act_add(model, tokenizer, POSITIVE, POSITIVE)
    assert len(items) == len(ids_of(tokenizer, POSITIVE))
    with torch.no_grad(), fg.steer(model, items[:3]):  # as many as the shortest prompt has
        assert torch.equal(model(**inputs).logits, plain)
    for item in items:
        assert not item.direction.any()


def test_vectors_are_differences_token_by_token_and_zero_up_to_the_first_that_differs(llama, tokenizer):
    items = act_add(llama, tokenizer)
    rows = [ids_of(tokenizer, text) for text in (POSITIVE, NEGATIVE)]
    plus, minus = (reference.block_inputs(llama, blocks_of(llama)[1], row) for row in (rows[0], [*rows[1], PAD]))
    assert not items[0].direction.any(), "BOS"
    assert not items[1].direction.any(), "the word that both begin with"
    for number, item in enumerate(items):
        # float32: one pass over both against one for each
        torch.testing.assert_close(item.direction, plus[number] - minus[number], atol=1e-4, rtol=1e-4)
        assert (item.scope, item.bos, item.hookpoint) == (f"at:{number}", True, fg.Hookpoint.parse(PLACE))
    assert len(items) == 4
    assert items[2].direction.any()


def test_what_is_added_is_linear_in_c(llama, tokenizer):
    def at_the_site(c):  # what the block works on: this hook comes after those of the steer block
        with fg.steer(llama, act_add(llama, tokenizer, c=c)):
            return reference.block_inputs(llama, blocks_of(llama)[1], ids_of(tokenizer, LONG[0]))

    plain, once, thrice = (at_the_site(c) for c in (0.0, 1.0, 3.0))
    vectors = torch.stack([item.direction for item in act_add(llama, tokenizer)])
    # float32 sums of two terms of size 10
    torch.testing.assert_close(once[:4] - plain[:4], vectors, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(thrice - plain, 3 * (once - plain), atol=3e-5, rtol=1e-5)
    assert torch.equal(thrice[4:], plain[4:]), "tokens after them keep every bit at the site"


def test_padding_is_the_callers_choice(llama, tokenizer):
    by_default = act_add(llama, tokenizer)
    chosen = act_add(llama, tokenizer, padding="dog")
    longer = act_add(llama, tokenizer, POSITIVE, f"{NEGATIVE} dog")
    for number in range(3):
        assert torch.equal(by_default[number].direction, chosen[number].direction)
    assert torch.equal(chosen[3].direction, longer[3].direction)
    assert not torch.equal(chosen[3].direction, by_default[3].direction)
    assert torch.equal(act_add(llama, tokenizer, padding="<pad>")[3].direction, by_default[3].direction)
    for wrong in ("a dog", ""):
        with pytest.raises(fg.DataError, match="tokens of this tokenizer"):
            act_add(llama, tokenizer, padding=wrong)
    tokenizer.pad_token = None
    try:
        ended = act_add(llama, tokenizer)
    finally:
        tokenizer.pad_token = "<pad>"
    assert torch.equal(ended[3].direction, act_add(llama, tokenizer, padding="</s>")[3].direction)


def test_a_prompt_that_is_too_short_is_steered_in_part_and_said_so(llama, tokenizer):
    """Rows, chunks and plain passes; a row that is not steered does not count."""
    items = act_add(llama, tokenizer)  # of four tokens
    inputs, short = batch(tokenizer), "without all tokens of the scopes 'at:3'"  # the first prompt has three
    with pytest.warns(fg.UntouchedWarning, match=short):
        rows = run(llama, inputs, items)
    assert rows == [expected(llama, tokenizer, p)[1] for p in PROMPTS]
    with pytest.warns(fg.UntouchedWarning, match=short):
        run(llama, inputs, items, prefill_chunk_size=2)
    with pytest.warns(fg.UntouchedWarning, match=short), fg.steer(llama, items), torch.no_grad():
        llama(**inputs)
    with pytest.warns(fg.UntouchedWarning, match="'at:3' touched no token"):
        fg.generate(llama, tokenizer, PROMPTS[0], steering=items, max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fg.UntouchedWarning)
        run(llama, inputs, [None, items, items])
        run(llama, inputs, [None, items, [*items, vector(1).add(1.0)]], num_beams=2)


def test_it_composes_and_is_the_same_after_a_file(llama, tokenizer, tmp_path):
    items = [*act_add(llama, tokenizer), vector(2).add(0.5, scope="generated")]
    fg.save_steering(tmp_path / "s.safetensors", items)
    loaded = fg.load_steering(tmp_path / "s.safetensors")
    inputs = tokenizer(LONG, return_tensors="pt", padding=True, return_token_type_ids=False)
    assert run(llama, inputs, loaded, per_row=False) == run(llama, inputs, items, per_row=False)
    assert all(isinstance(item, fg.Add) and item.method == "act_add" for item in loaded[:-1])


def test_conversations_and_bos(llama, tokenizer):
    chats = [[{"role": "user", "content": text}] for text in (POSITIVE, NEGATIVE)]
    items = act_add(llama, tokenizer, *chats)
    assert len(items) == max(len(ids_of(tokenizer, chat)) for chat in chats)
    bare = act_add(llama, tokenizer, "king", "dog", prepend_bos=False)
    assert len(bare) == 1
    assert bare[0].direction.any()


def test_what_is_refused(llama, tokenizer):
    with pytest.raises(fg.HookpointError, match="layer 9"):
        fg.act_add(llama, tokenizer, POSITIVE, NEGATIVE, 9)
    with pytest.raises(fg.SteeringError, match="coefficient"):
        act_add(llama, tokenizer, c=float("inf"))
    with pytest.raises(fg.DataError):
        act_add(llama, tokenizer, 3, NEGATIVE)
    with pytest.raises(fg.DataError, match="the model's window"):
        act_add(model_of("gpt2"), tokenizer, "a " * 70, NEGATIVE)
    items = act_add(llama, tokenizer)
    assert items[0].d_model == D_MODEL
