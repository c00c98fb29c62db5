"""Every reader against damaged and hostile files: nothing but an fgsteer error may come of them.

Each input is a good file with a few bytes or JSON values changed, or a key doubled; it is read, and what was read is
used. Of files that hold a hash, one with a bit of its tensors flipped is never read; most are damaged without it, as
it would tell of any damage. Memory is limited, so that a header which lies about sizes shows.

    python tests/fuzz_readers.py --inputs 100000 --seed 0
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gzip
import json
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import fgsteer as fg
from fgsteer.activations.tokens import TokenReader
from fgsteer.cli.info import describe_file
from fgsteer.data.contrasts import check_name as check_file_name
from fgsteer.data.corpora import read_documents
from fgsteer.effects.measuring import check_shapes
from fgsteer.evaluation.bench.concept_runs import begun_design
from fgsteer.evaluation.bench.run_files import check_run, load_conditions, resume
from fgsteer.evaluation.judges.answer_cache import AnswerCache, parse_score
from fgsteer.evaluation.judges.chat_client import BrokenAnswerError, completion
from fgsteer.evaluation.runs.settings import best_settings
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.saes.fingerprints import sae_identity
from fgsteer.serving import save_clamp, steering
from fgsteer.serving.control import Control
from fgsteer.serving.http import asks_for_steering, load_upload
from fgsteer.serving.request import PLAN
from fgsteer.serving.rows import check_name
from fgsteer.serving.sources import load_stages
from fgsteer.serving.tables import Batch
from fgsteer.statistics.collecting import ChunkReader, sums_of_shards
from fgsteer.storage.files import write_tensors
from fgsteer.storage.json_files import text_sha256, write_json
from fgsteer.storage.lines import as_line
from fgsteer.storage.locks import _describe_holder
from fgsteer.storage.ranks import Ranks
from fgsteer.storage.shards import Shards
from tests.helpers import engine, runs
from tests.helpers.sae_files import K, config_of, folder_of, sparsify_files, state_of
from tests.helpers.saes import make_sae
from tests.helpers.tiny import word_tokenizer

MEMORY = 512 << 20  # bytes that a reader may take besides what the process holds
AT = "blocks.1.hook_resid_post"
SAE = make_sae("topk", d_model=6, d_sae=12)


@dataclass(frozen=True)
class Reader:
    """Good files by name, and what reads the first of them and uses what it read."""

    files: dict[str, bytes]
    read: Callable[[Path], object]


# ---------------------------------------------------------------- what is read, and how it is used


def vector(path):
    v = fg.SteeringVector.load(path)
    v.add(2.0).update()
    return repr(v), v.top_features(3), (v * 2.0 + v).save(path.with_name("out")), describe_file(path)


def statistics(path):
    stats = fg.ContrastStatistics.load(path)
    (stats + stats).save(path.with_name("out"))
    fg.caa(stats).save(path.with_name("out"))
    return fg.diagnose(stats), fg.sta(stats, SAE)


def density(path):
    found = fg.FeatureDensity.load(path).check(SAE)
    (found + found).save(path.with_name("out"))
    return found.density, found.bos_features()


def examples(path):
    found = fg.FeatureExamples.load(path).check(SAE)
    found.save(path.with_name("out"))
    return found.largest(SAE.d_sae), [str(e) for j in range(3) for e in found.of(j, TOKENIZER)]


def effects(path):
    found = fg.load_effects(path).check(SAE)
    found.save(path.with_name("out"))
    return fg.sae_ts(SAE, [1], found)


def labels(path):
    return fg.load_labels(path, SAE)


def contrast(path):
    found = fg.load_contrast(path)
    return found.sha256, found.held_out and found.held_out.sha256, list(found.side(True))


def run(path):
    found = fg.load_run(path)
    return best_settings(found), found.layers(), found.targets, json.dumps(found.header)


def sae(path):
    found = fg.load_sae(path.parent)
    return found.encode(torch.ones(2, found.d_model)), found.direction(0), found.sha256, found.labels.get(1)


def piece(path):
    tensors = part(path, "effects part")
    check_shapes(tensors, {"vectors": (2, 6), "strengths": (2,)}, path)
    return tensors


def part(path, kind):
    with tempfile.TemporaryDirectory() as folder:
        parts = Shards(folder, kind, PARTS, Ranks())
        parts.path(0).write_bytes(path.read_bytes())
        return parts.read(0, "0")


def collected(path):
    with tempfile.TemporaryDirectory() as folder:
        return list(sums_of_shards(Shards(folder, "", PARTS, Ranks()), [part(path, "collected texts")]))


def clamp(path):
    return [stage.sha256 for stage in load_stages(path)]


def cache(path):
    found = AnswerCache(path)
    found.add("new", 3)
    return AnswerCache(path).scores["new"]


def answer(path):
    return parse_score(completion(path.read_bytes()) or "")


def upload(path):
    """A body, loaded by a server's engine; what it accepts is asked for."""
    control = Control(engine.FakeEngine([1], rows=16, slots=2), [1], 2)
    load_upload(control, "sent", path.read_bytes())
    return [asked(control, {"steer": "sent", "steer_scale": scale}) for scale in (1.0, -1e3, 1e6)]


