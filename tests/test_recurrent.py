"""Models whose blocks keep a state: steered with and without a cache as a recompute with plain hooks says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import fgsteer as fg
from fgsteer.interventions import SCOPES
from fgsteer.models.hookpoints import blocks_of, resolve
from fgsteer.models.properties import d_model
from fgsteer.steering.hooks import CACHE_ARGUMENTS
from tests.helpers.recurrent import CONFIGS, recurrent_model
from tests.reference import apply as reference

ROWS = torch.tensor([[0, 5, 6, 7, 8, 9], [15, 16, 17, 18, 19, 20]])  # the second begins with a word
NEW = 4
SINGLE = {"rwkv"}  # transformers decodes one row at a time
# The families that compute left-padded rows as they do rows alone, unsteered (to float32's rounding)
PADDED = ["mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba2", "falcon_h1", "lfm2", "qwen3_next"]
# float32: a scan over all tokens and one step a token add in another order; 1e-6 unsteered, logits up to 4
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}


def add(model, scope="all", bos=False, layer=1, seed=1):
    direction = torch.randn(d_model(model), generator=torch.Generator().manual_seed(seed))
    return fg.Add(hookpoint=fg.Hookpoint(layer), direction=direction, coefficient=2.0, scope=scope, bos=bos)


@torch.no_grad()
def recomputed(model, ids, prompt_length, item):
    """Logits (tokens, vocabulary) of one row, steered by a hook that is told every place."""
    spares = int(ids[0]) in (0, 2)  # a start token, BOS or EOS
    where = reference.positions(item.scope, len(ids), prompt_length, 0, bos=item.bos or not spares)

    def hook(_, __, output):
        h = (output[0] if isinstance(output, tuple) else output).clone()
        h[0, where] += item.coefficient * item.direction
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = resolve(model, item.hookpoint)[0].register_forward_hook(hook)
    try:
        return model(ids[None], use_cache=False).logits[0]
    finally:
        handle.remove()


def generated(model, ids, steering, **options):
    """(ids, logits of each step) of greedy decoding."""
    options = {"attention_mask": torch.ones_like(ids), "output_logits": True, **options}
    with fg.steer(model, steering, per_row=isinstance(steering, list)):
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_with_and_without_a_cache_equal_the_recompute(family, scope):
    model = recurrent_model(family)
    items = [add(model, scope), add(model, scope, bos=True, layer=0, seed=2)]
    batches = [(ROWS[:1], items[:1]), (ROWS[1:], items[1:])] if family in SINGLE else [(ROWS, items)]
    for rows, entries in batches:
        for options in ({}, {"use_cache": False}):
            ids, logits = generated(model, rows, entries, **options)
            for row, got, item in zip(ids, logits, entries, strict=True):
                expected = recomputed(model, row, ROWS.shape[1], item)[ROWS.shape[1] - 1 : -1]
                torch.testing.assert_close(got, expected, **CLOSE)


@torch.no_grad()
def fed(model, steering, prompt, completion):
    """Logits of one row, its prompt read first and its completion fed token by token from the returned state."""
    kind, state, place = model.config.model_type, {}, {}
    if kind == "recurrent_gemma":  # returns none, but fills the one that it is given
        state = {"past_key_values": DynamicCache(config=model.config)}
    with fg.steer(model, steering):
        out = model(prompt[None], use_cache=True, **state)
        logits = [out.logits]
        for number, token in enumerate(completion, start=len(prompt)):
            returned = {name: out[name] for name in CACHE_ARGUMENTS if out.get(name) is not None}
            if kind == "bamba":  # counts from 0 unless told
                place = {"position_ids": torch.tensor([[number]])}
            out = model(token.view(1, 1), use_cache=True, **(returned or state), **place)
            logits.append(out.logits)
    return torch.cat(logits, 1)[0]


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
@pytest.mark.parametrize("family", CONFIGS)
def test_a_loop_over_the_returned_state_and_prompt_lengths_equal_the_recompute(family):
    model = recurrent_model(family)
    for row in ROWS:
        for scope in SCOPES:
            item = add(model, scope)
            expected = recomputed(model, row, 4, item)
            torch.testing.assert_close(fed(model, item, row[:4], row[4:]), expected, **CLOSE)
            with torch.no_grad(), fg.steer(model, item, prompt_lengths=[4]):
                torch.testing.assert_close(model(row[None], use_cache=False).logits[0], expected, **CLOSE)


@pytest.mark.parametrize("family", PADDED)
def test_left_padding(family):
    model, item = recurrent_model(family), add(recurrent_model(family), "reply")
    short, pads = ROWS[:1, :4], torch.ones(1, 2, dtype=torch.long)
    padded = torch.cat([torch.cat([pads, short], 1), ROWS[1:]])
    mask = torch.ones_like(padded)
    mask[0, :2] = 0
    for steering in (None, item):
        _, together = generated(model, padded, steering, attention_mask=mask)
        _, alone = generated(model, short, steering)
        torch.testing.assert_close(together[:1], alone, **CLOSE)


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_beams_share_the_prompts_entry(family):
    model, item = recurrent_model(family), add(recurrent_model(family), "generated")
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 2}
    with fg.steer(model, [item, None]):
        together = model.generate(ROWS, attention_mask=torch.ones_like(ROWS), **options)
    for row, steering, got in zip(ROWS, (item, None), together, strict=True):
        with fg.steer(model, steering):
            alone = model.generate(row[None], attention_mask=torch.ones(1, 6), **options)
        assert got.tolist() == alone[0].tolist()


def test_rows_that_rwkv_mixes_are_refused():
    model, item, ran = recurrent_model("rwkv"), add(recurrent_model("rwkv")), []
    with fg.steer(model, item), torch.no_grad():
        handle = blocks_of(model)[0].register_forward_pre_hook(lambda *_: ran.append(1))
        with pytest.raises(fg.SteeringError, match=r"mixes the rows.*2 rows.*use_cache=False"):
            model.generate(ROWS, attention_mask=torch.ones_like(ROWS), max_new_tokens=NEW)
        assert not ran
        handle.remove()
        state = model(ROWS, use_cache=True).state  # a prompt of several tokens is read right
        with pytest.raises(fg.SteeringError, match="for one prompt at a time"):
            model(ROWS[:, :1], state=state)
    _, logits = generated(model, ROWS, item, use_cache=False)
    for row, got in zip(ROWS, logits, strict=True):
        torch.testing.assert_close(got[None], generated(model, row[None], item)[1], **CLOSE)


def test_prompt_lengths_need_the_whole_row():
    model = recurrent_model("mamba")
    with fg.steer(model, add(model), prompt_lengths=[2, 2]), torch.no_grad():
        state = model(ROWS[:, :4], use_cache=True).cache_params
        with pytest.raises(fg.SteeringError, match="Feed both at once"):
            model(ROWS[:, 4:], cache_params=state)
