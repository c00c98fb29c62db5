"""Code that a model brings: run where it is trusted by the call or the option, never on a question's answer."""

from __future__ import annotations

import io
import json
import sys
import warnings

import pytest
import torch
from transformers import AutoTokenizer, dynamic_module_utils

import fgsteer as fg
from fgsteer import cli
from fgsteer.cli.loading import check_fit
from tests.helpers import axbench_folder
from tests.helpers.cli import click_group
from tests.helpers.saes import make_sae
from tests.helpers.tiny import D_MODEL, tiny_model, word_tokenizer

MARK = "from pathlib import Path\nPath({mark!r}).write_text('it ran', encoding='utf-8')\n"
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
IN_CONFIG = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """(folder of a model with code of its own, what that code writes), with "y" waiting on standard input."""
    folder, mark = tmp_path / "own", tmp_path / "ran"
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(MARK.format(mark=str(mark)) + MODEL, encoding="utf-8")
    change(folder / "config.json", model_type="own_llama", architectures=["OwnModel"], auto_map=IN_CONFIG)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    yield folder, mark
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def status_of(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fgsteer", *map(str, arguments)])
    with warnings.catch_warnings():
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0
    return 0


def commands(folder, at):
    """Every command that loads a model, with what it needs to come as far as that."""
    vector, corpus = at / "vector", at / "corpus.txt"
    fg.SteeringVector(torch.ones(D_MODEL), 1).save(vector)
    corpus.write_text("A dog sat.\nA cat lay.\n", encoding="utf-8")
    one = ("-v", vector, "-c", 1)
    rest = {
        "audit": ("-r", folder),
        "axbench": (axbench_folder.write(at / "mini"), "-o", at / "axbench", "--hookpoint", 1),
        "bench": ("-o", at / "bench", "--concept", "sea", "--sae-id", "1", "--judge", "keyword"),
        "collect": ("sea", "-o", at / "s", "--no-sae", "--hookpoint", 1),
        "demo": ("sea",),
        "density": (corpus, "-o", at / "d"),
        "describe-contrast": ("is happy", "-o", at / "happy.json"),
        "diagnose": ("sea",),
        "effects": ("-o", at / "e"),
        "eval": ("--tasks", "hellaswag", *one),
        "examples": (corpus, "-o", at / "x"),
        "explain": (vector,),
        "export": (vector, "--to", "lm-eval", "-c", 1, "-o", at / "v.pt"),
        "features": (vector,),
        "fold": (*one, "-o", at / "folded"),
        "generate": ("the king", *one),
        "orthogonalize": ("-v", vector, "-o", at / "without"),
        "patterns": ("sea",),
        "play": ("--no-browser",),
        "sweep": ("sea",),
        "train": ("dialogue", "-o", at / "trained", "--hookpoint", 1),
        "train-sae": (corpus, "-o", at / "sae", "--hookpoint", 1, "--held-out", 1),
    }
    takes_sae = {"bench", "demo", "density", "effects", "examples", "features", "play"}
    for name in takes_sae:
        rest[name] = (*rest[name], "--sae", "mine")
    return [(name, *arguments, "--model", folder) for name, arguments in rest.items()]


def test_no_command_runs_code_of_a_model_unasked(own, tmp_path, monkeypatch, capsys):
    folder, mark = own
    monkeypatch.setattr("fgsteer.cli.eval.find_spec", lambda _: True)
    monkeypatch.setattr(fg, "load_sae", lambda *_, **__: make_sae())
    monkeypatch.setattr("fgsteer.play.web.need_play", lambda: None)
    tried = commands(folder, tmp_path)
    for arguments in tried:
        assert status_of(monkeypatch, *arguments) == 2, arguments
        told = capsys.readouterr().err
        assert "error: " in told, arguments
        assert "brings Python code of its own" in told, told
        if arguments[0] != "demo":  # which has no option for it
            assert "if you trust it pass --trust-remote-code" in told
        assert not mark.exists(), arguments
    parameters = {name: {p.name for p in c.params} for name, c in click_group().commands.items()}
    loads = {name for name, names in parameters.items() if "model" in names} - {"saes", "serve", "build"}
    # a filter; vLLM's own; goes on without the model, which only tells what strengths cost
    assert loads == {name for name, *_ in tried}
    fixed = {"demo"}  # of models whose code is part of transformers alone
    assert all({"revision", "trust_remote_code"} <= parameters[name] for name in loads - fixed)


def test_code_runs_where_it_is_trusted(own, tmp_path, monkeypatch, capsys):
    folder, mark = own
    arguments = ("generate", "the king", "--max-new-tokens", 4, "--device", "cpu", "-m", folder)
    assert status_of(monkeypatch, *arguments, "--trust-remote-code") == 0
    assert capsys.readouterr().out.startswith("unsteered: the king")
    assert mark.read_text(encoding="utf-8") == "it ran"
    model, tokenizer = fg.load_model(folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    add = fg.Add(hookpoint=1, direction=torch.ones(D_MODEL), coefficient=50.0, bos=True)
    plain, steered = (fg.generate(model, tokenizer, "the king", steering=s, max_new_tokens=6) for s in (None, add))
    assert plain != steered
    fg.export.checkpoint.write([add], tmp_path / "folded", model, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "folded", trust_remote_code=False)("the king")


def test_code_of_a_tokenizer_and_of_generation(own, tmp_path):
    folder, mark = own
    change(folder / "config.json", model_type="llama", auto_map={})
    (folder / "custom_generate").mkdir()
    code = MARK.format(mark=str(mark)) + "def generate(model, **_):\n    return _['input_ids']\n"
    (folder / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")
    model, tokenizer = fg.load_model(folder)
    for function in (fg.generate, fg.stream):
        with pytest.raises(fg.DataError, match=r"which would run code.*pass trust_remote_code=True"):
            function(model, tokenizer, "the king", max_new_tokens=2, custom_generate=str(folder))
    assert not mark.exists()
    fg.generate(model, tokenizer, "the king", max_new_tokens=2, custom_generate=str(folder), trust_remote_code=True)
    assert mark.exists()
    mark.unlink()
    change(
        folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]}
    )
    with pytest.raises(fg.FormatError, match="Python code of its own"):
        fg.load_model(folder)
    assert not mark.exists()


def test_the_config_of_a_model_is_read_without_its_code(own):
    folder, mark = own
    check_fit({folder: fg.SteeringVector(torch.ones(20), 7)}, str(folder))  # loading says why it cannot be told
    assert not mark.exists()


@pytest.mark.parametrize(
    "config", ["[1]", '{"model_type": 3}', '{"model_type": "llama", "hidden_size": "x"}', "{}", "{"]
)
def test_a_folder_that_is_no_model_is_a_typed_error(config, tmp_path, monkeypatch, capsys):
    tiny_model("llama").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(fg.FormatError):
        fg.load_model(tmp_path)
    assert status_of(monkeypatch, "generate", "the king", "-m", tmp_path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_weights_that_do_not_fit_are_a_typed_error(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 5}', encoding="utf-8")
    with pytest.raises(fg.FormatError, match="cannot be read"):
        fg.load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(fg.FormatError):
        fg.load_model(tmp_path)
    with pytest.raises(fg.FormatError):
        fg.load_model("a\0b")
    with pytest.raises(fg.FormatError):
        fg.load_model("\ud800")


# ---------------------------------------------------------------- revisions


def test_a_revision_reaches_model_tokenizer_and_config(monkeypatch, tmp_path, capsys):
    from transformers import AutoConfig, AutoModelForCausalLM

    asked = {}

    def refuse(name):
        def load(source, **options):
            asked[name] = options.get("revision"), options["trust_remote_code"]
            if name == "model":
                return tiny_model("llama")
            raise OSError(f"no {name}")

        return load

    for name, kind in (("model", AutoModelForCausalLM), ("tokenizer", AutoTokenizer), ("config", AutoConfig)):
        monkeypatch.setattr(kind, "from_pretrained", refuse(name))
    fg.SteeringVector(torch.ones(D_MODEL), 1).save(tmp_path / "v")
    arguments = ("generate", "hi", "-v", tmp_path / "v", "-c", 1, "-m", "me/model", "--revision", "v2")
    assert status_of(monkeypatch, *arguments) == 2
    assert "no model 'me/model'" in capsys.readouterr().err
    assert asked == dict.fromkeys(("model", "tokenizer", "config"), ("v2", False))


def test_files_have_no_revision(monkeypatch, tmp_path, capsys):
    for model in ("default", tmp_path):
        assert status_of(monkeypatch, "generate", "hi", "-m", model, "--revision", "v2") == 2
        assert "--revision v2" in capsys.readouterr().err
