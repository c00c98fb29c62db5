"""Reading features: excerpts, labels, search and feature cards."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.display import pages
from fgsteer.features import cards
from fgsteer.features.search import MIN_SCORE, word_pattern
from fgsteer.saes.examples import token_texts
from fgsteer.storage.files import read_tensors, write_tensors
from tests.helpers.cli import invoke_on_cpu as invoke
from tests.helpers.pages import Checker, luminance
from tests.helpers.saes import make_sae
from tests.helpers.tiny import WORDS, word_tokenizer
from tests.reference.excerpts import top_excerpts

# Lengths mixed, so that batches reorder and pad; no two begin alike, for the same beginning has the same activations.
TEXTS = [
    " ".join([WORDS[seed], *np.random.default_rng(seed).choice(WORDS[:50], size=3 + seed % 9)]) for seed in range(30)
]


def naive_activations(model, tokenizer, sae, text, max_tokens):
    """(ids, activations (tokens, d_sae)) of one text alone, by the model's own hidden states and numpy."""
    ids = tokenizer(text)["input_ids"][:max_tokens]
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[sae.hookpoint.layer + 1]
    pre = hidden[0].double().numpy() @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
    acts = np.maximum(pre, 0)
    if sae.activation == "topk":
        kept = np.argsort(-pre, axis=1)[:, : sae.k]
        mask = np.zeros_like(acts)
        np.put_along_axis(mask, kept, 1.0, axis=1)
        acts = acts * mask
    return ids, acts


@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize("features", [None, [3, 17]])
@pytest.mark.parametrize("small_batches", [False, True])
def test_excerpts_equal_a_loop(llama, tokenizer, activation, features, small_batches, monkeypatch):
    sae = make_sae(activation)
    if small_batches:
        monkeypatch.setattr(
            "fgsteer.activations.pooling.ENCODE_ELEMENTS", 24 * 20
        )  # a row or two are encoded at a time
    found = fg.measure_examples(
        llama,
        tokenizer,
        sae,
        TEXTS,
        features=features,
        top=4,
        window=2,
        max_tokens=9,
        batch_tokens=24 if small_batches else 8192,
    )
    documents = [naive_activations(llama, tokenizer, sae, text, 9) for text in TEXTS]
    assert found.features.tolist() == (features or list(range(sae.d_sae)))
    for row, feature in enumerate(found.features.tolist()):
        expected = top_excerpts([(ids, acts[:, feature]) for ids, acts in documents], 4, 2)
        got = found.of(feature, tokenizer)
        assert len(got) == len(expected)
        for slot, (excerpt, (peak, number, ids, acts)) in enumerate(zip(got, expected, strict=True)):
            # float32 in batches against float64 alone: 1e-4 is a hundred times the rounding
            assert excerpt.activations[excerpt.peak] == pytest.approx(peak, rel=1e-4)
            assert excerpt.document == number
            kept = found.tokens[row, slot]
            assert kept[kept >= 0].tolist() == ids
            np.testing.assert_allclose(excerpt.activations, acts, rtol=1e-4, atol=1e-4)
            assert excerpt.activations[excerpt.peak] == max(excerpt.activations)
            assert "".join(excerpt.tokens) == tokenizer.decode(ids)


def test_one_excerpt_of_each_context(llama, tokenizer):
    sae = make_sae("relu")
    texts = [*TEXTS[:2], *[TEXTS[2]] * 6, TEXTS[2] + " " + TEXTS[0]]
    for batch_tokens in (16, 8192):  # copies in one batch and in several
        options = {"top": 4, "window": 2, "batch_tokens": batch_tokens}
        once = fg.measure_examples(llama, tokenizer, sae, [*TEXTS[:3], texts[-1]], **options)
        found = fg.measure_examples(llama, tokenizer, sae, texts, **options)
        for feature in range(sae.d_sae):
            peaks = [[e.activations[e.peak] for e in kept.of(feature, tokenizer)] for kept in (once, found)]
            assert peaks[1] == pytest.approx(peaks[0], rel=1e-4)


