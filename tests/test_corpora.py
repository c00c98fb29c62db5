"""Corpora and contrast files: each format gives the same documents, what is not read is refused by name."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fgsteer as fg
from fgsteer.data.corpora import as_documents, read_documents
from tests.helpers.cli import app
from tests.helpers.saes import make_sae

STORIES = ["the king said yes", 'a dog, "the" cat\nran', "she wore ï white"]
ROWS = [{"id": n, "text": text, "story": text.upper()} for n, text in enumerate(STORIES)]
PAIRS = [{"prompt": "the", "positive": "king ran", "negative": "dog sat"}]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_table(path, rows, separator=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def write(path, rows):
    """The rows as a file of the kind that its name asks for."""
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        path.write_text(json_lines(rows), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    else:
        write_table(path, rows, "\t" if kind == ".tsv" else ",")
    return path


KINDS = ["c.jsonl", "C.JSONL", "c.ndjson", "c.json", "c.JSON", "c.csv", "c.CSV", "c.tsv", "c.parquet"]


@pytest.mark.parametrize("name", KINDS)
def test_every_format_gives_the_same_documents(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    assert list(read_documents(path)) == STORIES
    assert list(read_documents(str(path), field="story")) == [row["story"] for row in ROWS]
    with pytest.raises(
        fg.DataError, match=rf"{re.escape(name)}, (row|line) 1, which has the fields 'id', 'text', 'story'"
    ):
        list(read_documents(path, field="body"))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip), (".bz2", bz2), (".XZ", lzma)])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv"])
def test_compressed_files_are_read(tmp_path, kind, suffix, pack):
    plain = tmp_path / f"c{kind}"
    if kind == ".txt":
        plain.write_text("one\n\n two \n", encoding="utf-8")
    else:
        write(plain, ROWS)
    packed = tmp_path / f"c{kind}{suffix}"
    packed.write_bytes(pack.compress(plain.read_bytes()))
    assert (
        list(read_documents(packed)) == list(read_documents(plain)) == (["one", "two"] if kind == ".txt" else STORIES)
    )
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(fg.DataError, match="Cannot read"):
        list(read_documents(packed))


def test_lists_of_texts_and_objects_of_columns(tmp_path):
    path = tmp_path / "c.json"
    for value in (STORIES, {"text": STORIES, "id": [0, 1, 2], "version": "1"}):
        path.write_text(json.dumps(value), encoding="utf-8")
        assert list(read_documents(path)) == STORIES
    lines = tmp_path / "c.jsonl"
    lines.write_text(json_lines(STORIES), encoding="utf-8")
    assert list(read_documents(lines)) == STORIES


@pytest.mark.parametrize("name", ["c.md", "c.jsonlines", "c.csv.zst", "c", "c.parquet.gz", "c.gz", ".jsonl.bak"])
def test_other_suffixes_are_refused_at_once(tmp_path, name):
    (tmp_path / name).write_text("the king\n")
    with pytest.raises(fg.DataError, match=r"\.txt, \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.parquet"):
        read_documents(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("c.jsonl", b'{"text": "a"}\n{"text": null}\n', r"null in .*line 2, field 'text'"),
        ("c.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"an int, 3, in .*line 2, field 'text'"),
        ("c.jsonl", b'{"text": "a"}\n[1]\n', r"a list, .* in .*line 2"),
        ("c.json", b'{"text": "a"}\n{"text": "b"}\n', r"is not JSON: Extra data.*\.jsonl"),
        ("c.json", b'{"text": {"0": "a"}}', r"holds no list"),
        ("c.json", b'"a"', r"holds no list"),
        ("c.json", b'[{"text": "a"}, {"body": "b"}]', r"field 'text', got .*row 2, which has the fields 'body'"),
        ("c.csv", b"id,text\n1,a\n2,b, and c\n", r"row 2 has 3 cells under the header \['id', 'text'\].*quotes"),
        ("c.csv", b"id,text\n1,a\n2\n", r"row 2 has 1 cells"),
        ("c.csv", b"text,text\na,b\n", r"header of different names"),
        ("c.csv", b'id,text\n1,"a\n2,b\n', r"row 1 is damaged: unexpected end of data"),
        ("c.csv", b'id,text\n1,"a"b\n', r"row 1 is damaged"),
        ("c.csv", "id,text\n1,é\n".encode("utf-16"), r"UTF-8"),
        ("c.txt", b"\xff\xfea", r"UTF-8"),
        ("c.parquet", b"PAR1 no", r"Cannot read .* after row 0.*Parquet"),
        ("c.jsonl.gz", b'{"text": "a"}\n', r"Cannot read .*c\.jsonl\.gz"),
    ],
)
def test_damage_names_file_and_row(tmp_path, name, data, told):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(fg.DataError, match=told) as caught:
        list(read_documents(path))
    assert name in str(caught.value)


def test_csv_of_other_programs(tmp_path):
    """A byte-order mark, Windows line ends, blank lines, and a cell larger than Python's reader takes by default."""
    long = "word " * 40_000
    path = tmp_path / "c.csv"
    path.write_bytes(f'\ufefftext,id\r\n"{long}",1\r\n\r\n"two\r\nlines",2\r\n'.encode())
    limit = csv.field_size_limit()
    assert list(read_documents(path)) == [long, "two\r\nlines"]
    assert csv.field_size_limit() == limit < len(long)
    path.write_text("text\n", encoding="utf-8")
    assert list(read_documents(path)) == []


