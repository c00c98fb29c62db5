"""Releases of the registry from a loopback hub, then from the cache without a request; the registry itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fgsteer as fg
from fgsteer.models.names import bare_name
from fgsteer.saes.registry import find_row, registry
from tests.helpers.hub import Hub, run_script
from tests.helpers.sae_files import write_releases

LOAD_ALL = """
import json, sys, torch
import fgsteer as fg
from huggingface_hub import constants
from tests.helpers.sae_files import inputs
cases = json.load(open(sys.argv[1]))
for name, case in cases.items():
    sae = fg.load_sae(*name.split("|"))
    acts = torch.tensor(case["acts"], dtype=torch.float64)
    assert (acts > 0).any(), name
    assert torch.allclose(sae.encode(inputs()).double(), acts, atol=1e-5), name  # float32
    assert torch.allclose(sae.direction(3), torch.tensor(case["direction"]), atol=1e-5), name
    assert str(sae.hookpoint) == case["hookpoint"], (name, sae.hookpoint)
    assert sae.source == name.replace("|", "/")
print({name.split("|")[0]: fg.load_sae(*name.split("|")).neuronpedia for name in list(cases)[:1]})
assert constants.HF_HUB_OFFLINE == ("offline" in sys.argv[2:])
"""
REFUSE_PICKLE = """
import os, sys
import fgsteer as fg
release, sae_id = sys.argv[1:]
for setting in ("0", "1"):
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = setting
    try:
        fg.load_sae(release, sae_id)
    except fg.FormatError as error:
        print(error)
    else:
        raise SystemExit("loaded")
"""


class Ran:
    """A pickle that would create a file on being read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.slow
def test_releases_of_the_registry_from_a_hub_then_without_a_request(tmp_path):
    cases = write_releases(tmp_path / "hub")
    expected = tmp_path / "cases.json"
    expected.write_text(json.dumps(cases))
    with Hub(tmp_path / "hub") as hub:
        assert "gemma-2-2b/12-gemmascope-res-16k" in run_script(LOAD_ALL, hub.url, tmp_path / "home", str(expected))
        assert len(hub.requests) >= 2 * len(cases)
        hub.requests.clear()
        run_script(LOAD_ALL, hub.url, tmp_path / "home", str(expected))
        assert hub.requests == []
        run_script(LOAD_ALL, hub.url, tmp_path / "home", str(expected), "offline", offline="1")
        release, sae_id = "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109", "blocks.12.hook_resid_post__trainer_0"
        row = find_row(release, sae_id)
        mark = tmp_path / "ran"
        torch.save({"encoder.weight": Ran(mark)}, tmp_path / "hub" / row.repo_id / row.path / "ae.pt")
        told = run_script(REFUSE_PICKLE, hub.url, tmp_path / "other home", release, sae_id).splitlines()
        assert "cannot be read" in told[0]
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in told[-1]
        assert not mark.exists()


def test_releases_that_are_refused_before_any_download():
    for release, sae_id, words in (
        ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", "all the tokens before"),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_0", "cross-layer"),
        ("gpt2-small-hook-z-kk", "blocks.5.hook_z", "value biases"),
        ("gpt2-small-resid-mid-v5-32k", "blocks.5.hook_resid_mid", "between attention and MLP"),
        ("gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76", "before its gain"),
    ):
        with pytest.raises((fg.PairingError, fg.HookpointError), match=words):
            fg.load_sae(release, sae_id)
    with pytest.raises(fg.FormatError, match="gpt2-small-res-jb"):
        fg.load_sae("gpt2-small-res-jbb", "x")
    with pytest.raises(fg.FormatError, match="layer_12/width_16k/canonical"):
        fg.load_sae("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k")
    with pytest.raises(fg.FormatError, match="HF_HUB_OFFLINE"):
        fg.load_sae("nobody/has-this-one", "folder")


def test_registry_lists_and_searches():
    rows = registry("google/gemma-2-2b", 12, "canonical res")
    assert ("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical") in {(r.release, r.sae_id) for r in rows}
    first = next(r for r in rows if r.sae_id == "layer_12/width_16k/canonical")
    assert (first.hookpoint, first.width) == ("blocks.12.hook_resid_post", "16k")
    assert first.neuronpedia == "gemma-2-2b/12-gemmascope-res-16k"
    assert {r.layer for r in rows} == {12}
    assert registry("gpt2") == registry("gpt2-small")
    layers = [r.layer for r in registry("gpt2", search="res-jb hook_resid_pre") if r.release == "gpt2-small-res-jb"]
    assert layers == sorted(layers)
    everything = registry()
    assert len(everything) > 10_000
    for row in everything:  # every hookpoint told is one that parses, or one that is refused by name
        if row.hookpoint and "resid_mid" not in row.hookpoint:
            assert fg.Hookpoint.parse(row.hookpoint).layer == row.layer


def test_saes_command_needs_neither_torch_nor_sae_lens():
    code = (
        "import sys\nsys.argv = ['fgsteer', 'saes', '-m', 'gpt2', '--layer', '5', '--json']\n"
        "from fgsteer.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'sae_lens', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    rows = json.loads(result.stdout)
    assert {row["layer"] for row in rows} == {5}
    assert "gpt2-small-res-jb" in {row["release"] for row in rows}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("gpt2-small", "gpt2", True),
        ("gpt2-small", "openai-community/gpt2", True),
        ("gemma-2-2b", "google/gemma-2-2b", True),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped", True),
        ("meta-llama/Llama-3.1-8B", "/models/Meta-Llama-3.1-8B/", True),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1", True),
        ("gemma-2-2b", "/home/x/.cache/huggingface/hub/models--google--gemma-2-2b/snapshots/c5ebcd40d208", True),
        ("gemma-2-2b", "google/gemma-2-2b-it", False),
        ("gpt2-small", "gpt2-medium", False),
        ("gemma-2-2b", "models--google--gemma-2-2b-it/snapshots/c5ebcd40d208", False),
    ],
)
def test_one_model_under_two_names(one, other, same):
    assert (bare_name(one) == bare_name(other)) is same