def test_position_0_is_read_where_it_is_a_word(llama, tokenizer):
    plain = word_tokenizer(bos=False)
    sae = replace(make_sae(), b_enc=torch.full((24,), 50.0))  # every feature fires on every token
    for words, prepend in ((plain, None), (plain, True), (tokenizer, None)):
        (excerpt,) = fg.measure_examples(llama, words, sae, ["the man sat"], window=3, prepend_bos=prepend).of(2, words)
        assert "".join(excerpt.tokens) == "the man sat"  # BOS is neither read nor shown
        assert min(excerpt.activations) > 0


def test_excerpts_of_a_feature_that_never_fires_are_none(llama, tokenizer):
    sae = replace(make_sae(), b_enc=torch.full((24,), -1e4))
    found = fg.measure_examples(llama, tokenizer, sae, TEXTS, top=2)
    assert (found.documents == -1).all()
    assert found.of(3, tokenizer) == ()
    reasons = [why for f in fg.find_features(llama, tokenizer, sae, "man", examples=found) for why in f.why]
    assert all(why.startswith("raises it") for why in reasons)
    assert fg.measure_examples(llama, tokenizer, sae, []).of(3, tokenizer) == ()


def test_excerpts_refuse_what_they_cannot_use(llama, tokenizer, sae):
    for bad in ({"features": [24]}, {"features": []}, {"top": 0}, {"window": -1}):
        with pytest.raises(fg.SelectionError):
            fg.measure_examples(llama, tokenizer, sae, TEXTS, **bad)
    with pytest.raises(fg.DataError, match="activations of text 0"):
        fg.measure_examples(llama, tokenizer, replace(sae, b_enc=torch.full((24,), torch.inf)), ["the man"])


def test_excerpts_save_whole_and_refuse_damage(llama, tokenizer, sae, tmp_path):
    path = tmp_path / "e.safetensors"
    made = fg.measure_examples(llama, tokenizer, sae, TEXTS, top=3, window=2, corpus={"name": "c"})
    made.save(path)
    read = fg.FeatureExamples.load(path).check(sae)
    assert read.corpus == {"name": "c"}
    assert [read.of(j, tokenizer) for j in range(24)] == [made.of(j, tokenizer) for j in range(24)]
    with pytest.raises(fg.PairingError, match="measured on the SAE"):
        read.check(make_sae(seed=1))
    tensors, header = read_tensors(path, kind="examples")
    peak = tensors["tokens"].shape[2] // 2
    damages = (
        lambda t: t.pop("documents"),
        lambda t: t.update(tokens=t["tokens"][:, :, :-1]),
        lambda t: t.update(features=t["features"][:-1]),
        lambda t: t.update(features=t["features"].float()),
        lambda t: t["tokens"][0, 0, peak].fill_(-1),
        lambda t: t["activations"][0, 0, 0].fill_(torch.nan),
        lambda t: t.update(tokens=t["tokens"][0]),
    )
    for damage in damages:
        broken = {name: tensor.clone() for name, tensor in tensors.items()}
        damage(broken)
        write_tensors(path, broken, kind="examples", header=header)
        with pytest.raises(fg.FormatError, match="damaged"):
            fg.FeatureExamples.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(fg.FormatError):
        fg.FeatureExamples.load(path)


def test_token_texts_of_split_characters():
    """Byte-level tokens that hold parts of a character: it stands with the last of them."""
    _, tokenizer = fg.load_model("default")
    text = "naïve café 日本 🙂 end"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == text
    assert "\ufffd" not in "".join(texts)
    assert "" in texts
    assert token_texts(tokenizer, []) == ()


def export_row(index, description, layer="12-gemmascope-res-16k", **more):
    """A row as Neuronpedia exports it: the index a string, an embedding besides."""
    return {"modelId": "gemma-2-2b", "layer": layer, "index": str(index), "description": description, **more}


