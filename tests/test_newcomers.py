"""A newcomer's wrong turns: each ends in a typed error that names the way, or simply works."""

from __future__ import annotations

import inspect
import json
import socket
import time
import warnings
from typing import Any, cast

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fgsteer as fg
from fgsteer.data.chat import apply_template
from fgsteer.data.rendering import render_prompt
from fgsteer.features.search import forms_pattern
from fgsteer.storage import network
from tests.helpers.cli import app
from tests.helpers.saes import make_sae
from tests.helpers.tiny import tiny_model, word_tokenizer

DATA = fg.ContrastSet("x", positives=["the bride wore a ring", "the groom"], negatives=["a dog sat", "a cat"])
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def stats():
    return fg.collect(tiny_model("llama"), word_tokenizer(), DATA, sae=make_sae(), keep_pooled=True)


@pytest.fixture
def chatty():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


class Processor:
    """A multimodal processor: callable, with the tokenizer inside."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, images):
        raise TypeError("images, please")


# ---------------------------------------------------------------- arguments at the door


def calls(model, tokenizer, sae, stats):
    """Every public function that takes a model and a tokenizer, called with them."""
    vec, texts = fg.caa(stats), ["the man sat", "a cat ran"]
    pair = fg.ContrastPair("yes", "no", prompt="the man said")
    return {
        "generate": lambda m, t: fg.generate(m, t, ["the"], max_new_tokens=2),
        "collect": lambda m, t: fg.collect(m, t, DATA, sae=sae),
        "measure_density": lambda m, t: fg.measure_density(m, t, sae, texts),
        "measure_examples": lambda m, t: fg.measure_examples(m, t, sae, texts),
        "find_features": lambda m, t: fg.find_features(m, t, sae, "cat"),
        "describe_features": lambda m, t: fg.describe_features(m, t, sae, [1]),
        "output_scores": lambda m, t: fg.output_scores(m, t, sae, [1], prompt="the man"),
        "seen_features": lambda m, t: fg.seen_features(m, t, sae, "the man"),
        "cross_entropy": lambda m, t: fg.cross_entropy(m, t, texts),
        "cross_entropies": lambda m, t: fg.cross_entropies(m, t, texts, [None]),
        "kl_divergences": lambda m, t: fg.kl_divergences(m, t, texts, [vec.add(1.0)]),
        "log_probabilities": lambda m, t: fg.log_probabilities(m, t, [("the", "man")]),
        "calibrate": lambda m, t: fg.calibrate(m, t, vec.unit().add, texts, target_kl=0.001),
        "perplexities": lambda m, t: fg.perplexities(m, t, texts),
        "answer_probabilities": lambda m, t: fg.answer_probabilities(m, t, [pair]),
        "measure_steerability": lambda m, t: fg.measure_steerability(m, t, vec.add, [pair], [-1.0, 1.0]),
        "Coherence.fit": lambda m, t: fg.Coherence.fit(m, t, texts),
    }


def test_a_processor_is_taken_for_its_tokenizer(llama, tokenizer, sae, stats):
    for name, call in calls(llama, tokenizer, sae, stats).items():
        assert call(llama, Processor(tokenizer)) is not None, name


def test_other_things_in_the_places_of_model_and_tokenizer_are_named(llama, tokenizer, sae, stats):
    for name, call in calls(llama, tokenizer, sae, stats).items():
        for model, given, told in (
            (llama, None, "None for tokenizer"),
            (llama, llama, "a LlamaForCausalLM for tokenizer"),
            (tokenizer, llama, "a Tokeni.* for model"),
            ("default", tokenizer, r"'default' \(str\) for model.*load_model"),
        ):
            with pytest.raises(fg.ArgumentError, match=told) as caught:
                call(model, given)
            assert name.partition(".")[2] or name in str(caught.value)


def test_one_order_of_arguments():
    """Public functions begin with model, tokenizer and sae, those of them that they need, in this order."""
    order = ("model", "tokenizer", "sae")
    for name in vars(fg)["__all__"]:
        value = getattr(fg, name)
        if inspect.isfunction(value):
            own = [p for p in inspect.signature(value).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
            named = [p.name for p in own if p.name in order]
            assert named == sorted(named, key=order.index), name
            needed = [p.name for p in own if p.default is p.empty]
            begin = [n for n in needed if n in order]
            assert "model" not in begin or needed[: len(begin)] == begin, name


def test_former_orders_still_work_and_warn(llama, tokenizer, sae):
    texts = ["the man sat", "a cat ran"]
    pairs: list[tuple[Any, Any, Any]] = [
        (fg.find_features, ("cat", sae, llama, tokenizer), (llama, tokenizer, sae, "cat")),
        (fg.describe_features, ([1], llama, tokenizer, sae), (llama, tokenizer, sae, [1])),
    ]
    for function, former, now in pairs:
        with pytest.warns(DeprecationWarning, match=r"is now \w+\(model, tokenizer, sae, ") as caught:
            assert function(*former) == function(*now)
        assert caught[0].filename == __file__  # the line that is to change
    with pytest.warns(DeprecationWarning, match="order of arguments.*measure_density"):
        density = fg.measure_density(llama, tokenizer, texts, sae)
    assert torch.equal(density.fired, fg.measure_density(llama, tokenizer, sae, texts).fired)
    with pytest.warns(DeprecationWarning, match="order of arguments.*measure_examples"):
        examples = fg.measure_examples(llama, tokenizer, texts, sae)
    assert torch.equal(examples.tokens, fg.measure_examples(llama, tokenizer, sae, texts).tokens)
    with pytest.raises(fg.ArgumentError, match=r"find_features\(model, tokenizer, sae, word, …\)"):
        fg.find_features(llama, tokenizer, "cat", sae)


def test_statistics_and_saes_are_what_methods_work_on(sae, stats):
    path, fgaa = "love.stats", cast(Any, fg.fgaa)  # without its type, which refuses some of these
    for make in (
        lambda: fg.caa(path),
        lambda: fg.ace(DATA),
        lambda: fg.pca(None),
        lambda: fg.sta(path, sae),
        lambda: fg.fgaa(sae, stats),
        lambda: fg.build("caa", stats=path),
        lambda: fg.diagnose(path),
    ):
        with pytest.raises(fg.ArgumentError, match=r"statistics.*ContrastStatistics\.load\(path\)"):
            make()
    for make, told in (
        (lambda: fg.fgaa(stats, "default"), r"'default' \(str\) for sae.*fg\.load_sae"),
        (lambda: fg.fgaa(stats, sae, "default"), r"'default' \(str\) for effects.*fg\.load_effects"),
        (lambda: fg.fgaa(stats, sae, density="d"), r"'d' \(str\) for density.*FeatureDensity\.load"),
        (lambda: fgaa(stats), r"missing.*'sae'. Expected fgaa\(stats, sae, effects"),
        (lambda: fgaa(stats, sae, nonsense=1), "unexpected keyword argument 'nonsense'"),
        (lambda: fg.from_features([1], sae), "a list for sae"),
    ):
        with pytest.raises(fg.ArgumentError, match=told):
            make()


def test_plain_values_are_checked_at_the_door(llama, tokenizer, sae):
    vec = fg.SteeringVector(torch.ones(32), 1)
    for make, told in (
        (lambda: fg.collect(llama, tokenizer, DATA, sae=sae, bos="no"), "True or False, got 'no'.*for bos"),
        (lambda: fg.collect(llama, tokenizer, DATA, sae=sae, max_tokens="3"), "whole number.*'3'.*for max_tokens"),
        (lambda: fg.measure_density(llama, tokenizer, sae, "the man"), "'the man'.*for texts"),
        (lambda: fg.calibrate(llama, tokenizer, vec, ["the man"], target_kl=0.1), "vec.add itself"),
        (lambda: fg.calibrate(llama, tokenizer, vec.add, ["the man"], target_kl="0.1"), r"'0\.1'.*for target_kl"),
        (lambda: fg.kl_divergences(llama, tokenizer, ["the man"], None), "None for steering"),
        (lambda: fg.logit_lens(llama, vec), "a SteeringVector for directions"),
        (lambda: fg.fold(llama, vec), r"a SteeringVector.*\.add\(coefficient\)"),
        (lambda: fg.steer(vec.add(1.0), llama), r"an Add for model.*steer\(model, steering, …\)"),
    ):
        with pytest.raises(fg.ArgumentError, match=told):
            make()


def test_features_of_statistics_without_an_sae_are_named(llama, tokenizer, sae):
    bare = fg.collect(llama, tokenizer, DATA, hookpoints=1)
    for make in (fg.fgaa, fg.sta):
        with pytest.raises(
            fg.PairingError, match=r"without features.*collected without an SAE.*Collect again with sae="
        ):
            make(bare, sae)


@pytest.mark.parametrize(
    "given", [2, [2], (2,), np.int64(2), torch.tensor(2), fg.Hookpoint(2), "blocks.2.hook_resid_post"]
)
def test_a_number_is_the_end_of_a_block(llama, tokenizer, given):
    assert list(fg.collect(llama, tokenizer, DATA, hookpoints=given).residual) == [fg.Hookpoint(2)]
    assert fg.SteeringVector(torch.ones(32), 2).hookpoint == fg.Hookpoint(2, "resid_post")


@pytest.mark.parametrize("given", [True, 2.0, "2", [[1]], {"layer": 1}])
def test_what_is_no_hookpoint_is_named(llama, tokenizer, given):
    with pytest.raises(fg.HookpointError, match=r"block's number|a name like"):
        fg.collect(llama, tokenizer, DATA, hookpoints=given)


def test_the_command_line_takes_the_number_of_a_block(tmp_path):
    arguments = ["collect", "love", "-o", str(tmp_path / "s"), "--no-sae", "--hookpoint", "0", "--device", "cpu"]
    assert "40 positive and 40 negative texts at blocks.0.hook_resid_post" in CliRunner().invoke(app, arguments).stdout


def test_contrasts_in_memory(llama, tokenizer, sae):
    expected = fg.collect(llama, tokenizer, DATA, sae=sae).at("residual")[1].difference
    two_sided = {"positive": list(DATA.positives), "negative": list(DATA.negatives)}
    given: Any
    for given in (two_sided, {"positives": DATA.positives, "negatives": DATA.negatives}, fg.load_contrast(two_sided)):
        assert torch.equal(fg.collect(llama, tokenizer, given, sae=sae).at("residual")[1].difference, expected)
    rows = [{"positive": "the bride", "negative": "a dog"}]
    pairs = [fg.ContrastPair("the bride", "a dog")]
    for given in (rows, pairs, [("the bride", "a dog")]):
        assert fg.load_contrast(given).pairs == tuple(pairs)
    for given, told in (
        ({"positive": ["a"]}, "no field 'negative'"),
        (["a"], r"'a' \(str\) in pairs\[0\] of the contrast"),
        (None, "None for contrast"),
        (3, r"3 \(int\) for contrast"),
        ([{"role": "user", "content": "a"}], "fields 'role', 'content'"),
    ):
        with pytest.raises(fg.DataError, match=told):
            fg.collect(llama, tokenizer, given, sae=sae)


def test_a_vector_of_another_model_names_both(llama):
    made = {"method": "caa", "model": {"name": "google/gemma-2-2b"}}
    llama.config._name_or_path = "fgsteer/default"
    try:
        deep = fg.SteeringVector(torch.ones(32), 15, provenance=made)
        told = r"default has: a layer from 0 to 2.*made for google/gemma-2-2b at blocks\.15.*load_model\('google/gemma"
        with pytest.raises(fg.HookpointError, match=told), fg.steer(llama, deep.add(1.0)):
            pass
        wide = fg.SteeringVector(torch.ones(20), 1, provenance=made)
        with pytest.raises(fg.PairingError, match=r"load_model\('google/gemma-2-2b'\)"):
            wide.check(llama)
    finally:
        llama.config._name_or_path = ""


# ---------------------------------------------------------------- prompts and chat


def test_a_prompt_without_a_token_is_named(llama, tokenizer):
    bare = word_tokenizer(bos=False)
    for prompts, told in (("", "Prompt 0"), (["the king", ""], "Prompt 1")):
        with pytest.raises(fg.DataError, match=f"{told} is empty, and this tokenizer puts no BOS before a text"):
            fg.generate(llama, bare, prompts, max_new_tokens=2)
    assert fg.generate(llama, tokenizer, "", max_new_tokens=2)  # after BOS
    nonsense: Any
    for nonsense in (None, 3):
        with pytest.raises(fg.DataError, match="prompts that are a text"):
            fg.generate(llama, tokenizer, nonsense)
    with pytest.raises(fg.DataError, match=r"Put the message into a list"):
        fg.generate(llama, tokenizer, [{"role": "user", "content": "a"}])


def test_a_template_that_refuses_is_a_typed_error(llama, chatty):
    system = [{"role": "system", "content": "the"}, {"role": "user", "content": "a"}]
    with pytest.raises(fg.DataError, match=r"System role not supported.*first user message"):
        fg.generate(llama, chatty, [system])
    with pytest.raises(fg.DataError, match="System role not supported"):
        fg.collect(llama, chatty, [fg.ContrastPair("yes", "no", prompt=system)], hookpoints=1)
    chatty.chat_template = "{{ nothing.here }}"
    with pytest.raises(fg.DataError, match="template refuses"):
        apply_template(chatty, system)
    chatty.chat_template = None
    with pytest.raises(fg.DataError, match="a tokenizer with a chat template"):
        fg.generate(llama, chatty, [system[1:]])


def test_content_parts_are_texts(llama, chatty):
    plain = [{"role": "user", "content": "the bride sat"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "the bride"}, {"type": "text", "text": " sat"}]}]
    made = [fg.generate(llama, chatty, [messages], max_new_tokens=4) for messages in (plain, parts)]
    assert made[0] == made[1]
    assert fg.ContrastPair(parts, plain) == fg.ContrastPair(plain, plain)
    for part, told in (
        ({"type": "image", "url": "x"}, "type 'image'"),
        ({"type": "audio"}, "type 'audio'"),
        ("text", "type 'str'"),
    ):
        with pytest.raises(fg.DataError, match=f"a content part of {told} in prompt 0, message 0"):
            fg.generate(llama, chatty, [[{"role": "user", "content": [part]}]])


def test_the_assistants_last_message_is_continued(chatty):
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "a bride"}]
    assert render_prompt(chatty, messages[:1]).text == "user the assistant "
    assert render_prompt(chatty, messages).text == "user the assistant a bride"


def test_a_list_of_interventions_means_one_thing(llama, tokenizer):
    vec = fg.SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1)
    x, y, prompts = vec.add(9.0), vec.ablate(), ["the man", "a cat"]

    def made(prompts, steering, **options):
        return fg.generate(llama, tokenizer, prompts, steering=steering, max_new_tokens=6, **options)

    with pytest.raises(fg.SteeringError, match=r"per_row=False.*per_row=True"):
        made(prompts, [x, y])
    each, both = made(prompts, [x, y], per_row=True), made(prompts, [x, y], per_row=False)
    assert each == [*made(prompts[:1], x), *made(prompts[1:], y)] == made(prompts, [[x], [y]])
    assert both == made(prompts, [[x, y], [x, y]])
    assert made(prompts[:1], [x, y]) == both[:1]  # as steer composes
    assert made(prompts, [x, None]) == [each[0], *made(prompts[1:], None)]  # None says: by row
    with fg.steer(llama, [x, y]):
        composed = made(prompts, None)
    assert composed == both
    for steering, options in (([x, None, y], {}), ([x], {"per_row": True})):
        with pytest.raises(fg.SteeringError, match="one entry per prompt"):
            made(prompts, steering, **options)


# ---------------------------------------------------------------- search


@pytest.mark.parametrize(
    ("word", "text", "matches"),
    [
        ("wedding", "wed", True),
        ("wedding", "wedded", True),
        ("wedding", "Wednesday", False),
        ("marry", "marriage, married", True),
        ("married", "marry", True),
        ("running", "runs", True),
        ("king", "kin", False),
        ("ring", "r", False),
        ("sea", "seal", False),
        ("war", "ward", False),
        ("wedding ring", "wedding rings", True),
        ("日本", "日本語", True),
    ],
)
def test_forms_of_a_word(word, text, matches):
    assert bool(forms_pattern(word).search(text)) is matches


def test_search_for_nonsense_finds_nothing_and_for_a_form_finds_its_word():
    model, tokenizer = fg.load_model("default")
    sae = fg.load_sae("default")
    examples = fg.load_examples(sae)

    def found(word):
        return {entry.id: entry for entry in fg.find_features(model, tokenizer, sae, word, examples=examples)}

    for word in ("zzzzz", "qwertyuiop", "xqvbn"):
        assert not found(word), word
    marry = next(j for j, label in sae.labels.items() if label.startswith("marry"))
    assert "another form in its label" in found("married")[marry].why
    king = next(iter(found("king").values()))
    assert king.why[:2] == ("label", "peaks on it in 4 of 4 excerpts")
    assert king.id in found("kings")


def test_a_search_without_a_hit_ends_with_1():
    result = CliRunner().invoke(app, ["features", "--search", "zzzzz", "--json", "--device", "cpu"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["features"] == []
    assert "No feature was found" in result.stderr


# ---------------------------------------------------------------- before a model is loaded


@pytest.fixture
def no_loading(monkeypatch):
    """Loading a model is an error of its own: whatever else is raised, was raised before."""

    def refuse(*_, **__):
        raise AssertionError("a model is loaded")

    fg.load_model("default")  # fills the module's names
    monkeypatch.setattr("fgsteer.models.loading.load_model", refuse)
    monkeypatch.setattr(fg, "load_model", refuse)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    sae = fg.load_sae("default")
    vec = fg.from_features(sae, {1: 1.0})
    vec.save(folder / "vector")
    fg.SteeringVector(torch.ones(64), 15, provenance={"model": {"name": "google/gemma-2-2b"}}).save(folder / "gemma")
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("x", encoding="utf-8")
    (folder / "corpus.txt").write_text("A dog sat.\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("generate hi -v {0}/none", "no file"),
        (
            "generate hi -v {0}/gemma -c 1",
            "made for google/gemma-2-2b.*Name the model that the vector was made for: --model google/gem",
        ),
        ("generate hi -v {0}/vector -c 1 --op push", "--op push"),
        ("generate hi -v {0}/vector -c 1 -c 2", "2 coefficients for 1 vector"),
        ("generate hi -v {0}/vector -c 1 --scope al", "got .*'al'"),
        ("generate hi --dtype float31", "--dtype"),
        ("generate hi --device gpu", "--device gpu"),
        ("generate hi --prefill Yes --no-chat", "--prefill with --no-chat"),
        ("generate hi -v {0}/vector -v {0}/vector", "2 vectors without coefficients"),
        ("fold -v {0}/vector -c 1 -o {0}/full", "full exists"),
        ("export {0}/vector --to checkpoint -c 1 -m default -o {0}/none --op push", "--op push"),
        ("export {0}/gemma --to checkpoint -c 1 -m default -o {0}/none", "made for google/gemma-2-2b"),
        ("eval --tasks x -v {0}/gemma -c 1", "made for google/gemma-2-2b|lm-eval is not installed"),
        ("features {0}/gemma", "made for google/gemma-2-2b"),
        ("features --feature 99999", "99999"),
        ("features --feature 1 --labels {0}/none", "none"),
        ("features --feature 1 --corpus {0}/none.txt", "(?i)cannot read"),
        ("features --feature 1 --sae {0}/none", "no SAE"),
        ("collect nothing -o {0}/s", "no contrast set"),
        ("collect love -o {0}/s --tokens lst", "--tokens lst"),
        ("collect love -o {0}/s --hookpoint nowhere", "hookpoint = 'nowhere'"),
        ("collect love -o {0}/s --no-sae", "--no-sae without --hookpoint"),
        ("collect love -o {0}/s --sae {0}/none", "There is no SAE"),
        ("collect love -o {0}/full", "Cannot write"),
        ("density {0}/none.txt -o {0}/d", "(?i)cannot read"),
        ("density {0}/corpus.txt -o {0}/d --sae {0}/none", "no SAE"),
        ("examples {0}/none.txt -o {0}/e", "(?i)cannot read"),
        ("effects -o {0}/m --prompts {0}/none.txt", "(?i)cannot read"),
        ("effects -o {0}/m --top-p 2", "top_p"),
        ("effects -o {0}/m --ce-rise 0", "--ce-rise 0"),
        ("effects -o {0}/m --rows-of {0}/none", "There is no SAE"),
        ("diagnose nothing", "no contrast set"),
        ("diagnose wedding --tokens lst", "--tokens lst"),
        ("diagnose wedding --hookpoint nowhere", "hookpoint = 'nowhere'"),
        ("diagnose wedding -v {0}/gemma", "made for google/gemma-2-2b"),
        ("sweep nothing", "no contrast set"),
        ("sweep wedding --method fga", r"one of caa, ace, pca .*got the method 'fga'"),
        ("sweep wedding --held-out nothing", "no contrast set"),
        ("sweep wedding --neutral {0}/none.txt", "(?i)cannot read"),
        ("sweep wedding -v {0}/gemma", "made for google/gemma-2-2b"),
        ("bench -o {0}/b --concept nothing", "no contrast set"),
        ("bench -o {0}/b --method fga", "fga"),
        ("bench -o {0}/corpus.txt", "Cannot write"),
        ("build fga -o {0}/v", r"one of caa.*got the method 'fga'"),
        ("build fgaa -o {0}/v", "Expected --stats for the method fgaa, got none"),
        ("build sae_ts -o {0}/v --features 1", "Expected --effects for the method sae_ts"),
        ("build from_features -o {0}/v", "Expected --features for the method from_features"),
        ("build fgaa -o {0}/v --stats {0}/none --set nonsense=1", "got --set nonsense=1"),
    ],
)
def test_checked_before_a_model_is_loaded(command, told, made, no_loading):
    result = CliRunner().invoke(app, command.format(made).split())
    assert isinstance(result.exception, fg.FgsteerError), (result.exception, result.output)
    with pytest.raises(fg.FgsteerError, match=told):
        raise result.exception


def test_statistics_are_told_by_their_content(tmp_path, stats):
    for name in ("love.stats", "love", "love.json"):
        stats.save(tmp_path / name)
        told = json.loads(CliRunner().invoke(app, ["diagnose", str(tmp_path / name), "--json"]).stdout)
        assert [row["texts"] for row in told["rows"]] == ["collected"]
    (tmp_path / "pairs.safetensors").write_text('{"positive": ["a"], "negative": []}', encoding="utf-8")
    result = CliRunner().invoke(app, ["diagnose", str(tmp_path / "pairs.safetensors")])
    assert "Expected a .json" in str(result.exception)


def test_a_missing_coefficient_is_said(made):
    arguments = ["generate", "I think", "-v", str(made / "vector"), "--max-new-tokens", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--op", "clamp"])
    assert "No --coefficient is given, so it is 1, for a vector of norm 1." in result.stderr
    assert "Strength found: -c " in CliRunner().invoke(app, arguments).stdout
    for more in (["-c", "2"], ["--op", "ablate"]):
        assert "note" not in CliRunner().invoke(app, [*arguments, *more]).stderr


def test_chat_from_the_command_line(monkeypatch, llama, chatty):
    monkeypatch.setattr(fg, "load_model", lambda *_, **__: (llama, chatty))
    chatty.chat_template = TEMPLATE.partition("{% endif %}")[2]  # takes a system message
    asked = []
    real = fg.generate
    monkeypatch.setattr(fg, "generate", lambda m, t, prompts, **o: asked.append(prompts) or real(m, t, prompts, **o))
    options = ["generate", "the king", "--system", "you", "--prefill", "a", "--max-new-tokens", "2", "--device", "cpu"]
    told = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    messages = [("system", "you"), ("user", "the king"), ("assistant", "a")]
    assert [(m["role"], m["content"]) for m in asked[0][0]] == messages
    assert (told["prompts"], told["system"], told["prefill"]) == (["the king"], "you", "a")
    shown = CliRunner().invoke(app, options).stdout
    assert shown.startswith("user: the king\nunsteered: a")
    CliRunner().invoke(app, ["generate", "the king", "--chat", "--device", "cpu"])
    assert [[m["role"] for m in conversation] for conversation in asked[-1]] == [["user"]]


# ---------------------------------------------------------------- no network


def test_without_a_network_the_error_comes_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(network, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    # the client itself asks again and again, with pauses that come to 23 s for each of these
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("asked again after a pause"))
    with pytest.raises(fg.MissingError, match=r"no model 'someone/something'.*cannot be reached"):
        fg.load_model("someone/something")
    with pytest.raises(OSError, match="cannot be reached"):  # what earlier versions raised
        fg.load_model("someone/something")
    with pytest.raises(fg.FormatError, match="cannot be reached"):
        fg.load_sae("someone/saes", "layer_1")
    with pytest.raises(fg.FormatError, match="cannot be reached"):
        fg.SteeringVector.from_pretrained("someone/love")
    with pytest.raises(fg.FormatError, match="cannot be reached"):
        fg.SteeringVector(torch.ones(4), 1).push_to_hub("someone/love")
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(network, "getproxies", dict)
        with network.hub_or_cache("someone/something") as reachable:
            assert reachable
            assert not constants.HF_HUB_OFFLINE


def test_warnings_point_at_the_callers_line(stats, sae, llama, tokenizer):
    item = fg.Add(hookpoint="blocks.1.hook_resid_post", direction=torch.ones(32), scope="generated")
    ids = torch.tensor([[0, 5]])
    long = "the man said " * 40

    @fg.steer(llama, item)
    def decorated():
        llama(ids)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fg.sta(stats, sae)
        fg.fgaa(stats, sae)
        fg.generate(llama, tokenizer, ["tea"], steering=item, max_new_tokens=1)
        decorated()
        with fg.steer(llama, item):
            llama(ids)
        fg.collect(llama, tokenizer, {"positive": [long], "negative": ["tea"]}, hookpoints=1)
        fg.cross_entropy(llama, tokenizer, [long])
    assert [warning.category for warning in caught[2:]] == [fg.UntouchedWarning] * 3 + [fg.FgsteerWarning] * 2
    assert {warning.filename for warning in caught} == {__file__}
