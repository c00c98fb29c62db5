"""Loading: what the hub is told reaches model and tokenizer alike, GGUF files become plain models."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

import fgsteer as fg
from fgsteer.models import checkpoints
from tests.helpers.gguf_files import untied, write_gguf
from tests.helpers.tiny import VOCAB, tiny_model, word_tokenizer

TEXTS = ["the king said", "a dog"]
HUB = {
    "cache_dir": "cache",
    "code_revision": "main",
    "force_download": True,
    "local_files_only": True,
    "proxies": {},
    "revision": "abc",
    "subfolder": "inner",
    "token": "secret",
    "trust_remote_code": True,
}


def save(folder):
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def test_the_hubs_arguments_reach_model_and_tokenizer(monkeypatch):
    told = {}

    def loader(name, value):
        def load(source, **kwargs):
            told[name] = (source, kwargs)
            return value

        return load

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loader("model", tiny_model("llama")))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loader("tokenizer", word_tokenizer()))
    fg.load_model("folder", dtype=torch.float32, attn_implementation="eager", **HUB)
    given = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    assert told["model"] == ("folder", {**given, **HUB})
    assert told["tokenizer"] == ("folder", HUB)
    fg.load_model("folder", dtype=torch.float32)
    assert told["tokenizer"] == ("folder", {"trust_remote_code": False})


def test_a_model_goes_to_a_gpu_where_there_is_one(monkeypatch, tmp_path):
    save(tmp_path)
    assert fg.load_model(tmp_path)[0].device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert fg.load_model(tmp_path, device="cpu")[0].device.type == "cpu"
    moved = []
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda model, device: moved.append(device) or model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    fg.load_model(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "3")  # the fourth of torchrun's processes
    fg.load_model(tmp_path)
    fg.load_model(tmp_path, device_map="cpu")
    assert moved == ["cuda:0", "cuda:1"]


def test_a_device_that_cannot_be_used_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(fg.DataError, match=r"device=banana cannot be used: .*device=cpu"):
        fg.load_model(tmp_path, device="banana")


def test_every_argument_of_the_hub_is_shared():
    """What transformers itself picks out for the files of a model, besides arguments that say what to do with them."""
    from transformers.utils import hub

    known = set(inspect.signature(hub.cached_files).parameters)
    names = {"cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder"}
    assert names <= known
    assert names <= set(checkpoints._SHARED_WITH_TOKENIZER)


def test_a_subfolder_holds_model_and_tokenizer(tmp_path):
    save(tmp_path / "inner")
    model, tokenizer = fg.load_model(tmp_path, subfolder="inner")
    assert (type(model), tokenizer.padding_side) == (LlamaForCausalLM, "left")
    assert tokenizer("the king")["input_ids"] == word_tokenizer()("the king")["input_ids"]


def test_gguf_files_load_and_steer(tmp_path):
    original = untied()
    write_gguf(tmp_path / "tiny.gguf", original)
    ids = torch.tensor([[5, 9, 40, 7]])
    for source, options in ((tmp_path, {"gguf_file": "tiny.gguf"}), (tmp_path / "tiny.gguf", {})):
        model, tokenizer = fg.load_model(source, **options)
        assert (type(model), model.dtype) == (Qwen2ForCausalLM, torch.float32)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, original(ids).logits)
        assert tokenizer("ABCDE")["input_ids"] == [VOCAB - 2, VOCAB - 1, 3 + ord("E") - 33]
        assert tokenizer.padding_side == "left"
        item = fg.Add(hookpoint=fg.Hookpoint(1), direction=torch.ones(32), coefficient=50.0)
        plain, steered = (
            fg.generate(model, tokenizer, ["AB"], steering=s, max_new_tokens=8, do_sample=False) for s in (None, [item])
        )
        assert plain != steered
    model.save_pretrained(tmp_path / "plain")  # a model like any other
    tokenizer.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(fg.load_model(tmp_path / "plain")[0](ids).logits, original(ids).logits)


def test_a_checkpoint_without_all_weights_is_refused(tmp_path):
    """transformers would draw at random what is not there, and say so in its log alone."""
    save(tmp_path)
    fg.load_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(fg.FormatError, match=r"lacks 1 weight of a LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj"):
        fg.load_model(tmp_path)


def test_a_gguf_file_without_the_models_weights_is_refused(tmp_path):
    """transformers would draw at random what a file does not hold under its names."""
    write_gguf(tmp_path / "tiny.gguf", untied(), ending=".other")
    with pytest.raises(fg.FormatError, match=r"tiny\.gguf lacks 39 weights.*lm_head\.weight"):
        fg.load_model(tmp_path / "tiny.gguf")


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    with pytest.raises(fg.FormatError, match=r"no file 'gone\.gguf'.*there\.gguf"):
        fg.load_model(tmp_path, gguf_file="gone.gguf")
    pytest.importorskip("gguf")
    with pytest.raises(fg.FormatError, match=r"there\.gguf cannot be read"):
        fg.load_model(tmp_path / "there.gguf")
    with pytest.raises(fg.FormatError, match="embedded default"):
        fg.load_model("default", gguf_file="gone.gguf")


def test_gguf_without_its_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(fg.FormatError, match=r"pip install 'fgsteer\[gguf\]'"):
        fg.load_model(tmp_path, gguf_file="tiny.gguf")
    with pytest.raises(fg.FormatError, match=r"pip install 'fgsteer\[gguf\]'"):
        fg.load_model(tmp_path / "tiny.gguf")
