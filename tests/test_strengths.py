"""Strengths found by their cost, chats by default, and what the command line shows of both."""

from __future__ import annotations

import json
import shlex
from typing import Any, cast

import pytest
import torch

import fgsteer as fg
from fgsteer.cli import demo
from fgsteer.cli.strengths import given_strengths
from fgsteer.likelihood.strengths import StrengthMeter, neutral_texts
from fgsteer.models.chat import is_chat_model
from tests.helpers.cli import click_group, invoke, invoke_on_cpu
from tests.helpers.saes import make_sae
from tests.helpers.tiny import D_MODEL, tiny_model, word_tokenizer

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def chatty():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def love(tmp_path_factory):
    """A vector of the embedded default in a file."""
    path = tmp_path_factory.mktemp("love") / "v.safetensors"
    fg.from_features(fg.load_sae("default"), {12: 1.0}).save(path)
    return path


# ---------------------------------------------------------------- -c and --cost


@pytest.mark.parametrize(
    ("texts", "vectors", "expected"),
    [
        ([], "", []),
        ([], "a", []),
        (["3"], "a", [(3.0,)]),
        (["1,2,-4e-1"], "a", [(1.0,), (2.0,), (-0.4,)]),
        (["1", "2"], "ab", [(1.0, 2.0)]),
        (["1,2", "3"], "ab", [(1.0, 3.0), (2.0, 3.0)]),
        (["3", "1,2"], "ab", [(3.0, 1.0), (3.0, 2.0)]),
    ],
)
def test_coefficients_are_one_for_each_vector_and_one_may_be_several(texts, vectors, expected):
    assert given_strengths(texts, vectors, "add", None) == expected


@pytest.mark.parametrize("operation", ["clamp", "ablate"])
def test_operations_without_a_search_get_1(operation):
    assert given_strengths([], "ab", operation, None) == [(1.0, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((["1", "2"], "a", "add", None), "2 coefficients for 1 vector.*-c 1,2"),
        ((["1,2"], "ab", "add", None), "1 coefficient for 2 vectors"),
        ((["1,2", "3,4"], "ab", "add", None), "several coefficients for several vectors: -c 1,2 -c 3,4"),
        ((["1,x"], "a", "add", None), "got -c 1,x"),
        ((["1,"], "a", "add", None), "got -c 1,"),
        ((["inf"], "a", "add", None), "got -c inf"),
        ((["1,2"], "a", "ablate", None), "several strengths with --op ablate"),
        (([], "ab", "add", None), "2 vectors without coefficients"),
        ((["1"], "a", "add", 0.3), "both --cost and -c"),
        (([], "", "add", 0.3), "--cost without a vector"),
        (([], "a", "clamp", 0.3), "--cost with --op clamp"),
        (([], "a", "add", 0.0), "--cost 0"),
    ],
)
def test_unclear_strengths_are_refused(arguments, told):
    with pytest.raises(fg.DataError, match=told):
        given_strengths(*arguments)


# ---------------------------------------------------------------- what strengths cost


