"""Names that mean one thing, and values that are what they are taken for."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fgsteer as fg
from fgsteer import methods, serving
from fgsteer.saes.registry import models_like, models_named, registry
from fgsteer.serving.request import steering as request_steering
from tests.helpers.cli import app
from tests.helpers.saes import make_sae

AT = fg.Hookpoint(1)
EVERY_NAME = """
import importlib, pkgutil, random, sys
import fgsteer as fg
order, modules = list(fg.__all__), [m.name for m in pkgutil.walk_packages(fg.__path__, "fgsteer.")]
modules = [m for m in modules if not m.startswith(("fgsteer.serving", "fgsteer.__main__", "fgsteer.cli"))]
lottery = random.Random(int(sys.argv[1]))
steps = [("name", name) for name in order] + [("module", name) for name in modules]
lottery.shuffle(steps)
seen = {}
for kind, name in steps:
    if kind == "module":
        importlib.import_module(name)
    else:
        seen[name] = getattr(fg, name)
for name in order:
    value = getattr(fg, name)
    assert value is seen[name], name
    assert type(value).__name__ != "module", name
    assert value is getattr(importlib.import_module(fg._MODULE_OF[name]), name), name
assert callable(fg.registry) and callable(fg.sweep) and callable(fg.diagnose)
"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_names_are_the_same_in_whatever_order_things_are_imported(seed):
    result = subprocess.run(
        [sys.executable, "-c", EVERY_NAME, str(seed)], check=False, capture_output=True, text=True, cwd=Path.cwd()
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_no_public_name_is_also_a_module():
    for package in (fg, methods, serving):
        modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
        assert not modules & set(package.__all__), package.__name__


def test_the_registry_is_a_function_after_a_model_is_loaded():
    fg.load_model("default")
    assert fg.registry(model="gpt2", layer=5)


def test_saes_are_listed_by_part_of_a_models_name():
    assert models_named("qwen3") == models_named("Qwen-3") == models_named("Qwen/Qwen3") > {"qwen3-1.7b"}
    assert models_named("gpt2-small") == {"gpt2"}  # a whole name is that model alone
    assert models_named("gemma-2-2b") == {"gemma-2-2b"}
    assert {row.model for row in registry(model="gpt2", layer=5)} == {"gpt2-small"}
    rows = registry(model="qwen3", layer=5)
    assert rows
    assert all("qwen3" in row.model.lower() for row in rows)
    assert registry(model="no such model") == []
    assert "gemma-2-2b" in models_like("gema-2-2b")
    told = CliRunner().invoke(app, ["saes", "--model", "qwen3", "--layer", "5"])
    assert told.exit_code == 0
    assert "Qwen/Qwen3" in told.stdout
    wrong = CliRunner().invoke(app, ["saes", "--model", "gema-2-2b"])
    assert isinstance(wrong.exception, fg.DataError)
    assert "gemma-2-2b" in str(wrong.exception)


@pytest.mark.parametrize("layer", [1.0, "1", True, None, np.float64(1.0), torch.tensor(1.0)])
def test_a_layer_is_a_whole_number(layer):
    with pytest.raises(fg.HookpointError, match="the number of a block"):
        fg.Hookpoint(layer)


@pytest.mark.parametrize("layer", [np.int64(1), np.uint8(1), 1])
def test_layers_of_numpy_are_saved_and_loaded(layer, tmp_path):
    place = fg.Hookpoint(layer)
    assert type(place.layer) is int
    assert place == AT
    fg.SteeringVector(torch.ones(4), place).save(tmp_path / "v.safetensors")
    assert fg.SteeringVector.load(tmp_path / "v.safetensors").hookpoint == AT


@pytest.mark.parametrize("feature", [1.0, 1.5, "1", True])
def test_a_feature_id_is_a_whole_number(feature):
    """A float id was saved as 1.0 and could not be loaded; a clamp of 1.5 was one of 1."""
    sae = make_sae("relu")
    with pytest.raises(fg.FgsteerError, match="whole number"):
        fg.SteeringVector(torch.ones(32), AT, features={feature: 1.0})
    with pytest.raises(fg.FgsteerError, match="whole number"):
        fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={feature: 1.0})