def wish(path):
    """A body that asks for steering, as the server reads it."""
    asks, refusal, _ = asks_for_steering(path.read_bytes())
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return asks, refusal
    extra = body.get("vllm_xargs") if isinstance(body, dict) else None
    return asks, refusal, asked(CONTROL, extra) if isinstance(extra, dict) else None


def carried(path):
    """The file of a vector, carried by a request."""
    control = Control(engine.FakeEngine([1]), [1], inline=True)
    return asked(control, {"steer_vector": base64.b64encode(path.read_bytes()).decode(), "steer_scale": 2.0})


def asked(control, extra):
    """A request admitted, and what its steering makes of a few tokens: finite numbers, and others' as they were."""
    made = engine.request(extra)
    if not control.admit(made):
        return None
    table = control.engine.tables[1]
    batch = Batch(8, torch.device("cpu"), control.slots)
    table.tokens, batch.plans = batch.tokens, {"r": made.sampling_params.extra_args[PLAN]}
    hidden = 3 * engine.normal(0, 8, engine.WIDTH)
    batch.write_plan(["r", "other"], np.array([0, 4, 8]), torch.arange(4).repeat(2))
    out = table(hidden, hidden)
    assert (out[:4] + hidden[:4]).square().sum(1).isfinite().all()
    assert torch.equal(out[4:], hidden[4:])
    return out


def name(path):
    told = path.read_bytes().decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        told = json.loads(told)
    inside = Path("/vectors", f"{check_name(told)}.safetensors")
    assert inside.resolve() == inside
    assert told.isascii()
    assert told.isprintable()


CONTROL = Control(engine.FakeEngine([1], rows=16, slots=2), [1], 2, inline=True)
for key, thing in (("love", engine.vector()), ("features", engine.clamp("relu"))):
    CONTROL.load(key, thing)
