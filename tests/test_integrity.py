"""What was written is what is read: a hash in every file of tensors, and no key of JSON that stands twice."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import fgsteer as fg
from fgsteer.data.corpora import read_documents
from fgsteer.evaluation.bench.run_files import load_conditions
from fgsteer.evaluation.judges.answer_cache import AnswerCache
from fgsteer.evaluation.judges.chat_client import completion
from fgsteer.export import gguf
from fgsteer.models.shipped import DEFAULT, SHIPPED
from fgsteer.serving.sources import load_stages, save_clamp
from fgsteer.storage import files, json_files
from fgsteer.storage.lines import as_line
from fgsteer.storage.shards import Shards
from tests.helpers import runs
from tests.helpers.sae_files import config_of, folder_of, state_of
from tests.helpers.saes import make_sae
from tests.helpers.saved import things

AT = "blocks.1.hook_resid_post"
LOADS: dict[str, Callable[[Path], object]] = {
    "vector": fg.SteeringVector.load,
    "statistics": fg.ContrastStatistics.load,
    "density": fg.FeatureDensity.load,
    "examples": fg.FeatureExamples.load,
    "effects": fg.EffectApproximator.load,
    "transfer": fg.TransferMap.load,
    "clamp": load_stages,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small file of every kind."""
    folder = tmp_path_factory.mktemp("saved")
    made = {**things(1, width=64), "vector": fg.SteeringVector(torch.randn(16), AT, torch.ones(16), {3: 1.0, 1: -2.0})}
    for kind, thing in made.items():
        thing.save(folder / kind)
    sae = make_sae()
    save_clamp(fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={1: 2.0}), folder / "clamp")
    return folder


def data_start(data):
    return 8 + int.from_bytes(data[:8], "little")


def flipped(data, place, bit):
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


@pytest.mark.parametrize("kind", LOADS)
def test_a_flip_in_tensors_is_seen(kind, saved, tmp_path):
    data, path, lottery = (saved / kind).read_bytes(), tmp_path / kind, random.Random(0)
    for _ in range(100):
        path.write_bytes(flipped(data, lottery.randrange(data_start(data), len(data)), lottery.randrange(8)))
        with pytest.raises(fg.FormatError, match=f"{path} is damaged: its hash is not that of what it holds"):
            LOADS[kind](path)
    path.write_bytes(data)
    LOADS[kind](path)


@pytest.mark.parametrize("kind", LOADS)
def test_a_flip_in_the_header_is_seen_or_does_no_harm(kind, saved, tmp_path):
    data, path = (saved / kind).read_bytes(), tmp_path / kind
    told, lottery = files.read_tensors(saved / kind, kind=kind), random.Random(0)
    for place in range(lottery.randrange(5), data_start(data), 5):
        path.write_bytes(flipped(data, place, lottery.randrange(8)))
        try:
            tensors, header = files.read_tensors(path, kind=kind)
        except fg.FormatError:
            continue
        spared = {key: header[key] for key in told[1]}  # a hash under another key is no hash, and no harm
        assert spared == told[1]
        assert list(tensors) == list(told[0])
        assert all(torch.equal(tensor, told[0][name]) for name, tensor in tensors.items())


