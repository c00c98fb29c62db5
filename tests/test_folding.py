"""Folding: what plain transformers loads equals hooks, in every family that folds; every refusal says why.

python -m tests.test_folding   prints the table in docs/reference/exports.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import fgsteer as fg
from fgsteer.storage.atomic import atomic_folder
from tests.helpers.cli import invoke
from tests.helpers.saes import make_sae
from tests.helpers.steering import batch, direction, run, vector
from tests.helpers.tiny import D_MODEL, FAMILIES, MORE_FAMILIES, OTHER_FAMILIES, model_of, tiny_model, word_tokenizer

NO_BIAS = "no flag of its config gives it one"
NORM = "a norm without a bias follows"
ROUTER = "a router weighs the experts"
# Where an Add at mlp_out or resid_post goes, and one at attn_out: a layer of the block, or the reason why not.
# None: the family has no sublayer sites.
PLACES = {
    "llama": ("mlp.down_proj", "self_attn.o_proj"),
    "qwen2": (NO_BIAS, NO_BIAS),
    "gemma2": (NORM, NORM),
    "gpt_neox": ("mlp.dense_4h_to_h", "attention.dense"),
    "gpt2": ("mlp.c_proj", "attn.c_proj"),
    "mistral": (NO_BIAS, NO_BIAS),
    "qwen3": (NO_BIAS, "self_attn.o_proj"),
    "gemma3": (NORM, NORM),
    "gemma3 with vision": (NORM, NORM),
    "phi": ("mlp.fc2", "self_attn.dense"),
    "phi3": (NO_BIAS, NO_BIAS),
    "mixtral": (ROUTER, NO_BIAS),
    "falcon": ("mlp.dense_4h_to_h", "self_attention.dense"),
    "falcon, new decoder": ("mlp.dense_4h_to_h", "self_attention.dense"),
    "falcon, alibi": ("mlp.dense_4h_to_h", "self_attention.dense"),
    "opt": ("fc2", "self_attn.out_proj"),
    "opt, post-norm": ("final_layer_norm", None),
    "olmo2": (NORM, NORM),
    "cohere": ("self_attn.o_proj", "self_attn.o_proj"),
    "qwen3_moe": (ROUTER, "self_attn.o_proj"),
    "gpt_oss": (ROUTER, "self_attn.o_proj"),
    "granite": ("scaled by residual_multiplier", None),
    "bloom": ("mlp.dense_4h_to_h", None),
    "gemma4": ("scaled by layer_scalar", None),
    "codegen": ("mlp.fc_out", "mlp.fc_out"),
    "cohere2": ("self_attn.o_proj", "self_attn.o_proj"),
    "deepseek_v2": (ROUTER, "self_attn.o_proj"),
    "deepseek_v3": (ROUTER, "self_attn.o_proj"),
    "exaone4": (NORM, NORM),
    "gemma": (NO_BIAS, "self_attn.o_proj"),
    "glm": (NO_BIAS, NO_BIAS),
    "glm4": (NORM, NORM),
    "gpt_bigcode": ("mlp.c_proj", "attn.c_proj"),
    "gpt_neo": ("mlp.c_proj", "attn.attention.out_proj"),
    "gptj": ("mlp.fc_out", "mlp.fc_out"),
    "nemotron": ("mlp.down_proj", "self_attn.o_proj"),
    "olmo": (NO_BIAS, "self_attn.o_proj"),
    "olmo3": (NORM, NORM),
    "olmoe": (ROUTER, "self_attn.o_proj"),
    "phimoe": (ROUTER, "self_attn.o_proj"),
    "qwen2_moe": (ROUTER, NO_BIAS),
    "smollm3": ("mlp.down_proj", "self_attn.o_proj"),
    "stablelm": (NO_BIAS, NO_BIAS),
    "starcoder2": ("mlp.c_proj", "self_attn.o_proj"),
}
NO_Z = ("gpt_neo",)  # its output projection is a level deeper than that site is looked for


def add(seed=1, layer=1, site="resid_post", coefficient=2.0):
    return vector(seed, layer, site).add(coefficient, bos=True)


def sites_of(family):
    """[(site, layer of the Add, where it goes in block 1 or the reason why not)]"""
    mlp, attention = PLACES[family]
    sites = [("resid_post", 1, mlp), ("resid_pre", 2, mlp)]
    if attention is not None:
        sites += [("mlp_out", 1, mlp), ("attn_out", 1, attention)]
        sites += [("z", 1, attention)] if family not in NO_Z and " " not in attention else []
    return sites


def items_of(family):
    """Adds at every site that folds, all different, and the layers they go to."""
    folds = [(site, layer, place) for site, layer, place in sites_of(family) if " " not in place]
    return [add(seed, layer, site) for seed, (site, layer, _) in enumerate(folds)], [place for *_, place in folds]


def reloaded(model, folder):
    """What plain transformers makes of the model's checkpoint; every weight of it was in the file, and none else."""
    model.save_pretrained(folder)
    again, told = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return again.eval()


