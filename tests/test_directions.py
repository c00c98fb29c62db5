"""The refusal direction: candidates, scores, the rule that chooses, ablation everywhere, orthogonalised weights."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fgsteer as fg
from fgsteer.directions.candidates import template_positions
from tests.helpers.cli import invoke
from tests.helpers.steering import vector
from tests.helpers.tiny import ALL_FAMILIES, D_MODEL, model_of, tiny_model, word_tokenizer
from tests.reference import directions as reference

REFUSED = ["the man sat", "the king sat", "a dog sat down", "the man sat down"]
ANSWERED = ["a cat", "the queen", "a dog was a cat", "the day"]
# families whose sublayers, or the experts in them, end in a linear layer that writes to the stream
ABLE = {
    *("codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "falcon", "falcon, alibi", "falcon, new decoder"),
    *("gemma", "glm", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "llama", "mistral", "mixtral"),
    *("nemotron", "olmo", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("smollm3", "stablelm", "starcoder2"),
}


@pytest.fixture
def chatty():
    """A tokenizer with a chat template, whose replies begin after the word "cat"."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}a cat {% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def wide():
    """A tiny Llama in float64, in which identities hold to rounding."""
    return tiny_model("llama", dtype=torch.float64)


def ids_of(tokenizer, prompts):
    return [tokenizer(prompt)["input_ids"] for prompt in prompts]


def test_candidates_are_differences_of_means(wide, tokenizer):
    found = fg.candidate_directions(wide, tokenizer, REFUSED, ANSWERED, positions=[-1, -2], batch_tokens=12)
    naive = reference.candidates(wide, ids_of(tokenizer, REFUSED), ids_of(tokenizer, ANSWERED), [-1, -2])
    for (position, layer), expected in naive.items():
        # sums of a few float64 numbers of size 1, in another order
        assert torch.allclose(found[[-1, -2].index(position), layer], expected, atol=1e-12, rtol=0)
    assert float(found[0, 0].norm()) > 0, "these prompts end in different words"


def test_selection_equals_loops_with_plain_hooks(wide, tokenizer):
    """Every score of every candidate, and the choice, which the first of equal ones would not give."""
    tokens = [5, 9]
    held_out = (["a dog was a man", "the man was down"], ["the king was a cat", "a day"])
    options: Any = {"refusal_tokens": tokens, "held_out": held_out, "positions": [-1, -2], "filter_requests": False}
    bounds: Any = {"max_kl": None, "min_induce": None, "depth": 1.0}
    found = fg.select_direction(wide, tokenizer, REFUSED, ANSWERED, **options, **bounds)
    candidates = reference.candidates(wide, ids_of(tokenizer, REFUSED), ids_of(tokenizer, ANSWERED), [-1, -2])
    sides = [ids_of(tokenizer, side) for side in held_out]
    assert len(found.scores) == 2 * (len(wide.model.layers) - 1)
    for row in found.scores:
        r = candidates[row.position, row.layer]
        expected = reference.scores(wide, sides[0], sides[1], tokens, r, row.layer)
        # the vector is float32, so that directions differ by 6e-8 of themselves; softmax is taken in float32
        assert (row.bypass, row.induce, row.kl) == pytest.approx(expected, rel=2e-4, abs=2e-6)
    best = min(found.scores, key=lambda row: row.bypass)
    assert found.chosen == best
    assert found.vector.hookpoint == fg.Hookpoint(best.layer, "resid_pre")
    assert torch.allclose(found.vector.direction.double(), candidates[best.position, best.layer], atol=1e-6)
    assert found.vector.provenance["hyperparameters"]["refusal_tokens"] == tokens
    assert "bypass" in str(found.scores)
    assert (found.refused, found.answered) == ((4, 2), (4, 2))


