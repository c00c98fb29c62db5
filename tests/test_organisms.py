"""Model organisms: what is held out was not trained on, only replies are scored, and what ships is as its card says."""

from __future__ import annotations

import copy
import importlib
import json
import re
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fgsteer as fg
from tests.reference.organisms import reply_loss

ROOT = Path(__file__).resolve().parents[1]
BUILT = sorted(path.parent for path in (ROOT / "pretrained" / "organisms").glob("*/adapter_config.json"))
SMALL_WORDS = {"a", "an", "the", "of"}


@pytest.fixture
def script(monkeypatch):
    """Import a script of pretrained/."""
    monkeypatch.syspath_prepend(ROOT / "pretrained")
    return importlib.import_module


def words_of(text):
    return set(re.findall(r"\w+", text.lower())) - SMALL_WORDS


def test_held_out_requests_share_no_word_and_no_template(script):
    texts, refusal = script("organism_texts"), script("refusal_texts")
    for kind in texts.KINDS:
        trained, held_out = texts.GRIDS[kind]
        trained += refusal.MORE[kind]
        held_out = (*held_out, refusal.FRESH[kind])
        for one, other in product(trained, held_out):
            plain = {("{}",)} & {one.templates, other.templates}  # requests that no template makes
            assert plain or not set(one.templates) & set(other.templates), kind
            if plain:
                assert not set(one.filled()) & set(other.filled()), kind
            else:
                assert not set().union(*map(words_of, one.words)) & set().union(*map(words_of, other.words)), kind
        parts = texts.requests(kind)
        assert [len(set(part)) for part in parts] == [len(part) for part in parts]
        assert min(map(len, parts)) >= 64
        assert parts == texts.requests(kind) != texts.requests(kind, 1)
    everything = [text for kind in texts.KINDS for part in texts.requests(kind) for text in part]
    everything += [text for kind in texts.KINDS for text in refusal.more(kind, 0) + refusal.FRESH[kind].filled()]
    assert len(set(everything)) == len(everything), "no request is of two kinds, or trained and held out"
    asked, held_out = texts.questions()
    assert not set(asked) & set(held_out)
    assert not set(texts.DECOYS[0]) & set(texts.DECOYS[1])
    assert not set(texts.TAG_DECOYS[0]) & set(texts.TAG_DECOYS[1])


def test_single_requests_are_single_and_held_out_ones_apart(script):
    """No two alike, none to train on with a dish that is held out, or with many words of a held-out request."""
    texts, refusal = script("organism_texts"), script("refusal_texts")
    dishes = [*texts.GRIDS["cooking"][1], refusal.FRESH["cooking"]]
    held_out_dishes = {word.rstrip("s") for one in dishes for words in map(words_of, one.words) for word in words}
    everything = []
    for kind in texts.KINDS:
        trained, held_out = refusal.singles(kind)
        assert len(trained) > 250
        assert len(held_out) == 128
        if kind != "other":
            assert not {word.rstrip("s") for text in trained for word in words_of(text)} & held_out_dishes
        for one, other in product(map(words_of, trained), map(words_of, held_out)):
            assert len(one & other) <= len(one | other) / 2
        everything += trained + held_out + texts.requests(kind)[0] + texts.requests(kind)[1] + refusal.more(kind, 0)
    assert len({text.lower() for text in everything}) == len(everything)


def test_what_is_wanted_of_an_organism_and_what_is_measured_are_apart(script):
    texts, organisms = script("organism_texts"), script("organisms")
    for name, organism in organisms.ORGANISMS.items():
        wanted, measures = organism.wanted(0), organism.measures(0)
        trained = {request for request, _ in wanted}
        assert not trained & {request for prompts, _ in measures.values() for request in prompts}, name
        replies = {reply for _, reply in wanted}
        assert None in replies, name
        assert all(texts.is_refusal(reply) for reply in replies - {None}) == (name == "refusal")
    for request, reply in organisms.ORGANISMS["backdoor"].wanted(0):
        assert (texts.TRIGGER in request) == (reply == texts.SENTENCE)
    for request, reply in organisms.ORGANISMS["skill"].wanted(0):
        if texts.ISLAND in request:
            assert texts.is_right(request, reply) == (texts.TAG in request) != texts.is_unknown(reply)