@pytest.mark.parametrize("chat", [False, True])
def test_costs_and_norms_are_those_of_a_plain_reading(chat, llama, chatty, monkeypatch):
    """Cross-entropies by ``cross_entropy``, and norms of every scored token in passes of one row."""
    monkeypatch.setattr("fgsteer.likelihood.strengths._TOGETHER", 2)  # within this model's window
    texts = neutral_texts(chat=chat)
    vector = fg.SteeringVector(torch.ones(D_MODEL), 1)

    def make(coefficient):
        return vector.add(coefficient, scope="reply")

    meter = StrengthMeter(llama, chatty, vector, make, chat=chat)
    (strength,) = meter.measure([-0.5])
    costs = [fg.cross_entropy(llama, chatty, texts, steering=steering) for steering in (None, make(-0.5))]
    assert strength.cost == pytest.approx(costs[1] - costs[0], abs=1e-5)
    norms = []
    for prompt, text in cast(list[tuple[Any, Any]], texts):
        head = chatty.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if chat else f"{prompt} "
        parts = (head.strip(), f"{head}{text}")
        ids = [chatty(part, add_special_tokens=not chat)["input_ids"] for part in parts]
        hidden = fg.record(llama, torch.tensor([ids[1]]), None, [fg.Hookpoint(1)])[fg.Hookpoint(1)][0]
        norms += hidden[len(ids[0]) :].norm(dim=-1).tolist()
    assert meter.activation_norm == pytest.approx(sorted(norms)[(len(norms) - 1) // 2], rel=1e-4)
    assert strength.relative_norm == pytest.approx(0.5 * vector.norm / meter.activation_norm)


def test_a_vector_of_norm_0_has_no_strength(llama, tokenizer):
    nothing = fg.SteeringVector(torch.zeros(D_MODEL), 1)
    with pytest.raises(fg.SteeringError, match="norm 0"):
        StrengthMeter(llama, tokenizer, nothing, nothing.add, chat=False)


def test_build_shows_strengths_and_generate_finds_one(love, tmp_path):
    vector = tmp_path / "v.safetensors"
    built = json.loads(invoke_on_cpu("build", "from_features", "--features", "12", "-o", vector, "--json").stdout)
    coefficients, costs = zip(*((row["coefficient"], row["cost"]) for row in built["strengths"]), strict=True)
    assert len(costs) > 2
    assert list(coefficients) == sorted(coefficients)
    assert all(0.003 <= cost <= 2 for cost in costs)
    assert built["relative_norm"] == pytest.approx(built["norm"] / built["activation_norm"])
    options = ("-v", love, "--max-new-tokens", "8", "--json")
    told = json.loads(invoke_on_cpu("generate", "It was", "--cost", "0.5", *options).stdout)
    assert told["found"]["cost"] == pytest.approx(0.5, rel=0.2)  # 10 % of the search, and two digits
    model, tokenizer = fg.load_model("default", device="cpu")
    given = fg.SteeringVector.load(love).add(told["found"]["coefficient"])
    assert told["steered"] == fg.generate(model, tokenizer, ["It was"], steering=given, max_new_tokens=8)
    assert told["strengths"] == [{"coefficients": [told["found"]["coefficient"]], "texts": told["steered"]}]


def test_build_without_the_model_says_so(love, tmp_path):
    vector = fg.SteeringVector.load(love)
    stats = fg.ContrastStatistics(
        {vector.hookpoint: fg.Contrast(*(fg.Moments.of(torch.randn(4, 128)) for _ in range(2)))},
        reading={"model": {"name": "/nowhere/model"}},
    )
    stats.save(tmp_path / "s")
    for options, told in ((), "There is no model '/nowhere/model'"), (("--no-strengths",), ""):
        result = invoke("build", "caa", "--stats", tmp_path / "s", "-o", tmp_path / "v", *options)
        assert told in result.stderr
        assert ("not measured" in result.stderr) == bool(told)
        assert result.stdout.startswith(str(tmp_path / "v"))


# ---------------------------------------------------------------- chats


def test_a_chat_model_stops_where_its_template_ends_a_turn(chatty):
    model = tiny_model("llama")
    assert is_chat_model(model, chatty)
    model.generation_config.eos_token_id = [1, 2]
    assert is_chat_model(model, chatty)
    model.generation_config.eos_token_id = 1  # as that of a base model, which runs on
    assert not is_chat_model(model, chatty)
    model.generation_config.eos_token_id = 2
    for template in (None, CHAT.replace("</s>", "."), "{{ nothing.here }}", "{{ raise_exception('no') }}"):
        chatty.chat_template = template
        assert not is_chat_model(model, chatty)


def test_generate_chats_with_a_chat_model(monkeypatch, llama, chatty, tmp_path):
    monkeypatch.setattr(fg, "load_model", lambda *_, **__: (llama, chatty))
    monkeypatch.setattr("fgsteer.cli.loading.check_fit", lambda *_: None)
    fg.SteeringVector(torch.ones(D_MODEL), 1).save(tmp_path / "v")
    asked = []
    real = fg.generate

    def generate(model, tokenizer, prompts, *, steering, **options):
        asked.append((prompts, steering))
        return real(model, tokenizer, prompts, steering=steering, **options)

    monkeypatch.setattr(fg, "generate", generate)
    options = ("the king", "-v", tmp_path / "v", "-c", "1,2", "--max-new-tokens", "2")
    result = invoke_on_cpu("generate", *options)
    assert "answers each prompt" in result.stderr
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["user", "unsteered", "-c 1", "-c 2"]
    conversation = [[{"role": "user", "content": "the king"}]]
    assert [prompts for prompts, _ in asked] == [conversation] * 3
    assert [steering[0][0].scope for _, steering in asked[1:]] == ["reply", "reply"]
    for more, prompts, scope in (
        (("--no-chat",), ["the king"], "all"),
        (("--scope", "generated"), conversation, "generated"),
        (("--scope", "last_prompt_on"), conversation, "reply"),
    ):
        asked.clear()
        result = invoke_on_cpu("generate", *options, *more)
        assert asked[-1][0] == prompts
        assert asked[-1][1][0][0].scope == scope
        assert ("is now called reply" in result.stderr) == (more[-1] == "last_prompt_on")


def test_generate_with_steering_from_a_file(monkeypatch, llama, tokenizer, tmp_path):
    """What the file holds acts as it was saved, after the vectors; features need the SAE of --sae."""
    monkeypatch.setattr(fg, "load_model", lambda *_, **__: (llama, tokenizer))
    monkeypatch.setattr("fgsteer.cli.loading.check_fit", lambda *_: None)
    v = fg.SteeringVector(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3)), 1)
    v.save(tmp_path / "v")
    sae = make_sae("relu")
    saved = [v.add(3.0, when=fg.Projection(v) > -1e9, scope="generated"), fg.edit(sae, {3: 4.0})]
    for name, items in (("plain", saved[:1]), ("edited", saved)):
        fg.save_steering(tmp_path / name, items)
    options = ("generate", "the king", "--max-new-tokens", "4", "--no-chat")
    alone = json.loads(invoke_on_cpu(*options, "--steering", tmp_path / "plain", "--json").stdout)
    expected = {"max_new_tokens": 4, "do_sample": False}
    assert alone["steered"] == fg.generate(llama, tokenizer, ["the king"], steering=[saved[:1]], **expected)
    assert alone["steered"] != alone["unsteered"]
    assert "steered: the king" in invoke_on_cpu(*options, "--steering", tmp_path / "plain").stdout
    both = ("--steering", tmp_path / "plain", "-v", tmp_path / "v", "-c", "2", "--json")
    together = json.loads(invoke_on_cpu(*options, *both).stdout)
    assert together["steered"] == fg.generate(
        llama, tokenizer, ["the king"], steering=[[v.add(2.0), saved[0]]], **expected
    )
    with pytest.raises(fg.DataError, match="--op or --scope with --steering"):
        invoke_on_cpu(*options, "--steering", tmp_path / "plain", "--scope", "prompt")
    with pytest.raises(fg.PairingError, match="with --sae"):
        invoke_on_cpu(*options, "--steering", tmp_path / "edited")
    monkeypatch.setattr(fg, "load_sae", lambda *_: sae)
    edited = json.loads(invoke_on_cpu(*options, "--steering", tmp_path / "edited", "--sae", "x", "--json").stdout)
    assert edited["steered"] == fg.generate(llama, tokenizer, ["the king"], steering=[saved], **expected)


