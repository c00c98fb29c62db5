"""Trained factors of activations: the loss and the loop against naive ones, one linear site, files, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fgsteer as fg
from fgsteer.learning import scaling
from tests.helpers.tiny import D_MODEL, tiny_model
from tests.reference import adaptive as adam
from tests.reference import scaling as reference

AT, ABOVE = fg.Hookpoint(0), fg.Hookpoint(1)
EXAMPLES = [
    ("the man said", "yes", "no"),
    ("the king took the ring", "queen", "dog"),
    ("she is", "happy", "sad"),
    ("a", "good", "bad"),
]


@pytest.fixture(scope="module")
def wide():
    """A tiny Llama in float64, so that what differs from the naive loops is float32 rounding of what we add."""
    return tiny_model("llama", dtype=torch.float64)


def rows_of(tokenizer):
    return [
        (tokenizer(x)["input_ids"], [tokenizer(f"{x} {y}")["input_ids"][-1] for y in answers])
        for x, *answers in EXAMPLES
    ]


def trainer_of(model, tokenizer, sites, dynamic=False, **settings):
    return scaling._Trainer(model, tokenizer, EXAMPLES, sites, dynamic, fg.ScalingTraining(**settings))


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_is_the_naive_loop(dynamic, wide, tokenizer):
    """Three steps of Adam on all examples, with two layers."""
    settings = fg.ScalingTraining(steps=3, batch=4, faithfulness=2.0, l1=0.0 if dynamic else 0.03, lr=0.05)
    found = fg.train_scaling(wide, tokenizer, EXAMPLES, hookpoints=[AT, ABOVE], settings=settings, dynamic=dynamic)
    rows = rows_of(tokenizer)
    norms = [1.0, 1.0]
    if dynamic:
        with torch.no_grad():
            states = [wide(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids, _ in rows]
        count = sum(len(ids) - 1 for ids, _ in rows)
        norms = [
            float(torch.cat([s[at.layer + 1][0, 1:] for s in states]).norm(dim=-1).sort().values[(count - 1) // 2])
            for at in (AT, ABOVE)
        ]

    def factors_of(leaves, m):
        def factor(n):
            theta = leaves[2 + n] if dynamic else None
            return lambda h, _: 1 + m * (leaves[n] + (0.0 if theta is None else (theta * h).sum() / norms[n]))

        return {at.layer: factor(n) for n, at in enumerate((AT, ABOVE))}

    def loss(*leaves):
        size = sum(leaf.abs().sum() for leaf in leaves)
        weights = {"faithfulness": settings.faithfulness, "l1": settings.l1}
        return reference.loss(wide, rows, lambda m: factors_of(leaves, m), size, weights)

    start = [torch.zeros(()), torch.zeros(())] + [torch.zeros(D_MODEL)] * (2 if dynamic else 0)
    now, losses = adam.train(start, loss, settings.lr, settings.steps)
    assert found.losses == pytest.approx(losses, rel=1e-5)  # logits are compared in float32
    alphas = [float(item.coefficient) for item in found.scales]
    # Adam divides gradients by their size, and so magnifies the rounding of small ones
    assert alphas == pytest.approx([float(x) for x in now[:2]], rel=1e-2, abs=1e-4)
    assert all(abs(alpha) > 1e-3 for alpha in alphas)
    if dynamic:
        for item, theta, norm in zip(found.scales, now[2:], norms, strict=True):
            assert torch.allclose(item.read.double() * norm, theta, rtol=2e-2, atol=2e-3)


def test_the_gradient_of_one_linear_site_is_the_logits(tokenizer):
    """METHODS: where logits are U·(1 + α)h, d logit/dα is U·h; at α = 0 nothing is changed."""
    model = tiny_model("llama", dtype=torch.float64)
    model.model.norm = nn.Identity()
    at = fg.Hookpoint(len(model.model.layers) - 1)
    trainer = trainer_of(model, tokenizer, [(at, "prompt")], l1=0.0, faithfulness=0.0)
    plain = trainer.logits([0], [])
    assert torch.equal(trainer.logits([0], trainer.scales(1.0)), plain)
    for token in trainer.answers[0]:
        trainer.alphas[0].grad = None
        trainer.logits([0], trainer.scales(1.0))[0, token].backward()
        ids = torch.tensor([trainer.rows[0].ids])
        h = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        expected = float((model.lm_head.weight[token] * h).sum().detach())
        assert trainer.alphas[0].grad is not None
        assert float(trainer.alphas[0].grad) == pytest.approx(expected, rel=1e-5)
        trainer.alphas[0].grad = None
        trainer.logits([0], trainer.scales(-1.0))[0, token].backward()
        assert float(trainer.alphas[0].grad) == pytest.approx(-expected, rel=1e-5)
    # without effect on other tokens the loss at α is the mean of −log σ(±(1 ± α)d)
    with torch.no_grad():
        trainer.alphas[0].fill_(0.3)
    d = [float((row[a] - row[b]).detach()) for row, (a, b) in zip(
        torch.stack([trainer.logits([n], [])[0] for n in range(4)]), trainer.answers, strict=True
    )]  # fmt: skip
    mean = torch.tensor([[-sign * (1 + sign * 0.3) * x for sign in (1, -1)] for x in d]).exp().log1p().mean()
    assert trainer.backward([0, 1, 2, 3]) == pytest.approx(float(mean), rel=1e-5)


def test_an_answer_is_flipped_both_ways(llama, tokenizer):
    """A factor for each token of the prompt, in two layers; they are listed by their size."""
    settings = fg.ScalingTraining(steps=15, lr=0.4, faithfulness=0.0, l1=0.0)
    scopes = [fg.at([n]) for n in range(1, 4)]  # 0 is the start token
    found = fg.train_scaling(llama, tokenizer, EXAMPLES[:1], hookpoints=[0, 1], scopes=scopes, settings=settings)
    assert found.flipped == (1.0, 1.0)
    assert found.losses[-1] < found.losses[0]
    table = found.table()
    assert len(table) == 6
    sizes = [abs(row.coefficient) for row in table]
    assert sizes == sorted(sizes, reverse=True)


def test_a_penalty_leaves_everything_as_it_is(llama, tokenizer):
    """With an l1 weight above every gradient the factors stay within a step of 0."""
    settings = fg.ScalingTraining(steps=8, l1=100.0, lr=0.01)
    found = fg.train_scaling(llama, tokenizer, EXAMPLES, hookpoints=1, settings=settings)
    assert all(abs(float(item.coefficient)) < 0.01 for item in found.scales)


def test_interventions_and_files(llama, tokenizer, tmp_path):
    without_gradients = [p.grad is None for p in llama.parameters()]  # other tests may leave some
    settings = fg.ScalingTraining(steps=5)
    found = fg.train_scaling(llama, tokenizer, EXAMPLES, hookpoints=[0, 1], settings=settings, dynamic=True)
    fg.save_steering(tmp_path / "s.safetensors", found.interventions(2.0))
    ids = tokenizer("the man said", return_tensors="pt")["input_ids"]
    plain = llama(ids).logits
    with fg.steer(llama, found.interventions(2.0)):
        expected = llama(ids).logits
    with fg.steer(llama, fg.load_steering(tmp_path / "s.safetensors")):
        assert torch.equal(llama(ids).logits, expected)
    assert not torch.equal(expected, plain)
    with fg.steer(llama, found.interventions(0.0)):
        assert torch.equal(llama(ids).logits, plain)
    assert not any(item.trained for item in found.scales)
    assert [p.grad is None for p in llama.parameters()] == without_gradients


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox", "qwen2"])
def test_families_and_sites(family, models, tokenizer):
    model, places = models[family], [fg.Hookpoint(0, "mlp_out"), fg.Hookpoint(1, "attn_out"), fg.Hookpoint(1)]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    settings = fg.ScalingTraining(steps=2)
    found = fg.train_scaling(model, tokenizer, EXAMPLES, hookpoints=places, settings=settings)
    assert all(float(item.coefficient) for item in found.scales)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_a_bfloat16_model(tokenizer):
    model = tiny_model("llama", dtype=torch.bfloat16)
    found = fg.train_scaling(model, tokenizer, EXAMPLES, hookpoints=1, settings=fg.ScalingTraining(steps=3))
    assert float(found.scales[0].coefficient) != 0


def test_prompts_are_split_into_passes(wide, tokenizer, monkeypatch):
    settings: Any = {"settings": fg.ScalingTraining(steps=3, batch=4)}
    expected = fg.train_scaling(wide, tokenizer, EXAMPLES, hookpoints=1, **settings)
    monkeypatch.setattr(scaling, "default_batch_tokens", lambda _: 1)
    found = fg.train_scaling(wide, tokenizer, EXAMPLES, hookpoints=1, **settings)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)  # float32 logits of other batches


@pytest.mark.parametrize(
    ("examples", "options", "error", "match"),
    [
        ([], {}, fg.DataError, "no examples"),
        (["a b c"], {}, fg.DataError, "example 0"),
        ([("the", "dog", "dog ran")], {}, fg.DataError, "first tokens differ"),
        (EXAMPLES, {"hookpoints": []}, fg.DataError, "at least one of each"),
        (EXAMPLES, {"scopes": []}, fg.DataError, "at least one of each"),
        (EXAMPLES, {"scopes": ["some"]}, fg.SteeringError, "scope"),
        (EXAMPLES, {"hookpoints": 9}, fg.HookpointError, "layer"),
    ],
)
def test_refusals(examples, options, error, match, llama, tokenizer):
    with pytest.raises(error, match=match):
        fg.train_scaling(llama, tokenizer, examples, **{"hookpoints": 1, **options})


def test_settings_out_of_range():
    for changes in ({"lr": 0.0}, {"steps": 0}, {"batch": 0}, {"faithfulness": -1.0}, {"l1": -1.0}, {"seed": -1}):
        with pytest.raises(fg.DataError):
            fg.ScalingTraining(**changes)