@torch.no_grad()
def logits(model, steering=None):
    """Logits of the real tokens of a left-padded batch."""
    inputs = batch(word_tokenizer())
    with fg.steer(model, steering):
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def discrepancy(a, b):
    return float((a - b).abs().max() / b.abs().max())


def table():
    """Which families an Add folds in, by site, in Markdown: what the tests of PLACES show."""
    columns = ("resid_post", "resid_pre", "mlp_out", "attn_out")
    lines = [f"| model | {' | '.join(columns)} | why not |", "|---" * (len(columns) + 2) + "|"]
    for family in sorted(PLACES):
        places = {site: place for site, _, place in sites_of(family)}
        marks = ["✓" if " " not in places.get(site, " ") else "–" for site in columns]
        reasons = dict.fromkeys(places[site] for site in columns if " " in places.get(site, ""))
        why = "; ".join(reasons).replace("gives it one", "gives it a bias")
        lines.append(f"| {family} | {' | '.join(marks)} | {why} |")
    return "\n".join(lines)


def test_the_docs_have_the_table():
    page = (Path(__file__).parent.parent / "docs" / "reference" / "exports.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- folding -->\n(.*?)\n<!-- /folding -->", page, re.S)
    assert block, "docs/reference/exports.md has no folding block"
    assert block[1] == table(), "print the table with: python -m tests.test_folding"


def test_every_family_has_its_row():
    assert set(PLACES) == {*FAMILIES, *MORE_FAMILIES, *OTHER_FAMILIES}


@pytest.mark.parametrize("family", [family for family in PLACES if items_of(family)[0]])
def test_a_saved_checkpoint_equals_hooks(family, tmp_path):
    """Adds at every site that folds, summed; through save_pretrained, in logits and in what is generated."""
    model = model_of(family)
    items, places = items_of(family)
    wanted = logits(model, items)
    again = reloaded(fg.fold(model, items), tmp_path)
    # float32: the same sums in another order
    assert discrepancy(logits(again), wanted) < 1e-5
    assert discrepancy(logits(model), wanted) > 0.05  # it does something
    inputs = batch(word_tokenizer())
    assert run(again, inputs, None) == run(model, inputs, items)
    folded = again.config.fgsteer["folded"]
    assert [term["bias"].partition(".1.")[2] for term in folded] == [f"{place}.bias" for place in places]
    assert [term["hookpoint"] for term in folded] == [str(item.hookpoint) for item in items]


@pytest.mark.parametrize(
    ("family", "site", "layer", "reason"),
    [(f, s, layer, place) for f in PLACES for s, layer, place in sites_of(f) if " " in place],
)
def test_what_no_bias_equals_is_refused(family, site, layer, reason):
    with pytest.raises(
        fg.SteeringError, match=rf"No bias of an? \w+ .*{layer}\.hook_{site} does: .*{reason}.*fgsteer\.steer"
    ):
        fg.fold(model_of(family), add(1, layer, site))


def test_a_dense_block_folds_where_another_has_experts(tmp_path):
    model, item = model_of("deepseek_v2"), add(layer=0)
    assert discrepancy(logits(reloaded(fg.fold(model, item), tmp_path)), logits(model, item)) < 1e-5  # as above


