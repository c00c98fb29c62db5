"""How objects show themselves: tables in notebooks and terminals, labels of features, texts side by side."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.display.tables import MOST_ROWS, Share, Table, table_html
from fgsteer.hub import card
from tests.helpers.saes import make_sae
from tests.helpers.tiny import tiny_model, word_tokenizer

ACTING = "<script>alert('x')</script>\x1b[2J\u202e& \"quoted\""
HARMLESS = {"table", "thead", "tbody", "tr", "th", "td", "p", "b", "br"}


class Page(HTMLParser):
    """The text of an HTML fragment, which may hold nothing but tables and lines."""

    def __init__(self, markup):
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in HARMLESS, tag
        assert {name for name, _ in attrs} <= {"style"}
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        assert data.isprintable(), data
        self.text += f"{data}\n"


@pytest.fixture(scope="module")
def parts():
    labels = {3: ACTING, 1: "weddings"}
    sae = dataclasses.replace(make_sae("relu"), labels=labels, source=ACTING, model_name=ACTING, neuronpedia=ACTING)
    return tiny_model("llama"), word_tokenizer(), sae


@pytest.fixture(scope="module")
def stats(parts):
    model, tokenizer, sae = parts
    contrast = fg.ContrastSet(ACTING, positives=["the bride wore a ring"], negatives=["a dog sat"])
    sae = dataclasses.replace(sae, model_name="")
    return fg.collect(model, tokenizer, contrast, sae=sae, hookpoints=[0, 1])


def test_html_shows_everything_and_does_nothing(parts, stats):
    model, tokenizer, sae = parts
    sae = dataclasses.replace(sae, model_name="")
    vector = fg.from_features(sae, {3: 2.0, 1: -0.5})
    vector = dataclasses.replace(vector, provenance={**vector.provenance, "method": ACTING})
    comparison = fg.Comparison((ACTING,), ("one\ntwo",), (ACTING,))
    shown: dict[str, tuple[Any, ...]] = {
        "vector": (vector, "weddings", "-0.5", "blocks.1.hook_resid_post", r"</script>\x1b[2J\u202e& "),
        "features": (vector.top_features(), "feature", "label", "weight", "weddings"),
        "described": (fg.describe_features(model, tokenizer, sae, vector), "raises", "lowers", "weddings"),
        "sae": (parts[2], "relu", "d_sae", "2 features", r"</script>\x1b[2J"),
        "statistics": (stats, "blocks.0.hook_resid_post", "1 + 1", "Features that differ most: ", r"</script>\x1b[2J"),
        "comparison": (comparison, "unsteered", "steered", "one\ntwo", r"</script>\x1b[2J\u202e& "),
        "seen": (Table([fg.SeenFeature(3, ACTING, 0.5, ACTING)]), "activation", r"\x1b[2J"),
        "found": (Table([fg.FoundFeature(3, 0.5, (ACTING,))]), "found because", r"\x1b[2J"),
    }
    for name, (value, *texts) in shown.items():
        markup = value._repr_html_()
        assert len(markup) < 10_000, name
        text = Page(markup).text
        for expected in texts:
            assert expected in text, (name, expected)


def test_a_list_of_rows_prints_as_a_table():
    rows = Table([fg.FeatureWeight(12, 1 / 3, None, "a ring"), fg.FeatureWeight(7, -2.0)])
    assert str(rows) == "feature  label   weight\n     12  a ring  0.3333\n      7              -2"
    rows = Table([fg.FeatureWeight(12, 0.5, 0.0123)])
    assert str(rows) == "feature  weight  fires on\n     12     0.5     1.23%"
    assert isinstance(rows, list)
    assert rows == [fg.FeatureWeight(12, 0.5, 0.0123)]
    assert (str(Table()), Table()._repr_html_()) == ("[]", "<p>No rows.</p>")
    many = Table([fg.FeatureWeight(n, 1.0) for n in range(MOST_ROWS + 3)])
    assert str(many).splitlines()[-1] == "and 3 more"
    assert len(str(many).splitlines()) == MOST_ROWS + 2
    assert Page(many._repr_html_()).text.endswith("and 3 more\n")


def test_cells_of_a_table():
    markup = table_html(["", "share"], [["a", Share(0.5)], ["b", None], ["c", Share(1e-6)], ["d", Share(0.0)]])
    assert "50.00%\nb\nc\n<0.01%\nd\n0.00%\n" in Page(markup).text
    assert markup.count("text-align:right") == 5  # the second column, with its heading
    assert "<thead>" not in table_html(["", ""], [["a", "b"]])
    assert "color" not in markup.replace("border-bottom:1px solid rgba(128,128,128,.35)", "")


def test_features_keep_their_labels(parts, tmp_path):
    sae = dataclasses.replace(parts[2], model_name="")
    vector = fg.from_features(sae, {1: 1.0, 2: 0.5})
    known = [(1, "weddings"), (2, "")]
    vector.save(tmp_path / "vector.safetensors")
    loaded = fg.SteeringVector.load(tmp_path / "vector.safetensors")
    for one in (vector, vector * 2.0, -vector, loaded, vector + loaded * 0.5):
        assert [(row.id, row.label) for row in one.top_features()] == known
    both = vector + fg.from_features(sae, [3])
    assert {row.id: row.label for row in both.top_features()} == {1: "weddings", 2: "", 3: ACTING}
    assert "feature_labels" not in fg.from_features(sae, [2]).provenance
    unlabelled = fg.SteeringVector(vector.direction, 1, features={1: 1.0}, provenance={"method": "fgaa"})
    unlabelled.save(tmp_path / "old.safetensors")  # as files of earlier versions are
    assert [row.label for row in fg.SteeringVector.load(tmp_path / "old.safetensors").top_features()] == [""]


def test_a_card_tells_the_labels(parts):
    sae = dataclasses.replace(parts[2], model_name="", source="a folder")
    text = card(fg.from_features(sae, {1: 1.0, 3: 0.5}))
    assert "| 1 | weddings | 1 |" in text
    assert r"| 3 | \<script\>alert\(\'x\'\)" in text
    assert "feature_labels" not in text


def test_texts_side_by_side(parts):
    model, tokenizer, sae = parts
    add = fg.SteeringVector(sae.direction(1), sae.hookpoint).add
    prompts = ["the man", "a queen"]
    sampling = {"do_sample": True, "max_new_tokens": 6}
    state = torch.random.get_rng_state()
    compared = fg.compare(model, tokenizer, prompts, add(50.0), seed=3, **sampling)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert compared.prompts == ("the man", "a queen")
    for entries, texts in ((None, compared.unsteered), (add(50.0), compared.steered)):
        torch.manual_seed(3)
        assert list(texts) == fg.generate(model, tokenizer, prompts, steering=entries, **sampling)
    assert compared.unsteered != compared.steered
    same = fg.compare(model, tokenizer, prompts, add(0.0), num_return_sequences=2, **sampling)
    assert same.unsteered == same.steered
    assert same.prompts == ("the man", "the man", "a queen", "a queen")
    assert fg.compare(model, tokenizer, "the man", add(50.0), seed=3, max_new_tokens=2).prompts == ("the man",)
    assert fg.compare(model, tokenizer, [], add(1.0)) == fg.Comparison((), (), ())
    printed = str(fg.Comparison(("I think",), (" so\n",), (ACTING,)))
    assert printed.startswith("I think\n  unsteered: so\n    steered: <script>")
    assert "\x1b" not in printed
    with pytest.raises(fg.ArgumentError, match="seed"):
        fg.compare(model, tokenizer, "the man", None, seed=0.5)
