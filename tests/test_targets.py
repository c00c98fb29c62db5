"""Where is written: only to files, through links, in folders that are there, and never over what is read."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import stat
import threading
import time
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import typer

import fgsteer as fg
from fgsteer.cli import outputs
from fgsteer.evaluation.drawing import save_each
from fgsteer.evaluation.judges.answer_cache import AnswerCache
from fgsteer.storage import atomic, json_files
from fgsteer.storage.shards import Shards
from tests.helpers.cli import app

AT = "blocks.1.hook_resid_post"


def write_folder(path):
    with atomic.atomic_folder(path) as beside:
        (beside / "a").write_text("new")


def write_page(path):
    with atomic.atomic_write(path) as beside:
        beside.write_text("new")


WRITERS = {
    "page": write_page,
    "vector": lambda path: fg.SteeringVector(torch.ones(4), AT).save(path),
    "json": lambda path: json_files.write_json(path, [1]),
    "append": lambda path: atomic.append_bytes(path, b"new"),
    "answers": lambda path: AnswerCache(path).add("key", 7),
}
FOLDERS = {
    "folder": write_folder,
    "vector's folder": lambda path: fg.SteeringVector(torch.ones(4), AT).save_pretrained(path),
    "parts": lambda path: Shards(path, "x", {}),
    "pictures": lambda path: save_each([], path),
}


def made(kind, path):
    """Something at the path that is no regular file."""
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # what /dev/null is
        except PermissionError:
            pytest.skip("needs a user who may make device nodes")


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a socket", "a device"])
def test_what_is_no_file_is_refused_and_stays(kind, linked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    made(kind, Path("target"))
    before = os.lstat("target")
    if linked:
        Path("link").symlink_to("target")
    path = Path("link" if linked else "target")
    for write in WRITERS.values():
        with pytest.raises(fg.FormatError, match=f"Cannot write {path}: it is {kind}. Expected a file"):
            write(path)
    if kind != "a folder":
        for write in FOLDERS.values():
            with pytest.raises(fg.FormatError, match=r"exists. Expected a new|is no folder"):
                write(path)
    assert os.lstat("target") == before
    assert {path.name for path in Path().iterdir()} == {"target", *(["link"] if linked else [])}


@pytest.mark.parametrize("name", [*WRITERS, *FOLDERS])
def test_a_folder_that_is_not_there_is_named_and_not_made(name, tmp_path):
    write = {**WRITERS, **FOLDERS}[name]
    with pytest.raises(fg.FormatError, match=f"there is no folder {tmp_path}/ot. Expected.*correct the name"):
        write(tmp_path / "ot" / "inner" / "x")
    (tmp_path / "file").write_text("old")
    with pytest.raises(fg.FormatError, match=f"Cannot write {tmp_path}/file/x: {tmp_path}/file is no folder"):
        write(tmp_path / "file" / "x")
    for impossible in ("a\0b", "x" * 300):
        with pytest.raises(fg.FormatError, match="Cannot write"):
            write(tmp_path / impossible)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", [*WRITERS, *FOLDERS])
def test_a_link_is_followed(name, tmp_path):
    """To a file elsewhere, one that is not there yet, and over several links; one that leads nowhere is refused."""
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "link").symlink_to("middle")
    (tmp_path / "middle").symlink_to("there/target")
    for _ in range(1 if name in ("folder", "vector's folder") else 2):
        {**WRITERS, **FOLDERS}[name](tmp_path / "link")
        assert [path.name for path in there.iterdir()] == ["target"]
        assert not (there / "target").is_symlink()
        assert {path.name for path in tmp_path.iterdir() if path.is_symlink()} == {"link", "middle"}
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none" / "target")
    for lost in ("loop", "nowhere"):
        with pytest.raises(fg.FormatError, match="Cannot write"):
            {**WRITERS, **FOLDERS}[name](tmp_path / lost)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link", "middle", "loop", "nowhere"}


def test_an_empty_folder_behind_a_link_is_taken(tmp_path):
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("target")
    with atomic.atomic_folder(tmp_path / "link") as beside:
        assert stat.S_IMODE(beside.stat().st_mode) == 0o700
        (beside / "a").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "a").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755, 0o4711])
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_replaced_hands_on_its_mode_and_owner(name, mode, tmp_path):
    path = tmp_path / "target"
    WRITERS[name](path)
    path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(path, 12345, 54321)
        path.chmod(mode)
    before = path.stat()
    WRITERS[name](path)
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_private_file_is_never_open_to_others_while_it_is_replaced(tmp_path):
    path = tmp_path / "target"
    path.write_text("secret")
    path.chmod(0o600)
    with atomic.atomic_write(path) as beside:
        assert stat.S_IMODE(beside.stat().st_mode) == 0o600
        beside.write_text("new")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_new_files_have_what_the_umask_leaves(umask, tmp_path, monkeypatch):
    before = os.umask(umask)
    try:
        monkeypatch.setattr(os, "umask", None)  # setting it would change other threads' files meanwhile
        for name, write in WRITERS.items():
            write(tmp_path / name)
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
        with atomic.atomic_folder(tmp_path / "folder") as beside:
            (beside / "inner").mkdir()
            (beside / "inner" / "a").touch(mode=0o600)
        modes = [stat.S_IMODE((tmp_path / "folder" / name).stat().st_mode) for name in ("", "inner", "inner/a")]
        assert modes == [0o777 & ~umask, 0o777 & ~umask, 0o666 & ~umask]
    finally:
        monkeypatch.undo()
        os.umask(before)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to everything")
def test_what_is_read_only_is_refused(tmp_path):
    path = tmp_path / "target"
    path.write_text("old")
    path.chmod(0o400)
    with pytest.raises(fg.FormatError, match="it is read-only"):
        write_page(path)
    tmp_path.chmod(0o500)
    with pytest.raises(fg.FormatError, match="is read-only; expected a folder that can be written to"):
        write_page(tmp_path / "new")


# ---------------------------------------------------------------- several writers


@contextlib.contextmanager
def writing(path, how="atomic_write"):
    """Another process that has begun to write, and is killed before it ends."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with getattr(atomic, how)(path) as beside:
            (beside / "a" if beside.is_dir() else beside).write_text("half")
            os.write(write, b".")
            time.sleep(600)
    try:
        os.close(write)
        assert os.read(read, 1)
        os.close(read)
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_only_what_a_dead_writer_left_goes(tmp_path, monkeypatch):
    """However old it looks: a clock that is two hours off, or a write that takes a day, is no reason."""
    page, folder = tmp_path / "page", tmp_path / "folder"
    with writing(page), writing(folder, "atomic_folder"):
        beside = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert len(beside) == 3
        for path in beside:
            os.utime(path, (time.time() - 7200, time.time() - 7200))
        monkeypatch.setattr(time, "time", lambda: 4e9)
        write_page(page)
        write_folder(folder)
        assert all(path.exists() for path in beside)
    (tmp_path / ".page.0badf00d.12345678.part").write_text("another machine's")
    write_page(page)
    folder.joinpath("a").unlink()
    write_folder(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"page", "folder", ".page.0badf00d.12345678.part"}