PARTS = {"p": 1}
TEXTS = [("", "the man", True), ("", "a cat", False)]
HEADER = {"fgsteer": "bench", "plan": {"prompts": 2}, "sha256": {}, "model": {"name": "m"}}
TOKENIZER = word_tokenizer()


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader by name, with good files; the folder is for making them."""
    made = (saved_files(folder), texts(), records(folder), requests(folder), identities(folder), sae_folders(folder))
    return {name: reader for part in made for name, reader in part.items()}


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def lines(*rows: object) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows)


def saved_files(folder: Path) -> dict[str, Reader]:
    """What fgsteer saves as safetensors."""
    g = torch.Generator().manual_seed(0)
    model = tiny()
    data = fg.ContrastSet("x", pairs=[fg.ContrastPair("the bride", "a dog"), fg.ContrastPair("a ring", "the cat")])
    provenance = {
        "method": "fgaa",
        "model": {"name": "m"},
        "sae": {"sha256": SAE.sha256},
        "feature_density": {"1": 0.1},
    }
    made: dict[str, Any] = {
        "vector": fg.SteeringVector(torch.randn(6, generator=g), AT, torch.ones(6), {1: 2.0, 3: -1.0}, provenance),
        "statistics": fg.collect(model, TOKENIZER, data, sae=SAE, keep_pooled=True),
        "density": fg.measure_density(model, TOKENIZER, SAE, ["the man sat", "a cat ran"]),
        "examples": fg.measure_examples(model, TOKENIZER, SAE, ["the man sat", "a cat ran"], top=2, window=2),
        "effects": fg.EffectApproximator(
            torch.randn(6, 12, generator=g), torch.ones(12), SAE.hookpoint, SAE.sha256, {"r2": 0.5}
        ),
    }
    for name, thing in made.items():
        thing.save(folder / name)
    parts = {"vectors": torch.ones(2, 6), "strengths": torch.ones(2)}
    header = {"plan": text_sha256({"run": "effects part", **PARTS}), "part": 0, "of": "0"}
    write_tensors(folder / "effects part", parts, kind="effects part", header=header)
    at = fg.Hookpoint.parse(AT)
    sums = ChunkReader(model, TokenReader(TOKENIZER), None, [at], True).sum_chunk(0, TEXTS)
    header["plan"] = text_sha256({"run": "collected texts", **PARTS})
    write_tensors(folder / "collected part", sums.to_tensors(), kind="collected texts", header=header)
    relu = make_sae(d_model=6, d_sae=12)
    save_clamp(fg.ClampFeature(hookpoint=relu.hookpoint, sae=relu, targets={1: 2.0}), folder / "clamp")
    read = {
        "vector": vector,
        "statistics": statistics,
        "density": density,
        "examples": examples,
        "effects": effects,
        "effects part": piece,
        "collected part": collected,
        "clamp": clamp,
    }
    return {name: Reader({"f": (folder / name).read_bytes()}, reader) for name, reader in read.items()}


def texts() -> dict[str, Reader]:
    """Labels, contrast sets and documents."""
    rows = [{"modelId": "m", "layer": "1-res", "index": str(j), "description": f"about {j}"} for j in range(3)]
    sides = {"positive": ["a", "b"], "negative": ["c"]}
    chat = [{"role": "user", "content": "hello"}]
    pairs = [
        {"prompt": "p", "positive": "a", "negative": "b"},
        {"prompt": chat, "chosen": "a", "rejected": chat},
        {"question": "q", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"},
    ]
    documents = lines({"text": "One day."}, {"text": "Two \u00e9\u2028 days."})
    plain = "One day.\n\nTwo \u00e9 days.\n".encode()
    return {
        "labels": Reader({"f.json": as_json({"1": "weddings", "7": "the sea"})}, labels),
        "labels, export": Reader({"f.json": as_json({"explanations": rows})}, labels),
        "labels, lines": Reader({"f.jsonl": lines(*rows)}, labels),
        "labels, gzip": Reader({"f.jsonl.gz": gzip.compress(lines(*rows), mtime=0)}, labels),
        "contrast": Reader({"f.json": as_json({"name": "n", **sides, "held_out": sides})}, contrast),
        "contrast, rows": Reader({"f.json": as_json(pairs)}, contrast),
        "contrast, lines": Reader({"f.jsonl": lines(*pairs)}, contrast),
        "documents": Reader({"f.jsonl": documents}, lambda path: list(read_documents(path))),
        "documents, text": Reader({"f.txt": plain}, lambda path: list(read_documents(path))),
    }


def records(folder: Path) -> dict[str, Reader]:
    """What a benchmark keeps, and what its judge answers."""
    settings = {"concepts": ("sea",), "methods": {"caa": (0.6, 1.0)}, "layers": (1,), "coefficients": (2.0, 4.0)}
    made = lines(*runs.rows(**settings, prompts=2, seeds=1))
    resumed = as_line(HEADER) + lines(*({"row": n} for n in range(6)))
    arms = {"sea": [{"concept": "sea", "method": "caa", "layer": 1, "coefficient": 2.0, "ce_rise": 0.5}]}
    write_json(folder / "arms", {"identity": HEADER, "arms": arms})
    scores = lines({"key": "a" * 8, "score": 7}, {"key": "b" * 8, "score": 3})
    told = as_json({"choices": [{"message": {"content": 'well: {"score": 7}'}}]})
    return {
        "run": Reader({"f.jsonl": made}, run),
        "run to go on with": Reader({"f.jsonl": resumed}, lambda path: resume(path, HEADER, [2, 3])),
        "strengths of a run": Reader(
            {"f.json": (folder / "arms").read_bytes()}, lambda path: load_conditions(path, HEADER)
        ),
        "judge's cache": Reader({"f.jsonl": scores}, cache),
        "judge's answer": Reader({"f.json": told}, answer),
    }


def identities(folder: Path) -> dict[str, Reader]:
    """What a run notes of what it is made of, and who holds it; names that files are called by."""
    made = {**run_fingerprint(tiny(), TOKENIZER), "sae": sae_identity(SAE), "prompts": ["one", "two"], "mu": 0.5}
    plan = {"run": "sums", **made}
    header = {"plan": text_sha256(plan), "part": 0, "of": "0"}
    write_tensors(folder / "identity part", {"x": torch.ones(2)}, kind="sums", header=header)
    parts = {"plan.json": as_json(plan), "part-000000.safetensors": (folder / "identity part").read_bytes()}
    run_header = (
        as_json({"fgsteer": "bench", "plan": {"prompts": ["a", "b"], "seeds": 1}, "identity": made}) + b"\n{}\n"
    )
    identity = {**made, "plan": {"prompts": ["a", "b"], "seeds": 1}}
    arms = {"sea": [{"concept": "sea", "method": "caa", "layer": 1, "coefficient": 2.0, "ce_rise": 0.5}]}
    note = as_json({"host": "h", "pid": 1, "since": "2026-01-01 00:00:00", "command": "fgsteer bench"})
    sides = {"positive": list("abcdef"), "negative": list("ghijkl")}

    def go_on(path: Path, fresh: bool = False) -> object:
        steps = Shards(path.parent, "sums", made, Ranks(), fresh=fresh).each(
            ["0"], lambda *_: {"x": torch.ones(2)}, str
        )
        return list(steps)

    def start_over(path: Path) -> object:
        (path.parent / "part-000000.safetensors").write_bytes(parts["part-000000.safetensors"])
        return go_on(path, fresh=True)

    def holder(path: Path) -> str:
        with mock.patch("fgsteer.storage.locks.NOTE_SECONDS", -1):
            who = _describe_holder(path)
        assert who.isprintable()
        return who

    def own(path: Path) -> object:
        contrast = fg.load_contrast(path)
        name = check_file_name(contrast.name)
        (path.parent / f"{name}.running.jsonl").write_bytes(b"")
        return contrast.hold_out(), contrast.description.strip()

    return {
        "parts to go on with": Reader(parts, go_on),
        "parts to start over": Reader({"plan.json": parts["plan.json"]}, start_over),
        "identity of a run": Reader({"f.jsonl": run_header}, lambda path: check_run(path, identity)),
        "run to start over": Reader({"f.jsonl": run_header}, lambda path: check_run(path, identity, fresh=True)),
        "design of a run": Reader({"f.jsonl": run_header}, begun_design),
        "strengths with identity": Reader(
            {"f.json": as_json({"identity": identity, "arms": arms})}, lambda path: load_conditions(path, identity)
        ),
        "holder of a lock": Reader({"f.lock": note}, holder),
        "contrast of one's own": Reader({"f.json": as_json({"name": "n", "description": "d", **sides})}, own),
    }


def requests(folder: Path) -> dict[str, Reader]:
    """What the clients of a server send: vectors and clamps, requests, names."""
    engine.vector().save(folder / "sent")
    save_clamp(engine.clamp("jumprelu"), folder / "sent clamp")
    extra = steering("love", op="affine", scale=0.5, scope="generated")
    body = {"model": "m", "prompt": [1, 2], "vllm_xargs": extra, "use_beam_search": False}
    v, gate = engine.vector(), (fg.Projection(engine.vector(3)) > 0.0) | ~(fg.Cosine(engine.vector(4)) > 0.1)
    fg.save_steering(folder / "sent steering", [v.add(2.0, when=gate, scope="prompt"), v.clamp(at_most=0.0)])
    several = steering([{"name": "love", "scale": 2.0, "scope": "reply"}, {"name": "features", "bos": True}])
    return {
        "upload, vector": Reader({"f": (folder / "sent").read_bytes()}, upload),
        "upload, clamp": Reader({"f": (folder / "sent clamp").read_bytes()}, upload),
        "upload, steering": Reader({"f": (folder / "sent steering").read_bytes()}, upload),
        "request": Reader({"f.json": as_json(body)}, wish),
        "request, list": Reader({"f.json": as_json({"vllm_xargs": several})}, wish),
        "request, vector": Reader({"f.json": as_json({"vllm_xargs": steering(v, scale=2.0)})}, wish),
        "vector in a request": Reader({"f": (folder / "sent").read_bytes()}, carried),
        "request, clamp": Reader({"f.json": as_json({"vllm_xargs": steering("features", scale=2.0)})}, wish),
        "name": Reader({"f.json": as_json("love-2.b")}, name),
    }


def sae_folders(folder: Path) -> dict[str, Reader]:
    """Folders of sae-lens and sparsify, some with a density and labels."""
    for architecture in ("topk", "jumprelu", "gated", "jumprelu_skip_transcoder"):
        options: dict[str, object] = {"k": 4} if architecture == "topk" else {}
        if "transcoder" in architecture:
            options["metadata"] = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
        place = folder_of(folder / architecture, config_of(architecture, options), state_of(architecture))
        zeros = torch.zeros(K, dtype=torch.float64)
        fg.FeatureDensity(zeros, zeros, zeros, 5, fg.load_sae(place).sha256).save(place / "density.safetensors")
        write_json(place / "labels.json", {"1": "weddings"})
    folder_of(folder / "early sae-lens", OLD, state_of("standard"))
    sparsify_files(folder / "sparsify")
    return {
        f"SAE, {place.name}": Reader({path.name: path.read_bytes() for path in sorted(place.iterdir())}, sae)
        for place in sorted(folder.iterdir())
        if place.is_dir()
    }


OLD = {"hook_name": AT, "d_in": 8, "d_sae": 12, "architecture": "standard", "dtype": "float32", "device": "cpu",
       "model_name": "tiny", "normalize_activations": "none", "context_size": 128, "apply_b_dec_to_input": True,
       "activation_fn_str": "relu", "finetuning_scaling_factor": False, "prepend_bos": True}  # fmt: skip


def tiny() -> torch.nn.Module:
    """A model of the width of the SAE here."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=80, hidden_size=6, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    return AutoModelForCausalLM.from_config(config).eval()


