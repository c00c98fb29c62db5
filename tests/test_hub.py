"""Vectors in folders and in repositories of a hub on the loopback."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

import fgsteer as fg
from fgsteer.errors.escaping import escape_markdown
from fgsteer.evaluation.runs.records import Run
from fgsteer.hub import card
from tests.helpers.errors import chain
from tests.helpers.hub import COMMIT, TOKEN, Hub
from tests.helpers.hub import run_script as in_process
from tests.helpers.pages import MARKS
from tests.helpers.saes import make_sae

PUSH = """
import sys
import fgsteer as fg
vector = fg.SteeringVector.load(sys.argv[1])
try:
    print(vector.push_to_hub("me/sea", run=fg.load_run(sys.argv[2]), commit_message="Sea"))
except fg.FormatError as error:
    print("refused:", error)
"""
PULL = """
import sys
import fgsteer as fg
vector = fg.SteeringVector.from_pretrained("me/sea")
vector.save(sys.argv[1])
try:
    fg.SteeringVector.from_pretrained("me/other")
except fg.FormatError as error:
    print(error)
"""


@pytest.fixture
def vector():
    sae = make_sae()
    made = fg.from_features(sae, {3: 2.0, 5: -1.0})
    provenance = {**made.provenance, "method": "fgaa", "data": [{"name": "sea"}], "hyperparameters": {"n_positive": 2}}
    provenance["model"] = {"name": "acme/tiny", "d_model": made.d_model}
    return fg.SteeringVector(made.direction, made.hookpoint, features=made.features, provenance=provenance)


def record(coefficient, half, prompt, behavior, layer=1, method="fgaa"):
    scores = {"behavior": behavior, "coherence": 0.5, "ce": 2.0, "ce_rise": 0.5, "text": "a b"}
    place = {"concept": "sea", "method": method, "layer": layer, "coefficient": coefficient, "matched": None}
    return {**place, "prompt": prompt, "seed": 0, "half": half, **scores}


@pytest.fixture
def measured(tmp_path):
    """A run in which coefficient 4 is best on the tuning half and 8 on the other, which must not matter."""
    best = {("tune", 2.0): 0.2, ("tune", 4.0): 0.8, ("tune", 8.0): 0.4}
    best |= {("report", 2.0): 0.1, ("report", 4.0): 0.6, ("report", 8.0): 0.9}
    rows = [record(c, half, p + 2 * (half == "report"), b) for (half, c), b in best.items() for p in range(2)]
    header = {"fgsteer": "bench", "plan": {"judge": {"name": "keyword"}}, "sha256": {}, "model": {}, "versions": {}}
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{**header, "command": "", "version": "0"}, *rows]))
    return path


def test_a_folder_holds_the_vector_and_a_card(vector, measured, tmp_path):
    folder = tmp_path / "sea"
    vector.save_pretrained(folder, run=fg.load_run(measured))
    again = fg.SteeringVector.from_pretrained(folder)
    assert torch.equal(again.direction, vector.direction)
    assert (again.features, again.provenance) == (vector.features, vector.provenance)
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["base_model"] == "acme/tiny"
    assert told["library_name"] == "fgsteer"
    assert "towards **sea**" in body
    assert "| 3 | 2 |" in body
    assert "| **4** | 0.600 | 0.500 | 0.300 |" in body  # of the half that chose nothing
    assert "coefficient = 4  #" in body
    assert "load_model('acme/tiny')" in body
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "curve.png", "vector.safetensors"]
    with pytest.raises(fg.FormatError, match="exists"):
        vector.save_pretrained(folder)


def read(text):
    """A card's front matter, its headings, what its code does with the model's name taken out, and its JSON."""
    _, head, body = text.split("---\n", 2)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in [*tokens, *inline]}
    assert not kinds & {
        "html_block",
        "html_inline",
        "link_open",
        "code_block",
        "hr",
        "blockquote_open",
        "list_item_open",
    }
    assert {token.attrs["src"] for token in inline if token.type == "image"} <= {"curve.png"}
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    fences = {token.info: token.content for token in tokens if token.type == "fence"}
    assert sorted(fences) == ["json", "python"]
    code = ast.parse(fences["python"])
    (load,) = [n for n in ast.walk(code) if isinstance(n, ast.Call) and "load_model" in ast.unparse(n.func)]
    (named,) = load.args
    assert isinstance(named, ast.Constant)
    load.args = []
    return yaml.safe_load(head), headings, named.value, ast.unparse(code), json.loads(fences["json"])


NAMES = [*MARKS, "---", "a: b", "acme/tiny\n", "é/é", "acme/ti\\ny", "...", "\x1b[2J", "x" * 300]
NAMES += ['a/b"); import os; os.system("x") #', "a/b'); import os #", 'a/b")\nimport os\nprint("', "a/b```\nimport os"]


def test_no_name_writes_the_card(vector, measured):
    run = fg.load_run(measured)
    points = sorted(set(run.settings), key=lambda s: s.coefficient)
    head, headings, named, code, _ = read(card(vector, points, run))
    assert (named, headings) == ("acme/tiny", ["sea", "Features", "Measured", "Use"])
    for name in NAMES:
        provenance = {
            "method": name,
            "data": [{"name": name}],
            "hyperparameters": {name: name},
            "model": {"name": name},
            "sae": {"source": name, "d_sae": name},
        }
        hostile = replace(vector, provenance=provenance)
        judged = Run({**run.header, "plan": {"judge": {"name": name}}}, run.records)
        found = read(card(hostile, points, judged))
        assert found[0] == {key: value for key, value in head.items() if key != "base_model"}
        assert found[1] == [escape_markdown(name) or "Steering vector", *headings[1:]]
        assert found[2:] == ("…", code, provenance)


@pytest.mark.parametrize("odd", [3, "text", [], {}, [3], {"a": 1}, None])
def test_a_card_of_provenance_of_other_kinds(vector, odd):
    provenance = dict.fromkeys(("method", "data", "hyperparameters", "model", "sae"), odd)
    assert read(card(replace(vector, provenance=provenance)))[1] == ["Steering vector", "Features", "Use"]


def test_the_cards_code_runs(vector, tmp_path):
    """The snippet as printed, with the repository named where it leaves a gap."""
    fg.from_features(fg.load_sae("default"), [2588]).save_pretrained(tmp_path / "bare")
    code = (tmp_path / "bare" / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    here = repr(str(tmp_path / "bare"))
    exec(code.replace("'…'", here), scope)
    assert scope["vector"].norm == pytest.approx(1.0, rel=1e-5)
    assert 10 < scope["coefficient"] < 1000


def test_a_run_without_the_vector_is_refused(vector, measured, tmp_path):
    run = fg.load_run(measured)
    with pytest.raises(fg.DataError, match="got a run that has fgaa at layer 1"):
        vector.save_pretrained(tmp_path / "x", run=run, method="caa")
    with pytest.raises(fg.DataError, match="other concepts"):
        vector.save_pretrained(tmp_path / "x", run=Run(run.header, []))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("named", [True, False])
def test_what_the_hub_says_is_told_without_the_token(named, vector, monkeypatch):
    token = "hf_abcdefghijklmnopqrstuvwxyz"

    def refuse(*_, **__):
        raise OSError(f"401 for Authorization: Bearer {token}\nmore")

    monkeypatch.setattr("fgsteer.hub.hub_is_reachable", lambda: True)
    monkeypatch.setattr("fgsteer.storage.network.hub_is_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    options = {"token": token} if named else {}
    for ask in (
        lambda: vector.push_to_hub("me/sea", **options),
        lambda: type(vector).from_pretrained("me/s", **options),
    ):
        with pytest.raises(fg.FormatError, match=r"401 for Authorization: Bearer \(key\)") as caught:
            ask()
        assert token not in chain(caught.value)


def test_pushed_to_a_hub_and_read_back(vector, measured, tmp_path):
    vector.save(tmp_path / "v.safetensors")
    (tmp_path / "hub").mkdir()
    with Hub(tmp_path / "hub") as hub:
        arguments = (PUSH, hub.url, tmp_path / "home", str(tmp_path / "v.safetensors"), str(measured))
        assert in_process(*arguments).startswith("refused: me/sea was not written")
        assert in_process(*arguments, token=TOKEN).strip() == f"{hub.url}/me/sea/commit/{COMMIT}"
        assert sum("/commit/" in path for _, path in hub.requests) == 1
        told = in_process(PULL, hub.url, tmp_path / "home", str(tmp_path / "again.safetensors"))
        assert "There is no vector.safetensors in me/other" in told
        told = in_process(PULL, hub.url, tmp_path / "home", str(tmp_path / "again.safetensors"), offline="1")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "v.safetensors").read_bytes()
    assert (tmp_path / "hub" / "me" / "sea" / "curve.png").exists()