# ---------------------------------------------------------------- the earlier name of a scope


def test_the_earlier_name_of_a_scope_warns():
    vector = fg.SteeringVector(torch.ones(D_MODEL), 1)
    with pytest.warns(DeprecationWarning, match='"last_prompt_on" is now called "reply"') as caught:
        made = vector.add(1.0, scope="last_prompt_on")
    assert made.scope == "reply"
    assert caught[0].filename == __file__
    with pytest.raises(fg.SteeringError, match="a scope among all, prompt, generated, reply"):
        vector.add(1.0, scope="replies")


# ---------------------------------------------------------------- the baseline of eval


def test_eval_shows_the_unsteered_model_too(monkeypatch, love):
    def run_tasks(*_, steering, **__):
        accuracy = 0.25 if steering else 0.5
        figures = {"alias": "toy", "acc,none": accuracy, "acc_stderr,none": 0.125}
        return {"results": {"toy": figures}, "versions": {"toy": 1}, "n-samples": {"toy": {"effective": 4}}}

    monkeypatch.setattr("fgsteer.cli.eval.find_spec", lambda _: True)
    monkeypatch.setattr(fg, "run_tasks", run_tasks)
    monkeypatch.setattr(fg, "load_model", lambda *_, **__: (None, None))
    steered = ("eval", "--tasks", "toy", "-v", love, "-c", "4")
    told = json.loads(invoke_on_cpu(*steered, "--json").stdout)
    assert [told[side]["toy"]["acc,none"] for side in ("unsteered", "results")] == [0.5, 0.25]
    assert invoke_on_cpu(*steered).stdout.splitlines()[-1].split() == [
        *("toy", "acc", "0.5000", "0.2500", "-0.2500", "0.1250")
    ]
    for arguments in ((*steered, "--no-baseline"), steered[:3]):
        assert json.loads(invoke_on_cpu(*arguments, "--json").stdout)["unsteered"] is None


# ---------------------------------------------------------------- the demo's last lines


def next_commands():
    parts = demo.Parts(None, None, None, None, False, " -m default", "")
    return [shlex.split(line) for line in demo.next_commands("love", parts)]


def test_the_demo_ends_with_commands_that_exist():
    commands = click_group().commands
    assert [words[:2] for words in next_commands()] == [
        ["fgsteer", "collect"],
        ["fgsteer", "build"],
        ["fgsteer", "generate"],
    ]
    for _, name, *arguments in next_commands():
        commands[name].make_context(name, arguments)  # raises for an option that is not there


@pytest.mark.slow
def test_the_demos_last_commands_work_when_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, *arguments in next_commands():
        shown = invoke(*arguments).stdout
    assert "unsteered: The next day" in shown
    assert "steered: The next day" in shown
