"""What a run is made of: another model, tokenizer, SAE, text or setting is another run, and is refused by name."""

from __future__ import annotations

import copy
import importlib.metadata
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fgsteer as fg
from fgsteer.evaluation.bench.run_files import strengths_path
from fgsteer.models import fingerprints as identities
from fgsteer.models.fingerprints import run_fingerprint, tokenizer_sha256, weights_sha256
from fgsteer.storage.files import read_tensors
from fgsteer.storage.json_files import read_json, write_json
from fgsteer.storage.plans import check_same_plan
from tests.helpers.resumable import (
    PARTS,
    RUNS,
    SIDES,
    TEXTS,
    LengthJudge,
    bench,
    collect,
    contrast,
    density,
    effects,
    shared_bench,
)
from tests.helpers.tiny import LAYERS, tiny_model, word_tokenizer

# ---------------------------------------------------------------- hashes


def changed(model, change):
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


def add_to_one(model):
    model.model.layers[1].mlp.up_proj.weight[17, 5] += 1e-3


def add_past_counters(model):
    model.lm_head.weight.data[3, 3] += 1e-3


def test_every_weight_counts(llama):
    """One value of 1,000s, changed in ways that counters of changes do and do not see."""
    before = weights_sha256(llama)
    assert weights_sha256(copy.deepcopy(llama)) == before
    hashes = [weights_sha256(changed(llama, change)) for change in (add_to_one, add_past_counters)]
    half = changed(llama, lambda model: model.bfloat16())
    hashes += [weights_sha256(half), weights_sha256(changed(half, add_to_one))]
    assert len({before, *hashes}) == 4 or len({before, *hashes}) == 5  # 1e-3 may round away in bfloat16
    model = changed(llama, lambda model: model.register_buffer("bias", torch.zeros(2)))
    buffered = weights_sha256(model)
    model.bias += 1
    assert len({before, buffered, weights_sha256(model)}) == 3


def test_a_shared_tensor_is_read_once(monkeypatch):
    model: Any = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    apart = weights_sha256(model)
    read, original = [], identities.stored_sha256
    monkeypatch.setattr(identities, "stored_sha256", lambda tensor: read.append(tensor) or original(tensor))
    model[1].weight = model[0].weight
    tied = weights_sha256(model)
    assert len(read) == 1
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    assert weights_sha256(model) == tied != apart  # what they compute is the same


def test_weights_that_are_elsewhere_count_too(llama, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate splits models")

    def offloaded(model, folder):
        model = copy.deepcopy(model)
        places = {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(LAYERS)}
        places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)

    assert weights_sha256(offloaded(llama, tmp_path / "a")) == weights_sha256(llama)
    other = changed(llama, add_to_one)  # a weight that lies on disk
    assert weights_sha256(offloaded(other, tmp_path / "b")) == weights_sha256(other)


def test_packed_and_adapted_weights_count(llama):
    pack = torch.ao.quantization.quantize_dynamic
    hashes = {weights_sha256(pack(m, {nn.Linear}, dtype=torch.qint8)) for m in (llama, tiny_model("llama", seed=1))}
    assert len(hashes) == 2
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(target_modules=["q_proj"], r=2))
    on = identities._config_sha256(model)
    with model.disable_adapter():
        assert identities._config_sha256(model) != on


def test_how_a_model_computes_counts_and_its_name_does_not(llama):
    other = copy.deepcopy(llama)
    other.config._name_or_path = "elsewhere"
    other.config.use_cache = not other.config.use_cache
    assert identities._config_sha256(other) == identities._config_sha256(llama)
    tokenizer = word_tokenizer()
    assert identities.run_fingerprint(other, tokenizer) == identities.run_fingerprint(llama, tokenizer)
    other.config.rms_norm_eps *= 10
    assert identities._config_sha256(other) != identities._config_sha256(llama)


def retold(change):
    tokenizer = word_tokenizer()
    change(tokenizer)
    return tokenizer


