"""pretrained/build.py rebuilds a miniature of the default from a folder of corpora, every stage."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.training.settings import KINDS

ROOT = Path(fg.__file__).resolve().parent.parent
SCRIPT = ROOT / "pretrained" / "build.py"
RECIPE = {
    "steps": 40,
    "compile": False,
    "batch": 4,
    "vocab_size": 400,
    "layers": 2,
    "d_model": 64,
    "d_mlp": 128,
    "sae_layers": [0, 1],
    "sae_tokens": 8192,
    "compare_seeds": 1,
    "compare_tokens": 4096,
    "compare_texts": 80,
    "feature_texts": 400,
    "sae_batch": 1024,
    "sae_width": 256,
    "effects_layers": [1],
    "effects_vectors": 200,
    "effects_tokens": 6,
    "effects_ce_rise": 0.05,
}


@pytest.fixture(autouse=True)
def _scripts_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def test_auc_equals_counting_pairs():
    from fgsteer.evaluation.judges.learning import auc

    g = np.random.default_rng(0)
    up, down = g.integers(0, 4, (7, 5)), g.integers(0, 4, (9, 5))  # few values: many ties
    expected = [
        sum((a > b) + 0.5 * (a == b) for a in up[:, j] for b in down[:, j]) / (len(up) * len(down)) for j in range(5)
    ]
    got = auc(torch.from_numpy(up), torch.from_numpy(down))
    assert got.tolist() == pytest.approx(expected, rel=1e-12)  # sums of a few exact halves


def test_trigram_baseline_equals_counting():
    """Witten–Bell by dictionaries, one token at a time."""
    from baselines import Trigram

    g = np.random.default_rng(0)
    vocabulary, train = 7, g.integers(0, 5, 300)
    ids = g.integers(0, 7, 40)  # tokens 5 and 6 were never seen

    def p(word, context):
        if len(context) == 0:
            kinds = len(set(train.tolist()))
            return ((train == word).sum() + kinds / vocabulary) / (len(train) + kinds)
        after = [
            int(train[i + len(context)])
            for i in range(len(train) - len(context))
            if train[i : i + len(context)].tolist() == list(context)
        ]
        lower = p(word, context[1:])
        return (after.count(word) + len(set(after)) * lower) / (len(after) + len(set(after))) if after else lower

    padded = [int(ids[0]), *ids.tolist()]
    expected = -sum(math.log2(p(padded[i], tuple(padded[i - 2 : i]))) for i in range(2, len(padded)))
    assert Trigram(train, vocabulary).bits(ids) == pytest.approx(expected, rel=1e-9)  # the same sums in float64


@pytest.mark.slow
def test_a_miniature_is_rebuilt_and_loads(tmp_path):
    from corpus import SOURCES, clean

    assert (
        clean("Title: T\n\nAuthor: A\n\n-------\nIt was _so_<br />good &amp; \u201cnice\u201d.")
        == 'It was so\ngood & "nice".'
    )
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    sentences = [t for name in fg.shipped_contrasts() for t in fg.load_contrast(name).positives]
    documents = [" ".join(sentences[i : i + 6]) for i in range(0, len(sentences), 2)]
    for number, source in enumerate(SOURCES):
        text = "\n<|endoftext|>\n".join(f"{number} {d} {d}" for d in documents)
        (corpora / f"{source.file}.txt").write_text(text)
    out = tmp_path / "out"
    arguments = ["--corpora", corpora, "--work", tmp_path / "work", "--target", out, "--recipe", json.dumps(RECIPE)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):  # the second run finds everything done
        subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], check=True, env=environment)
    sae = fg.load_sae(out / "sae" / "layer_1")
    assert (sae.d_model, sae.d_sae) == (64, 256)
    assert sae.density is not None
    assert (
        fg.EffectApproximator.load(out / "sae" / "layer_1" / "effects.safetensors").check(sae).about["vectors"] == 200
    )
    model, tokenizer = fg.load_model(out / "model")
    figures = json.loads((out / "figures.json").read_text())
    assert {(row["kind"], row["seed"]) for row in figures["comparison"]["rows"]} == {(k, 0) for k in KINDS}
    assert set(figures["saes"]) == {"layer_0", "layer_1"}
    assert fg.generate(model, tokenizer, ["The"], max_new_tokens=2)