def test_parquet_reads_the_column_alone_and_names_a_null(tmp_path, monkeypatch):
    path = write(tmp_path / "c.parquet", [*ROWS, {"id": 3, "text": None, "story": "x"}])
    from pyarrow import parquet

    asked = []
    reader = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda *a, columns=None, **k: (asked.append(columns), reader(*a, columns=columns, **k))[1],
    )
    with pytest.raises(fg.DataError, match=r"null in .*c\.parquet, row 4, field 'text'"):
        list(read_documents(path))
    assert asked == [["text"]]


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(fg.DataError, match="pip install pyarrow"):
        list(read_documents(tmp_path / "c.parquet"))


def test_rows_of_the_datasets_library_are_texts(llama, tokenizer):
    """Dataset, its streamed form and its column count as the list of the same texts does."""
    datasets = pytest.importorskip("datasets")
    sae = make_sae()
    data = datasets.Dataset.from_list(ROWS)
    expected = fg.measure_density(llama, tokenizer, sae, STORIES)
    upper = fg.measure_density(llama, tokenizer, sae, [row["story"] for row in ROWS])
    for texts, field, wanted in (
        (data, "text", expected),
        (data.to_iterable_dataset(), "text", expected),
        (data["text"], "text", expected),
        (ROWS, "story", upper),
    ):
        assert torch.equal(fg.measure_density(llama, tokenizer, sae, texts, field=field).fired, wanted.fired)
    excerpts = fg.measure_examples(llama, tokenizer, sae, data, top=1)
    assert torch.equal(excerpts.tokens, fg.measure_examples(llama, tokenizer, sae, STORIES, top=1).tokens)
    with pytest.raises(fg.DataError, match="a row with the field 'body'"):
        fg.measure_density(llama, tokenizer, sae, data, field="body")
    with pytest.raises(fg.DataError, match=r"one split.*'train', 'test'"):
        fg.measure_density(llama, tokenizer, sae, datasets.DatasetDict(train=data, test=data))


@pytest.mark.parametrize("texts", ["the king", b"the king", Path("c.txt"), 3])
def test_what_is_no_list_of_texts_is_refused_at_once(texts):
    with pytest.raises(fg.DataError, match=r"read_documents\(path\)"):
        as_documents(texts)


