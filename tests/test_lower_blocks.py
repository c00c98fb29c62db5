"""Texts scored under many entries: lower blocks that are run once, rows that are merged, and that nothing changes."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

import fgsteer as fg
from fgsteer.likelihood import passes as passes_module
from fgsteer.likelihood.lower_blocks import can_skip_blocks, output_of_blocks, skip_blocks, unchanged_blocks
from fgsteer.likelihood.passes import TextPasses
from fgsteer.likelihood.scoring import text_log_probabilities
from fgsteer.models.hookpoints import blocks_of
from tests.helpers.tiny import D_MODEL, FAMILIES, HYBRIDS, LAYERS, MORE_FAMILIES, ODD_FAMILIES, model_of, tiny_model

TEXTS = [("the man said", "it is a new day"), ("", "the dog sat on the house"), ("I think", "no")]
# float32 passes at other batch shapes: log-probabilities of some tens of nats
CLOSE = {"rtol": 1e-4, "atol": 1e-3}


def vector(layer, site="resid_post", seed=0):
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return fg.SteeringVector(direction, fg.Hookpoint(layer, site))


def one_at_a_time(model, tokenizer, texts, entries):
    """What a pass of its own for each entry gives: with a single entry nothing is shared."""
    return torch.cat([fg.log_probabilities(model, tokenizer, texts, [entry]).sums for entry in entries])


@contextmanager
def counted(model):
    """The tokens that each block computes: its MLP is not run where the block hands on what it returned before."""
    tokens = [0] * len(blocks_of(model))
    handles = []
    for number, block in enumerate(blocks_of(model)):

        def count(_, args, __, number=number):
            tokens[number] += args[0].shape[:-1].numel()

        handles.append(block.get_submodule("mlp").register_forward_hook(count))
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


ENTRIES = [
    None,
    vector(0).add(2.0),
    vector(1).add(1.0, scope="generated"),
    vector(2).add(3.0),
    [vector(1, "resid_pre").add(1.0), vector(2, seed=1).ablate()],
]


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_shared_blocks_change_nothing(family, tokenizer):
    model = model_of(family)
    shared = fg.log_probabilities(model, tokenizer, TEXTS, ENTRIES).sums
    assert torch.allclose(shared, one_at_a_time(model, tokenizer, TEXTS, ENTRIES), **CLOSE)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_does_not_depend_on_the_strength_is_run_once(llama, tokenizer):
    entries = [None, *(vector(1).add(c) for c in (1.0, 2.0, 4.0))]
    ids = sum(len(tokenizer(f"{prompt} {text}".strip())["input_ids"]) for prompt, text in TEXTS)
    longest = 9 * len(TEXTS)  # with padding
    assert ids < longest
    with counted(llama) as tokens:
        fg.log_probabilities(llama, tokenizer, TEXTS, entries)
    assert tokens == [longest, longest, 4 * longest]
    with counted(llama) as tokens:
        fg.log_probabilities(llama, tokenizer, TEXTS, entries[1:2])
    assert tokens == [longest] * LAYERS
    kept = TextPasses(llama, tokenizer, TEXTS, keep=True)
    first = text_log_probabilities(kept, len(TEXTS), entries).sums
    with counted(llama) as tokens:
        again = text_log_probabilities(kept, len(TEXTS), [vector(1).add(2.0)]).sums
    assert tokens == [0, 0, longest]
    assert torch.allclose(first[2:3], again, **CLOSE)


def test_little_memory_for_blocks_changes_nothing(llama, tokenizer, monkeypatch):
    expected = fg.log_probabilities(llama, tokenizer, TEXTS, ENTRIES).sums
    monkeypatch.setattr(passes_module, "MAX_KEPT_BYTES", 0)
    kept = TextPasses(llama, tokenizer, TEXTS, keep=True, batch_tokens=12)
    for _ in range(2):
        assert torch.allclose(text_log_probabilities(kept, len(TEXTS), ENTRIES).sums, expected, **CLOSE)


def test_hooks_of_others_act_once(llama, tokenizer):
    """A hook on a skipped block, and a steer block around it all, act in shared passes as in others."""

    def shift(_, __, output):
        return output + 0.5

    for number in (0, 1):
        handle = blocks_of(llama)[number].register_forward_hook(shift)
        try:
            shared = fg.log_probabilities(llama, tokenizer, TEXTS, ENTRIES).sums
            alone = one_at_a_time(llama, tokenizer, TEXTS, ENTRIES)
        finally:
            handle.remove()
        assert torch.allclose(shared, alone, **CLOSE)
    with fg.steer(llama, vector(0, seed=3).add(1.0)):
        shared = fg.log_probabilities(llama, tokenizer, TEXTS, ENTRIES).sums
        alone = one_at_a_time(llama, tokenizer, TEXTS, ENTRIES)
    assert torch.allclose(shared, alone, **CLOSE)
    assert not torch.allclose(shared, fg.log_probabilities(llama, tokenizer, TEXTS, ENTRIES).sums, **CLOSE)


@torch.no_grad()
def test_other_threads_run_the_whole_model(llama):
    ids = torch.tensor([[0, 5, 6, 7]])
    mask = torch.ones_like(ids)
    plain = llama(input_ids=ids, attention_mask=mask).logits
    output = output_of_blocks(llama, ids, mask, 2)
    found = {}

    def run():
        with torch.no_grad():
            found["other"] = llama(input_ids=ids, attention_mask=mask).logits

    with skip_blocks(llama, 2, torch.zeros_like(output)):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        here = llama(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(found["other"], plain)
    assert not torch.allclose(here, plain)
    with skip_blocks(llama, 2, output):
        assert torch.allclose(llama(input_ids=ids, attention_mask=mask, use_cache=False).logits, plain, atol=1e-5)


def test_where_blocks_cannot_be_skipped(tokenizer):
    assert can_skip_blocks(model_of("llama"))
    for family in (next(iter(HYBRIDS)), *ODD_FAMILIES):
        assert not can_skip_blocks(model_of(family))
    training = tiny_model("llama").train()
    assert not can_skip_blocks(training)
    compiled = tiny_model("llama")
    compiled.compile()
    assert not can_skip_blocks(compiled)
    assert [unchanged_blocks(entry, 3) for entry in ENTRIES] == [3, 1, 2, 3, 1]
    assert unchanged_blocks(vector(9).add(1.0), 3) == 3


def test_answers_of_one_token_share_their_prompt(llama, tokenizer):
    answers = [(prompt, answer) for prompt in ("the man said", "I think") for answer in ("yes", "no", "yes and no")]
    entries = [None, vector(1).add(2.0)]
    found = fg.log_probabilities(llama, tokenizer, answers, entries, batch_tokens=16).sums
    each = [fg.log_probabilities(llama, tokenizer, [answer], entries).sums for answer in answers]
    assert torch.allclose(found, torch.cat(each, 1), **CLOSE)
    two = answers[:2]
    with counted(llama) as single:
        fg.log_probabilities(llama, tokenizer, two[:1])
    with counted(llama) as merged:  # the last token predicts nothing that is scored
        fg.log_probabilities(llama, tokenizer, two)
    assert merged == [single[0] - 1] * LAYERS
    with counted(llama) as unmerged:  # a generated token is one to steer
        fg.log_probabilities(llama, tokenizer, two, [vector(1).add(2.0, scope="generated")])
    assert unmerged == [2 * single[0]] * LAYERS
