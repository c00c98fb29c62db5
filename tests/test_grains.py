"""GrAInS: attributions that add up, words that are replaced and no others, and the vector by loops."""

from __future__ import annotations

import pytest
import torch

import fgsteer as fg
from fgsteer.methods.grains import attribute
from tests.helpers.tiny import D_MODEL
from tests.reference import grains as reference

PAIRS = [
    fg.ContrastPair("the bread", "a ship of war", prompt="the man sat on"),
    fg.ContrastPair("happy", "sad and old", prompt="she took the ring and was"),
    fg.ContrastPair("tea", "the sea", prompt="a cat"),
]
PAD = 1


def ids_of(tokenizer, pair):
    prompt = tokenizer(pair.prompt)["input_ids"]
    return prompt, *(tokenizer(text, add_special_tokens=False)["input_ids"] for text in (pair.positive, pair.negative))


@pytest.mark.parametrize("number", range(3))
def test_attributions_are_those_of_loops_and_add_up(llama, tokenizer, number):
    prompt, positive, negative = ids_of(tokenizer, PAIRS[number])
    for steps, batch_tokens in ((4, 40), (20, 4096)):
        found = attribute(llama, tokenizer, PAIRS[number], steps=steps, batch_tokens=batch_tokens)
        naive = reference.attributions(llama, prompt, positive, negative, steps)
        assert found.values.tolist() == pytest.approx(naive, abs=1e-4)  # float32 gradients of a few nats
    # Completeness: from a tenth of the way on, parts add up to f(1) − f(0.1). Nearer to zero norms make f all but jump.
    steps = 400
    fine = attribute(llama, tokenizer, PAIRS[number], steps=steps, batch_tokens=4096)
    below = sum(sum(reference.part(llama, prompt, positive, negative, n, steps)) for n in range(steps // 10))
    ends = [reference.difference(llama, prompt, positive, negative, scale)[0] for scale in (1.0, 0.1)]
    assert float(fine.values.sum()) - below == pytest.approx(ends[0] - ends[1], abs=1e-4)


@pytest.mark.parametrize("top", [1, 2, 50])
def test_the_vector_is_that_of_loops(llama, tokenizer, top):
    special = set(tokenizer.all_special_ids)
    ids = [ids_of(tokenizer, pair) for pair in PAIRS]
    naive, moved = reference.vector(llama, ids, 1, top, 8, special, PAD)
    vec = fg.grains(llama, tokenizer, PAIRS, 1, top=top, steps=8)
    torch.testing.assert_close(vec.direction.double(), naive, atol=1e-4, rtol=1e-4)  # float32 passes
    assert vec.provenance["hyperparameters"] == {"top": top, "steps": 8, "component": "mean", "pairs": 3}
    component = fg.grains(llama, tokenizer, PAIRS, 1, top=top, steps=8, component="pca").direction.double()
    expected = torch.zeros(D_MODEL, dtype=torch.float64)
    for sign, rows in moved.items():
        outer = sum(torch.outer(row, row) for row in rows)
        first = torch.linalg.eigh(outer).eigenvectors[:, -1]
        expected += sign * first * (1 if float(first @ sum(rows)) > 0 else -1)
    torch.testing.assert_close(component, expected, atol=1e-3, rtol=1e-3)  # a gap of eigenvalues magnifies rounding


def test_only_words_of_the_prompt_are_replaced(llama, tokenizer, monkeypatch):
    from fgsteer.methods import grains as module

    seen = []

    def noting(model, ids, attention, places):
        seen.append(ids.tolist())
        return fg.record(model, ids, attention, places)

    monkeypatch.setattr(module, "record", noting)
    fg.grains(llama, tokenizer, PAIRS, 1, top=50, steps=2)
    for pair, rows in zip(PAIRS, seen, strict=True):
        prompt, *completions = ids_of(tokenizer, pair)
        assert rows[0][: len(prompt)] == prompt
        assert len(rows) in (4, 6)
        for number, row in enumerate(rows):
            assert row[0] == prompt[0], "BOS stays"
            completion = completions[number % 2]
            assert row[len(prompt) : len(prompt) + len(completion)] == completion


def test_nothing_is_left_behind(llama, tokenizer):
    before = [p.grad for p in llama.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llama.modules()]
    fg.grains(llama, tokenizer, PAIRS[:1], 1, steps=2)
    assert [p.grad for p in llama.parameters()] == before
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llama.modules()] == hooks
    with torch.no_grad():
        fg.grains(llama, tokenizer, PAIRS[:1], 1, steps=2)


def test_what_is_refused(llama, tokenizer):
    for wrong in ({"top": 0}, {"steps": 0}):
        with pytest.raises(fg.FgsteerError, match=r"top|steps"):
            fg.grains(llama, tokenizer, PAIRS, 1, **wrong)
    with pytest.raises(fg.DataError, match="'mean' or 'pca'"):
        fg.grains(llama, tokenizer, PAIRS, 1, component="median")
    with pytest.raises(fg.DataError, match="no word"):
        fg.grains(llama, tokenizer, [fg.ContrastPair("the sea", "a war")], 1)
    with pytest.raises(fg.DataError, match="without pairs"):
        fg.grains(llama, tokenizer, fg.ContrastSet("x", positives=["a man"], negatives=["a dog"]), 1)
    with pytest.raises(fg.DataError, match="one token"):
        fg.grains(llama, tokenizer, PAIRS, 1, replacement="the man")
    with pytest.raises(fg.HookpointError):
        fg.grains(llama, tokenizer, PAIRS, 99)
    equal = [fg.ContrastPair("the sea", "the sea", prompt="a man")]
    with pytest.raises(fg.SelectionError, match="no word"):
        fg.grains(llama, tokenizer, equal, 1)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_neox", "qwen2"])
def test_other_families_have_the_attributions_of_loops(models, tokenizer, name):
    model = models[name]
    found = attribute(model, tokenizer, PAIRS[1], steps=4, batch_tokens=2048)
    prompt, positive, negative = ids_of(tokenizer, PAIRS[1])
    naive = reference.attributions(model, prompt, positive, negative, 4)
    assert found.values.tolist() == pytest.approx(naive, abs=1e-4)  # float32 gradients of a few nats
    assert fg.grains(model, tokenizer, PAIRS, 1, steps=4).norm > 0