def test_requests_that_are_not_as_named_are_left_out(wide, tokenizer):
    """A token that is certain after some prompts alone: the others are no refusals."""
    scores = fg.refusal_scores(wide, tokenizer, [*REFUSED, *ANSWERED], [5])[0]
    naive = [
        reference.score(reference.probabilities(wide, ids), [5]) for ids in ids_of(tokenizer, [*REFUSED, *ANSWERED])
    ]
    assert scores.tolist() == pytest.approx(naive, rel=1e-5)
    with pytest.raises(fg.DataError, match="the model refuses none"):
        fg.select_direction(wide, tokenizer, REFUSED, ANSWERED, refusal_tokens=[5], held_out=(["a dog"], ["a man"]))
    everything = list(range(len(tokenizer)))  # more than half of the vocabulary: all requests are refused, then
    assert (fg.refusal_scores(wide, tokenizer, [*REFUSED, *ANSWERED], everything) > 0).all()
    with pytest.raises(fg.DataError, match="the model answers none"):
        fg.select_direction(
            wide, tokenizer, REFUSED, ANSWERED, refusal_tokens=everything, held_out=(["a dog"], ["a man"])
        )


def row(position=-1, layer=1, bypass=0.0, induce=1.0, kl=0.01):
    return fg.DirectionScore(position, layer, bypass, induce, kl)


def test_the_rule_of_the_paper():
    best = row(bypass=-3.0)
    worse = [
        row(bypass=-2.0),
        row(bypass=-9.0, kl=0.11),
        row(bypass=-9.0, induce=-0.1),
        row(bypass=-9.0, layer=8),
        row(bypass=math.nan),
        row(bypass=-9.0, kl=math.nan),
    ]
    assert fg.choose_direction([*worse, best], 10) == best
    edge = row(bypass=-4.0, layer=7, kl=0.1, induce=0.0)  # each bound itself is allowed, and ⌊0.8 · 10⌋ is not
    assert fg.choose_direction([*worse, best, edge], 10) == edge
    assert fg.choose_direction(worse[1:4], 10, max_kl=None, min_induce=None, depth=1.0).bypass == -9.0
    with pytest.raises(fg.SelectionError, match=r"not numbers: 2; from block 8 on: 1; a KL above 0\.1: 1"):
        fg.choose_direction(worse[1:], 10)


# (position, layer, refusal, steering, KL) of Qwen-1.8B-chat, to four digits, in the runs of the paper: those
# that its filter leaves of position −2 and −1, and some of those that it does not. It chose position −2, layer 15.
PUBLISHED = [
    *[(-2, 13, -4.4953, 1.1857, 0.0757), (-2, 15, -5.0575, 1.6514, 0.0658), (-2, 16, -4.5113, 1.3602, 0.0437)],
    *[(-2, 17, -3.8590, 1.2628, 0.0638), (-2, 18, -3.5198, 1.6624, 0.0635), (-1, 13, -4.4229, 1.2732, 0.0833)],
    *[(-1, 15, -5.0224, 1.7627, 0.0688), (-1, 16, -4.4890, 1.5690, 0.0449), (-1, 17, -3.7252, 1.4029, 0.0621)],
    *[(-1, 18, -3.3104, 1.6796, 0.0640)],
]
LEFT_OUT = [(-4, 1, -8.5429, -6.5259, 7.7260), (-4, 14, -4.5228, 1.7522, 0.1424), (-4, 21, -2.8952, -1.3281, 0.0534)]


def test_stored_evaluations_of_the_paper(tmp_path):
    names = ("position", "layer", "refusal_score", "steering_score", "kl_div_score")
    rows = [dict(zip(names, values, strict=True)) for values in (*LEFT_OUT, *PUBLISHED)]
    (tmp_path / "e.json").write_text(json.dumps(rows))
    scores = fg.load_direction_scores(tmp_path / "e.json")
    chosen = fg.choose_direction(scores, 24)
    assert (chosen.position, chosen.layer, chosen.bypass) == (-2, 15, -5.0575)
    assert fg.choose_direction(scores, 24, max_kl=None, min_induce=None).layer == 1
    with pytest.raises(fg.SelectionError, match="3 candidates"):
        fg.choose_direction(scores[:3], 24)
    for damaged in ("[{}]", "{", '[{"position": "x"}]'):
        (tmp_path / "e.json").write_text(damaged)
        with pytest.raises(fg.FormatError, match=r"kl_div_score|JSON|json"):
            fg.load_direction_scores(tmp_path / "e.json")


