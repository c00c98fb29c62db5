"""What happens when something fails: kills, full disks, damaged files, overflow, short memory, threads, Ctrl-C."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.evaluation.bench.run_files import append, resume
from fgsteer.evaluation.judges.answer_cache import AnswerCache
from fgsteer.export import checkpoint, lm_eval
from fgsteer.storage import atomic, json_files
from tests.fuzz_readers import fuzz
from tests.helpers.saes import make_sae
from tests.helpers.saved import things
from tests.helpers.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
AT = fg.Hookpoint(1)
WIDTH = 20_000  # of what is written while it is killed: a write takes a while
DATA = fg.ContrastSet("x", positives=["the bride wore a ring", "the groom"], negatives=["a dog sat", "the old cat ran"])


@pytest.fixture(scope="module")
def llama():
    """A model of its own: transformers leaves hooks in those that were asked for hidden states."""
    return tiny_model("llama")


def start(work):
    """A child process that runs ``work(ready)``; returns its id once it is ready, or has ended."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status: Any = 1
        try:
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = work(lambda: os.write(write, b".")) or 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def interrupted(pid):
    """The status of a child that is interrupted, again each second: Python drops a signal that meets a finalizer."""
    for _ in range(30):
        os.kill(pid, signal.SIGINT)
        for _ in range(100):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return ended(pid)


# ---------------------------------------------------------------- files


def write_all(folder, n):
    for kind, thing in things(n, WIDTH).items():
        thing.save(folder / kind)
    json_files.write_json(folder / "json", [n] * WIDTH)
    with atomic.atomic_write(folder / "page") as temporary:
        temporary.write_text(f"{n} " * WIDTH)


def numbers(folder):
    """The numbers that each file holds; a file that cannot be read raises."""
    read = {
        "vector": lambda p: fg.SteeringVector.load(p).direction,
        "statistics": lambda p: fg.ContrastStatistics.load(p).at("residual")[1].negative.m2,
        "density": lambda p: fg.FeatureDensity.load(p).first,
        "examples": lambda p: fg.FeatureExamples.load(p).activations,
        "effects": lambda p: fg.EffectApproximator.load(p).M,
        "transfer": lambda p: fg.TransferMap.load(p).weight,
        "json": lambda p: torch.tensor(json_files.read_json(p)),
        "page": lambda p: torch.tensor([int(word) for word in p.read_text().split()]),
    }
    return {kind: set(r(folder / kind).flatten().tolist()) for kind, r in read.items() if (folder / kind).exists()}