def lower(tokenizer):
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def test_all_that_makes_ids_and_texts_of_a_tokenizer_counts():
    before = tokenizer_sha256(word_tokenizer())
    used = word_tokenizer()
    used(TEXTS, padding=True, truncation=True, max_length=3)
    assert tokenizer_sha256(used) == before  # the padding of a call is no part of it
    changes = (
        lower,
        lambda t: t.add_tokens(["ship2"]),
        lambda t: setattr(t, "eos_token", "yes"),
        lambda t: setattr(t, "padding_side", "right"),
        lambda t: setattr(t, "chat_template", "{{ messages[0]['content'] }}"),
        lambda t: setattr(t, "clean_up_tokenization_spaces", True),
    )
    hashes = [tokenizer_sha256(retold(change)) for change in changes]
    assert len({before, tokenizer_sha256(word_tokenizer(bos=False)), *hashes}) == len(changes) + 2


def test_a_slow_tokenizers_files_count(tmp_path):
    from transformers import CTRLTokenizer

    def slow(name, merges):
        folder = tmp_path / name
        folder.mkdir()
        words = ["<unk>", "l", "o", "w</w>", "lo", "ow</w>", "low</w>"]
        (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
        return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))

    one, same, other = slow("a", "l o\nlo w</w>"), slow("b", "l o\nlo w</w>"), slow("c", "o w</w>\nl ow</w>")
    assert tokenizer_sha256(one) == tokenizer_sha256(same) != tokenizer_sha256(other)


def test_differences_are_told_short_and_exact():
    kept = {"versions": {"torch": "2.12"}, "weights": "a" * 64, "prompts": ["x", "y" * 100 + "1"], "plan": {"n": [1]}}
    now = {"versions": {"torch": "2.13"}, "weights": "b" * 64, "prompts": ["x", "y" * 100 + "2"], "plan": {"n": [1, 2]}}
    check_same_plan("run", kept, kept)
    with pytest.raises(fg.PairingError) as told:
        check_same_plan("run", kept, now)
    for words in ("versions.torch was 2.12 and is 2.13", f"weights was {'a' * 12} and is {'b' * 12}",
                  "prompts[1] was …yyyyyyyyyyyyyyyyyyyy1 and is …yyyyyyyyyyyyyyyyyyyy2", "plan.n was [1] and is [1, 2]",
                  "fresh=True"):  # fmt: skip
        assert words in str(told.value)
    for old in ({"plan": {}}, [], None, "x"):
        with pytest.raises(fg.PairingError, match="of an earlier version"):
            check_same_plan("run", old, now)
    many = {f"n{n}": n for n in range(9)}
    with pytest.raises(fg.PairingError, match=r"n3 was 3 and is null, and 5 more"):
        check_same_plan("run", {**kept, **many}, kept)
    with pytest.raises(fg.PairingError) as told:
        check_same_plan("run", {**kept, "a\x1b[2J": "\x1b]0;x\x07"}, kept)
    assert str(told.value).isprintable()


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module", params=sorted(RUNS))
def begun(request, tmp_path_factory, models):
    """A finished run of each kind: its function, its folder, what it was made of."""
    run, folder = RUNS[request.param], tmp_path_factory.mktemp(request.param)
    parts = {**PARTS, "model": models["llama"]}
    if run is effects:  # its texts set strengths: they are the model's own, which steering makes dearer
        texts = fg.generate(models["llama"], PARTS["tokenizer"], TEXTS, max_new_tokens=12, do_sample=False)
        parts["contrast"] = contrast(positives=texts)
    run(folder, **parts)
    return run, folder, parts


