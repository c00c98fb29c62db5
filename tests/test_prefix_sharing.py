"""What several texts begin with is run once, and statistics are those of every text run alone."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

import fgsteer as fg
from fgsteer.activations.batches import Batch, batch_rows
from fgsteer.activations.prefixes import batch_rows_by_prefix, choose_batching, group_by_prefix, pooling_index
from fgsteer.activations.tokens import TokenRow
from fgsteer.models.hookpoints import blocks_of, resolve
from tests.helpers.examples import LONG
from tests.helpers.saes import make_sae
from tests.helpers.steering import vector
from tests.helpers.tiny import ALL_FAMILIES, D_MODEL, HYBRIDS, NO_SUBLAYERS, ODD_FAMILIES, SITES, model_of, tiny_model
from tests.reference import sparse as reference

PROMPTS = ["the man said yes and the dog sat on bread ?", LONG, f"a cat ran to {LONG}", "is it war ?"]
PAIRS = [fg.ContrastPair("( A )", "( B )", prompt) for prompt in PROMPTS]
PAIRS += [fg.ContrastPair("( B", "A", PROMPTS[0]), fg.ContrastPair("C", "( C ) .", PROMPTS[1])]  # groups of four
PAIRS += [fg.ContrastPair("A yes yes yes", "A yes yes yes", LONG)]  # one text on both sides
UNPAIRED = ["the man said A", "the film is B"], [f"{LONG} A", "the ship was B", "C dog sat on bread"]
SET = fg.ContrastSet("answers", PAIRS, positives=UNPAIRED[0], negatives=UNPAIRED[1])
RULES = ("all", "last", "answer", "letter", 3, -2)


def sites_of(family):
    return [fg.Hookpoint(1, site) for site in (SITES[:2] if family in NO_SUBLAYERS else SITES)]


def alone(model, tokenizer, text, hookpoints):
    """Activations (tokens, d_model) at each hookpoint, of one text in a plain pass of the whole model."""
    kept, handles = {}, []

    def keep(at, value):
        kept[at] = value.detach().clone().reshape(-1, D_MODEL)

    for at in hookpoints:
        module, is_input = resolve(model, at)
        if is_input:
            hook = lambda _, args, kwargs, at=at: keep(at, args[0] if args else kwargs["hidden_states"])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            hook = lambda _, __, out, at=at: keep(at, out[0] if isinstance(out, tuple | list) else out)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(tokenizer(text, return_tensors="pt")["input_ids"], use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def read_places(words, before, rule, bos):
    """Places among <s> and the words, of which ``before`` are the prompt's; written from collect's docstring."""
    first = 0 if bos else 1
    everything = list(range(len(words) + 1))
    if rule == "all":
        return everything[first:]
    if rule == "answer":
        return everything[max(first, before + 1) :] if before else everything[first:]
    if rule == "letter":
        return [n for n, word in enumerate(words, 1) if n > before and word in ("A", "B", "C")]
    return [everything[-1 if rule == "last" else rule]]


def naive_sides(model, tokenizer, hookpoints, rules, sae=None):
    """{(rule, hookpoint or "feature", positive): one mean a text}, every text run alone."""
    found = {}
    for positive in (True, False):
        prompt: Any
        for prompt, completion in SET.side(positive):
            words = f"{prompt} {completion}".split()
            acts = alone(model, tokenizer, " ".join(words), hookpoints)
            if sae is not None:
                acts["feature"] = sae.encode(acts[sae.hookpoint])
            for rule, bos in rules:
                places = read_places(words, len(prompt.split()), rule, bos)
                for at, h in acts.items():
                    mean = np.mean([h[place].numpy() for place in places], 0)
                    found.setdefault((rule, bos, at, positive), []).append(mean)
    return found


def check(model, tokenizer, family, rules, sae=None):
    """collect against the naive loop under each (rule, bos), in one batch and in several."""
    hookpoints = sites_of(family)
    naive = naive_sides(model, tokenizer, hookpoints, rules, sae)
    for rule, bos in rules:
        for batch_tokens in (10_000, 150):
            stats = fg.collect(
                model, tokenizer, SET, sae=sae, hookpoints=hookpoints, tokens=rule, bos=bos, batch_tokens=batch_tokens
            )
            for at in [*hookpoints, *([] if sae is None else ["feature"])]:
                contrast = stats.feature[sae.hookpoint] if at == "feature" else stats.residual[at]
                for side in ("positive", "negative"):
                    count, mean, m2 = reference.moments(naive[rule, bos, at, side == "positive"])
                    got = getattr(contrast, side)
                    assert got.count == count
                    # float32 forward passes at other batch shapes
                    size = max(1.0, np.abs(mean).max())
                    assert np.allclose(got.mean.numpy(), mean, rtol=1e-4, atol=1e-5 * size), (rule, at, side)
                    assert np.allclose(got.m2.numpy(), m2, rtol=1e-3, atol=1e-4 * size**2), (rule, at, side)


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
@pytest.mark.filterwarnings("ignore:.*attention sinks")  # that a random Mamba has
def test_every_family_equals_one_text_at_a_time(family, tokenizer):
    """Sliding windows shorter than the prefix, ALiBi, learned positions and experts among them."""
    if family in ("nemotron_h", "zamba2") and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("before 5.20 their scan in chunks itself differs by 1e-4 with the padding after a text")
    model = model_of(family)
    unknown = family in HYBRIDS or family in ODD_FAMILIES
    assert choose_batching(model) is (batch_rows if unknown else batch_rows_by_prefix)
    check(model, tokenizer, family, [("all", False), ("last", False)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom"])
def test_every_rule_equals_one_text_at_a_time(family, attention, tokenizer):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    check(model, tokenizer, family, [(rule, bos) for rule in RULES for bos in (False, True)], make_sae())


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "gated"])
def test_features_of_shared_tokens_count_for_every_text(activation, tokenizer, monkeypatch):
    check(model_of("llama"), tokenizer, "llama", [("all", True)], make_sae(activation))
    monkeypatch.setattr("fgsteer.activations.pooling.ENCODE_ELEMENTS", 24 * 7)  # seven tokens are encoded at a time
    check(model_of("llama"), tokenizer, "llama", [("all", False)], make_sae(activation))


def test_examples_kept_stay_in_order(llama, tokenizer):
    at = fg.Hookpoint(1)
    naive = naive_sides(llama, tokenizer, [at], [("all", False)])
    kept = fg.collect(llama, tokenizer, SET, hookpoints=[at], keep_pooled=True).pooled[at]
    assert kept.pairs == len(PAIRS)
    for rows, positive in ((kept.positive, True), (kept.negative, False)):
        # float32 forward passes at other batch shapes
        assert np.allclose(rows.numpy(), naive["all", False, at, positive], atol=1e-5)


def tokens_run(model, tokenizer, data, **options):
    """Tokens, padding included, that go through the embedding."""
    counts = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, __: counts.append(args[0].numel()))
    stats = fg.collect(model, tokenizer, data, hookpoints="blocks.1.hook_resid_post", **options)
    handle.remove()
    return sum(counts), stats


def test_answers_to_a_prompt_cost_half(llama, tokenizer):
    words = LONG.split()
    prompts = [" ".join([*words[n:], *words[:n], *words]) for n in range(12)]  # 38 words
    data = [fg.ContrastPair("A", "B", prompt) for prompt in prompts]
    shared, _ = tokens_run(llama, tokenizer, data, tokens="last")
    apart, _ = tokens_run(llama, tokenizer, data, tokens="last", share_prefixes=False)
    assert apart == 24 * 40
    assert shared == 12 * 39 + 24


def test_pairs_meet_although_windows_are_short(llama, tokenizer, monkeypatch):
    monkeypatch.setattr("fgsteer.activations.tokens.TEXTS_PER_CHUNK", 4)
    data = [fg.ContrastPair("A", "B", f"{word} {LONG}") for word in LONG.split()[:10]]
    shared, _ = tokens_run(llama, tokenizer, data)
    apart, _ = tokens_run(llama, tokenizer, data, share_prefixes=False)
    assert shared < 0.6 * apart


def test_texts_that_share_little_take_the_plain_path(llama, tokenizer):
    pair = fg.ContrastPair("A", "B", "the man said")  # saves four tokens of some forty
    data = fg.ContrastSet("x", [pair], positives=[LONG, "the bride wore a ring"], negatives=["a dog sat"])
    shared, ours = tokens_run(llama, tokenizer, data)
    apart, plain = tokens_run(llama, tokenizer, data, share_prefixes=False)
    assert shared == apart
    assert torch.equal(ours.at("residual")[1].difference, plain.at("residual")[1].difference)


rows_of_tokens = st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(5, 7), min_size=1, max_size=6)), min_size=1)


@settings(max_examples=60, deadline=None)
@given(rows_of_tokens, st.integers(1, 80), st.randoms(use_true_random=False))
def test_batches_hold_every_row_once_and_keep_the_bound(drawn, batch_tokens, random):
    rows = []
    for index, (kind, tail) in enumerate(drawn):
        ids = [*range(kind * 20, kind * 20 + 3 * kind), *tail]
        rows.append(TokenRow(ids, sorted(random.sample(range(len(ids)), random.randint(1, len(ids)))), index))
    seen = []
    for batch in batch_rows_by_prefix(rows, batch_tokens=batch_tokens, pad_id=99, device="cpu"):
        seen += [row.index for row in batch.rows]
        if isinstance(batch, Batch):
            assert batch.ids.numel() <= batch_tokens or len(batch.rows) == 1
            continue
        before, after = batch.prefixes, batch.rest
        assert before.ids.numel() + after.ids.numel() <= batch_tokens
        assert len(batch.rows) * (before.ids.shape[1] + after.ids.shape[1]) <= 2 * batch_tokens
        reads = pooling_index(batch)
        told = [
            (number, number_in) for part in (before, after) for number, number_in in part.selected.nonzero().tolist()
        ]
        for number, row in enumerate(batch.rows):
            prefix = batch.prefix_of[number]
            head = before.ids[prefix][before.attention[prefix] == 1].tolist()
            assert head + after.ids[number][after.attention[number] == 1].tolist() == row.ids
            width = before.ids.shape[1]
            read = []
            for source in reads.source[reads.owner == number].tolist():
                owner, column = told[source]
                inside = source < int(before.selected.sum())
                assert owner == (int(prefix) if inside else number)
                read.append(column - (width - len(head)) if inside else column + len(head))
            assert sorted(read) == list(row.selected)
    assert sorted(seen) == list(range(len(rows)))


def test_groups_share_half_of_each_row():
    rows = [
        TokenRow(ids, [0], n) for n, ids in enumerate([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 9, 9, 9], [7], [7]])
    ]
    assert [([row.index for row in g.rows], g.shared, g.saved) for g in group_by_prefix(rows)] == [
        ([0, 1], 4, 4),
        ([2], 4, 0),
        ([3], 0, 0),
        ([4], 0, 0),
    ]


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "reply"])
def test_steered_reading_is_not_shared(scope, llama, tokenizer):
    """A scope tells the prompt by the first pass: in two passes it would end with the prefix."""
    item = vector(1, layer=0).add(4.0, scope=scope)
    compiled: Any = torch.compile(llama, backend="eager")
    with fg.steer(llama, item):
        assert choose_batching(llama) is batch_rows
        assert choose_batching(compiled) is batch_rows  # whose generate the block does not set
    assert choose_batching(llama) is choose_batching(compiled) is batch_rows_by_prefix


def test_models_where_it_might_not_hold_are_not_shared():
    other, rotary = copy.deepcopy(model_of("llama")), copy.deepcopy(model_of("llama"))
    for block in blocks_of(other):
        block.__class__ = type("OtherDecoderLayer", (type(block),), {})
    assert choose_batching(other) is batch_rows
    rotary.model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert choose_batching(rotary) is batch_rows


MEMORY = """
import resource, sys
import fgsteer as fg
from tests.helpers.saes import make_sae
from tests.helpers.tiny import WORDS, tiny_model, word_tokenizer

model, tokenizer, sae = tiny_model("llama"), word_tokenizer(), make_sae(d_sae=4096)
def peak(texts):
    pairs = [fg.ContrastPair("A", "B", f"{WORDS[n % 60]} {WORDS[n // 60 % 60]} said") for n in range(texts // 2)]
    fg.collect(model, tokenizer, pairs, sae=sae, tokens="answer", batch_tokens=256)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(peak(100), peak(5000))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts():
    """5,000 texts' features would be 80 MB; the window of tokenised texts, which is bounded, is a fifth of that."""
    code = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    few, many = map(float, code.stdout.split())
    assert many - few < 40


@pytest.mark.gpu
def test_gpu_twin(tokenizer):
    sae, differences = make_sae("jumprelu"), []
    for device in ("cpu", "cuda"):
        stats = fg.collect(tiny_model("gemma3").to(device), tokenizer, SET, sae=sae)
        differences.append([stats.at(space)[1].difference for space in ("residual", "feature")])
    for cpu, cuda in zip(*differences, strict=True):
        assert torch.allclose(cpu, cuda, rtol=1e-4, atol=1e-4 * float(cpu.abs().max()))  # float32 sums
