"""Consoles of any encoding, files that are UTF-8 whatever the locale, and the words of messages."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fgsteer as fg
from fgsteer.cli import messages
from fgsteer.cli.messages import options_of, with_options
from fgsteer.cli.printing import json_text
from fgsteer.errors.wording import a, count
from tests.helpers.cli import click_group, run_on_console
from tests.helpers.tiny import tiny_model, word_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Über ☃ 王 😀"


@pytest.fixture(scope="module")
def vector(tmp_path_factory):
    path = tmp_path_factory.mktemp("consoles") / "vector.safetensors"
    fg.from_features(fg.load_sae("default"), {2588: 1.0}).save(path)
    return path


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_every_command_prints_on_any_console(encoding, vector, tmp_path, monkeypatch):
    for arguments in (
        ("generate", PROMPT, "-v", vector, "-c", 10, "--max-new-tokens", 2),
        ("features", vector),
        ("info", vector),
        ("info", "☃.safetensors"),
        ("saes", "--model", "☃"),
        ("diagnose", "王"),
        *([] if encoding == "ascii" else [("generate", "--help")]),  # click writes its help there as UTF-8
    ):
        status, out, err = run_on_console(monkeypatch, encoding, *arguments)
        assert "Traceback" not in out + err
        assert status == (2 if any("☃.s" in str(x) or x == "王" for x in arguments) else 0), (arguments, err)
    status, out, err = run_on_console(monkeypatch, encoding, "generate", PROMPT, "--max-new-tokens", 2, "--json")
    assert status == 0
    assert json.loads(out)["prompts"] == [PROMPT]  # nothing is lost: what the console lacks is escaped


@pytest.mark.slow
def test_a_process_on_such_a_console(vector):
    """The same from outside: the streams that Python itself makes."""
    command = [sys.executable, "-m", "fgsteer", "generate", PROMPT, "--max-new-tokens", "2"]
    env = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, check=False, capture_output=True, env=env)
    assert result.returncode == 0, result.stderr[-500:]
    assert result.stdout.decode("cp1252").startswith("unsteered: Über \\u2603 \\u738b")


def test_json_is_escaped_only_where_the_console_needs_it(monkeypatch):
    for encoding, expected in (("utf-8", '"☃é"'), ("latin-1", r'"\u2603\u00e9"'), ("ascii", r'"\u2603\u00e9"')):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert json_text("☃é") == expected


def test_every_text_file_states_its_encoding():
    """Else it would be the locale's: what one machine writes, another misreads."""
    for path in (ROOT / "fgsteer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            binary = any(isinstance(text, str) and "b" in text and len(text) <= 3 for text in texts)
            reads = name in ("read_text", "write_text") or (name == "open" and isinstance(node.func, ast.Name))
            if reads and not binary:
                stated = any(keyword.arg == "encoding" for keyword in node.keywords)
                assert stated, f"{path.name}:{node.lineno}"


def test_articles_and_plurals():
    nouns = {
        "SAE": "an SAE",
        "LLM": "an LLM",
        "Add": "an Add",
        "Ablate": "an Ablate",
        "Clamp": "a Clamp",
        "int": "an int",
        "str": "a str",
        "ndarray": "an ndarray",
        "UserDict": "a UserDict",
        "fgaa": "a fgaa",
        "LlamaForCausalLM": "a LlamaForCausalLM",
        "OPTDecoderLayer": "an OPTDecoderLayer",
        "NoneType": "a NoneType",
    }
    assert {noun: a(noun) for noun in nouns} == nouns
    assert [count(n, "vector") for n in (0, 1, 2)] == ["0 vectors", "1 vector", "2 vectors"]
    assert [count(n, "steering entry") for n in (1, 2)] == ["1 steering entry", "2 steering entries"]


def test_messages_have_articles_and_plurals(llama):
    bare = fg.SteeringVector(torch.ones(32), "model.layers.1")
    assert "0 features" in repr(bare)
    one = fg.SteeringVector(torch.ones(32), "model.layers.1", features={3: 1.0})
    assert repr(one).endswith("1 feature {3: 1})")
    wide = fg.SteeringVector(torch.ones(20), "model.layers.1")
    with pytest.raises(fg.PairingError, match=r"got an Add of d_model 20"), fg.steer(llama, wide.add(1.0)):
        pass
    with pytest.raises(fg.SteeringError, match="got a SteeringVector"), fg.steer(llama, bare):
        pass
    with pytest.raises(fg.PairingError, match="got an SAE"):
        fg.collect(llama, word_tokenizer(), {"positive": ["a"], "negative": ["the"]}, sae=fg.load_sae("default"))


def test_the_command_line_speaks_of_options():
    commands = click_group().commands
    collect, generate, build = (options_of(commands[name]) for name in ("collect", "generate", "build"))
    for message, options, expected in (
        ("pass sae=, or hookpoints=", collect, "pass --sae, or --hookpoint"),
        ("name it with hookpoint=", collect, "name it with --hookpoint"),
        ("tokens='lst'; pass bos=True", collect, "--tokens lst; pass --bos"),
        ("keep_pooled=False", collect, "--no-pooled"),
        ("pass max_new_tokens=8", generate, "pass --max-new-tokens 8"),
        ("statistics of collect(keep_pooled=True)", build, "statistics of fgsteer collect without --no-pooled"),
        ("load it: fg.load_model('google/gemma-2-2b')", generate, "load it: --model google/gemma-2-2b"),
        ("got the option model='x'", build, "got --set model='x'"),
        ("--set n_positive=8, http://x/?model=2", generate, "--set n_positive=8, http://x/?model=2"),
    ):
        assert with_options(message, options) == expected


def test_every_phrase_that_is_replaced_is_one_of_the_package():
    package = Path(fg.__file__).parent
    code = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name != "messages.py")
    assert [pattern for pattern, _ in messages.PHRASES if not re.search(pattern, code, re.IGNORECASE)] == []


def test_an_error_of_a_command_names_its_options(tmp_path, monkeypatch):
    tokenizer = word_tokenizer()
    data = {"positive": ["the bride"], "negative": ["a dog"]}
    fg.collect(tiny_model("llama"), tokenizer, data, hookpoints=1).save(tmp_path / "bare")
    arguments = ("build", "fgaa", "--stats", tmp_path / "bare", "-o", tmp_path / "v")
    status, _, err = run_on_console(monkeypatch, "utf-8", *arguments)
    assert status == 2
    assert "collected without an SAE" in err
    assert "--sae" in err
    assert "sae=" not in err