def test_what_stands_between_instruction_and_reply(llama, chatty, tokenizer):
    assert template_positions(llama, tokenizer) == [-1]
    llama = tiny_model("llama")
    llama.generation_config.eos_token_id = [1, 2]
    places = template_positions(llama, chatty)
    asked = chatty.apply_chat_template([{"role": "user", "content": "the king"}], add_generation_prompt=True)
    after = asked["input_ids"] if hasattr(asked, "keys") else asked
    other = chatty.apply_chat_template([{"role": "user", "content": "a dog"}], add_generation_prompt=True)
    other = other["input_ids"] if hasattr(other, "keys") else other
    assert after[places[0] :] == other[places[0] :], "the same for every instruction"
    assert places == list(range(-len(places), 0))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"positions": [0]}, fg.DataError, "below 0"),
        ({"positions": [-1, -1]}, fg.DataError, "below 0"),
        ({"positions": [-9]}, fg.DataError, "at least 9 tokens"),
        ({"layers": [0]}, fg.DataError, "layers from 1"),
        ({"layers": [9]}, fg.DataError, "layers from 1"),
        ({"refusal_tokens": ["the king"]}, fg.DataError, "one token"),
        ({"refusal_tokens": "the"}, fg.DataError, "a list"),
        ({"refusal_tokens": [10**6]}, fg.DataError, "an id from 0"),
        ({"refusal_tokens": []}, fg.DataError, "at least one token"),
        ({"layers": [1, 1]}, fg.DataError, "each once"),
        ({"layers": 1}, fg.DataError, "a list of layers"),
        ({"held_out": None}, fg.DataError, "two lists"),
        ({"held_out": (["a"], ["b"], ["c"])}, fg.DataError, "two lists"),
        ({"depth": float("nan")}, fg.DataError, "depth"),
        ({"max_kl": float("nan")}, fg.DataError, "max_kl"),
        ({"refusal_tokens": 5}, fg.DataError, "a list of tokens"),
        ({"max_kl": 0.0}, fg.SelectionError, r"a KL above 0\.0: 1"),
    ],
)
def test_what_cannot_be_selected_is_refused(wide, tokenizer, change, error, match):
    held_out = (["a dog was a man"], ["the king was a cat"])
    options: Any = {"refusal_tokens": [5], "held_out": held_out, "filter_requests": False, "layers": [1]}
    with pytest.raises(error, match=match):
        fg.select_direction(wide, tokenizer, REFUSED, ANSWERED, **{**options, **change})


# ---------------------------------------------------------------- removal


def test_ablation_everywhere_leaves_nothing_of_the_direction(wide):
    v = vector(3)
    ids = torch.tensor([[0, 5, 6, 7]])
    places = [fg.Hookpoint(layer, "resid_post") for layer in range(len(wide.model.layers))]
    with fg.steer(wide, fg.ablate_everywhere(wide, v)):
        acts = fg.record(wide, ids, None, places)
        steered = wide(ids).logits
    unit = v.direction.double() / v.direction.double().norm()
    for h in acts.values():
        assert float((h @ unit).abs().amax()) < 5e-7  # hooks keep r̂ in float32; the activations are of size 1
    with reference.hooked(reference.removal_hooks(wide, v.direction.double())):
        assert torch.allclose(steered, wide(ids).logits, atol=1e-6, rtol=0)
    assert {item.scope for item in fg.ablate_everywhere(wide, v, scope="generated")} == {"generated"}
    with pytest.raises(fg.HookpointError):
        fg.ablate_everywhere(model_of("bloom"), v)