def test_feature_ids_of_numpy_are_saved_and_loaded(tmp_path):
    vector = fg.SteeringVector(torch.ones(4), AT, features={np.int64(7): np.float32(0.5)})
    vector.save(tmp_path / "v.safetensors")
    assert fg.SteeringVector.load(tmp_path / "v.safetensors").features == {7: 0.5}


def test_numbers_of_numpy_and_torch_are_kept_in_headers(tmp_path):
    """As of ``collect(max_tokens=np.int64(64))``: they failed only when the file was written."""
    numbers = {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(2.0)}
    fg.SteeringVector(torch.ones(4), AT, provenance=numbers).save(tmp_path / "v.safetensors")
    assert fg.SteeringVector.load(tmp_path / "v.safetensors").provenance == {"a": 0.5, "b": 3, "c": 2.0}
    with pytest.raises(fg.DataError, match="which JSON can hold, got a Tensor"):
        fg.SteeringVector(torch.ones(4), AT, provenance={"a": torch.ones(2)}).save(tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


DIRECTION = torch.ones(32)
CONTRAST = fg.ContrastSet("x", positives=["the bride wore a ring", "a cat"], negatives=["a dog sat"])


def flags():
    """(flag, call with a value of it) of every public function whose result a flag decides."""
    sae = make_sae("relu")
    effects = fg.EffectApproximator(torch.randn(32, sae.d_sae), torch.randn(sae.d_sae), sae.hookpoint, sae.sha256)
    vector = fg.SteeringVector(DIRECTION, AT, reference=DIRECTION)

    def read(**options):
        return lambda model, tokenizer: fg.collect(model, tokenizer, CONTRAST, sae=sae, **options)

    def stats(model, tokenizer):
        return fg.collect(model, tokenizer, CONTRAST, sae=sae)

    def steered(value):
        def call(model, _):
            with fg.steer(model, [vector.add(1.0)], per_row=value):
                pass

        return call

    return {
        "bos": lambda v: lambda *_: fg.Add(hookpoint=AT, direction=DIRECTION, bos=v),
        "bos of add": lambda v: lambda *_: vector.add(1.0, bos=v),
        "bos of ablate": lambda v: lambda *_: vector.ablate(bos=v),
        "bos of clamp": lambda v: lambda *_: vector.clamp(1.0, bos=v),
        "bos of affine": lambda v: lambda *_: vector.affine(1.0, bos=v),
        "bos of features": lambda v: lambda *_: fg.ClampFeature(hookpoint=AT, sae=sae, targets={1: 1.0}, bos=v),
        "bos of a request": lambda v: lambda *_: request_steering("love", bos=v),
        "bos of collect": lambda v: read(bos=v),
        "keep_pooled": lambda v: read(keep_pooled=v),
        "share_prefixes": lambda v: read(share_prefixes=v),
        "per_row": steered,
        "normalize of from_features": lambda v: lambda *_: fg.from_features(sae, [1], normalize=v),
        "normalize of fgaa": lambda v: lambda *parts: fg.fgaa(stats(*parts), sae, bos_share=None, normalize=v),
        "normalize of sae_ts": lambda v: lambda *_: fg.sae_ts(sae, [1], effects, normalize=v),
        "unit_effects": lambda v: lambda *_: fg.sae_ts(sae, [1], effects, unit_effects=v),
        "unit_effects of project": lambda v: lambda *_: effects.project(torch.ones(sae.d_sae), unit_effects=v),
        "norm_match": lambda v: lambda *parts: fg.sta(stats(*parts), sae, norm_match=v),
        "compat": lambda v: lambda *parts: fg.sta(stats(*parts), sae, compat=v),
        "copy": lambda v: lambda model, _: fg.fold(model, [vector.add(1.0, bos=True)], copy=v),
        "skip_empty": lambda v: lambda *parts: fg.log_probabilities(parts[0], parts[1], [("", "a cat")], skip_empty=v),
    }


@pytest.mark.parametrize("name", flags())
@pytest.mark.parametrize("value", ["no", 0, 1, np.bool_(False), [True]], ids=str)
def test_a_flag_is_true_or_false(llama, tokenizer, name, value):
    """ "no" counts as true in Python: what is meant is asked for."""
    with pytest.raises(fg.ArgumentError, match=rf"True or False.*\b{name.split()[0]}\b"):
        flags()[name](value)(llama, tokenizer)