def test_labels_of_every_form(tmp_path):
    rows = [
        export_row(3, " weddings\x1b[31m and\nrings ", embedding=[0.1] * 256, typeName="oai_token-act-pair"),
        export_row(3, "a second explanation"),
        export_row(7, "naïve 日本"),
        export_row(8, None),
    ]
    expected = {3: "weddings [31m and rings", 7: "naïve 日本"}
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "c.json").write_text(json.dumps({"explanations": rows, "explanationsCount": 4}))
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "labels.json").write_text(json.dumps({"3": "weddings [31m and rings", "7": "naïve 日本"}))
    for path in [*tmp_path.iterdir(), tmp_path]:
        assert fg.load_labels(path) == expected, path


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"index": "1", "description": "x"}\n{"index":', "line 2 is not JSON"),
        ("a.jsonl", b"\xff\xfe\n", "line 1 is not JSON"),
        ("a.jsonl", b"[" * 100000, "line 1 is not JSON"),
        ("a.jsonl", b'{"index": "-1", "description": "x"}', "line 1."),
        ("a.jsonl", b'{"index": "99999999999", "description": "x"}', "line 1."),
        ("a.jsonl", b'{"index": "1", "description": 5}', "line 1."),
        ("a.jsonl", b"[]\n", "line 1."),
        ("a.jsonl.gz", b"not gzip", "Cannot read"),
        ("a.jsonl.gz", gzip.compress(b'{"index": "1", "description": "x"}\n' * 99, mtime=0)[:-20], "Cannot read"),
        ("a.jsonl.gz", gzip.compress(b" " * (3 << 20), mtime=0), "line 1 is longer than"),
        ("a.json", b"[]", "Expected explanations, or an object"),
        ("a.json", b'{"one": "x"}', "got 'one': 'x' in"),
        ("a.json", b'{"1": 2}', "got '1': 2 in"),
        ("a.json", b'[{"index": 1}, 5]', "got 5 in"),
        ("a.json", b"{", "line 1"),
    ],
)
def test_labels_name_what_is_wrong(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(fg.FormatError, match=re.escape(name)) as caught:
        fg.load_labels(tmp_path / name)
    assert told in str(caught.value)
    with pytest.raises(fg.FormatError):
        fg.load_labels(tmp_path / "nothing.json")


def named_sae(name):
    """An SAE that knows its id at Neuronpedia."""
    return make_sae(neuronpedia=name)


def test_labels_belong_to_the_sae(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(export_row(3, "weddings")))
    assert fg.load_labels(path, named_sae("gemma-2-2b/12-gemmascope-res-16k")) == {3: "weddings"}
    assert fg.load_labels(path, named_sae("")) == {3: "weddings"}
    with pytest.raises(fg.PairingError, match=r"gpt2-small/5-res.*12-gemmascope-res-16k"):
        fg.load_labels(path, named_sae("gpt2-small/5-res"))
    path.write_text(json.dumps(export_row(24, "x")))
    with pytest.raises(fg.PairingError, match="feature 24"):
        fg.load_labels(path, make_sae())
    path.write_text(json.dumps(export_row(1, "x")) + "\n" + json.dumps(export_row(1, "x", layer="13-other")))
    with pytest.raises(fg.PairingError, match=r"one of gemma-2-2b/13-other in .*line 2"):
        fg.load_labels(path)


@pytest.mark.parametrize(
    ("word", "text", "matches"),
    [
        ("war", "the War.", True),
        ("war", "wars", True),
        ("war", "warm software", False),
        ("C++", "I like c++!", True),
        ("日", "今日は", True),
        ("été", "L'Été indien", True),
    ],
)
def test_words_match_whole_and_in_any_case(word, text, matches):
    assert bool(word_pattern(word).search(text)) is matches


@pytest.mark.parametrize(
    ("tokens", "peak", "on"),
    [
        ((" a", " wed", "ding", "."), 2, True),
        ((" a", " wed", "ding", "."), 1, True),
        ((" a", " wed", "ding", "."), 0, False),
        ((" a", " wed", "ding", "."), 3, False),
        (("a", " wedding", " ring"), 2, False),  # the space between belongs to neither
    ],
)
def test_peak_on_a_word_of_several_tokens(tokens, peak, on):
    excerpt = fg.Excerpt(tokens, (1.0,) * len(tokens), peak, 0)
    assert excerpt.peaks_on(word_pattern("Wedding")) is on


def planted(llama, tokenizer, word="bride"):
    """An SAE whose feature 5 reads the embedding of a word and writes its unembedding."""
    i = tokenizer(word, add_special_tokens=False)["input_ids"][0]
    sae = replace(make_sae(), hookpoint=fg.Hookpoint(0, "resid_pre"))
    embedding = llama.get_input_embeddings().weight[i].detach()
    W_enc, W_dec, b_enc = sae.W_enc.clone(), sae.W_dec.clone(), sae.b_enc.clone()
    W_enc[:, 5] = embedding / embedding.norm()
    b_enc[5] = -0.8 * float(embedding.norm())  # no other word is as near as cos 0.8
    W_dec[5] = 50 * llama.get_output_embeddings().weight[i].detach()
    return replace(sae, W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, labels={9: "Brides and grooms", 2: "dogs"})


def test_search_finds_planted_features_and_says_why(llama, tokenizer):
    sae = planted(llama, tokenizer)
    texts = [*TEXTS, "the bride wore a ring", "a bride ran"]
    examples = fg.measure_examples(llama, tokenizer, sae, texts, top=8)
    found = {entry.id: entry for entry in fg.find_features(llama, tokenizer, sae, "BRIDE", examples=examples)}
    excerpts = examples.of(5, tokenizer)
    assert all(excerpt.tokens[excerpt.peak].strip() == "bride" for excerpt in excerpts)
    peak = 0.2 * float(llama.get_input_embeddings().weight[tokenizer("bride")["input_ids"][1]].detach().norm())
    n = len(excerpts)
    assert found[5].why == (f"peaks on it in {n} of {n} excerpts", f"fires on it: {peak:.1f}", "raises it (rank 1)")
    assert next(iter(found)) in (5, 9)
    assert "label" in found[9].why
    assert 2 not in found or "label" not in found[2].why
    scores = [entry.score for entry in found.values()]
    assert scores == sorted(scores, reverse=True)
    assert len(fg.find_features(llama, tokenizer, sae, "bride", top=2)) == 2
    with pytest.raises(fg.DataError, match="empty word"):
        fg.find_features(llama, tokenizer, sae, "  ")
    with pytest.raises(fg.PairingError):
        fg.find_features(llama, tokenizer, make_sae(seed=3), "bride", examples=examples)


def test_search_for_no_word_finds_less_than_for_a_word():
    model, tokenizer = fg.load_model("default")
    sae = fg.load_sae("default")
    assert fg.find_features(model, tokenizer, sae, "xyzzyplugh frobnitz") == []  # twelve tokens
    found = fg.find_features(model, tokenizer, sae, "love")
    assert "love" in sae.labels[found[0].id]
    assert min(entry.score for entry in found) >= MIN_SCORE
    assert len(fg.find_features(model, tokenizer, sae, "qzxwv")) < len(found)  # five tokens


def test_search_finds_what_raises_a_word():
    model, tokenizer = fg.load_model("default")
    sae = fg.load_sae("default")
    i = tokenizer(" king", add_special_tokens=False)["input_ids"][0]
    W_dec = sae.W_dec.clone()
    W_dec[77] = model.get_output_embeddings().weight[i].detach().float()
    found = fg.find_features(model, tokenizer, replace(sae, W_dec=W_dec), "king", top=4)
    assert any(entry.id == 77 and "raises it (rank 1)" in entry.why for entry in found)
    assert any("king" in sae.labels.get(entry.id, "") for entry in found)


def row_of(**more):
    excerpt = fg.Excerpt(("<b>", " é", "", "日\n", "\u202e x"), (0.0, 1.0, 5.0, 2.0, 0.5), 2, 7)
    fields = {"id": 12, "weight": 0.5, "density": 0.01, "tokens": ("<i>",), "lowered": ("&",), "excerpts": (excerpt,)}
    return fg.FeatureRow(**{**fields, **more})


def test_page_is_whole_escaped_and_stands_alone(tmp_path):
    hostile = row_of(
        label='<script>alert(1)</script>"', why=("<img src=x>",), link="https://x.org/a?b&\"'>", weight=None
    )
    path = tmp_path / "p.html"
    cards.write_page(path, "<h> \ud800", [row_of(), hostile], ["<note>"])
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert not {"script", "img", "note", "h", "i", "b>"} & set(checker.tags)
    assert 'alert(1)</script>"' in checker.text
    assert {value for name, value in checker.attributes if name in ("href", "src")} == {hostile.link}
    assert not re.search(r"@import|url\(", page)
    assert ("title", "5.00") in checker.attributes  # the split character carries its largest activation
    assert checker.text.count("日↵· x") == 2  # line breaks and direction marks do nothing here
    assert cards.html_page("none", []).count("<article") == 0


@pytest.mark.parametrize(("plain", "scale"), [(pages.LIGHT, pages.LIGHT_SCALE), (pages.DARK, pages.DARK_SCALE)])
def test_contrast_of_every_text(plain, scale):
    """WCAG AA: 4.5 to 1."""

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert len(scale) == pages.SHADES
    pairs = [(plain["text"], shade) for shade in (*scale, plain["page"], plain["card"])]
    pairs += [(plain[name], plain[ground]) for name in ("quiet", "link") for ground in ("page", "card")]
    for text, ground in pairs:
        assert contrast(text, ground) >= 4.5, (text, ground)


def test_describe_features_by_id_and_by_vector(llama, tokenizer):
    sae = named_sae("gemma-2-2b/12-gemmascope-res-16k")
    examples = fg.measure_examples(llama, tokenizer, sae, TEXTS, top=2)
    rows = fg.describe_features(llama, tokenizer, sae, [7, 3], examples=examples, why={3: ("label",)})
    assert [(row.id, row.weight, row.why) for row in rows] == [(7, None, ()), (3, None, ("label",))]
    assert rows[0].link == "https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/7"
    assert rows[0].excerpts == examples.of(7, tokenizer)
    lens = fg.logit_lens(llama, sae.W_dec[[7]])[0]
    assert rows[0].tokens[0] == tokenizer.decode([int(lens.argmax())]).strip()
    assert rows[0].lowered[0] == tokenizer.decode([int(lens.argmin())]).strip()
    vector = fg.from_features(sae, {7: -2.0})
    flipped = fg.describe_features(llama, tokenizer, sae, vector)[0]
    assert (flipped.tokens, flipped.lowered) == (rows[0].lowered, rows[0].tokens)
    json.dumps([row.as_dict() for row in rows], allow_nan=False)
    with pytest.raises(fg.SelectionError):
        fg.describe_features(llama, tokenizer, sae, [24])
    with pytest.raises(fg.PairingError):
        fg.describe_features(llama, tokenizer, make_sae(seed=2), [1], examples=examples)


def test_command_line_reads_features(tmp_path):
    corpus, kept, page = tmp_path / "c.txt", tmp_path / "e.safetensors", tmp_path / "p.html"
    corpus.write_text("The King was here.\nIt was the King himself.\nA dog sat on the mat.\n")
    told = json.loads(invoke("examples", corpus, "-o", kept, "--top", 2, "--json").stdout)
    assert (told["texts"], told["features"]) == (3, fg.load_sae("default").d_sae)
    labels = tmp_path / "labels.json"
    labels.write_text('{"2588": "kings"}')
    options = ("--search", "king", "--examples", kept, "--labels", labels, "--html", page, "--json", "--top", 3)
    told = json.loads(invoke("features", *options).stdout)
    first = told["features"][0]
    assert (first["id"], first["label"]) == (2588, "kings")
    assert first["why"][:2] == ["label", "peaks on it in 2 of 2 excerpts"]
    assert first["excerpts"][0]["tokens"][first["excerpts"][0]["peak"]] == " King"
    assert "Feature 2588" in page.read_text()
    shown = invoke("features", "--feature", "2588,5", "--corpus", corpus).stdout
    assert "2588" in shown
    assert "King" in shown
    for wrong in ((), ("--feature", "1", "--search", "x"), ("--feature", "x")):
        with pytest.raises(fg.DataError):
            invoke("features", *wrong)
    with pytest.raises(fg.DataError, match="either --corpus or --examples"):
        invoke("features", "--feature", "1", "--corpus", corpus, "--examples", kept)


def test_a_search_without_a_hit_ends_with_1(monkeypatch):
    monkeypatch.setattr("fgsteer.features.search.find_features", lambda *_, **__: [])
    monkeypatch.delitem(fg.__dict__, "find_features", raising=False)
    result = invoke("features", "--search", "nothing", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["features"] == []
    assert "No feature was found" in result.stderr
    monkeypatch.undo()
    fg.__dict__.pop("find_features", None)