@pytest.mark.parametrize("family", sorted(ABLE))
def test_orthogonalised_weights_equal_hooks(family, tmp_path):
    """In every family that allows them, through a saved checkpoint too; the model itself stays as it is."""
    model = tiny_model(family)
    v = vector(4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    changed = fg.orthogonalize(model, v)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    ids = torch.tensor([[0, 5, 6, 7, 3]])
    with fg.steer(model, fg.ablate_everywhere(model, v)):
        hooked = model(ids).logits
    # float32 sums in another order, through blocks that magnify them, against logits of size 1 to 10
    assert torch.allclose(changed(ids).logits, hooked, atol=2e-4, rtol=0)
    assert not torch.allclose(hooked, model(ids).logits, atol=0.01)
    changed.save_pretrained(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, changed(ids).logits)
    assert loaded.config.fgsteer["orthogonalised"][0]["direction_sha256"]


@pytest.mark.parametrize("family", sorted({*ALL_FAMILIES} - ABLE))
def test_other_families_are_refused(family):
    with pytest.raises(fg.FgsteerError, match=r"ablate_everywhere|width|class that Auto"):
        fg.orthogonalize(model_of(family), vector(4))


def test_tied_embeddings_are_untied():
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    head = model.lm_head.weight.clone()
    changed = fg.orthogonalize(model, vector(5))
    assert changed.config.tie_word_embeddings is False
    assert torch.equal(changed.lm_head.weight, head)
    assert not torch.equal(changed.model.embed_tokens.weight, head)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "the model itself stays as it is"
    same = fg.orthogonalize(model, vector(5), copy=False)
    assert same is model
    assert torch.equal(same.model.embed_tokens.weight, changed.model.embed_tokens.weight)


def test_several_directions_are_removed_together(wide):
    """One after the other would put back what they have in common."""
    a = vector(6).direction
    vectors = [fg.SteeringVector(a, 1), fg.SteeringVector(0.7 * a + vector(7).direction, 1)]
    changed = fg.orthogonalize(wide, vectors)
    ids = torch.tensor([[0, 5, 6, 7, 3]])
    places = [fg.Hookpoint(layer) for layer in range(len(wide.model.layers))]
    for acts in (
        fg.record(changed, ids, None, places),
        recorded(wide, fg.ablate_everywhere(wide, vectors), ids, places),
    ):
        for h in acts.values():
            for v in vectors:
                unit = v.direction.double() / v.direction.double().norm()
                assert float((h @ unit).abs().amax()) < 5e-6  # hooks keep float32 directions
    assert len(changed.config.fgsteer["orthogonalised"]) == 2
    with pytest.raises(fg.SteeringError, match="orthogonalised already"):
        fg.orthogonalize(changed, vector(8))
    with pytest.raises(fg.SteeringError, match="make up"):
        fg.orthogonalize(wide, [vectors[0], vectors[0] * 2.0])


def test_the_command_writes_a_checkpoint_without_directions(tmp_path):
    """Of one vector or several, in float32 or another dtype; what it writes computes what hooks compute."""
    wide, tokenizer = fg.load_model("default", device="cpu", dtype="float32")
    files = []
    for seed in (6, 7):
        files.append(tmp_path / f"{seed}.safetensors")
        draw = torch.Generator().manual_seed(seed)
        fg.SteeringVector(torch.randn(wide.config.hidden_size, generator=draw), 1).save(files[-1])
    out = tmp_path / "without"
    told = json.loads(invoke("orthogonalize", "-v", files[0], "-v", files[1], "-o", out, "--json").stdout)
    assert [told[key] for key in ("out", "model", "dtype")] == [str(out), "default", "float32"]
    assert len(told["orthogonalised"]) == 2
    changed, its_tokenizer = (Auto.from_pretrained(out) for Auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = its_tokenizer("She said that", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    vectors = [fg.SteeringVector.load(file) for file in files]
    with torch.no_grad():
        plain = wide(ids).logits
        with fg.steer(wide, fg.ablate_everywhere(wide, vectors)):
            hooked = wide(ids).logits
        # float32 sums in another order, through four blocks, against logits of size 10
        assert torch.allclose(changed(ids).logits, hooked, atol=1e-3, rtol=0)
    assert not torch.allclose(plain, hooked, atol=0.1)
    assert tokenizer.get_vocab() == its_tokenizer.get_vocab()
    shown = invoke("orthogonalize", "-v", files[0], "-o", tmp_path / "one", "--dtype", "bfloat16").stdout
    assert shown == f"{tmp_path / 'one'}: default in bfloat16, without 1 direction\n"
    with pytest.raises(fg.FormatError, match="exists"):
        invoke("orthogonalize", "-v", files[0], "-o", out)


def test_a_command_that_cannot_orthogonalise_writes_nothing(tmp_path):
    narrow, out = tmp_path / "narrow.safetensors", tmp_path / "without"
    vector(4).save(narrow)
    with pytest.raises(fg.PairingError, match="made for another model"):
        invoke("orthogonalize", "-v", narrow, "-o", out)
    model_of("bloom").save_pretrained(tmp_path / "bloom")
    word_tokenizer().save_pretrained(tmp_path / "bloom")
    with pytest.raises(fg.SteeringError, match="ablate_everywhere"):
        invoke("orthogonalize", "-m", tmp_path / "bloom", "-v", narrow, "-o", out)
    assert not out.exists()


def recorded(model, steering, ids, places):
    with fg.steer(model, steering):
        return fg.record(model, ids, None, places)


def test_a_model_in_training_and_one_with_another_writer(tokenizer):
    """Dropout is no writer; something else that writes the direction is refused, in bfloat16 too."""
    model = tiny_model("gpt2").train()
    changed = fg.orthogonalize(model, vector(4))
    assert changed.training
    for dtype in (torch.float32, torch.bfloat16):
        other = tiny_model("llama", dtype=dtype)
        v = vector(4)
        extra = 0.2 * v.direction.to(dtype) / v.norm * 3
        other.model.layers[0].register_forward_hook(lambda _, __, output, extra=extra: output + extra)
        with pytest.raises(fg.SteeringError, match="Something else writes"):
            fg.orthogonalize(other, v)


def test_prompts_that_do_not_fit_are_refused(tokenizer):
    model = model_of("gpt2")
    with pytest.raises(fg.DataError, match="the model's window"):
        fg.refusal_scores(model, tokenizer, ["the man sat " * 40], [5])


def test_held_out_requests_that_are_not_held_out_are_told_of(wide, tokenizer):
    options: Any = {"refusal_tokens": [5], "filter_requests": False, "max_kl": None, "min_induce": None, "depth": 1.0}
    with pytest.warns(fg.FgsteerWarning, match="4 held-out requests of the refused ones"):
        fg.select_direction(
            wide, tokenizer, REFUSED, ANSWERED, layers=[1], held_out=(REFUSED, ["the night"]), **options
        )


def test_what_cannot_be_orthogonalised_is_refused(llama):
    with pytest.raises(fg.PairingError, match="width"):
        fg.orthogonalize(llama, fg.SteeringVector(torch.ones(D_MODEL + 1), 1))
    with pytest.raises(fg.SteeringError, match=r"zero|norm"):
        fg.orthogonalize(llama, fg.SteeringVector(torch.zeros(D_MODEL), 1))
    with fg.steer(llama, vector(1).add(1.0)), pytest.raises(fg.SteeringError, match="being steered"):
        fg.orthogonalize(llama, vector(1))