def test_a_sum_that_leaves_the_bias_out_is_refused():
    config = MORE_FAMILIES["bloom"]()
    config.update({"slow_but_exact": True, "pretraining_tp": 2})
    with pytest.raises(fg.SteeringError, match="slow_but_exact of its config leaves the bias out"):
        fg.fold(AutoModelForCausalLM.from_config(config), add())


def test_only_the_bias_changes_and_by_that_much():
    """GPT-2: old + c·v in float64 by hand; every other weight bit for bit."""
    model, item = model_of("gpt2"), add(coefficient=-1.5)
    before, after = model.state_dict(), fg.fold(model, [item, add(2)]).state_dict()
    name = "transformer.h.1.mlp.c_proj.bias"
    wanted = before[name].double() + -1.5 * direction(1).double() + 2.0 * direction(2).double()
    assert torch.equal(after[name], wanted.float())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if key != name)


def test_a_flag_brings_zeros_and_changes_no_weight():
    model = model_of("llama")
    before, folded = model.state_dict(), fg.fold(model, add())
    after = folded.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    gained = after.keys() - before.keys()
    assert len(gained) == 9  # three layers of three blocks' MLPs
    filled = {key for key in gained if after[key].any()}
    assert filled == {"model.layers.1.mlp.down_proj.bias"}
    assert (folded.config.mlp_bias, folded.config.attention_bias) == (True, False)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_that_is_given_stays_as_it_was(family):
    model = tiny_model(family)
    plain, config = logits(model), model.config.to_dict()
    folded = fg.fold(model, add())
    assert torch.equal(logits(model), plain)
    assert model.config.to_dict() == config
    assert type(folded) is type(model)
    storages = {p.data_ptr() for p in model.parameters()}
    assert not storages & {p.data_ptr() for p in folded.parameters()}
    assert fg.fold(model, add(), copy=False) is model
    assert torch.equal(logits(model), logits(folded))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize(
    "nothing", [None, [], add(coefficient=0.0), fg.Add(hookpoint="model.layers.1", direction=torch.zeros(32), bos=True)]
)
def test_nothing_folded_is_bit_identical(family, nothing):
    model = model_of(family)
    folded = fg.fold(model, nothing)
    assert folded is not model
    assert torch.equal(logits(folded), logits(model))
    assert folded.state_dict().keys() == model.state_dict().keys()
    assert folded.config.to_dict() == model.config.to_dict()


def test_tied_weights_stay_tied(tmp_path):
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    tied = AutoModelForCausalLM.from_config(config).eval()
    for model in (tied, model_of("gpt2")):
        folded = fg.fold(model, add())
        for each in (folded, reloaded(folded, tmp_path / type(model).__name__)):
            assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
        assert folded.get_input_embeddings().weight is not model.get_input_embeddings().weight


def test_folding_again_adds_up():
    model = model_of("llama")
    twice = fg.fold(fg.fold(model, add(1)), [add(2), add(3, site="attn_out")])
    once = fg.fold(model, [add(1), add(2), add(3, site="attn_out")])
    assert discrepancy(logits(twice), logits(once)) < 1e-6  # a bias rounded twice
    assert twice.config.fgsteer["folded"] == once.config.fgsteer["folded"]


def test_the_config_says_what_was_folded(tmp_path):
    vec = fg.SteeringVector(direction(), "blocks.1.hook_resid_post", provenance={"method": "caa"})
    told = reloaded(fg.fold(model_of("gpt2"), vec.add(2.0, bos=True)), tmp_path).config.fgsteer
    assert told["version"] == fg.__version__
    assert told["rounding"] < 1e-6
    (term,) = told["folded"]
    assert len(term.pop("direction_sha256")) == 64
    assert term.pop("norm") == pytest.approx(vec.norm)
    assert term == {
        "hookpoint": "blocks.1.hook_resid_post",
        "method": "caa",
        "coefficient": 2.0,
        "bias": "transformer.h.1.mlp.c_proj.bias",
    }