def state(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_of_something_else_is_refused_by_name(begun, monkeypatch):
    run, folder, parts = begun
    before = state(folder)
    model, sae = parts["model"], parts["sae"]
    other = changed(model, add_to_one)
    settled = copy.deepcopy(model)
    settled.config.rms_norm_eps *= 10
    cases = [
        ({"model": copy.deepcopy(model).bfloat16()}, r"model\.dtype was float32 and is bfloat16"),
        ({"model": other}, r"model\.weights was [0-9a-f]{12} and is [0-9a-f]{12}"),
        ({"model": settled}, r"model\.config was"),
        ({"tokenizer": retold(lambda t: t.add_tokens(["ship2"]))}, "tokenizer was"),
        ({"sae": replace(sae, b_enc=sae.b_enc + 1e-4)}, r"saes?(\.1)?\.sha256 was"),
        ({"sae": replace(sae, prepend_bos=True)}, "prepend_bos was null and is true"),
        ({"contrast": contrast(positives=[*SIDES["positives"][:2], "a church"])}, "was"),
    ]
    if run in (bench, shared_bench):
        counts = torch.ones(24, dtype=torch.float64)
        density = fg.FeatureDensity(counts, counts, counts, 9, "x")
        prompts = ("the man", "a dog", "the queen", "she took")
        held_out = fg.ContrastSet("held", positives=["a ring"], negatives=["tea"])
        fit = fg.EffectApproximator(torch.ones(32, 24), torch.ones(24), sae.hookpoint, sae.sha256)
        judge: Any = LengthJudge()
        judge.identity = {"asks": 1}
        cases += [
            ({"contrast": replace(parts["contrast"], held_out=held_out)}, r"contrasts\.own\.held_out was"),
            (
                {"sae": replace(sae, density=density)},
                r"density was null and is",
            ),
            ({"effects": fit}, r"effects\.1 was null and is"),
            ({"judge": judge}, "judge was length and is"),
            ({"neutral": ("the king said no",)}, "neutral was"),
            (
                {"own_prompts": prompts},
                r"prompts\[2\] was the old king and is the q",
            ),
        ]
    for changes, told in cases:
        with pytest.raises(fg.PairingError, match=told):
            run(folder, **{**parts, **changes})
        assert state(folder) == before
    for library, told in (("fgsteer", "fgsteer was"), ("torch", "torch was"), ("transformers", "transformers was")):
        with monkeypatch.context() as patch:
            versions = dict.fromkeys(identities.LIBRARIES, "1.2.3") | {"fgsteer": "0.1", library: "9.9.9"}
            patch.setattr(identities, "version", versions.get)
            with pytest.raises(fg.PairingError, match=rf"versions\.{told}.* and is 9\.9"):
                run(folder, **parts)
    run(folder, **parts)  # and the same run goes on
    assert state(folder) == before


def test_a_patch_of_a_library_parts_no_run(begun, monkeypatch):
    run, folder, parts = begun
    original = importlib.metadata.version
    monkeypatch.setattr(identities, "version", lambda n: original(n) + (".post7" if n != "fgsteer" else ""))
    run(folder, **parts)


def test_fresh_starts_over_and_leaves_what_is_not_its_own(begun, tmp_path, models):
    run, folder, parts = begun
    before = state(folder)
    own, other = tmp_path / "own", tmp_path / "other"
    for place in (own, other):
        place.mkdir()
    run(own, **parts)
    (own / "notes.txt").write_text("mine")
    (own / "love.jsonl").write_text("mine")
    changes = {**parts, "model": changed(parts["model"], add_to_one)}
    run(own, **changes, fresh=True)
    run(other, **changes)
    assert (own / "notes.txt").read_text() == (own / "love.jsonl").read_text() == "mine"
    assert {p: b for p, b in state(own).items() if p.name not in ("notes.txt", "love.jsonl")} == state(other)
    run(own, **parts, fresh=True)
    assert {p: b for p, b in state(own).items() if p.name not in ("notes.txt", "love.jsonl")} == before


def test_a_run_of_an_earlier_version_is_refused_and_can_be_started_over(begun, tmp_path, models):
    run, folder, parts = begun
    own = tmp_path / "own"
    own.mkdir()
    run(own, **parts)
    if (plan := own / "plan.json").exists():
        write_json(plan, {key: value for key, value in read_json(plan).items() if key in ("model", "tokens")})
    else:
        lines = (own / "run.jsonl").read_bytes().split(b"\n", 1)
        header = json.loads(lines[0])
        del header["identity"]
        (own / "run.jsonl").write_bytes(json.dumps(header).encode() + b"\n" + lines[1])
        assert fg.load_run(own / "run.jsonl").records  # reports read it
    with pytest.raises(fg.PairingError, match="holds a run of an earlier version"):
        run(own, **parts)
    run(own, **parts, fresh=True)
    assert state(own) == state(folder)


def test_a_folder_of_another_kind_is_not_started_over(models, tmp_path):
    parts = {**PARTS, "model": models["llama"]}
    collect(tmp_path, **parts)
    before = state(tmp_path)
    with pytest.raises(fg.PairingError, match="holds collected texts, not counted texts"):
        density(tmp_path, **parts, fresh=True)
    assert state(tmp_path) == before
    (tmp_path / "plan.json").write_text('{"scripts": {}}')
    with pytest.raises(fg.PairingError, match="holds something else, not collected texts"):
        collect(tmp_path, **parts, fresh=True)


def test_strengths_of_something_else_are_refused_before_the_next_are_set(models, tmp_path, monkeypatch):
    """A run that was killed while its strengths were set; on the way on nothing is calibrated for nothing."""
    parts = {**PARTS, "model": models["llama"]}
    bench(tmp_path, **parts)
    (tmp_path / "run.jsonl").unlink()
    monkeypatch.setattr("fgsteer.evaluation.bench.bench.calibrate_grid", lambda *_, **__: 1 / 0)
    bench(tmp_path, **parts)
    kept = strengths_path(tmp_path / "run.jsonl").read_bytes()
    for there in (True, False):
        if not there:
            (tmp_path / "run.jsonl").unlink()
        with pytest.raises(fg.PairingError, match="neutral was"):
            bench(tmp_path, **parts, neutral=("the king said no",))
        assert strengths_path(tmp_path / "run.jsonl").read_bytes() == kept


def test_other_texts_of_a_stream_are_refused_at_their_part(models, tmp_path):
    parts = {**PARTS, "model": models["llama"]}
    density(tmp_path, **parts)
    header = read_tensors(tmp_path / "part-000000.safetensors", kind="counted texts")[1]
    assert header["of"]
    with pytest.raises(fg.PairingError, match=r"part-000000\.safetensors was made of other texts"):
        density(tmp_path, **{**parts, "contrast": contrast(positives=["a church"])})


def test_no_run_that_can_be_gone_on_with_is_begun_in_a_steer_block(llama, tokenizer, tmp_path):
    """Its parts would not tell that they were steered, and go on unsteered."""
    texts, item = (
        {"positive": ["the king"], "negative": ["the sea"]},
        fg.Add(hookpoint=1, direction=torch.ones(llama.config.hidden_size)),
    )
    with fg.steer(llama, item):
        with pytest.raises(fg.SteeringError, match="inside a steer block"):
            fg.collect(llama, tokenizer, texts, hookpoints=1, work=tmp_path / "work")
        steered = fg.collect(llama, tokenizer, texts, hookpoints=1)  # read at once, as it is
    plain = fg.collect(llama, tokenizer, texts, hookpoints=1, work=tmp_path / "work")
    assert not torch.equal(
        steered.residual[fg.Hookpoint(1)].positive.mean, plain.residual[fg.Hookpoint(1)].positive.mean
    )


def test_a_plan_that_is_damaged_is_not_started_over(llama, tokenizer, tmp_path):
    texts = {"positive": ["the king"], "negative": ["the sea"]}
    (tmp_path / "plan.json").write_text("{")
    for fresh in (False, True):
        with pytest.raises(fg.FormatError, match="plan.json.*Delete the folder" if fresh else "plan.json"):
            fg.collect(llama, tokenizer, texts, hookpoints=1, work=tmp_path, fresh=fresh)
    assert (tmp_path / "plan.json").read_text() == "{"


def test_what_a_run_is_made_of_is_plain_json(llama, tokenizer):
    found = run_fingerprint(llama, tokenizer)
    assert json.loads(json.dumps(found)) == found
    assert found["model"]["dtype"] == "float32"
    assert found["versions"]["torch"] == ".".join(torch.__version__.split(".")[:2])


def test_texts_that_differ_are_told_as_they_are_on_one_line():
    kept = {"versions": {}, "prompts": ["At dawn", "Now"], "text": "one\nline"}
    with pytest.raises(fg.PairingError) as caught:
        check_same_plan("run", kept, {**kept, "prompts": ["At dawn", "Now", "Then"], "text": "one\nword"})
    assert 'prompts was ["At dawn", "Now"] and is ["At dawn", "Now", "Then"]' in str(caught.value)
    assert r"text was one\nline and is one\nword" in str(caught.value)