def test_writers_of_one_file_do_not_take_each_others(tmp_path):
    """Each ends with its own text in the file, and nobody's unfinished file is taken for one that was left."""
    errors = []

    def work(n):
        try:
            for number in range(60):
                with atomic.atomic_write(tmp_path / "page") as beside:
                    beside.write_text(f"{n} {number}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
    assert (tmp_path / "page").read_text().endswith(" 59")


def test_where_nothing_can_be_locked_files_are_written_and_nothing_is_removed(tmp_path, monkeypatch):
    left = tmp_path / f".page.{atomic._MACHINE}.12345678.part"
    left.write_text("half")

    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_page(tmp_path / "page")
    assert (tmp_path / "page").read_text() == "new"
    assert left.exists()


# ---------------------------------------------------------------- commands


@cache
def group():
    return typer.main.get_command(app)


def commands():
    """{name: command} of every command that writes."""
    return {name: c for name, c in group().commands.items() if {p.name for p in c.params} & set(outputs.OUTPUTS)}


@pytest.fixture
def no_loading(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was loaded")

    for name in ("load_model", "load_sae"):
        getattr(fg, name)  # fills the module's names
        monkeypatch.setattr(fg, name, refuse)


def refused(arguments):
    with pytest.raises(fg.FgsteerError) as told:
        group().main([str(a) for a in arguments], standalone_mode=False)
    return str(told.value)


def filled(command, but):
    """Arguments that a command requires, with anything in them."""
    words = []
    for p in command.params:
        if p.required and p.name not in but:
            words += [max(p.opts, key=len), "gguf"] if p.opts[0].startswith("-") else ["love"]
    return words


NAMED = {"contrast", "concept", "held_out", "model", "sae", "rows_of", "effects"}  # a shipped thing, or a file


def files_of(name):
    """The parameters of a command that may name a file."""
    (function,) = (
        c.callback for c in app.registered_commands if (c.name or c.callback.__name__.replace("_", "-")) == name
    )
    hints = get_type_hints(function)
    return {p for p, hint in hints.items() if "Path" in str(hint)} | NAMED & set(hints)


def inputs():
    """(command, output, input) for every pair of parameters of a command of which either may name a file."""
    for name, command in commands().items():
        for output in command.params:
            for p in command.params:
                if output.name in outputs.OUTPUTS and p.name != output.name and p.name in files_of(name):
                    yield name, output.name, p.name


@pytest.mark.parametrize(("name", "output", "source"), list(inputs()))
def test_no_command_writes_over_what_it_reads(name, output, source, tmp_path, no_loading):
    """The same name, another spelling, a link, a second name of the file: whichever option names it."""
    command = commands()[name]
    by_name = {p.name: p for p in command.params}
    file = tmp_path / "t.txt"
    file.write_text("One day.\n")
    (tmp_path / "soft").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    told = set()
    for same in (file, tmp_path / "soft", tmp_path / "hard", f"{tmp_path}/./t.txt"):
        given = [same] if by_name[source].opts[0] == source else [max(by_name[source].opts, key=len), same]
        words = [name, *filled(command, {output, source}), max(by_name[output].opts, key=len), file, *given]
        told.add("are one file" in refused(words))
        assert file.read_text() == "One day.\n"
    folder = {"work"} & {output, source}
    assert told == {True} or folder or name in ("axbench", "bench", "fold", "orthogonalize", "sweep", "train-sae"), (
        told
    )  # a file is no folder: refused before


def test_inputs_of_every_kind_are_looked_at():
    found = {(name, source) for name, output, source in inputs() if output in ("out", "html")}
    for pair in (
        ("density", "corpus"),
        ("examples", "corpus"),
        ("build", "stats"),
        ("build", "effects"),
        ("build", "density"),
        ("features", "file"),
        ("features", "labels"),
        ("collect", "contrast"),
        ("effects", "prompts"),
        ("export", "vectors"),
    ):
        assert pair in found


def test_every_output_is_known_to_be_one():
    """A path that a command writes to says so, and is among the outputs."""
    for name, command in group().commands.items():
        for p in command.params:
            writes = any(
                word in (p.help or "") for word in ("to write", "Write ", "Folder for", "Folder of ", "New fold")
            )
            if writes and p.name in files_of(name) - NAMED and (name, p.name) != ("serve", "vectors"):
                assert p.name in outputs.OUTPUTS, (name, p.name)


def test_a_word_is_no_file_that_has_its_name(tmp_path, monkeypatch):
    """What is shipped under a name, methods, fields and rules, though a file that is called so is written again."""
    monkeypatch.chdir(tmp_path)

    def loads(*_, **__):
        raise fg.SelectionError("loaded")

    for name in ("load_model", "load_sae", "build"):
        getattr(fg, name)
        monkeypatch.setattr(fg, name, loads)
    ones = torch.ones(2, dtype=torch.float64)
    fg.FeatureDensity(ones, ones, ones, 5, "x").save("density")
    words = ("love", "default", "text", "all", "sae_ts")
    for name in words:
        Path(name).write_text("One day.\n")
    Path("t.txt").write_text("One day.\n")
    for line in (
        "collect love -o love --device cpu",
        "collect love -o default --model default --sae default --device cpu",
        "collect love -o all --tokens all --device cpu",
        "density t.txt -o text --device cpu",
        "build from_features --features 1 -o sae_ts",
    ):
        assert refused(line.split()) == "loaded."
    assert "--stats love and --out love are one file" in refused(["build", "caa", "--stats", "love", "-o", "love"])
    assert "--effects text and --out text are one file" in refused(
        ["build", "sae_ts", "--effects", "text", "-o", "text"]
    )


def test_two_outputs_are_two(tmp_path, no_loading):
    same = tmp_path / "same"
    assert "--work" in (told := refused(["density", "love", "-o", same, "--work", same]))
    assert "are one file" in told
    assert not same.exists()


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_knows_where_it_cannot_write_before_it_loads(name, tmp_path, no_loading):
    command = commands()[name]
    os.mkfifo(tmp_path / "pipe")
    for p in command.params:
        if p.name in outputs.OUTPUTS:
            for target in (tmp_path / "typo" / "x", tmp_path / "pipe"):
                out = (
                    []
                    if p.name == "out" or not any(o.name == "out" for o in command.params)
                    else ["-o", tmp_path / "o"]
                )
                words = [*filled(command, {"out", p.name}), *out, max(p.opts, key=len), target]
                told = refused([name, *words])
                assert "Cannot write" in told or (target.exists() and "exists" in told), told
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_device_stays_one(tmp_path, no_loading):
    made("a device", tmp_path / "null")
    told = refused(["collect", "love", "-o", tmp_path / "null"])
    assert "null: it is a device. Expected a file" in told
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)