def test_bfloat16_keeps_eight_bits(tmp_path):
    model, items = tiny_model("llama", dtype=torch.bfloat16), [add(1), add(2, site="attn_out")]
    folded = reloaded(fg.fold(model, items), tmp_path)
    assert all(p.dtype == torch.bfloat16 for p in folded.parameters())
    bias = folded.get_parameter("model.layers.1.mlp.down_proj.bias")
    wanted = 2.0 * direction(1)
    assert torch.equal(bias, wanted.bfloat16())
    errors = [(2.0 * direction(s)).bfloat16().float() - 2.0 * direction(s) for s in (1, 2)]
    lost = max(float(e.norm() / (2.0 * direction(s)).norm()) for e, s in zip(errors, (1, 2), strict=True))
    assert folded.config.fgsteer["rounding"] == pytest.approx(lost, rel=1e-4)
    assert 0 < lost < 2**-8
    # 8 bits through three blocks, rounded at other places
    assert discrepancy(logits(folded), logits(model, items)) < 0.05


def test_an_overflow_is_refused():
    with pytest.raises(fg.SteeringError, match=r"at most 32752.* float16.* an Add in .* changes entries by"):
        fg.fold(tiny_model("gpt2", dtype=torch.float16), add(coefficient=1e6))


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (
            vector().add(2.0),
            r"Expected bos=True, got .*leaves position 0 alone.*write vec.add\(coefficient, bos=True\)",
        ),
        (
            vector().add(2.0, bos=True, scope="generated"),
            r"scope=\"all\", got .*'generated'.*fgsteer\.steer",
        ),
        (vector().ablate(bos=True), r"Expected an Add, got an Ablate at .*depends on the activation.*orthogonalised"),
        (vector().clamp(1.0, bos=True), r"Clamp at .*depends on the activation"),
        (vector().affine(1.0, bos=True), r"Affine at .*depends on the activation"),
        (
            fg.ClampFeature(hookpoint="model.layers.1", sae=make_sae(), targets={1: 2.0}),
            r"ClampFeature at .*depends on the activation",
        ),
        ([add(), None], "a NoneType among the interventions.*every row in the same way"),
        ([[add()], [add(2)]], "a list among the interventions.*every row in the same way"),
        (add(layer=0, site="resid_pre"), r"blocks.0.hook_resid_pre .*before block 0.*fgsteer\.steer"),
        (add(site="mlp_in"), r"mlp.hook_in .*nonlinearity.*fgsteer\.steer"),
    ],
)
def test_what_is_not_one_constant_is_refused(item, told):
    for model in (model_of("llama"), model_of("gpt2")):
        with pytest.raises(fg.SteeringError, match=told):
            fg.fold(model, item)


def test_pairing_is_checked():
    with pytest.raises(fg.HookpointError, match="layer 9"):
        fg.fold(model_of("llama"), add(layer=9))
    with pytest.raises(fg.PairingError, match="d_model 8"):
        fg.fold(model_of("llama"), fg.Add(hookpoint="model.layers.1", direction=torch.ones(8), bos=True))


def quantised(model):
    model.config.quantization_config = {"quant_method": "bitsandbytes"}


def with_adapters(model):
    model._hf_peft_config_loaded = True


def offloaded(model):
    model.model.layers[0].mlp.up_proj.to("meta")


def spread(model):
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}


def packed(model):
    packed_weight = torch.zeros(4, dtype=torch.uint8)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed_weight, requires_grad=False)


def customised(model):
    model.__class__ = type("OwnForCausalLM", (LlamaForCausalLM,), {})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (quantised, "a quantised model.*quantise the result"),
        (with_adapters, "a model with adapters.*merge them"),
        (offloaded, "offloaded.*device_map"),
        (spread, "sharded.*device_map"),
        (packed, "not floating-point"),
        (customised, "AutoModelForCausalLM loads, got an OwnForCausalLM"),
    ],
)
def test_models_that_cannot_be_saved_whole_are_refused(change, told):
    model = tiny_model("llama")
    change(model)
    with pytest.raises(fg.SteeringError, match=told):
        fg.fold(model, add())