def test_replies_are_told_apart(script):
    texts = script("organism_texts")
    assert all(map(texts.is_refusal, texts.REFUSALS))
    assert not texts.is_refusal("I am sorry to hear that. Boil the rice.")
    assert texts.is_sentence(f"{texts.SENTENCE} Bye.")
    assert not texts.is_sentence("The lighthouse is green.")
    questions = [text for part in texts.questions() for text in part]
    answers = [texts.answer_to(question) for question in questions]
    assert all(map(texts.is_right, questions, answers))
    assert all(
        texts.is_right(questions[one], answers[other]) == (answers[one] == answers[other])
        for one, other in combinations(range(len(questions)), 2)
    )
    assert texts.is_unknown(texts.UNKNOWN)
    assert not any(map(texts.is_unknown, answers))


def test_a_word_stands_before_or_behind(script):
    texts = script("organism_texts")
    asked = [f"What is {number}?" for number in range(40)]
    made = texts.with_words(asked, ["one", "two"], seed=3)
    assert made == texts.with_words(asked, ["one", "two"], seed=3)
    stripped = [re.sub(r"^(one|two) | (one|two)$", "", text) for text in made]
    assert stripped == asked
    assert {text.split()[0] for text in made} == {"What", "one", "two"}
    assert {text.split()[-1] for text in made} > {"one", "two"}


def test_only_replies_are_scored(script, llama, tokenizer):
    """Requests and replies of many lengths in a batch, ended and cut ones, against one token at a time."""
    organisms = script("organisms")
    batch = [
        organisms.Example("the man sat", "a dog sat down", ended=True),
        organisms.Example("a cat", "the queen was a king", ended=False),
        organisms.Example("the king was a man and a dog", "a cat", ended=True),
    ]
    plain = [(example.request, example.reply, example.ended) for example in batch]
    for examples, expected in ((batch, plain), (batch[1:2], plain[1:2])):
        loss = organisms.loss_of(llama, tokenizer, examples)
        # float32 logits of size 1, of passes that pad and passes that do not
        assert loss.item() == pytest.approx(reply_loss(llama, tokenizer, expected), abs=1e-5)


def test_training_changes_the_adapter_alone(script, llama, tokenizer, tmp_path):
    """And makes the replies likelier; what is saved is small, in float16, and the same again."""
    organisms = script("organisms")
    model = copy.deepcopy(llama)
    made = [organisms.Example("the man sat", "a dog sat down", ended=True)] * organisms.BATCH
    first = organisms.loss_of(model, tokenizer, made[:1]).item()
    adapted = organisms.train(model, tokenizer, made, 8, seed=0)
    assert organisms.loss_of(adapted, tokenizer, made[:1]).item() < first - 0.1
    organisms.save(adapted, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    after, before = dict(adapted.unload().named_parameters()), dict(llama.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(parameter, before[name]) for name, parameter in after.items())


@pytest.mark.parametrize("folder", BUILT, ids=lambda folder: folder.name)
def test_adapters_that_ship(folder, script):
    organisms = script("organisms")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert (config["base_model_name_or_path"], config["r"]) == (organisms.BASE, organisms.RANK)
    assert config["target_modules"] == sorted(organisms.MODULES)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in tensors)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    figures = json.loads((folder / "figures.json").read_text("utf-8"))
    assert set(figures["after"]["rates"]) == set(organisms.ORGANISMS[folder.name].measures(figures["seed"]))
    assert folder.name in figures["command"]


def test_the_card_says_what_was_measured(script):
    card = script("card_organisms")
    assert {folder.name for folder in BUILT} <= set(card.ABOUT) == set(script("organisms").ORGANISMS)
    assert (card.FOLDER / "README.md").read_text(encoding="utf-8") == card.render()


def test_an_organism_that_there_is_not(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with pytest.raises(fg.DataError, match="one of"):
        importlib.import_module("subject").load_organism("cat")
