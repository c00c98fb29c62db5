"""Residual shifts between a base model and a tuned one: planted directions come back in order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fgsteer as fg
from tests.helpers.steering import direction, vector
from tests.helpers.tiny import D_MODEL, tiny_model

WORDS = ("the", "man", "sat", "dog", "cat", "king", "queen", "was", "down", "day")
PROMPTS = [f"{a} {b} {c}" for a in WORDS[:4] for b in WORDS[3:7] for c in WORDS[6:9]]


@pytest.fixture(scope="module")
def wide():
    return tiny_model("llama", dtype=torch.float64)


def tuned(model, change):
    """A copy whose block 1 has a hook that changes the stream: a tuned model whose shift is known."""
    other = copy.deepcopy(model)
    other.model.layers[1].register_forward_hook(lambda _, __, output: change(output))
    return other


def test_planted_directions_come_back_in_order(wide, tokenizer):
    """With h' = h + Σ aₖ (pₖ·h) uₖ of orthogonal u and p, the shift has as many components, the largest first."""
    basis = torch.linalg.qr(torch.randn(D_MODEL, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    u, p, a = basis[:, :3], basis[:, 3:], torch.tensor([3.0, 1.0, 0.3], dtype=torch.float64)
    shifts = fg.residual_shift(wide, tuned(wide, lambda h: h + (h @ p * a) @ u.T), tokenizer, PROMPTS, hookpoints=[1])
    found = shifts[1]
    h = torch.stack(
        [
            fg.record(wide, tokenizer(prompt, return_tensors="pt")["input_ids"], None, [fg.Hookpoint(1)])[
                fg.Hookpoint(1)
            ][0, -1]
            for prompt in PROMPTS
        ]
    )
    shift = (h @ p * a) @ u.T
    singular = torch.linalg.svdvals(shift)
    assert torch.allclose(found.variances[:3], singular[:3].square() / (len(PROMPTS) - 1), rtol=1e-9)
    assert float(found.variances[3:].sum()) < 1e-18 * float(found.variances.sum())
    assert torch.allclose(found.mean, shift.mean(0), atol=1e-12)
    within = found.components[:3] @ u  # the three span what was planted
    assert torch.allclose(within @ within.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert (found.components[:3] @ found.mean >= 0).all()
    shares = found.shares
    assert found.effective_rank(float(shares[0]) - 1e-6) == 1
    assert found.effective_rank(float(shares[0]) + 1e-6) == 2
    assert found.effective_rank(1.0) <= 3 + 3  # what is left of the others is rounding
    assert found.effective_rank() == int((shares.cumsum(0) < 0.9).sum()) + 1


def test_an_added_vector_is_the_only_component(wide, tokenizer):
    v = direction(4).double()
    found = fg.residual_shift(wide, tuned(wide, lambda h: h + v), tokenizer, PROMPTS, hookpoints=[1])[1]
    assert (found.effective_rank(0.999), found.prompts) == (1, len(PROMPTS))
    made = found.vector()
    assert (made.hookpoint, made.provenance["method"]) == (fg.Hookpoint(1), "residual_shift")
    assert torch.allclose(made.direction, (v / v.norm()).float(), atol=1e-6), "it points to where the shift goes"
    everywhere = fg.residual_shift(wide, fg.fold(wide, vector(3, 0).add(0.5, bos=True)), tokenizer, PROMPTS[:4])
    assert list(everywhere) == list(range(wide.config.num_hidden_layers))


def test_the_linear_part(wide, tokenizer):
    """A linear change is found whole, and of a constant one only what a map without a constant can do."""
    a = torch.randn(D_MODEL, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.1
    options: Any = {"hookpoints": [1]}
    many = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:2]]
    other = tuned(wide, lambda h: h + h @ a)
    plain = fg.residual_shift(wide, other, tokenizer, many, **options)[1]
    linear = fg.residual_shift(wide, other, tokenizer, many, fit="linear", **options)[1]
    assert torch.allclose(plain.variances, linear.variances, rtol=1e-6, atol=1e-9 * float(plain.variances[0]))
    with pytest.raises(fg.DataError, match=f"at least {D_MODEL + 1}"):
        fg.residual_shift(wide, other, tokenizer, PROMPTS[:D_MODEL], fit="linear", **options)


def test_components_tell_labelled_prompts_apart(wide, tokenizer):
    """A component that carries the label does; one across it does not."""
    prompts = [f"{first} {second} {last}" for first in WORDS for second in WORDS[:3] for last in ("sat", "cat")]
    labels = [prompt.endswith("sat") for prompt in prompts]
    h = {
        label: torch.stack(
            [
                fg.record(wide, tokenizer(p, return_tensors="pt")["input_ids"], None, [fg.Hookpoint(1)])[
                    fg.Hookpoint(1)
                ][0, -1]
                for p, own in zip(prompts, labels, strict=True)
                if own == label
            ]
        )
        for label in (True, False)
    }
    carries = h[True].mean(0) - h[False].mean(0)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    mixed, truth = [prompts[n] for n in order], [labels[n] for n in order]
    for sign in (1.0, -1.0):  # where tuning moved it does not matter, but along what
        other = tuned(wide, lambda x, sign=sign: x + sign * carries)
        shift = fg.residual_shift(wide, other, tokenizer, mixed, hookpoints=[1])[1]
        accuracies = fg.component_accuracies(wide, tokenizer, shift, mixed, truth, components=3)
        assert accuracies[0] > 0.95
        assert len(accuracies) == 3
    with pytest.raises(fg.DataError, match="a label for each prompt"):
        fg.component_accuracies(wide, tokenizer, shift, mixed, truth[1:])
    with pytest.raises(fg.DataError, match="both labels"):
        fg.component_accuracies(wide, tokenizer, shift, mixed, [True] * len(mixed))


def test_what_has_no_shift_is_refused(wide, tokenizer):
    config = copy.deepcopy(wide.config)
    config.num_hidden_layers = 1
    narrow = AutoModelForCausalLM.from_config(config)
    with pytest.raises(fg.SelectionError, match="equal activations"):
        fg.residual_shift(wide, wide, tokenizer, PROMPTS)
    with pytest.raises(fg.PairingError, match="as the base has"):
        fg.residual_shift(wide, narrow, tokenizer, PROMPTS)
    with pytest.raises(fg.DataError, match="at least 2"):
        fg.residual_shift(wide, wide, tokenizer, PROMPTS[:1])
    found = fg.residual_shift(wide, tuned(wide, lambda h: 2 * h), tokenizer, PROMPTS, hookpoints=[1])[1]
    with pytest.raises(fg.SelectionError, match="a number from 0"):
        found.vector(len(found.components))
    with pytest.raises(fg.DataError, match="share"):
        found.effective_rank(1.5)