def test_a_data_frame_is_refused_by_its_column(llama, tokenizer):
    frame = pytest.importorskip("pandas").DataFrame(ROWS)
    with pytest.raises(fg.DataError, match=r"frame\['text'\]"):
        fg.measure_density(llama, tokenizer, make_sae(), frame)
    assert list(as_documents(frame["text"])) == STORIES


@pytest.mark.parametrize("name", KINDS)
def test_contrast_rows_of_every_format(tmp_path, name):
    path = write(tmp_path / name, PAIRS)
    assert fg.load_contrast(path).pairs == (fg.ContrastPair("king ran", "dog sat", "the"),)


@pytest.mark.parametrize("name", ["c.txt", "c.md", "c", "c.jsonl2"])
def test_contrast_files_of_other_suffixes_are_refused(tmp_path, name):
    (tmp_path / name).write_text(json_lines(PAIRS), encoding="utf-8")
    with pytest.raises(fg.DataError, match=r"a \.json, \.jsonl, \.ndjson, \.csv, \.tsv or \.parquet file"):
        fg.load_contrast(tmp_path / name)


def test_a_compressed_json_contrast_is_refused_as_such(tmp_path):
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(PAIRS).encode()))
    with pytest.raises(fg.DataError, match=r"c\.json\.gz, which is compressed.*Unpack it"):
        fg.load_contrast(tmp_path / "c.json.gz")


def test_contrast_damage_names_the_row(tmp_path):
    path = tmp_path / "c.CSV"
    path.write_text("positive,negative\na,b\nc,\n", encoding="utf-8")
    with pytest.raises(fg.DataError, match=r"an empty text in .*c\.CSV, row 2, field 'negative'"):
        fg.load_contrast(path)


def command(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    return result, str(result.exception or "") + result.output


def test_commands_read_the_same_tokens_from_every_format(tmp_path):
    counts = set()
    for number, name in enumerate(KINDS):
        path = write(tmp_path / name, ROWS)
        out = tmp_path / f"{number}.safetensors"
        result, told = command("density", path, "-o", out, "--json", "--field", "story")
        assert result.exit_code == 0, told
        counts.add(json.loads(result.stdout)["tokens"])
    assert len(counts) == 1
    (tmp_path / "c.yaml").write_text("the king\n")
    result, told = command("density", tmp_path / "c.yaml", "-o", tmp_path / "x")
    assert result.exit_code
    assert "'.yaml'" in told


MISSING = [
    ("collect", "wedding", "-o", "x"),
    ("density", "c.txt", "-o", "x"),
    ("examples", "c.txt", "-o", "x"),
    ("effects", "-o", "x"),
    ("features", "--feature", "1"),
    ("bench", "--quick", "-o", "bench"),
]


@pytest.mark.parametrize("words", MISSING, ids=lambda words: words[0])
def test_no_command_takes_the_defaults_sae_for_another_model(tmp_path, monkeypatch, words):
    """Said before anything is loaded: the model does not exist."""
    monkeypatch.chdir(tmp_path)
    Path("c.txt").write_text("the king\n")
    result, told = command(*words, "-m", "nobody/no-model")
    assert result.exit_code
    assert re.search(
        r"no --sae for the model 'nobody/no-model'.*saes --model no-model.*--sae RELEASE --sae-id ID", told, re.S
    )


def test_build_does_not_take_the_defaults_sae_for_statistics_of_another_model(tmp_path, llama, tokenizer):
    stats = fg.collect(llama, tokenizer, {"positive": ["the king"], "negative": ["a dog"]}, sae=make_sae())
    reading = {**stats.reading, "model": {**stats.reading["model"], "name": "nobody/other"}}
    named = fg.ContrastStatistics(stats.residual, stats.feature, reading, stats.data)
    named.save(tmp_path / "s.safetensors")
    result, told = command("build", "sta", "--stats", tmp_path / "s.safetensors", "-o", tmp_path / "v.safetensors")
    assert result.exit_code
    assert "no --sae for the model 'nobody/other'" in told