def kill_writers(folder, kills, seed):
    """Kill a process that writes, again and again; every file is whole each time."""
    lottery = random.Random(seed)
    seen = []
    for kill in range(kills):

        def work(ready, first=kill * 1000):
            for n in range(first, first + 1000):
                write_all(folder, n)
                if n == first:
                    ready()

        pid = start(work)
        begun = (folder / "vector").stat().st_mtime_ns
        while (folder / "vector").stat().st_mtime_ns == begun:  # into the second round
            time.sleep(0.001)
        time.sleep(lottery.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        found = numbers(folder)
        assert len(found) == 8
        assert all(len(values) == 1 for values in found.values()), found
        seen.append(tuple(sorted(min(values) for values in found.values())))
    return seen


def test_kill_leaves_every_file_whole(tmp_path):
    kill_writers(tmp_path, 4, seed=0)
    write_all(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 8  # what was left of others' goes with the next write
    assert numbers(tmp_path) == {kind: {2} for kind in numbers(tmp_path)}


@pytest.mark.slow
def test_two_hundred_kills_leave_every_file_whole(tmp_path):
    seen = kill_writers(tmp_path, 200, seed=1)
    assert sum(len(set(values)) > 1 for values in seen) > 100  # killed among the writes, not after them


def test_kill_leaves_records_to_go_on_from(tmp_path):
    path, header, batch = tmp_path / "run.jsonl", {"fgsteer": "bench", "plan": 1}, 50
    lottery = random.Random(0)
    done = 0
    for _ in range(5):

        def work(ready):
            number = resume(path, header, [batch] * 10_000)
            ready()
            while True:
                append(path, [{"batch": number, "text": "x" * 500}] * batch)
                number += 1

        pid = start(work)
        time.sleep(lottery.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        with open(path, "ab") as file:
            file.write(b'{"batch": 0, "te')  # whatever is half, is cut off
        before, done = done, resume(path, header, [batch] * 10_000)
        rows = [json_files.parse_json(line) for line in path.read_bytes().splitlines()]
        assert rows[0] == header
        assert [row["batch"] for row in rows[1:]] == [n for n in range(done) for _ in range(batch)]
        assert done >= before


def test_every_writer_goes_through_atomic_writes():
    """No other module opens a file to write, or writes to anything but the path that ``atomic_write`` gives."""
    writes = re.compile(
        r"""open\((?!temporary)[^)]*["'][rwax]?b?[wax+]b?\+?["']|(?<!temporary)\.write_(?:text|bytes)\(|save_file\(|"""
        r"""torch\.save\((?!vector|[^)]*buffer)|json\.dump\(|savefig\((?!buffer)|os\.(?:replace|rename)\(|mkstemp\("""
    )
    for path in (ROOT / "fgsteer").rglob("*.py"):
        if path.name != "atomic.py":
            assert not (found := writes.findall(path.read_text(encoding="utf-8"))), (path, found)
    assert len(writes.findall((ROOT / "fgsteer" / "storage" / "atomic.py").read_text(encoding="utf-8"))) >= 4


@contextlib.contextmanager
def full_disk(how, monkeypatch, limit=8000):
    """Writes fail: as the kernel fails those beyond a limit, or as a disk that fills up once data reach it."""
    if how == "limit":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            yield "File too large"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return

    def sync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        yield "No space left on device"


@pytest.mark.parametrize("how", ["limit", "sync"])
def test_full_disk_keeps_the_old_file(how, tmp_path, monkeypatch):
    write_all(tmp_path, 1)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writes = {kind: thing.save for kind, thing in things(2, WIDTH).items()}
    writes["json"] = lambda path: json_files.write_json(path, [2] * WIDTH)
    for kind, write in writes.items():
        with full_disk(how, monkeypatch) as reason, pytest.raises(fg.FormatError) as told:
            write(tmp_path / kind)
        assert f"Cannot write {tmp_path / kind}: {reason}" in str(told.value)
        assert "Make room, or write elsewhere" in str(told.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept  # and nothing beside them


def save_tokenizer(path, tokenizer):
    with atomic.atomic_folder(path) as temporary:
        tokenizer.save_pretrained(temporary)


@pytest.mark.parametrize("how", ["limit", "sync"])
@pytest.mark.parametrize("name", ["folded", "tokenizer", "folder", "lm.pt"])
def test_full_disk_leaves_nothing_of_what_libraries_save(name, how, tmp_path, monkeypatch, llama, tokenizer):
    """safetensors, tokenizers and torch.save have other errors for it, each its own."""
    vec = fg.SteeringVector(torch.ones(32), AT)
    write = {
        "folded": lambda path: checkpoint.write([vec.add(1.0, bos=True)], path, llama),
        "tokenizer": lambda path: save_tokenizer(path, tokenizer),
        "folder": fg.SteeringVector(torch.ones(WIDTH), AT).save_pretrained,
        "lm.pt": lambda path: lm_eval.write([vec.add(1.0, bos=True)], path, llama),
    }[name]
    with full_disk(how, monkeypatch, 500 if name == "lm.pt" else 2000), pytest.raises(fg.FormatError) as told:
        write(tmp_path / name)
    assert re.match(f"Cannot write {tmp_path}.*{name}.*: .*(File too large|No space left)", str(told.value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["limit", "sync"])
def test_full_disk_keeps_what_was_appended(how, tmp_path, monkeypatch):
    run, answers = tmp_path / "run.jsonl", tmp_path / "answers.jsonl"
    append(run, [{"row": "x" * 7000}])
    cache = AnswerCache(answers)
    cache.add("a" * 7900, 7)
    kept = run.read_bytes(), answers.read_bytes()
    with full_disk(how, monkeypatch) as reason:
        with pytest.raises(fg.FormatError, match=f"run.jsonl: {reason}"):
            append(run, [{"row": "y" * 7000}])
        with pytest.raises(fg.FormatError, match=f"answers.jsonl: {reason}"):
            cache.add("b" * 7900, 3)
    assert (run.read_bytes(), answers.read_bytes()) == kept
    cache.add("c", 5)
    assert AnswerCache(answers).scores == {"a" * 7900: 7, "c": 5}


def test_damaged_and_hostile_files_are_typed_errors():
    result = fuzz(500, seed=1)
    assert not result.findings, result.findings
    outcomes = sum(result.outcomes.values(), start=type(next(iter(result.outcomes.values())))())
    assert outcomes["FormatError"] > 100
    assert outcomes["read"] > 20  # some changes do no harm: the inputs are not mere noise


@pytest.mark.slow
def test_many_damaged_and_hostile_files_in_little_memory():
    command = [sys.executable, str(ROOT / "tests" / "fuzz_readers.py"), "--inputs", "20000", "--seed", "2"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_activations_are_named_by_text_and_layer(value, tokenizer):
    model = tiny_model("llama")
    dog = tokenizer("dog", add_special_tokens=False)["input_ids"][0]
    seen = []

    def spoil(_, args, output):
        out = output.clone()
        out[seen[-1] == dog] = value
        return out

    note = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    handle = model.model.layers[1].register_forward_hook(spoil)
    with pytest.raises(
        fg.DataError, match=r"blocks\.1\.hook_resid_post of text 2 \(negative\) 'a dog sat' are not fin"
    ):
        fg.collect(model, tokenizer, DATA, hookpoints=["model.layers.0", "model.layers.1", "model.layers.2"])
    assert fg.collect(model, tokenizer, DATA, hookpoints="model.layers.0").at("residual")
    handle.remove()
    note.remove()


def test_not_finite_features_are_named_by_text_and_layer(llama, tokenizer):
    sae = make_sae("relu")
    with pytest.raises(
        fg.DataError, match=r"SAE features at blocks\.1\.hook_resid_post of text \d \((posi|nega)tive\)"
    ):
        fg.collect(llama, tokenizer, DATA, sae=replace(sae, W_enc=sae.W_enc * 1e38))


def test_overflowing_coefficient_is_refused_in_float16(tokenizer):
    vec = fg.SteeringVector(torch.ones(32), AT, reference=torch.zeros(32))
    model = tiny_model("llama", dtype=torch.float16)
    for too_much in (vec.add(1e5), vec.clamp(-1e6), [None, vec.affine(2e5)]):
        with (
            pytest.raises(fg.SteeringError, match=r"at most 32752, .*in float16.*blocks\.1\.hook_resid_post"),
            fg.steer(model, too_much),
        ):
            pass
    assert not model.model.layers[1]._forward_hooks
    ids = tokenizer("the man sat", return_tensors="pt")["input_ids"]
    with fg.steer(tiny_model("llama", dtype=torch.bfloat16), vec.add(1e5)) as wide:
        assert wide(ids).logits.isfinite().all()


# ---------------------------------------------------------------- memory


def short_of_memory(model, most, error, monkeypatch):
    """Let the decoder fail on more than so many padded tokens; returns the sizes of all batches."""
    forward, sizes = model.model.forward, []

    def limited(*args, input_ids, **kwargs):
        sizes.append(input_ids.numel())
        if input_ids.numel() > most:
            raise error
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setitem(vars(model.model), "forward", limited)  # and is gone afterwards
    return sizes


SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried …"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: not enough memory: you tried …"),
    MemoryError(),
]
TEXTS = fg.ContrastSet(
    "y", positives=["the bride wore a ring"] * 5 + ["the king"] * 20, negatives=["a dog sat"] * 6 + ["the old cat ran"]
)


@pytest.mark.parametrize(("error", "shared"), [*((error, False) for error in SHORT), (SHORT[0], True)])
def test_out_of_memory_halves_the_batch(error, shared, llama, tokenizer, monkeypatch):
    sae = make_sae("relu")
    whole = fg.collect(llama, tokenizer, TEXTS, sae=sae, keep_pooled=True)
    most = 12 if shared else 30
    sizes = short_of_memory(llama, most, error, monkeypatch)
    done = []
    with pytest.warns(fg.FgsteerWarning, match="batch_tokens") as warned:
        parts = fg.collect(
            llama,
            tokenizer,
            TEXTS,
            sae=sae,
            keep_pooled=True,
            batch_tokens=60,
            share_prefixes=shared,
            progress=done.append,
        )
    assert len(warned) == 1
    assert sum(size > most for size in sizes) == 1  # what was too much once is not tried again
    assert done[-1] == 32
    assert sorted(done) == done
    for space in ("residual", "feature"):
        ours, theirs = parts.at(space)[1], whole.at(space)[1]
        for side in ("positive", "negative"):
            a, b = getattr(ours, side), getattr(theirs, side)
            assert a.count == b.count
            assert torch.equal(a.fired, b.fired)
            # float32 sums in batches of other shapes round in other places
            assert torch.allclose(a.mean, b.mean, rtol=1e-5, atol=1e-5)
            assert torch.allclose(a.m2, b.m2, rtol=1e-4, atol=1e-4)
    assert torch.allclose(parts.pooled[sae.hookpoint].positive, whole.pooled[sae.hookpoint].positive, atol=1e-5)


def test_a_text_too_long_for_memory_is_named(llama, tokenizer, monkeypatch):
    short_of_memory(llama, 5, SHORT[0], monkeypatch)
    told = r"Memory does not suffice for text 0 \(positive\) 'the bride wore a ring', with 6 tokens.*max_tokens"
    with pytest.warns(fg.FgsteerWarning), pytest.raises(fg.DataError, match=told):
        fg.collect(llama, tokenizer, TEXTS, hookpoints=[AT], share_prefixes=False)


def test_another_error_is_not_taken_for_want_of_memory(llama, tokenizer, monkeypatch):
    short_of_memory(llama, 5, RuntimeError("shapes do not fit"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fg.collect(llama, tokenizer, TEXTS, hookpoints=[AT])


@pytest.mark.gpu
def test_gpu_twin_of_out_of_memory(tokenizer):
    """The memory that torch may take is bounded for real: one batch of all texts does not fit, halves of it do."""
    data = fg.ContrastSet("z", positives=["the bride wore a ring " * 10] * 4096, negatives=["a dog sat"] * 64)
    model = tiny_model("llama").cuda()
    options: dict[str, Any] = {"hookpoints": [AT], "share_prefixes": False}  # equal texts would be read once
    whole = fg.collect(model, tokenizer, data, batch_tokens=4096, **options)
    torch.cuda.empty_cache()
    bound = (torch.cuda.memory_allocated() + (96 << 20)) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(bound)
    try:
        with pytest.warns(fg.FgsteerWarning, match="halves"):
            parts = fg.collect(model, tokenizer, data, batch_tokens=1 << 20, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    a, b = parts.at("residual")[1].difference, whole.at("residual")[1].difference
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- threads


def in_thread(work):
    """What ``work`` returns, or the exception that it raises, in a thread of its own."""
    found = []

    def target():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(60)
    return found[0]


@pytest.fixture
def ids(tokenizer):
    return tokenizer("the man sat", return_tensors="pt")["input_ids"]


def adds():
    g = torch.Generator().manual_seed(3)
    return [fg.SteeringVector(torch.randn(32, generator=g), AT).add(c) for c in (3.0, -5.0)]


def logits(model, ids, steering=None):
    with torch.no_grad(), fg.steer(model, steering) if steering else contextlib.nullcontext():
        return model(ids).logits


def test_two_threads_cannot_steer_one_model_at_once(llama, ids):
    first, second = adds()
    alone = logits(llama, ids, second)
    with fg.steer(llama, first):
        assert isinstance(error := in_thread(lambda: logits(llama, ids, second)), fg.SteeringError)
        assert "second steer block" in str(error)
        assert "one batch" in str(error)
        with fg.steer(llama, second):  # nested blocks of one thread compose
            llama(ids)
    assert torch.equal(in_thread(lambda: logits(llama, ids, second)), alone)


def test_other_threads_passes_are_refused_while_a_model_is_steered(llama, ids):
    (first, _), plain = adds(), logits(llama, ids)
    options = {"max_new_tokens": 4, "do_sample": False}
    with fg.steer(llama, first):
        told = llama.generate(ids, **options)
        for work in (lambda: llama(ids), lambda: llama.generate(ids, **options)):
            assert isinstance(error := in_thread(work), fg.SteeringError)
            assert "another thread is steering" in str(error)
        assert torch.equal(llama.generate(ids, **options), told)  # what they tried left no trace
    assert torch.equal(in_thread(lambda: logits(llama, ids)), plain)


def test_a_pass_that_had_begun_is_refused_not_half_steered(llama, ids):
    begun, steered = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert steered.wait(60)

    handle = llama.model.layers[0].register_forward_hook(wait)
    found = []
    thread = threading.Thread(target=lambda: found.append(in_thread(lambda: llama(ids))))
    thread.start()
    assert begun.wait(60)
    with fg.steer(llama, adds()[0]):
        llama(ids)
        steered.set()
        thread.join(60)
    handle.remove()
    assert isinstance(found[0], fg.SteeringError)


def test_threads_that_race_never_mix(llama, ids):
    """Three threads with a barrier before each try: what is not refused is exactly what each computes alone."""
    wanted = [*adds(), None]
    alone = [logits(llama, ids, steering) for steering in wanted]
    barrier, refused, wrong = threading.Barrier(3), [0, 0, 0], []

    def work(n):
        for _ in range(40):
            barrier.wait(60)
            try:
                if not torch.equal(logits(llama, ids, wanted[n]), alone[n]):
                    wrong.append(n)
            except fg.SteeringError:
                refused[n] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    assert sum(refused) < 120
    assert torch.equal(logits(llama, ids), alone[2])  # no hook is left


def test_unsteered_generation_and_recording_run_in_threads(llama, ids, tokenizer):
    texts = ["the man sat", "a queen"]
    alone = [fg.generate(llama, tokenizer, text, max_new_tokens=5, do_sample=False) for text in texts]
    acts = fg.record(llama, ids, None, [AT])[AT]
    barrier, found = threading.Barrier(3), {}

    def work(n):
        barrier.wait(60)
        for _ in range(10):
            if n == 2:
                found.setdefault(n, []).append(fg.record(llama, ids, None, [AT])[AT])
            else:
                found.setdefault(n, []).append(
                    fg.generate(llama, tokenizer, texts[n], max_new_tokens=5, do_sample=False)
                )

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[n] for n in (0, 1)] == [[alone[0]] * 10, [alone[1]] * 10]
    assert len(found[2]) == 10
    assert all(torch.equal(a, acts) for a in found[2])


# ---------------------------------------------------------------- Ctrl-C, copies


def is_clean(model):
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return not hooks and "generate" not in vars(model) and "forward" not in vars(model.model)


@pytest.mark.parametrize("job", ["generate", "collect"])
def test_interrupt_leaves_the_model_clean_and_files_whole(job, llama, tokenizer, tmp_path):
    lottery = random.Random(0)
    for _ in range(3):

        def work(ready):
            try:
                for n in range(100_000):
                    if job == "generate":
                        fg.generate(llama, tokenizer, ["the man"], steering=adds(), max_new_tokens=8)
                    else:
                        fg.collect(llama, tokenizer, DATA, sae=make_sae()).save(tmp_path / "stats")
                    if n == 0:
                        ready()
            except KeyboardInterrupt:
                return 7 if is_clean(llama) else 8

        pid = start(work)
        time.sleep(lottery.random() * 0.05)
        assert interrupted(pid) == 7
    if job == "collect":
        fg.ContrastStatistics.load(tmp_path / "stats")
        # a signal may fall between the making of a file and knowing its name
        assert [path.name for path in tmp_path.iterdir() if path.suffix != ".part"] == ["stats"]


def test_interrupt_ends_a_command_with_status_130(tmp_path, monkeypatch):
    from fgsteer.cli import collect, main

    monkeypatch.setattr(sys, "argv", ["fgsteer", "collect", "love", "-o", str(tmp_path / "stats")])

    def work(ready):
        def load(*_):
            ready()
            while True:
                time.sleep(0.01)

        error = os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT)
        os.dup2(error, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        monkeypatch.setattr(collect, "load_model", load)
        main()

    pid = start(work)
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130
    assert (tmp_path / "stderr").read_text() == "Interrupted. Every file was written completely or not at all.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["stderr"]


@pytest.mark.slow
def test_interrupted_bench_goes_on(tmp_path):
    """The command as a user has it: Ctrl-C once the first records stand, and again to its end."""
    code = "from fgsteer.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", "--quick", "--concept", "sea", "--judge", "keyword", "--method"]
    command += ["unsteered", "--method", "caa", "--device", "cpu", "--json", "--out", str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "bench.jsonl"
    while run.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 1):
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate()
    assert run.returncode == 130
    assert "Traceback" not in error
    assert error.endswith("Interrupted. Every file was written completely or not at all.\n")
    before = len(fg.load_run(path).records)
    assert subprocess.run(command, check=True, capture_output=True).returncode == 0
    assert len(fg.load_run(path).records) > before


def test_a_copy_of_a_steered_model_is_refused(llama, ids):
    with fg.steer(llama, adds()[0]), pytest.raises(fg.SteeringError, match="before or after the block"):
        copy.deepcopy(llama)
    twin = copy.deepcopy(llama)
    assert is_clean(twin)
    assert torch.equal(logits(twin, ids), logits(llama, ids))


# ---------------------------------------------------------------- the table


def test_every_row_of_the_table_of_failures_has_a_test():
    page = (ROOT / "docs" / "reference" / "failures.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- failures -->\n(.*?)<!-- /failures -->", page, re.S)
    rows = [row.strip("|").split("|") for row in table.splitlines()[2:]]
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(?:(test_\w+)::)?(test_\w+)`", row[2])
        assert named, row
        for file, name in named:
            assert f"def {name}(" in sources[file or "test_failures"], name