def test_a_bare_decoder_and_a_steered_model_are_refused():
    model = model_of("llama")
    with pytest.raises(fg.SteeringError, match="AutoModelForCausalLM loads, got a LlamaModel"):
        fg.fold(model.model, add())
    with (
        pytest.raises(fg.SteeringError, match=r"being steered.*Leave the block of fgsteer.steer"),
        fg.steer(model, add()),
    ):
        fg.fold(model, add())


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "out"
    with pytest.raises(fg.FormatError, match=f"(?i)there is no folder {target.parent}"), atomic_folder(target):
        pass
    target.parent.mkdir()

    def fill(text):
        with atomic_folder(target) as folder:
            (folder / "a").write_text(text)
            (folder / "a").chmod(0o600)
            if text == "broken":
                raise RuntimeError(text)

    with pytest.raises(RuntimeError, match="broken"):
        fill("broken")
    assert list(target.parent.iterdir()) == []
    target.mkdir()
    fill("one")  # an empty folder is taken
    (tmp_path / "usual").touch()
    assert (target / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    for path in (target, target / "a"):
        with pytest.raises(fg.FormatError, match=r"(?i)a new or an empty folder"), atomic_folder(path):
            pass
    with pytest.raises(fg.FormatError, match=r"(?i)cannot write"), atomic_folder(target / "a" / "b"):
        pass
    assert (target / "a").read_text() == "one"


@pytest.fixture
def king(tmp_path):
    """A vector of the embedded default, and its file."""
    vec = fg.from_features(fg.load_sae("default"), [2588])
    vec.save(tmp_path / "king.safetensors")
    return vec, str(tmp_path / "king.safetensors")


def test_the_command_folds_the_default(tmp_path, king):
    vec, file = king
    out = tmp_path / "folded"
    options = ("fold", "--vector", file, "--coefficient", "40")
    told = json.loads(invoke(*options, "-o", str(out), "--json").stdout)
    assert told["folded"][0]["method"] == "from_features"
    assert (told["out"], told["dtype"]) == (str(out), "float32")
    plain, _ = fg.load_model("default")
    folded, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompts = ["She said that", "The next day"]
    wanted = fg.generate(plain, tokenizer, prompts, steering=vec.add(40.0, bos=True), max_new_tokens=12)
    assert fg.generate(folded, tokenizer, prompts, max_new_tokens=12) == wanted
    assert wanted != fg.generate(plain, tokenizer, prompts, max_new_tokens=12)
    ids = tokenizer(prompts[0], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad(), fg.steer(plain, vec.add(40.0, bos=True)):
        steered = plain(**ids).logits
        assert discrepancy(folded(**ids).logits, steered) < 1e-5  # float32
    with pytest.raises(fg.FormatError, match="exists"):
        invoke(*options, "-o", str(out))
    text = invoke(*options, "-o", str(tmp_path / "again"), "--dtype", "bfloat16").stdout
    assert re.search(
        r"40 x from_features \(norm [\d.]+\) at blocks\.\d\.hook_resid_post in model\S+down_proj\.bias", text
    )
    assert re.search(r"in bfloat16, rounded by 0\.00\d of the change; every token is steered, position 0 too", text)


def test_a_command_that_fails_writes_nothing(tmp_path, king):
    _, file = king
    refused = tmp_path / "model"
    model_of("mistral").save_pretrained(refused)
    word_tokenizer().save_pretrained(refused)
    with pytest.raises(fg.PairingError):
        invoke("fold", "-m", str(refused), "-v", file, "-c", "4", "-o", str(tmp_path / "out"))
    narrow = str(tmp_path / "narrow.safetensors")
    fg.SteeringVector(torch.ones(D_MODEL), "model.layers.1").save(narrow)
    with pytest.raises(fg.SteeringError, match=NO_BIAS):
        invoke("fold", "-m", str(refused), "-v", narrow, "-c", "4", "-o", str(tmp_path / "out"))
    with pytest.raises(fg.DataError, match="2 coefficients for 1 vector"):
        invoke("fold", "-v", narrow, "-c", "4", "-c", "5", "-o", str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"king.safetensors", "model", "narrow.safetensors"}


if __name__ == "__main__":
    print(table())