def test_every_dtype_and_shape_is_hashed(tmp_path):
    tensors = {
        "bfloat16": torch.randn(3, 2).bfloat16(),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "int64": torch.arange(6).reshape(2, 3).T,
        "number": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "f"
    files.write_tensors(path, tensors, kind="x", header={"a": {1: float("inf")}, "é": [torch.tensor(2), None]})
    read, header = files.read_tensors(path, kind="x")
    assert header == {"kind": "x", "a": {"1": float("inf")}, "é": [2, None]}
    assert all(str(read[name]) == str(tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    files.write_tensors(path, read, kind="x", header=header)  # what is read can be written again
    metadata = {"fgsteer": json.dumps({**header, "sha256": stored(path)["sha256"]}, ensure_ascii=False)}
    for other in (
        {"int64": read["int64"].reshape(2, 3)},
        {"bool": read["bool"].to(torch.uint8)},
        {"more": torch.ones(1)},
    ):
        path.write_bytes(save({**read, **other}, metadata))
        with pytest.raises(fg.FormatError, match="is damaged"):
            files.read_tensors(path, kind="x")


def stored(path):
    data = path.read_bytes()
    return json.loads(json.loads(data[8 : data_start(data)])["__metadata__"]["fgsteer"])


@pytest.mark.parametrize("kind", LOADS)
def test_files_without_a_hash_load_as_before(kind, saved, tmp_path):
    header = stored(saved / kind)
    assert len(header.pop("sha256")) == 64
    save_file(load_file(saved / kind), tmp_path / kind, {"fgsteer": json.dumps(header)})
    LOADS[kind](tmp_path / kind)


def test_shipped_files_load():
    shipped = SHIPPED[DEFAULT].folder().rglob("*.safetensors")
    found = [path for path in shipped if "fgsteer" in str(path.read_bytes()[:2000])]
    assert found
    for path in found:
        files.read_tensors(path, kind=None)


def test_a_flip_in_a_part_is_refused(tmp_path):
    """Resuming takes no part that is not what was written."""
    parts = Shards(tmp_path, "x", {"p": 1})

    def values():
        return [
            float(t["v"]) for t in parts.each(range(3), lambda number, piece: {"v": torch.tensor(piece * 1.5)}, str)
        ]

    assert values() == values() == [0, 1.5, 3]
    path = parts.path(1)
    data = path.read_bytes()
    path.write_bytes(flipped(data, len(data) - 2, 3))
    with pytest.raises(fg.FormatError, match=f"{path} is damaged.*delete it and make it again"):
        values()
    path.unlink()
    assert values() == [0, 1.5, 3]


def test_a_header_that_could_not_be_read_is_not_written(tmp_path):
    deep = []
    for _ in range(80):
        deep = [deep]
    for header, told in (
        ({"x": deep}, "nested"),
        ({"x": {1: 2, "1": 3}}, "'1' stands twice"),
        ({"x": object()}, "object"),
    ):
        with pytest.raises(fg.DataError, match=told):
            files.write_tensors(tmp_path / "f", {}, kind="x", header=header)
    assert not list(tmp_path.iterdir())
    half = "caf\udce9"  # as a name in another encoding comes from the command line
    files.write_tensors(tmp_path / "f", {}, kind="x", header={"name": half})
    assert files.read_tensors(tmp_path / "f", kind="x")[1]["name"] == "caf?"
    json_files.write_json(tmp_path / "j", {"name": half})
    assert json_files.read_json(tmp_path / "j") == {"name": "caf?"}


# ---------------------------------------------------------------- keys that stand twice

TWICE = '{"positive": ["a", "b"], "negative": ["c"], "positive": ["d"]}'
ROW = '{"prompt": "p", "positive": "a", "negative": "b", "positive": "c"}'
LABEL = '{"index": "1", "description": "a", "description": "b"}'
SCORE = '{"key": "k", "score": 3, "score": 7}'


def cfg(path):
    folder = folder_of(path.parent / "sae", config_of("topk", {"k": 4}), state_of("topk"))
    config = (folder / "cfg.json").read_text()
    (folder / "cfg.json").write_text('{"k": 3, ' + config[1:] if '"k"' in config else config[:-1] + ', "k": 4, "k": 3}')
    return fg.load_sae(folder)


@pytest.mark.parametrize(
    ("name", "text", "key", "read"),
    [
        ("f.json", '{"a": [{"b": 1, "c": {"d": 1, "d": 1}}]}', "d", json_files.read_json),
        ("f.json", TWICE, "positive", fg.load_contrast),
        ("f.json", f"[{ROW}]", "positive", fg.load_contrast),
        ("f.jsonl", ROW, "positive", fg.load_contrast),
        ("f.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}', "text", lambda path: list(read_documents(path))),
        ("f.json", '[{"text": "a", "text": "b"}]', "text", lambda path: list(read_documents(path))),
        ("f.json", '{"text": ["a"], "text": ["b"]}', "text", lambda path: list(read_documents(path))),
        ("f.jsonl.gz", '{"text": "a", "text": "b"}', "text", lambda path: list(read_documents(path))),
        ("f.json", '{"1": "a", "1": "b"}', "1", fg.load_labels),
        ("f.jsonl", LABEL, "description", fg.load_labels),
        ("f.jsonl", '{"fgsteer": "bench", "plan": {"a": 1, "a": 2}}\n', "a", fg.load_run),
        ("f.json", '{"plan": 1, "arms": {}, "arms": {"a": []}}', "arms", lambda path: load_conditions(path, {})),
        ("f.jsonl", SCORE + "\n", "", AnswerCache),
        ("f.json", "", "k", cfg),
    ],
)
def test_a_key_that_stands_twice_is_refused(name, text, key, read, tmp_path):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    told = f"key '{key}' stands twice in one object" if key else "holds no scores|Cannot|cannot"
    with pytest.raises((fg.FormatError, fg.DataError), match=told) as error:
        read(path)
    assert str(tmp_path) in str(error.value)


def test_a_last_line_that_says_a_key_twice_is_not_taken_for_one_that_breaks_off(tmp_path):
    whole = b"".join(as_line(row) for row in runs.rows(concepts=("sea",), layers=(1,), seeds=1))
    path = tmp_path / "run.jsonl"
    path.write_bytes(whole + whole.splitlines()[-1][:-5])
    records = len(fg.load_run(path).records)
    assert records == whole.count(b"\n") - 1
    path.write_bytes(whole[:-2] + b', "text": "another"}')
    with pytest.raises(fg.FormatError, match="'text' stands twice"):
        fg.load_run(path)


def test_a_judge_that_answers_twice_gave_no_answer():
    assert completion(b'{"choices": [{"message": {"content": "7"}}]}') == "7"
    assert completion(b'{"choices": [{"message": {"content": "7", "content": "3"}}]}') is None


def test_a_setting_that_holds_a_key_twice_is_refused():
    from fgsteer.cli.values import parse_settings

    assert parse_settings(['a={"x": 1}', "b=word", "c=inf"]) == {"a": {"x": 1}, "b": "word", "c": float("inf")}
    for value in ('{"x": 1, "x": 2}', "[" * 100_000, "7" * 5000):
        with pytest.raises(fg.DataError, match="--set a="):
            parse_settings([f"a={value}"])


def safetensors_of(header):
    text = header.encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


def test_a_tensor_that_is_named_twice_is_refused(tmp_path):
    """The format's own reader takes the last, and of metadata too."""
    meta = json.dumps({"kind": "vector", "hookpoint": AT, "features": {}, "provenance": {}})
    twice = '"direction":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}'
    other = '"direction":{"dtype":"I32","shape":[4,4],"data_offsets":[0,64]}'
    path = tmp_path / "f"
    for header in (
        f'{{"__metadata__":{{"fgsteer":{json.dumps(meta)}}},{other},{twice}}}',
        f'{{"__metadata__":{{"fgsteer":"1","fgsteer":{json.dumps(meta)}}},{twice}}}',
        f'{{"__metadata__":{{"fgsteer":{json.dumps(meta[:-1] + ", " + meta[1:])}}},{twice}}}',
    ):
        path.write_bytes(safetensors_of(header))
        with pytest.raises(fg.FormatError, match=r"twice|[Dd]uplicate"):
            fg.SteeringVector.load(path)
    path.write_bytes(safetensors_of(f'{{"__metadata__":{{"fgsteer":{json.dumps(meta)}}},{twice}}}'))
    assert not fg.SteeringVector.load(path).direction.any()


def test_an_saes_weight_that_is_named_twice_is_refused(tmp_path):
    folder = folder_of(tmp_path / "sae", config_of("topk", {"k": 4}), state_of("topk"))
    path = folder / "sae_weights.safetensors"
    data = path.read_bytes()
    header, body = data[8 : data_start(data)].decode().rstrip(), data[data_start(data) :]
    name, about = next((n, a) for n, a in json.loads(header).items() if n != "__metadata__")
    again = {**about, "dtype": "I32"} if about["dtype"] == "F32" else about
    header = f"{{{json.dumps(name)}:{json.dumps(again)},{header[1:]}"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + body)
    with pytest.raises(fg.FormatError, match=r"twice|[Dd]uplicate"):
        fg.load_sae(folder)


def test_a_flip_in_a_control_vector_is_seen(tmp_path):
    vec = fg.SteeringVector(torch.randn(8), AT)
    gguf.write([vec.add(1.0, bos=True), fg.SteeringVector(torch.randn(8), 2).add(2.0, bos=True)], tmp_path / "f.gguf")
    data = (tmp_path / "f.gguf").read_bytes()
    for place in range(len(data) - 64, len(data)):
        (tmp_path / "f.gguf").write_bytes(flipped(data, place, place % 8))
        with pytest.raises(fg.FormatError, match=r"is damaged|nan|finite"):
            gguf.read(tmp_path / "f.gguf")
    (tmp_path / "f.gguf").write_bytes(data.replace(b'"sha256"', b'"sha255"'))  # another engine's has none
    assert len(gguf.read(tmp_path / "f.gguf")) == 2


def test_a_control_vectors_header_that_says_a_key_twice_is_refused(tmp_path):
    vec = fg.SteeringVector(torch.ones(8), AT, provenance={"model": {"name": "m"}})
    gguf.write([vec.add(1.0, bos=True)], tmp_path / "f.gguf")
    data = (tmp_path / "f.gguf").read_bytes()
    assert data.count(b'{"model": "m", "baked"') == 1
    (tmp_path / "f.gguf").write_bytes(data.replace(b'{"model": "m", "baked"', b'{"baked": "m", "baked"'))
    with pytest.raises(fg.FormatError, match="'baked' stands twice"):
        gguf.read(tmp_path / "f.gguf")


def test_a_column_that_is_named_twice_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "f.parquet")
    with pytest.raises(fg.DataError, match="several columns named text"):
        list(read_documents(tmp_path / "f.parquet"))
