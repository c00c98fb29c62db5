"""The embedded default and the command line, end to end."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fgsteer as fg
from fgsteer.cli import demo
from fgsteer.models.shipped import DEFAULT, SHIPPED
from fgsteer.storage.json_files import read_json
from tests.helpers.cli import invoke

runner = CliRunner()


PRETRAINED = Path(fg.__file__).resolve().parent.parent / "pretrained"


# of the default as far as it fits into a wheel beside the code, of SmolLM2 what fits into one of its own
@pytest.mark.parametrize(("name", "most"), [(DEFAULT, 52e6), ("smollm2", 105e6)])
def test_every_shipped_file_is_the_indexed_one(name, most):
    folder = SHIPPED[name].folder()
    index = read_json(folder / "index.json")
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    found -= {"index.json", "README.md", "pyproject.toml"}
    assert found == set(index["files"])
    for file, entry in index["files"].items():
        data = (folder / file).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["bytes"]), file
    assert sum(entry["bytes"] for entry in index["files"].values()) < most


@pytest.mark.parametrize(("script", "page"), [("card", "README.md"), ("card_smollm2", "smollm2/README.md")])
def test_the_card_says_what_was_measured(script, page, monkeypatch):
    monkeypatch.syspath_prepend(str(PRETRAINED))
    card = importlib.import_module(script)
    assert (PRETRAINED / page).read_text(encoding="utf-8") == card.render()


def test_excerpts_and_labels_say_what_features_fire_on():
    """A feature labelled by a word fires on that word, in a sentence written here."""
    model, tokenizer = fg.load_model("default")
    sae = fg.load_sae("default")
    examples = fg.load_examples(sae)
    found = fg.find_features(model, tokenizer, sae, "king", examples=examples, top=3)
    king = found[0].id
    assert len(examples.of(king, tokenizer)) == 4
    assert sae.labels[king].startswith("king")
    assert {"label"} < set(found[0].why)
    ids = tokenizer("They saw the king and his men.", return_tensors="pt")["input_ids"]
    acts = sae.encode(fg.record(model, ids, None, [sae.hookpoint])[sae.hookpoint])[0, :, king]
    assert tokenizer.decode(ids[0, acts.argmax()]).strip() == "king"


@pytest.mark.parametrize(("name", "layers"), [(DEFAULT, "sae_layers"), ("smollm2", "layers")])
def test_every_shipped_sae_loads_with_what_belongs_to_it(name, layers):
    index = read_json(SHIPPED[name].folder() / "index.json")
    figures = read_json(SHIPPED[name].folder() / "figures.json")["saes"]
    for layer in index["recipe"][layers]:
        sae = fg.load_sae(name, f"layer_{layer}")
        assert sae.hookpoint == fg.Hookpoint(layer)
        assert sae.density is not None
        l0 = figures[f"layer_{layer}"]["quality"]["l0"]
        assert sae.density.density.sum() == pytest.approx(
            l0, rel=0.05
        )  # two counts, one over a part of the other's text
        assert len(sae.labels) > sae.d_sae / 2
        assert fg.load_examples(sae) is not None
    assert fg.load_sae(name).sha256 == fg.load_sae(name, index["sae"]).sha256
    assert fg.load_effects(name).check(fg.load_sae(name)).about["r2"] > 0.25
    with pytest.raises(fg.FormatError, match=index["sae"]):
        fg.load_sae(name, "layer_99")


def test_the_stages_compose_through_files(tmp_path):
    stats, vec = str(tmp_path / "s.safetensors"), str(tmp_path / "v.safetensors")
    invoke("collect", "love", "-o", stats, "--json", "--device", "cpu")
    for method in ("caa", "ace", "fgaa"):
        told = json.loads(invoke("build", method, "--stats", stats, "-o", vec, "--json", "--no-strengths").stdout)
        assert told["method"] == method
    told = json.loads(invoke("features", vec, "--json", "--top", "3").stdout)
    assert len(told["features"]) == 3
    assert told["features"][0]["density"] > 0
    options = ("--vector", vec, "-c", "60", "--max-new-tokens", "12", "--json", "--device", "cpu")
    told = json.loads(invoke("generate", "I think", *options).stdout)
    assert told["steered"] != told["unsteered"]
    assert json.loads(invoke("info", vec, "--json").stdout)["provenance"]["method"] == "fgaa"
    assert "parameters" in json.loads(invoke("info", "--json").stdout)["default"]
    corpus = tmp_path / "c.txt"
    corpus.write_text("The man walked home.\nShe sang a song.\n")
    told = json.loads(invoke("density", str(corpus), "-o", str(tmp_path / "d"), "--json", "--device", "cpu").stdout)
    assert told["l0"] == pytest.approx(fg.load_sae("default").density.density.sum(), rel=0.5)  # two lines of text
    told = invoke("build", "from_features", "--features", "12:1.5,40", "-o", vec, "--device", "cpu")
    assert "2 features" in told.stdout
    assert "‖v‖/‖h‖ = " in told.stdout
    with pytest.raises(fg.DataError, match="a name, = and a value"):
        invoke("build", "fgaa", "--stats", stats, "--set", "n", "-o", vec)


def test_effects_are_measured_and_used(tmp_path):
    stats, vec = str(tmp_path / "s.safetensors"), str(tmp_path / "v.safetensors")
    effects = str(tmp_path / "e.safetensors")
    options = ["--vectors", "40", "--rollouts", "2", "--max-new-tokens", "2", "--n-texts", "2", "--device", "cpu"]
    told = json.loads(invoke("effects", "-o", effects, *options, "--json").stdout)
    assert told["vectors"] == 40
    assert "ceiling set by sampling noise" in invoke("effects", "-o", effects, *options).stdout  # from its parts
    invoke("collect", "love", "-o", stats, "--json", "--device", "cpu")
    for source in (effects, "default"):
        command = ["build", "fgaa", "--stats", stats, "--effects", source, "--set", "score=welch_t", "--set", "mu=0.1"]
        invoke(*command, "-o", vec, "--no-strengths")
        how = fg.SteeringVector.load(vec).provenance["hyperparameters"]
        assert (how["projection"], how["score"], how["mu"]) == ("effects", "welch_t", 0.1)


def test_shipped_effects_predict_vectors_they_were_not_fitted_to():
    effects = fg.load_effects("default").check(fg.load_sae("default"))
    assert effects.about["plan"]["sae_sha256"] == fg.load_sae("default").sha256
    assert effects.about["r2"] > 0.2 > effects.about["shuffled"]


def test_methods_separate_held_out_sentences():
    """Vectors built from the training sentences rank held-out ones (chance is 0.5)."""
    model, tokenizer = fg.load_model("default")
    sae = fg.load_sae("default")
    contrast = fg.load_contrast("love")
    stats = fg.collect(model, tokenizer, contrast, sae=sae)
    held = fg.collect(model, tokenizer, contrast.held_out, sae=sae)
    gap = held.at("residual")[1].difference
    with pytest.warns(fg.SelectionWarning, match="40 and 40"):
        vectors = [fg.sta(stats, sae), fg.caa(stats), fg.fgaa(stats, sae)]
    for vec in vectors:
        assert float(torch.cosine_similarity(vec.direction.double(), gap, dim=0)) > 0.3


def test_calibrate_reaches_its_target():
    model, tokenizer = fg.load_model("default")
    texts = fg.load_neutral()[0][:6]
    vec = fg.from_features(fg.load_sae("default"), 12)
    c = fg.calibrate(model, tokenizer, vec.add, texts, target_ce_rise=0.4)
    rise = fg.cross_entropy(model, tokenizer, texts, steering=vec.add(c)) - fg.cross_entropy(model, tokenizer, texts)
    assert rise == pytest.approx(0.4, rel=0.03)  # calibrate's tolerance is 2 %


def test_demo_shows_a_concept():
    """Of the two that it shows unless told otherwise, on the model that is always there."""
    assert set(demo.CONCEPTS) == {"love", "wedding"} < set(fg.shipped_contrasts())
    (shown,) = json.loads(invoke("demo", "love", "--model", "default", "--json").stdout)
    assert set(shown["texts"]) == {"unsteered", "caa", "ace", "sta", "fgaa", "fgaa_effects"}
    assert all(text != shown["texts"]["unsteered"] for name, text in shown["texts"].items() if name != "unsteered")
    assert len(shown["features"]["fgaa"]) == 5
    assert shown["answers"] == {}  # the embedded default does not chat


@pytest.mark.parametrize(
    ("method", "setting", "told"),
    [
        ("fgaa", "n_positive=abc", "Expected a whole number as n_positive, got --set n_positive=abc"),
        ("fgaa", "n_positive=1.5", "a whole number"),
        ("fgaa", "n_positive=true", "a whole number"),
        ("fgaa", "max_density=abc", "Expected a number or null as max_density"),
        ("fgaa", "mu=abc", "Expected a number as mu"),
        ("fgaa", "normalize=maybe", "Expected true or false as normalize"),
        ("fgaa", "density=3", "Expected --density FILE, an option of its own"),
        ("fgaa", "score=3", "Expected a text as score"),
        ("fgaa", "nonsense=3", "a parameter of fgaa after --set: score.*got --set nonsense=3"),
        ("sta", "p=abc", "Expected a number as p"),
        ("sta", "mode=both", "Expected act_and_freq or act or freq as mode"),
        ("caa", "hookpoint=true", "as hookpoint"),
    ],
)
def test_nonsense_settings_end_in_one_message(tmp_path, method, setting, told):
    with pytest.raises(fg.FgsteerError, match=told) as caught:
        invoke("build", method, "--set", setting, "-o", str(tmp_path / "v.safetensors"))
    assert "\n" not in str(caught.value)


def test_settings_of_every_type_are_taken(tmp_path):
    stats, vec = str(tmp_path / "s.safetensors"), str(tmp_path / "v.safetensors")
    invoke("collect", "love", "-o", stats, "--device", "cpu")
    pairs = ("n_positive=4", "max_density=inf", "bos_share=null", "normalize=false", "score=welch_t", "mu=1")
    settings = [part for pair in pairs for part in ("--set", pair)]
    invoke("build", "fgaa", "--stats", stats, "--effects", "default", *settings, "-o", vec, "--no-strengths")
    hyper = fg.SteeringVector.load(vec).provenance["hyperparameters"]
    wanted = {"n_positive": 4, "max_density": None, "bos_share": None, "normalize": False, "score": "welch_t", "mu": 1}
    assert {key: hyper[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("collect", "love", "-o", "FILE/s.safetensors"), "Cannot write"),
        (("collect", "love", "-o", "FOLDER"), "Cannot write"),
        (("features", "--feature", "1", "--html", "FILE/p.html"), "Cannot write"),
        (("features", "--feature", "1,1"), "each id once"),
        (
            ("collect", "love", "-o", "FOLDER/s.safetensors", "--sae", "default", "--model", "/no/such"),
            "no model '/no/such'",
        ),
        (("collect", "love", "-o", "FOLDER/s.safetensors", "--device", "banana"), "--device banana"),
    ],
)
def test_mistakes_end_in_one_message(tmp_path, arguments, told):
    (tmp_path / "file").write_text("")
    arguments = [a.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path)) for a in arguments]
    with pytest.raises(fg.FgsteerError, match=told) as caught:
        invoke(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [("effects", "-o", "e", "--vectors", "-1"), ("generate", "x", "--max-new-tokens", "0"), ("features", "--top", "0")],
)
def test_counts_out_of_range_are_refused(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert re.search("greater than or equal to|not in the range", result.stderr)
