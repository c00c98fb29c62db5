"""Exports: what other engines make of each file equals hooks; what they cannot say is refused; damage is typed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import sys
import types
from dataclasses import dataclass, replace

import pytest
import torch

import fgsteer as fg
from fgsteer.interventions import SCOPES
from tests.helpers.cli import invoke_on_cpu as invoke
from tests.helpers.saes import make_sae
from tests.helpers.tiny import D_MODEL
from tests.reference import engines

PROMPT = "she took the ring of the old king"


def direction(seed=1, width=D_MODEL):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)) * 3


def vector(seed=1, layer=1, site="resid_post", **extra):
    return fg.SteeringVector(direction(seed), fg.Hookpoint(layer, site), reference=direction(seed + 50), **extra)


def hooks(model, ids, items):
    with torch.no_grad(), fg.steer(model, items):
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def close(a, b):
    # float32 rounding of c·v, and of sums in another order, through three blocks: about 1e-6 of the largest logit
    return float((a - b).abs().max()) < 2e-5 * float(b.abs().max())


@pytest.fixture
def ids(tokenizer):
    return tokenizer(PROMPT)["input_ids"]


def test_the_package_is_reached_by_name():
    assert fg.export.gguf.write is sys.modules["fgsteer.export.gguf"].write


# GGUF


ADDS = [
    vector(1, layer=1).add(2.0, bos=True),
    vector(2, layer=2, site="resid_pre").add(-0.7, bos=True),  # the same place: the two add up
    vector(3, layer=2).add(0.5, bos=True),
]


def test_a_control_vector_equals_hooks(family_model, ids, tmp_path):
    path = tmp_path / "v.gguf"
    fg.export.gguf.write(ADDS, path, model_type="llama")
    metadata, directions = engines.gguf_directions(path)
    assert sorted(directions) == [1, 2]
    expected = hooks(family_model, ids, ADDS)
    assert close(engines.llama_cpp_logits(family_model, ids, directions), expected)
    assert not close(hooks(family_model, ids, []), expected)
    shifted = {1: directions[2], 2: directions[1]}
    assert not close(engines.llama_cpp_logits(family_model, ids, shifted), expected)
    back = [v.add(1.0, bos=True) for v in fg.export.gguf.read(path)]
    assert close(hooks(family_model, ids, back), expected)
    assert metadata["controlvector.model_hint"] == "llama"
    told = json.loads(metadata["fgsteer.header"])
    assert [entry["coefficient"] for entry in told["baked"]] == [2.0, -0.7, 0.5]


def test_a_control_vector_comes_back(tmp_path):
    path = tmp_path / "v.gguf"
    made = vector(provenance={"model": {"name": "tiny/llama"}})
    fg.export.gguf.write(made.add(3.0, bos=True), path, model_type="llama")
    [back] = fg.export.gguf.read(path)
    assert torch.allclose(back.direction, 3.0 * made.direction, rtol=1e-6)  # one float32 rounding
    assert back.hookpoint == made.hookpoint
    model = {"name": "tiny/llama", "type": "llama", "d_model": D_MODEL}
    assert back.provenance["model"] == model
    assert back.provenance["baked"][0]["coefficient"] == 3.0
    assert back.add(1.0).model_name == "tiny/llama"


def test_the_gguf_package_agrees(tmp_path):
    gguf = pytest.importorskip("gguf")
    fg.export.gguf.write(ADDS, tmp_path / "v.gguf", model_type="llama")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    expected = engines.gguf_directions(tmp_path / "v.gguf")[1]
    found = {int(t.name.split(".")[1]): torch.tensor(t.data) for t in reader.tensors}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "controlvector")  # as repeng and EasySteer do
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 2)
    for layer in (2, 1):
        writer.add_tensor(f"direction.{layer}", direction(layer).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = fg.export.gguf.read(tmp_path / "w.gguf")
    assert [v.hookpoint.layer for v in back] == [1, 2]
    assert all(torch.equal(v.direction, direction(v.hookpoint.layer)) for v in back)
    assert back[0].provenance["model"]["type"] == "mistral"


def text(value):
    return struct.pack("<Q", len(value)) + value


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"controlvector")


def container(pairs=(ARCHITECTURE,), infos=None, data=bytes(64), count=None, version=3, tensors=None):
    """A GGUF file by hand; by default one direction of four float32 zeros."""
    infos = [info()] if infos is None else infos
    sizes = (len(infos) if tensors is None else tensors, len(pairs) if count is None else count)
    head = b"GGUF" + struct.pack("<IQQ", version, *sizes) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def info(name=b"direction.1", shape=(4,), kind=0, offset=0):
    shape = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def read_bytes(tmp_path, data):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return fg.export.gguf.read(path)


def test_files_of_other_writers_are_read(tmp_path):
    values = torch.tensor([1.0, -2.0, 0.5, 8.0])
    for kind, dtype in ((0, torch.float32), (1, torch.float16), (28, torch.float64), (30, torch.bfloat16)):
        data = bytes(values.to(dtype).view(torch.uint8).tolist())
        [back] = read_bytes(tmp_path, container(infos=[info(kind=kind)], data=data))
        assert torch.equal(back.direction, values)
    arrays = [
        ARCHITECTURE,
        pair(b"numbers", 9, struct.pack("<IQ3f", 6, 3, 1, 2, 3)),
        pair(b"strings", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"bc")),
        pair(b"flag", 7, b"\1"),
        pair(b"general.alignment", 4, struct.pack("<I", 64)),
    ]
    head = container(arrays, [info(b"other", (2, 2)), info()], b"")
    data = struct.pack("<4f", *values)
    [back] = read_bytes(tmp_path, head + bytes(-len(head) % 64) + data)
    assert torch.equal(back.direction, values)
    [back] = read_bytes(tmp_path, container(infos=[info(b"direction.0", (4, 1))], version=2))
    assert back.hookpoint == fg.Hookpoint(0)


def test_llama_cpps_generator_is_named(tmp_path):
    signed = pair(b"controlvector.layer_count", 5, struct.pack("<i", 1))
    with pytest.warns(fg.PairingWarning, match=r"measures after block N direction\.N\+1"):
        read_bytes(tmp_path, container([ARCHITECTURE, signed]))


HUGE = (1 << 63) - 1
HOSTILE = {
    "an empty file": b"",
    "another file": b"PK\3\4" + bytes(100),
    "version": container(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(64),
    "tensor count": container(tensors=HUGE),
    "pair count": container(count=HUGE),
    "no architecture": container([]),
    "a model": container([pair(b"general.architecture", 8, text(b"llama"))]),
    "key length": container([struct.pack("<Q", HUGE) + b"x"]),
    "string length": container([ARCHITECTURE, pair(b"x", 8, struct.pack("<Q", HUGE))]),
    "array length": container([ARCHITECTURE, pair(b"x", 9, struct.pack("<IQ", 4, HUGE))]),
    "strings in an array": container([ARCHITECTURE, pair(b"x", 9, struct.pack("<IQ", 8, HUGE))]),
    "arrays in an array": container([ARCHITECTURE, pair(b"x", 9, struct.pack("<IQ", 9, 1))]),
    "kind of value": container([ARCHITECTURE, pair(b"x", 99, b"")]),
    "key twice": container([ARCHITECTURE, ARCHITECTURE]),
    "not UTF-8": container([ARCHITECTURE, pair(b"x", 8, text(b"\xff"))]),
    "alignment 0": container([ARCHITECTURE, pair(b"general.alignment", 4, struct.pack("<I", 0))]),
    "alignment of 2 GiB": container([ARCHITECTURE, pair(b"general.alignment", 4, struct.pack("<I", 1 << 31))]),
    "alignment text": container([ARCHITECTURE, pair(b"general.alignment", 8, text(b"32"))]),
    "header": container([ARCHITECTURE, pair(b"fgsteer.header", 8, text(b"[" * 100000))]),
    "no direction": container(infos=[info(b"blk.0.weight")]),
    "name": container(infos=[info(b"direction.x")]),
    "negative": container(infos=[info(b"direction.-1")]),
    "a direction twice": container(infos=[info(), info(b"direction.01")]),
    "dimensions": container(infos=[info(shape=(1,) * 5)]),
    "scalar": container(infos=[info(shape=())]),
    "matrix": container(infos=[info(shape=(4, 2))]),
    "width 0": container(infos=[info(shape=(0,))]),
    "width": container(infos=[info(shape=(HUGE,))]),
    "widths": container(infos=[info(), info(b"direction.2", (5,))]),
    "quantised": container(infos=[info(kind=2)]),
    "offset": container(infos=[info(offset=HUGE)]),
    "shared bytes": container(infos=[info(b"direction.%d" % n, (1000,)) for n in range(100)], data=bytes(4000)),
    "nan": container(data=struct.pack("<4f", float("nan"), 0, 0, 0)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_typed_errors(tmp_path, name):
    with pytest.raises(fg.FormatError):  # at once: what they claim to hold would take hours to count
        read_bytes(tmp_path, HOSTILE[name])


def test_every_truncation_is_a_typed_error(tmp_path):
    whole = container([ARCHITECTURE, pair(b"x", 9, struct.pack("<IQI", 4, 1, 7))], data=bytes(16))
    read_bytes(tmp_path, whole)
    for cut in range(len(whole)):
        with pytest.raises(fg.FormatError):
            read_bytes(tmp_path, whole[:cut])
    for place in range(len(whole)):
        with contextlib.suppress(fg.FormatError):  # a changed value may be valid; nothing else may be raised
            read_bytes(tmp_path, whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    with pytest.raises(fg.FormatError, match="Cannot read"):
        fg.export.gguf.read(tmp_path)
    with pytest.raises(fg.FormatError, match="Cannot read"):
        fg.export.gguf.read(tmp_path / "none.gguf")


def test_a_header_may_not_grow_without_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("fgsteer.export.gguf.MAX_HEADER_BYTES", 64)
    with pytest.raises(fg.FormatError, match="more than 16 MiB"):
        read_bytes(tmp_path, container())


REFUSED = [
    ([], "at least one intervention, got an empty list"),
    ([vector()], "an intervention, got a SteeringVector. Call .add"),
    (vector().ablate(bos=True), "Expected an Add, got an Ablate.*lm-eval or EasySteer"),
    (vector().clamp(1.0, bos=True), "Expected an Add, got a Clamp"),
    (vector().affine(1.0, bos=True), "Expected an Add, got an Affine"),
    (vector().add(1.0, bos=True, scope="generated"), "got scope='generated'.*all tokens.*EasySteer"),
    (vector().add(1.0), "Expected bos=True, got .* leaves the token at position 0 alone"),
    (vector(layer=0).add(1.0, bos=True), "block 1 or later.*EasySteer"),
    (vector(layer=1, site="resid_pre").add(1.0, bos=True), "block 1 or later"),
    (vector(layer=0, site="resid_pre").add(1.0, bos=True), "Expected an intervention at resid_post"),
    (vector(site="mlp_out").add(1.0, bos=True), "at resid_post, got .*mlp_out.*fgsteer.steer"),
    ((vector() * 1e30).add(1e30, bos=True), "at most .* in float32.*got an Add that changes entries by inf"),
]


@pytest.mark.parametrize(("items", "match"), REFUSED)
def test_llama_cpp_cannot_say(tmp_path, items, match):
    with pytest.raises(fg.SteeringError, match=match):
        fg.export.gguf.write(items, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


def test_two_models_in_one_file_are_refused(tmp_path):
    narrow = fg.SteeringVector(torch.ones(4), fg.Hookpoint(1)).add(1.0, bos=True)
    with pytest.raises(fg.PairingError, match="widths 4, 32"):
        fg.export.gguf.write([ADDS[0], narrow], tmp_path / "v.gguf")
    named = [vector(provenance={"model": {"name": n}}).add(1.0, bos=True) for n in ("a", "b")]
    with pytest.raises(fg.PairingError, match="a and b"):
        fg.export.gguf.write(named, tmp_path / "v.gguf")


# lm-eval


def test_a_steered_file_equals_hooks(family_model, ids, tmp_path):
    path = tmp_path / "s.pt"
    choices = [
        [vector(1, layer=0).add(2.0, bos=True), vector(2).affine(0.7, bos=True), vector(3, layer=2).ablate(bos=True)],
        [vector(4).clamp(-5.0, bos=True), vector(5, layer=1, site="resid_pre").add(1.0, bos=True)],
        [vector(6, site="mlp_out").add(1.0, bos=True), vector(7, site="attn_out").ablate(bos=True)],
    ]
    for items in choices:
        fg.export.lm_eval.write(items, path, family_model)
        config = torch.load(path, weights_only=True)
        expected = hooks(family_model, ids, items)
        assert close(engines.lm_eval_logits(family_model, ids, config), expected)
        assert not close(hooks(family_model, ids, []), expected)


def test_lm_eval_cannot_say(llama, models, tmp_path):
    sae = make_sae()
    clamp = fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={1: 2.0}, bos=True)
    cases = [
        (clamp, "got a ClampFeature.*Run fgsteer eval"),
        (vector().add(1.0, bos=True, scope="prompt"), "scope='prompt'"),
        (vector().add(1.0), "bos=True"),
        ([vector().add(1.0, bos=True)] * 2, "two operations at the module layers.1.*a \\+ b"),
        (vector(layer=0, site="resid_pre").add(1.0, bos=True), "output of a module"),
        (vector(site="z").add(1.0, bos=True), "output of a module.*fgsteer eval"),
    ]
    for items, match in cases:
        with pytest.raises(fg.SteeringError, match=match):
            fg.export.lm_eval.write(items, tmp_path / "s.pt", llama)
    with pytest.raises(fg.FormatError, match=r"\.pt or \.pth"):
        fg.export.lm_eval.write(ADDS[0], tmp_path / "s.bin", llama)
    with pytest.raises(fg.HookpointError):
        fg.export.lm_eval.write(vector(layer=7).add(1.0, bos=True), tmp_path / "s.pt", llama)
    assert list(tmp_path.iterdir()) == []
    fg.export.lm_eval.write(ADDS[0], tmp_path / "s.pt", models["gpt2"])
    assert list(torch.load(tmp_path / "s.pt", weights_only=True)) == ["h.1"]


# EasySteer


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bos", [False, True])
def test_a_spec_equals_hooks(llama, ids, tmp_path, scope, bos):
    where = {"scope": scope, "bos": bos}
    items = [vector(1, layer=0).add(2.0, **where), vector(2).ablate(**where), vector(3).add(-1.0, **where)]
    files = fg.export.easysteer.write(items, tmp_path / "s.json", model_type="llama")
    assert [file.name for file in files] == ["s.json", "s-1.gguf", "s-2.gguf", "s-3.gguf"]
    with fg.steer(llama, items):
        out = llama.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    assert engines.easysteer_greedy(llama, ids, files[0], new=6) == out[0, len(ids) :].tolist()


def test_a_spec_keeps_strength_apart(tmp_path):
    made = vector()
    fg.export.easysteer.write(made.add(4.0), tmp_path / "s.json", folder="/srv/vectors")
    [entry] = json.loads((tmp_path / "s.json").read_text())["vectors"]
    assert (entry["scale"], entry["source"]) == (4.0, "/srv/vectors/s.gguf")
    assert entry["apply"] == {"prompt": "all", "generation": "all", "exclude_prompt_positions": [0]}
    assert torch.equal(fg.export.gguf.read(tmp_path / "s.gguf")[0].direction, made.direction)


def test_easysteer_cannot_say(tmp_path):
    for item in (vector().clamp(1.0), vector().affine(1.0)):
        with pytest.raises(fg.SteeringError, match=r"sets no projections.*lm-eval"):
            fg.export.easysteer.write(item, tmp_path / "s.json")
    with pytest.raises(fg.SteeringError, match="resid_post"):
        fg.export.easysteer.write([vector().add(1.0), vector(site="attn_out").add(1.0)], tmp_path / "s.json")
    with pytest.raises(fg.FormatError, match=r"\.json"):
        fg.export.easysteer.write(vector().add(1.0), tmp_path / "s.gguf")
    assert list(tmp_path.iterdir()) == []


# Neuronpedia


@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_request_adds_up_to_the_vector(tmp_path, activation, normalize):
    sae = replace(make_sae(activation), neuronpedia="gemma-2-2b/12-gemmascope-res-16k")
    made = fg.from_features(sae, {3: 2.0, 7: -0.5, 1: 1.0}, normalize=normalize)
    fg.export.neuronpedia.write(made, tmp_path / "r.json", sae, coefficient=6.0, prompt="The next day")
    request = json.loads((tmp_path / "r.json").read_text())
    assert (request["modelId"], request["prompt"]) == ("gemma-2-2b", "The next day")
    assert request["steer_method"] == "SIMPLE_ADDITIVE"
    added = torch.zeros(D_MODEL, dtype=torch.float64)
    for feature in request["features"]:
        assert (feature["modelId"], feature["layer"]) == ("gemma-2-2b", "12-gemmascope-res-16k")
        row = sae.W_dec[feature["index"]].double()
        unit = row if activation == "topk" else row / row.norm()  # Neuronpedia leaves TopK's rows as they are
        added += request["strength_multiplier"] * feature["strength"] * unit
    assert torch.allclose(added, 6.0 * made.direction.double(), atol=1e-5)  # the direction is float32
    strengths = [abs(feature["strength"]) for feature in request["features"]]
    assert strengths == sorted(strengths, reverse=True)


def test_neuronpedia_cannot_say(tmp_path):
    sae = replace(make_sae(), neuronpedia="m/1-res")
    effects = fg.EffectApproximator(torch.randn(32, 24), torch.randn(24), sae.hookpoint, sae.sha256)
    good = fg.from_features(sae, [3])
    cases = [
        (fg.SelectionError, vector(), sae, "no features.*from_features, sta or fgaa"),
        (fg.SteeringError, fg.sae_ts(sae, [3], effects), sae, "a sae_ts vector that is not the sum.*from_features"),
        (fg.PairingError, good, make_sae(), "an SAE that Neuronpedia hosts"),
        (fg.PairingError, good, replace(sae, hookpoint=fg.Hookpoint(2)), "where this SAE is"),
        (fg.PairingError, good, replace(sae, reads=fg.Hookpoint(1, "mlp_in")), "a transcoder"),
        (fg.SelectionError, replace(good, features={99: 1.0}), sae, "0 to 23"),
        (fg.SteeringError, replace(good, features={3: 0.0}), sae, "not the sum"),
    ]
    for error, made, used, match in cases:
        with pytest.raises(error, match=match):
            fg.export.neuronpedia.write(made, tmp_path / "r.json", used)
    assert list(tmp_path.iterdir()) == []


# steering-vectors


@pytest.fixture
def library(monkeypatch):
    """A stand-in for steering-vectors' dataclass, under the name that its files carry."""
    module = types.ModuleType("steering_vectors.steering_vector")

    @dataclass
    class SteeringVector:
        layer_activations: dict
        layer_type: str = "decoder_block"

    SteeringVector.__module__ = module.__name__
    SteeringVector.__qualname__ = "SteeringVector"
    vars(module)["SteeringVector"] = SteeringVector
    monkeypatch.setitem(sys.modules, "steering_vectors", types.ModuleType("steering_vectors"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return SteeringVector


def test_saved_steering_vectors_are_read_without_the_library(library, tmp_path, monkeypatch):
    layers = {2: direction(2), 1: direction(1)}
    torch.save(library(layers), tmp_path / "object.pt")
    torch.save(layers, tmp_path / "dict.pt")
    monkeypatch.delitem(sys.modules, "steering_vectors.steering_vector")
    for name in ("object.pt", "dict.pt"):
        back = fg.export.steering_vectors.read(tmp_path / name)
        assert [v.hookpoint for v in back] == [fg.Hookpoint(1), fg.Hookpoint(2)]
        assert all(torch.equal(v.direction, layers[v.hookpoint.layer]) for v in back)
    assert "steering_vectors.steering_vector" not in sys.modules


class Harmful:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_not_plain_is_refused(library, tmp_path):
    path = tmp_path / "v.pt"

    def refuse(match):
        with pytest.raises(fg.FormatError, match=match):
            fg.export.steering_vectors.read(path)

    torch.save(Harmful(tmp_path / "made"), path)
    refuse("without running code.*torch.save")
    torch.save(library({1: Harmful(tmp_path / "made")}), path)
    refuse("without running code")
    path.write_bytes(pickle.dumps(library({1: direction()})))
    refuse("layer_activations")
    assert not (tmp_path / "made").exists()
    torch.save(library({1: direction()}, "mlp"), path)
    refuse("layer type 'mlp'.*decoder_block")
    for wrong in ({}, [1], {"a": direction()}, {1: 2.0}, {-1: direction()}, {1: direction()[None]}, library(None)):
        torch.save(wrong, path)
        refuse("Expected")
    torch.save({1: torch.ones(1).expand(1 << 40)}, path)
    refuse("bytes stored in 4")
    torch.save({1: torch.full((4,), float("nan"))}, path)
    refuse("nan")
    path.unlink()
    refuse("There is no file")


def test_truncated_steering_vectors_are_typed_errors(tmp_path):
    path = tmp_path / "v.pt"
    torch.save({1: direction(width=4)}, path)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(fg.FormatError):
            fg.export.steering_vectors.read(path)


# the command line


def test_the_command_line_exports(tmp_path):
    sae = fg.load_sae("default")
    made, out = tmp_path / "v.safetensors", tmp_path / "o"
    fg.from_features(sae, {12: 1.0, 40: -2.0}).save(made)
    told = json.loads(invoke("export", made, "--to", "gguf", "-c", 8, "-o", out, "--json").stdout)
    assert (told["coefficients"], told["bos"]) == ([8.0], True)
    [back] = fg.export.gguf.read(out)
    assert back.norm == pytest.approx(8.0, rel=1e-5)
    assert back.add(1.0).model_name == "fgsteer/default"
    told = invoke("export", made, "--to", "easysteer", "-c", 8, "-o", tmp_path / "s.json").stdout
    assert "s.gguf" in told
    assert f"add 8 at {sae.hookpoint}, every token, position 0 left alone" in told
    with pytest.raises(fg.SteeringError, match="bos=True"):
        invoke("export", made, "--to", "gguf", "--no-bos", "-o", out)
    with pytest.raises(fg.DataError, match="the model that is steered, got no --model"):
        invoke("export", made, "--to", "lm-eval", "-o", tmp_path / "s.pt")
    with pytest.raises(fg.DataError, match="the model that is steered, got no --model"):
        invoke("export", made, "--to", "checkpoint", "-o", tmp_path / "c")
    told = invoke("export", made, "--to", "checkpoint", "--model", "default", "-c", 40, "-o", tmp_path / "c").stdout
    assert "an ordinary checkpoint" in told
    with torch.no_grad(), fg.steer(fg.load_model("default")[0], fg.SteeringVector.load(made).add(40.0, bos=True)) as m:
        ids = torch.tensor([[0, 5, 6, 7]])
        folded, _ = fg.load_model(str(tmp_path / "c"))
        assert torch.allclose(folded(ids).logits, m(ids).logits, atol=1e-4)  # float32; logits of some tens
    with pytest.raises(fg.SteeringError, match="Add"):
        invoke("export", made, "--to", "checkpoint", "--model", "default", "--op", "ablate", "-o", tmp_path / "d")
    invoke("export", made, "--to", "lm-eval", "--model", "default", "--op", "ablate", "-o", tmp_path / "s.pt")
    assert list(torch.load(tmp_path / "s.pt", weights_only=True)) == [f"layers.{sae.hookpoint.layer}"]
    with pytest.raises(fg.PairingError, match="an SAE that Neuronpedia hosts"):
        invoke("export", made, "--to", "neuronpedia", "-o", tmp_path / "r.json")
    with pytest.raises(fg.SteeringError, match="one Add of one vector, got an Ablate"):
        invoke("export", made, "--to", "neuronpedia", "--op", "ablate", "-o", out)
    for wrong, match in (
        (("--to", "onnx"), "gguf, lm-eval"),
        (("--to", "gguf", "-c", 1, "-c", 2), "2 coefficients for 1"),
        (("--to", "gguf", "--op", "sing"), "--op sing"),
    ):
        with pytest.raises(fg.DataError, match=match):
            invoke("export", made, *wrong, "-o", out)