# ---------------------------------------------------------------- how good files are damaged

HOSTILE = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 1e308, float("nan"),
    float("inf"), "", " ", "0", "-1", "x", "\x00", "\ud800", "é\u2028", "None", "a" * 3000, "²", "1e999", AT,
    "blocks.99999999999999999999.hook_resid_post", f"blocks.{'9' * 5000}.hook_resid_post", "layers.3", [], {}, [[]],
    [None], [0, 0], [-1, 5], [2**62, 2**62], ["a"], {"": 0}, {"1": {}}, {"sha256": 3}, "F32", "F64", "I64", "BOOL",
    "BF16", "F8_E4M3", "C64", "F4", "topk", "standard", "gated", "layer_norm", "expected_average_only_in",
    "@@nested:30@@", "@@nested:300@@", "@@nested:900@@", "@@nested:990@@", "@@nested:100000@@", "@@digits:5000@@",
]  # fmt: skip


AGAIN = "@@again@@"  # before a key that is to stand twice


def damaged(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """The files with one of them changed, or gone."""
    name = rng.choice(sorted(files))
    if len(files) > 1 and rng.random() < 0.02:
        return {other: data for other, data in files.items() if other != name}
    change = rng.choice((in_bytes, in_json, in_json))
    data = files[name]
    if name.endswith(".gz") and rng.random() < 0.5:
        return {**files, name: gzip.compress(change(gzip.decompress(data), rng), mtime=0)}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = change(data, rng)
    return {**files, name: data}


def split(data: bytes) -> tuple[dict, dict, bytes] | None:
    """(header, fgsteer's header in it, bytes of tensors) of safetensors that hold a hash; None for anything else."""
    start = 8 + int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or start >= len(data):
        return None
    header = json.loads(data[8:start])
    inner = json.loads(header.get("__metadata__", {}).get("fgsteer", "{}"))
    return (header, inner, data[start:]) if "sha256" in inner else None


def without_hash(data: bytes) -> bytes:
    """A file as the first versions wrote it, or the same."""
    if (parts := split(data)) is None:
        return data
    header, inner, tensors = parts
    del inner["sha256"]
    header["__metadata__"]["fgsteer"] = json.dumps(inner)
    text = as_json(header)
    return len(text).to_bytes(8, "little") + text + tensors


def with_a_flip(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """The files with a bit flipped among the tensors of one that holds a hash of them."""
    name = rng.choice([name for name, data in files.items() if split(data)])
    data = bytearray(files[name])
    data[-rng.randint(1, len(split(files[name])[2]))] ^= 1 << rng.randrange(8)
    return {**files, name: bytes(data)}


def in_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut off, taken out, doubled, overwritten or put in."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    near = rng.randrange(min(len(data), 64) + 1)
    noise = rng.randbytes(rng.choice((1, 2, 8, 64)))
    return rng.choice(
        (
            data[:a],
            data[a:],
            data[:a] + data[b:],
            data[:b] + data[a:],
            data[:a] + noise + data[a + len(noise) :],
            data[:near] + noise + data[near + len(noise) :],
            data[:a] + noise + data[a:],
            data[:a] + bytes(b - a) + data[b:],
            data[: -len(noise)] + noise,
            rng.choice((0, 1, 2**20, 2**31, 2**62, 2**64 - 1)).to_bytes(8, "little") + data[8:],
            data + noise,
            b"",
        )
    )


def in_json(data: bytes, rng: random.Random) -> bytes:
    """A value of a JSON file, of a line, or of a safetensors header or the header within it, changed."""
    size = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and size < len(data):
        try:
            header = json.loads(data[8 : 8 + size])
        except (ValueError, RecursionError):
            return in_bytes(data, rng)
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        inner = metadata.get("fgsteer") if isinstance(metadata, dict) else None
        if isinstance(inner, str) and rng.random() < 0.8:
            metadata["fgsteer"] = in_json(inner.encode(errors="replace"), rng).decode("utf-8", "replace")
            changed = json.dumps(header).encode()
        else:
            changed = in_json(data[8 : 8 + size], rng)
        told = len(changed) + rng.choice((*[0] * 20, 1, -1, 8))
        return max(0, told).to_bytes(8, "little") + changed + data[8 + size :]
    parts = data.split(b"\n")
    with contextlib.suppress(ValueError, RecursionError):  # one value, and not one a line
        json.loads(data)
        parts = [data]
    place = rng.randrange(len(parts))
    try:
        text = json.dumps(changed_value(json.loads(parts[place]), rng))
    except (ValueError, RecursionError):  # damaged before, or nested too deep before
        return in_bytes(data, rng)
    for word, made in (("nested", lambda n: "[" * n + "]" * n), ("digits", lambda n: "7" * n)):
        while (start := text.find(f'"@@{word}:')) >= 0:
            end = text.index('@@"', start + 3)
            text = text[:start] + made(int(text[start + len(word) + 4 : end])) + text[end + 3 :]
    parts[place] = text.replace(f'"{AGAIN}', '"').encode()
    return b"\n".join(parts)


def changed_value(value: object, rng: random.Random) -> object:
    """A JSON value with one of the values in it replaced, removed, renamed or scaled."""
    node: Any
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        places += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    if not places or rng.random() < 0.05:
        return rng.choice(HOSTILE)
    node, key = rng.choice(places)
    old, how = node[key], rng.random()
    if how < 0.08:
        del node[key]
    elif how < 0.15 and isinstance(node, dict):
        node[f"{AGAIN}{key}"] = rng.choice((old, *HOSTILE))
    elif how < 0.25 and isinstance(node, dict):
        word = rng.choice([word for word in HOSTILE if isinstance(word, str)])
        node[word] = node.pop(key)
    elif how < 0.35 and isinstance(old, int | float):
        node[key] = rng.choice((-old, old + 1, old * 10**9, str(old), [old]))
    elif how < 0.4:
        node[key] = rng.choice(places)[0] if rng.random() < 0.3 else [old]
        try:
            json.dumps(value)
        except (ValueError, RecursionError):  # it holds itself
            node[key] = None
    else:
        node[key] = rng.choice(HOSTILE)
    return value


# ---------------------------------------------------------------- the fuzzer


def put(folder: Path, files: dict[str, bytes], reader: Reader) -> Path:
    """The path to read, in a folder of these files alone."""
    for path in folder.iterdir():
        path.unlink()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder / next(iter(reader.files))


def check(name: str, reader: Reader, folder: Path, seed: int, number: int) -> str:
    """What came of one input: "read", or the name of an fgsteer error. Any other error goes on."""
    rng = random.Random(f"{seed}/{name}/{number}")
    flip = rng.random() < 0.1 and any(map(split, reader.files.values()))
    files = reader.files
    if not flip and rng.random() < 0.8:
        files = {name: without_hash(data) for name, data in files.items()}
    first = put(folder, (with_a_flip if flip else damaged)(files, rng), reader)
    try:
        reader.read(first)
    except (fg.FgsteerError, BrokenAnswerError) as error:
        return type(error).__name__
    assert not flip, "a flipped bit among tensors was not seen"
    return "read"


@dataclass
class Result:
    """Outcomes by reader, what is no fgsteer error, and the slowest input in seconds of CPU."""

    outcomes: dict[str, Counter[str]]
    findings: dict[tuple[str, str, str], str]
    slowest: tuple[float, str] = (0.0, "")


def fuzz(inputs_: int, seed: int = 0, only: str = "") -> Result:
    """Run ``inputs_`` inputs, dealt evenly to the readers."""
    result = Result({}, {})
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good, folder = Path(name) / "good", Path(name) / "layers.1"  # a name that sparsify's SAEs need
        good.mkdir()
        folder.mkdir()
        chosen = {key: reader for key, reader in readers(good).items() if only in key}
        for reader in chosen.values():
            reader.read(put(folder, reader.files, reader))  # what is good reads, and what is imported late is imported
        for place, (key, reader) in enumerate(chosen.items()):
            outcomes = result.outcomes.setdefault(key, Counter())
            for number in range(place, inputs_, len(chosen)):
                began = time.process_time()
                try:
                    outcomes[check(key, reader, folder, seed, number)] += 1
                except Exception as error:
                    outcomes["CRASH"] += 1
                    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/fgsteer/" in f.filename]
                    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
                    told = f"input {number}: {error!r:.200}\n{traceback.format_exc(limit=-6)[-1500:]}"
                    result.findings.setdefault((key, type(error).__name__, where), told)
                took = time.process_time() - began
                result.slowest = max(result.slowest, (took, f"{key}, input {number}"))
    return result


def limit_memory() -> None:
    """Let the process take no more than MEMORY beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def main() -> None:
    """Fuzz, print a table of outcomes, and end with status 1 where a reader crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name holds this")
    options = parser.parse_args()
    fuzz(200, options.seed, options.only)  # imports and buffers, before memory is counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit_memory()
    result = fuzz(options.inputs, options.seed, options.only)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for key, outcomes in result.outcomes.items():
        told = ", ".join(f"{outcome} {count:,}" for outcome, count in outcomes.most_common())
        print(f"{key:32} {sum(outcomes.values()):>7,}  {told}")
    total = sum(sum(outcomes.values()) for outcomes in result.outcomes.values())
    print(f"{total:,} inputs, {len(result.findings)} kinds of crash", end="; ")
    print(f"memory +{grown:.0f} MiB at the peak; slowest {result.slowest[0]:.2f} s ({result.slowest[1]})")
    for (key, kind, where), told in result.findings.items():
        print(f"\n{key}: {kind} at {where}, {told}")
    sys.exit(bool(result.findings))


if __name__ == "__main__":
    main()
