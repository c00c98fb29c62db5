"""One writer at a time: who comes second is told who writes, and nothing is left of a lock when its process ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fgsteer as fg
from fgsteer.evaluation.bench.concept_runs import run_concept
from fgsteer.storage.locks import exclusive_lock, lock_path
from tests.helpers.cli import app
from tests.helpers.resumable import PARTS, bench, collect, density, effects, shared_bench
from tests.helpers.saes import make_sae

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys, time
from fgsteer.storage.locks import exclusive_lock
with exclusive_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the file "run", and the file."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process, tmp_path / "run"
    process.kill()
    process.wait()


def test_the_second_process_is_told_at_once_who_holds_a_file(holder, monkeypatch):
    process, path = holder
    before = lock_path(path).read_bytes()
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited for the lock, or for who holds it"))
    for _ in range(2):  # being refused leaves the holder's note as it is
        told = rf"run is being written by process {process.pid} on \S+ since 2.*-c"
        with pytest.raises(fg.BusyError, match=told), exclusive_lock(path):
            pass
    assert lock_path(path).read_bytes() == before
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(fg.BusyError, match=f"process {process.pid}"), exclusive_lock(link):
        pass
    with exclusive_lock(path.with_name("another")):
        pass


def test_a_killed_process_holds_nothing(holder):
    process, path = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lock_path(path).exists()  # its note means nothing
    with exclusive_lock(path):
        assert str(os.getpid()) in lock_path(path).read_text()
    assert list(path.parent.iterdir()) == []


def test_a_stopped_process_still_holds(holder):
    process, path = holder
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(fg.BusyError), exclusive_lock(path):
        pass
    process.send_signal(signal.SIGCONT)


def test_a_block_within_a_block_is_the_same_lock(tmp_path):
    path = tmp_path / "run"
    with exclusive_lock(path):
        with exclusive_lock(path):
            pass
        assert lock_path(path).exists()
        found = []

        def other():
            try:
                with exclusive_lock(path):
                    found.append("held")
            except fg.BusyError as error:
                found.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert isinstance(found[0], fg.BusyError)
        child = os.fork()
        if child == 0:  # a child is another process, whatever it was given
            try:
                with exclusive_lock(path):
                    os._exit(1)
            except fg.BusyError:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert not lock_path(path).exists()
    with pytest.raises(ZeroDivisionError), exclusive_lock(path):
        raise ZeroDivisionError
    assert not lock_path(path).exists()


def test_a_forked_child_does_not_keep_the_lock_of_its_parent(tmp_path):
    path = tmp_path / "run"
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        with exclusive_lock(path):
            if os.fork() == 0:
                os.write(write, b".")
                time.sleep(5)
                os._exit(0)
            time.sleep(5)
        os._exit(0)
    os.read(read, 1)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    with exclusive_lock(path):  # though the child lives on
        pass


def test_threads_that_race_hold_one_after_another(tmp_path):
    """Lock files come and go while others take them."""
    inside, most, wins = [0], [0], [0]

    def race():
        while wins[0] < 200:
            try:
                with exclusive_lock(tmp_path / "run"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0)
                    inside[0] -= 1
                    wins[0] += 1
            except fg.BusyError:
                pass

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


@pytest.mark.parametrize(
    "note", [b"", b"[]", b'{"pid": 1}', b"[" * 4000, b'{"pid": "\\u001b[2J", "host": [1], "since": 7}']
)
def test_a_holder_that_does_not_say_who_it_is_is_still_one(holder, note):
    _, path = holder
    lock_path(path).write_bytes(note)
    with pytest.raises(fg.BusyError, match="by another process"), exclusive_lock(path):
        pass


def test_what_a_holder_says_is_shown_on_one_line(holder):
    _, path = holder
    lock_path(path).write_text('{"pid": "\\u001b[2J", "host": "a\\nb", "since": 7, "command": "x"}')
    with pytest.raises(fg.BusyError, match=r"process \\x1b\[2J on a\\nb since 7: x"), exclusive_lock(path):
        pass


def test_the_lock_of_another_user_is_told_apart_from_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fgsteer.storage.locks.FileLock.acquire", refuse)
    path = tmp_path / "run"
    with pytest.raises(fg.FormatError, match="Permission denied"), exclusive_lock(path):
        pass
    note = {"pid": 7, "host": "there", "since": "2026", "command": "fgsteer"}
    lock_path(path).write_text(json.dumps(note))
    told = f"by process 7 on there.* or was when that process was killed.*delete {lock_path(path)}"
    with pytest.raises(fg.BusyError, match=told), exclusive_lock(path):
        pass


def test_what_has_no_name_has_its_lock_inside():
    assert lock_path("/").parent == Path("/")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, number):
    import fcntl

    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    done = []
    with pytest.warns(fg.FgsteerWarning, match="run cannot be locked"), exclusive_lock(tmp_path / "run"):
        done.append(True)
    assert done


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(fg.FormatError, match=r"Cannot write .*file/run"), exclusive_lock(tmp_path / "file" / "run"):
        pass


# ---------------------------------------------------------------- runs and outputs


@contextlib.contextmanager
def held_elsewhere(path, share=""):
    """A block in which another thread holds a path."""
    ready, done = threading.Event(), threading.Event()

    def hold():
        with exclusive_lock(path, share):
            ready.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("run", [collect, density, effects, bench, shared_bench])
def test_a_run_that_is_under_way_is_left_alone(run, llama, tmp_path):
    """Whatever goes on with a folder or a file is refused while another does, with nothing written."""
    place = (tmp_path, "process-0") if run in (collect, density, effects) else (tmp_path / "run.jsonl", "")
    for fresh in (False, True):
        with held_elsewhere(*place):
            there = sorted(tmp_path.iterdir())
            with pytest.raises(fg.BusyError, match=f"process {os.getpid()} on"):
                run(tmp_path, **{**PARTS, "model": llama}, fresh=fresh)
            assert sorted(tmp_path.iterdir()) == there
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", [collect, density])
def test_processes_that_share_a_run_do_not_keep_each_other_out(run, llama, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with held_elsewhere(tmp_path, "process-1"):
        run(tmp_path, **{**PARTS, "model": llama})
    with held_elsewhere(tmp_path, "process-0"), pytest.raises(fg.BusyError):  # of a second torchrun
        run(tmp_path, **{**PARTS, "model": llama})


def test_a_concept_that_another_worker_runs_is_refused(llama, tmp_path):
    from tests.helpers.resumable import bench_of

    folder = tmp_path / "run.parts"
    folder.mkdir()
    alone = bench_of(**{**PARTS, "model": llama})
    with held_elsewhere(folder / "own.running.jsonl"), pytest.raises(fg.BusyError, match=r"own\.running\.jsonl"):
        run_concept(alone, "own", folder)
    run_concept(alone, "own", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["own.jsonl", "own.strengths.json"]


@pytest.mark.parametrize(
    ("command", "written"),
    [
        ("collect love -o OUT", "OUT"),
        ("density corpus.txt -o OUT", "OUT"),
        ("effects -o OUT", "OUT"),
        ("examples corpus.txt -o OUT", "OUT"),
        ("build from_features --features 1 -o OUT", "OUT"),
        ("features --feature 1 --html OUT", "OUT"),
        ("export v.safetensors --to gguf -o OUT", "OUT"),
        ("fold -v v.safetensors -o OUT", "OUT"),
        ("sweep love --out FOLDER", "FOLDER/sweep.json"),
        ("bench --quick --out FOLDER", "FOLDER/bench.jsonl"),
    ],
)
def test_a_command_leaves_an_output_alone_that_another_one_writes(command, written, tmp_path, monkeypatch):
    """Before anything is loaded; and one that ended, or failed, keeps nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("One day.\n")
    fg.SteeringVector(make_sae().direction(1), "blocks.1.hook_resid_post").save("v.safetensors")
    monkeypatch.setattr(fg, "load_model", lambda *_, **__: 1 / 0)
    (tmp_path / "FOLDER").mkdir()
    with held_elsewhere(written):
        there = sorted(tmp_path.rglob("*"))
        told = CliRunner().invoke(app, command.split())
        assert isinstance(told.exception, fg.BusyError), told.output
        assert written in str(told.exception)
        assert sorted(tmp_path.rglob("*")) == there
    told = CliRunner().invoke(app, command.split())
    assert not isinstance(told.exception, fg.BusyError)
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.slow
def test_two_benchmarks_of_one_folder_end_with_one_whole_run(tmp_path):
    """Started together, again and again: one runs, the others are told its process; the file is as if it were alone."""
    options = "--concept love --method unsteered --method caa --judge keyword --ce-rise 0.5 --prompts 4 --device cpu"
    command = [sys.executable, "-m", "fgsteer", "bench", *options.split(), "--max-new-tokens", "8", "--json", "--out"]
    subprocess.run([*command, str(tmp_path / "alone")], check=True, capture_output=True)
    together = [
        subprocess.Popen([*command, str(tmp_path / "two")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    told = [process.communicate() for process in together]
    assert sorted(process.returncode for process in together) == [0, 2, 2]
    winner = next(process.pid for process in together if process.returncode == 0)
    for process, (_, error) in zip(together, told, strict=True):
        assert process.returncode == 0 or f"is being written by process {winner}" in error
    alone, two = ((tmp_path / name / "bench.jsonl").read_bytes().split(b"\n", 1)[1] for name in ("alone", "two"))
    assert two == alone
    assert not list(tmp_path.rglob(".*"))
