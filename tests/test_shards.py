"""Work in parts: the same result in one process or several, after kills, and never from another run's parts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fgsteer as fg
from fgsteer.storage.files import read_tensors, write_tensors
from fgsteer.storage.json_files import text_sha256
from fgsteer.storage.ranks import Ranks
from fgsteer.storage.shards import Shards
from tests.helpers.examples import LONG
from tests.helpers.saes import make_sae

ROOT = Path(__file__).resolve().parent.parent
WORDS = LONG.split()


def sentences(count, seed):
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(2, 7))) for _ in range(count)]


CONTRAST = fg.ContrastSet(
    "words",
    [fg.ContrastPair("A", "B", prompt) for prompt in sentences(9, 0)],
    positives=sentences(14, 1),
    negatives=sentences(11, 2),
)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    for module in ("activations.tokens", "statistics.collecting", "features.density"):
        monkeypatch.setattr(f"fgsteer.{module}.TEXTS_PER_CHUNK", 8)  # 43 texts: six parts


def as_rank(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def saved(stats, path):
    stats.save(path)
    return path.read_bytes()


def collect(llama, tokenizer, **options):
    return fg.collect(llama, tokenizer, CONTRAST, sae=make_sae(), keep_pooled=True, **options)


def test_parts_give_the_same_bytes(llama, tokenizer, tmp_path):
    whole = saved(collect(llama, tokenizer), tmp_path / "whole")
    assert saved(collect(llama, tokenizer, work=tmp_path / "parts"), tmp_path / "a") == whole
    assert len(list((tmp_path / "parts").glob("part-*"))) == 6
    assert saved(collect(llama, tokenizer, work=tmp_path / "parts"), tmp_path / "b") == whole  # all of it read back


def test_windows_add_up_to_one_pass(llama, tokenizer, monkeypatch):
    small = collect(llama, tokenizer)
    monkeypatch.setattr("fgsteer.activations.tokens.TEXTS_PER_CHUNK", 64)
    monkeypatch.setattr("fgsteer.statistics.collecting.TEXTS_PER_CHUNK", 64)
    large = collect(llama, tokenizer)
    for space in ("residual", "feature"):
        for side in ("positive", "negative"):
            a, b = (getattr(stats.at(space)[1], side) for stats in (small, large))
            assert a.count == b.count
            assert torch.equal(a.fired, b.fired)
            # float32 forward passes at other batch shapes
            assert torch.allclose(a.mean, b.mean, rtol=1e-5, atol=1e-6)
            assert torch.allclose(a.m2, b.m2, rtol=1e-4, atol=1e-5)
    (a,), (b,) = small.pooled.values(), large.pooled.values()
    assert torch.allclose(a.positive, b.positive, atol=1e-5)
    assert torch.allclose(a.negative, b.negative, atol=1e-5)


def test_a_rank_makes_its_own_parts_and_reads_the_others(llama, tokenizer, tmp_path, monkeypatch):
    whole = saved(collect(llama, tokenizer), tmp_path / "whole")
    as_rank(monkeypatch, 1, 2)
    made = []

    class Waits(Exception):  # noqa: N818
        pass

    def wait(path, maker):
        made.append((path.stem, maker))
        raise Waits

    monkeypatch.setattr("fgsteer.storage.shards.wait_for_file", wait)
    with pytest.raises(Waits):
        collect(llama, tokenizer, work=tmp_path / "parts")
    assert made == [("part-000000", 0)]
    assert sorted(path.stem[-1] for path in (tmp_path / "parts").glob("part-*")) == ["1", "3", "5"]
    monkeypatch.undo()
    small = pytest.MonkeyPatch()
    for module in ("activations.tokens", "statistics.collecting"):
        small.setattr(f"fgsteer.{module}.TEXTS_PER_CHUNK", 8)
    assert saved(collect(llama, tokenizer, work=tmp_path / "parts"), tmp_path / "a") == whole
    small.undo()


def test_density_in_parts_is_the_same(llama, tokenizer, tmp_path):
    texts, sae = sentences(30, 3), make_sae()
    whole = saved(fg.measure_density(llama, tokenizer, sae, texts), tmp_path / "whole")
    done = []
    for _ in range(2):
        found = fg.measure_density(llama, tokenizer, sae, iter(texts), work=tmp_path / "parts", progress=done.append)
        assert saved(found, tmp_path / "a") == whole
    assert len(list((tmp_path / "parts").glob("part-*"))) == 4
    assert done[-1] >= 30


def test_another_runs_parts_are_refused(llama, tokenizer, tmp_path):
    work = tmp_path / "parts"
    collect(llama, tokenizer, work=work)
    with pytest.raises(fg.PairingError, match="bos was false and is true"):
        collect(llama, tokenizer, work=work, bos=True)
    other = fg.ContrastSet("words", CONTRAST.pairs, positives=sentences(14, 5), negatives=CONTRAST.negatives)
    with pytest.raises(fg.PairingError, match=r"contrast was [0-9a-f]{12} and is [0-9a-f]{12}."):
        fg.collect(llama, tokenizer, other, sae=make_sae(), keep_pooled=True, work=work)
    path = work / "part-000002.safetensors"
    tensors, header = read_tensors(path, kind="collected texts")
    name = next(name for name in tensors if name.endswith("/mean"))
    write_tensors(path, {**tensors, name: torch.ones(3)}, kind="collected texts", header=header)
    with pytest.raises(fg.FormatError, match="damaged"):
        collect(llama, tokenizer, work=work)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(fg.FormatError, match="not a readable"):
        collect(llama, tokenizer, work=work)


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("one", "2"), ("0", "0")])
def test_ranks_that_cannot_be_are_refused(rank, world, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(fg.DataError, match="RANK"):
        Ranks.from_env()


def test_every_part_is_one_ranks():
    for world in (1, 2, 3, 7):
        for number in range(20):
            assert sum(Ranks(rank, world).owns(number) for rank in range(world)) == 1


def test_waiting_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("fgsteer.storage.shards.LATE_SECONDS", 0.05)
    monkeypatch.setattr("fgsteer.storage.shards.POLL_SECONDS", 0.01)
    parts = Shards(tmp_path, "x", {}, Ranks(0, 2))
    seen = []

    def make(number, piece):
        return {"piece": torch.tensor(piece)}

    def other(seconds):
        seen.append(seconds)
        if len(seen) == 20:
            header = {"plan": parts.key, "part": 1, "of": text_sha256(11)}
            write_tensors(parts.path(1), make(1, 11), kind="x", header=header)

    monkeypatch.setattr(time, "sleep", other)
    moments = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(moments) / 100)
    with pytest.warns(fg.FgsteerWarning, match="which process 1 makes"):
        found = [int(tensors["piece"]) for tensors in parts.each([10, 11, 12], make, text_sha256)]
    assert found == [10, 11, 12]


# ---------------------------------------------------------------- as a user starts it

COMMAND = ["-m", "fgsteer", "collect", "data.json", "--device", "cpu", "-o"]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def write_contrast(folder):
    both = {"positive": sentences(1300, 1), "negative": sentences(1300, 2)}
    (folder / "data.json").write_text(json.dumps(both))


@pytest.mark.slow
def test_torchrun_gives_the_same_file_as_one_process(tmp_path):
    write_contrast(tmp_path)
    run = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True}
    subprocess.run([sys.executable, *COMMAND, "one"], check=True, **run)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    told = subprocess.run([sys.executable, *torchrun, *COMMAND, "two"], check=True, **run)
    assert told.stdout.count("2600") <= 1  # one process tells
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


@pytest.mark.slow
def test_killed_ranks_go_on_from_their_parts(tmp_path):
    """Two processes without torchrun, one of them killed at random, several times; then with another number of them."""
    write_contrast(tmp_path)
    subprocess.run([sys.executable, *COMMAND, "one"], cwd=tmp_path, env=environment(), check=True, capture_output=True)
    lottery = random.Random(0)
    for attempt in range(4):
        ranks = [
            subprocess.Popen(
                [sys.executable, *COMMAND, "two"],
                cwd=tmp_path,
                env=environment(RANK=str(rank), WORLD_SIZE="2"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        time.sleep(4 + 6 * lottery.random())
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not list((tmp_path / "two.parts").glob("part-*[!s]"))
        assert attempt < 3 or list((tmp_path / "two.parts").glob("part-*"))
    environment_of = [environment(RANK=str(rank), WORLD_SIZE="3") for rank in range(3)]
    last = [subprocess.Popen([sys.executable, *COMMAND, "two"], cwd=tmp_path, env=env) for env in environment_of]
    assert [process.wait(300) for process in last] == [0, 0, 0]
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
