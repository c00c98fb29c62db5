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


def test_batches_hold_every_activation_once_a_round(tmp_path):
    from recipe import Recipe
    from saes import batches

    (tmp_path / "activations").mkdir()
    np.save(tmp_path / "activations" / "layer_3.npy", np.arange(40, dtype=np.float16)[:, None])
    stream = batches(tmp_path, Recipe(sae_batch=8), layer=3, seed=0, tokens=32)
    rounds = [torch.cat([next(stream) for _ in range(4)])[:, 0].tolist() for _ in range(2)]
    assert rounds[0] != rounds[1]
    assert sorted(rounds[0]) == sorted(rounds[1]) == list(range(32))


def test_quality_equals_one_token_at_a_time():
    """Against sums written out per position, on the embedded model and SAE."""
    from saes import quality

    model, tokenizer = fg.load_model("default")
    sae = fg.load_sae("default")
    texts = ["The king rode home in the rain.", "She could not find her way to the sea."]
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    layer = sae.hookpoint.layer
    with torch.no_grad():
        streams = [model(i, output_hidden_states=True).hidden_states[layer + 1][0] for i in ids]
    rows = torch.cat([h[1:] for h in streams])
    acts = torch.stack([sae.encode(row[None])[0] for row in rows])
    rebuilt = acts @ sae.W_dec + sae.b_dec
    ev = 1 - float((rows - rebuilt).square().sum() / (rows - rows.mean(0)).square().sum())

    def loss(change):
        total = 0.0
        for i, h in zip(ids, streams, strict=True):
            new = torch.cat([h[:1], change(h[1:])])
            handle = model.model.layers[layer].register_forward_hook(lambda *_, new=new: new[None])
            with torch.no_grad():
                log_p = model(i).logits[0].log_softmax(-1)
            handle.remove()
            total -= sum(float(log_p[t, i[0, t + 1]]) for t in range(i.shape[1] - 1))
        return total

    plain, spliced, zeroed = (
        loss(change) for change in (lambda h: h, lambda h: sae.decode(sae.encode(h)), torch.zeros_like)
    )
    found = quality(model, tokenizer, sae, texts)
    assert found["tokens"] == len(rows)
    assert found["explained_variance"] == pytest.approx(ev, abs=1e-5)  # float32 sums in two orders
    assert found["l0"] == pytest.approx(float((acts > 0).sum()) / len(rows))
    assert found["dead_share"] == pytest.approx(1 - float((acts > 0).any(0).float().mean()), abs=1e-6)
    assert found["ce_recovered"] == pytest.approx((zeroed - spliced) / (zeroed - plain), abs=1e-5)
    assert found["ce"] == pytest.approx(plain / len(rows), rel=1e-5)


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
    from saes import KINDS

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
