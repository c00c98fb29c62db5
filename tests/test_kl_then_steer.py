"""KL-then-steer: its check, its loss and its loop against naive ones, what it does for steering, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.learning import kl_then_steer as kts
from tests.helpers.tiny import tiny_model
from tests.reference import kl_then_steer as reference

TEXTS = ["the man sat on the ship", "a cat ran", "the king took the ring of the queen ."]
SIDES = {"positive": ["the bride was happy", "good day"], "negative": ["a dog sat", "the old war was bad"]}
AT = [fg.Hookpoint(0), fg.Hookpoint(1)]


def token_ids(tokenizer, texts=TEXTS):
    return [tokenizer(text)["input_ids"] for text in texts]


def training(**changes):
    fixed: dict[str, Any] = {"rank": 4, "batch": 3, "lr": 1e-3, "probability": 1.0}
    return fg.KLThenSteerTraining(**{**fixed, **changes})


def trainer_of(model, tokenizer, stack, **changes):
    settings = training(**changes)
    student = stack.enter_context(kts._student(model, settings))
    rows = kts._rows(model, tokenizer, TEXTS)
    sets = [fg.ContrastSet("sides", positives=SIDES["positive"], negatives=SIDES["negative"])]
    return kts._Trainer(student, tokenizer, rows, sets, AT, settings)


@pytest.fixture
def stack():
    from contextlib import ExitStack

    with ExitStack() as entered:
        yield entered


def test_an_unsteered_new_adapter_loses_nothing_and_alone_has_gradients(tokenizer, stack):
    """METHODS: with B = 0 and c = 0 the loss is 0; under steering gradients reach the adapter, and nothing else."""
    model = tiny_model("llama")
    trainer = trainer_of(model, tokenizer, stack)
    assert trainer.backward([0, 1, 2], []) == 0.0
    assert trainer.backward([0, 1, 2], trainer.steering(0, 1.5)) > 1e-4
    named = dict(trainer.student.model.named_parameters())
    with_gradient = {name for name, p in named.items() if p.grad is not None}
    assert with_gradient == {name for name in named if "lora_" in name}
    assert all(float(named[name].grad.abs().max()) > 0 for name in named if "lora_B" in name)
    assert all(float(named[name].grad.abs().max()) == 0 for name in named if "lora_A" in name), "B is 0"
    assert not any("lm_head" in name for name in with_gradient)


@pytest.mark.parametrize("rank", [4, None])
def test_the_loss_is_the_naive_one(rank, tokenizer, stack):
    """Padding counts for nothing: the naive loops have none."""
    plain, model = tiny_model("llama"), tiny_model("llama")
    trainer = trainer_of(model, tokenizer, stack, rank=rank)
    positive, negative = (token_ids(tokenizer, SIDES[side]) for side in ("positive", "negative"))
    vectors = [reference.mean_difference(plain, at.layer, positive, negative) for at in AT]
    layers = [at.layer for at in AT]
    for strength in (1.5, -0.7):
        steering = trainer.steering(0, strength)
        for item, v in zip(steering, vectors, strict=True):
            assert torch.allclose(item.direction, v, atol=1e-5)  # float32 means
        expected = reference.loss(plain, plain, token_ids(tokenizer), layers, vectors, strength)
        assert trainer.backward([0, 1, 2], steering) == pytest.approx(float(expected.detach()), rel=1e-4)
    trainer.batch_tokens = 1
    assert trainer.backward([2, 0, 1], steering) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_training_is_the_naive_loop(tokenizer):
    """All weights, three steps of AdamW: losses, and the vectors, which are those of the model as it is then."""
    model, naive = tiny_model("llama"), tiny_model("llama")
    settings = training(rank=None, epochs=3, weight_decay=10.0)
    losses: list[float] = []
    strengths: list[float] = []

    class Spy(kts._Trainer):
        def step(self, number):
            super().step(number)
            losses.append(self.losses[-1])
            strengths.append(self.strengths[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kts, "_Trainer", Spy)
        tuned = fg.kl_then_steer(model, tokenizer, TEXTS, [SIDES], hookpoints=AT, settings=settings)
    assert tuned is model
    teacher = copy.deepcopy(naive)
    optimizer = torch.optim.AdamW(naive.parameters(), settings.lr, weight_decay=10.0)
    positive, negative = (token_ids(tokenizer, SIDES[side]) for side in ("positive", "negative"))
    expected = []
    for strength in strengths:
        vectors = [reference.mean_difference(naive, at.layer, positive, negative) for at in AT]
        loss = reference.loss(naive, teacher, token_ids(tokenizer), [0, 1], vectors, strength)
        expected.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(expected, rel=1e-3)  # float32; Adam magnifies rounding of small gradients
    assert len(set(strengths)) == 3
    assert all(abs(strength) <= 1.5 for strength in strengths)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_a_trained_model_stays_closer_under_steering(tokenizer, tmp_path):
    """What it is for: the divergence under steering falls, unsteered it stays small, and the adapter loads."""
    from peft import PeftModel

    plain, model = tiny_model("llama"), tiny_model("llama")
    settings = training(epochs=30, lr=5e-3, probability=0.5)
    before = [parameter.clone() for parameter in model.parameters()]
    tuned = fg.kl_then_steer(model, tokenizer, TEXTS, [SIDES], hookpoints=AT, settings=settings)
    assert not tuned.training
    for parameter, old in zip(plain.parameters(), before, strict=True):
        assert torch.equal(parameter, old)

    def divergence(student, strength):
        positive, negative = (token_ids(tokenizer, SIDES[side]) for side in ("positive", "negative"))
        vectors = [reference.mean_difference(student, at.layer, positive, negative) for at in AT]
        with torch.no_grad():
            return float(reference.loss(student, plain, token_ids(tokenizer), [0, 1], vectors, strength))

    for strength in (1.2, -1.2):
        assert divergence(tuned, strength) < 0.8 * divergence(plain, strength)
    assert divergence(tuned, 0.0) < 0.2 * divergence(plain, 1.2)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter").eval()
    ids = torch.tensor([token_ids(tokenizer)[0]])
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, tuned(ids).logits, atol=1e-6)
        assert not torch.allclose(plain(ids).logits, tuned(ids).logits, atol=1e-4)


def test_how_often_and_how_strongly_steps_are_steered(tokenizer, stack, monkeypatch):
    """An eighth of the steps, uniformly from −1.5 to 1.5, by the settings of the paper."""
    settings = fg.KLThenSteerTraining()
    assert (settings.rank, settings.lr, settings.epochs, settings.probability, settings.strength) == (
        128, 1e-5, 1, 0.125, 1.5
    )  # fmt: skip
    trainer = trainer_of(tiny_model("llama"), tokenizer, stack, probability=0.125)
    monkeypatch.setattr(trainer, "backward", lambda *_: 0.0)
    monkeypatch.setattr(trainer, "steering", lambda *_: [])
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    for number in range(4000):
        trainer.step(number)
    steered = torch.tensor([c for c in trainer.strengths if c])
    assert len(steered) / 4000 == pytest.approx(0.125, abs=0.02)  # four standard deviations
    assert float(steered.mean()) == pytest.approx(0.0, abs=0.16)  # likewise, of a spread of 0.87
    assert float(steered.std()) == pytest.approx(1.5 / 3**0.5, abs=0.08)
    assert float(steered.abs().max()) <= 1.5


def test_default_places_are_the_papers_share_of_the_depth():
    class Config:
        pass

    model = tiny_model("llama")
    model.model.layers.extend(copy.deepcopy(model.model.layers[0]) for _ in range(32 - len(model.model.layers)))
    model.config.num_hidden_layers = 32
    assert [at.layer for at in kts._places(model, None)] == list(range(3, 22))
    assert [at.layer for at in kts._places(tiny_model("llama"), None)] == [0, 1, 2]


def test_a_seed_decides_everything(tokenizer):
    trained = []
    for seed in (0, 0, 1):
        tuned = fg.kl_then_steer(
            tiny_model("llama"), tokenizer, TEXTS, [SIDES], hookpoints=AT, settings=training(batch=1, seed=seed)
        )
        trained.append(torch.cat([p.flatten() for n, p in tuned.named_parameters() if "lora_B" in n]))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox", "qwen2"])
def test_families(family, tokenizer):
    model = tiny_model(family)
    texts = [TEXTS[0], ("the man", "sat on the ship")]
    tuned = fg.kl_then_steer(model, tokenizer, texts, [SIDES], settings=training(batch=1))
    moved = [p for n, p in tuned.named_parameters() if "lora_B" in n and bool(p.abs().max() > 0)]
    assert moved
    merged = tuned.merge_and_unload()
    assert fg.generate(merged, tokenizer, ["the man"], max_new_tokens=2)


@pytest.mark.parametrize(
    ("texts", "contrasts", "options", "error", "match"),
    [
        ([], [SIDES], {}, fg.DataError, "at least one"),
        (TEXTS, [], {}, fg.DataError, "no contrast"),
        (TEXTS, [SIDES], {"hookpoints": []}, fg.DataError, "no hookpoint"),
        (TEXTS, [SIDES], {"hookpoints": [9]}, fg.HookpointError, "layer"),
    ],
)
def test_refusals(texts, contrasts, options, error, match, tokenizer):
    with pytest.raises(error, match=match):
        fg.kl_then_steer(tiny_model("llama"), tokenizer, texts, contrasts, settings=training(), **options)


def test_without_peft_and_with_an_adapter(tokenizer, monkeypatch):
    tuned = fg.kl_then_steer(tiny_model("llama"), tokenizer, TEXTS, [SIDES], settings=training())
    with pytest.raises(fg.ArgumentError, match="merge"):
        fg.kl_then_steer(tuned, tokenizer, TEXTS, [SIDES], settings=training())
    monkeypatch.setattr(kts, "find_spec", lambda _: None)
    with pytest.raises(fg.MissingError, match=r"fgsteer\[peft\]"):
        fg.kl_then_steer(tiny_model("llama"), tokenizer, TEXTS, [SIDES], settings=training())


def test_settings_out_of_range():
    wrong = {"rank": 0, "lr": 0.0, "epochs": 0, "batch": 0, "probability": 1.5, "strength": -1.0, "weight_decay": -1.0}
    for name, value in wrong.items():
        with pytest.raises(fg.DataError):
            fg.KLThenSteerTraining(**{name: value})


@pytest.mark.parametrize("rank", [2, None])
def test_a_training_that_stops_leaves_the_model_as_it_was(rank, tokenizer):
    model = tiny_model("llama")
    ids = torch.tensor([token_ids(tokenizer)[0]])
    before = model(ids).logits

    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    settings = training(batch=1, rank=rank, lr=0.1)
    for _ in range(2):  # the second finds no adapter of the first
        with pytest.raises(KeyboardInterrupt):
            fg.kl_then_steer(model, tokenizer, TEXTS, [SIDES], hookpoints=AT, settings=settings, progress=stop)
        assert torch.equal(model(ids).logits, before)
        assert not hasattr(model, "peft_config")
