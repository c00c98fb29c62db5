"""Real architectures: every site of every block, names, reading, steering; and the table in docs/reference/models.md.

python -m tests.test_families   prints the table.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.activations.outputs import hidden_states_of, reshape_by_token
from fgsteer.models.hookpoints import _SUBLAYERS, blocks_of, resolve
from fgsteer.models.pairing import model_identity
from fgsteer.models.properties import d_model
from fgsteer.models.unembedding import logit_lens
from tests.helpers.examples import DOWN, SET, UP, naive_examples
from tests.helpers.saes import make_sae
from tests.helpers.steering import batch, rows_of, run, vector
from tests.helpers.tiny import (
    D_MODEL,
    FAMILIES,
    HYBRIDS,
    LAYERS,
    MORE_FAMILIES,
    NO_SUBLAYERS,
    OTHER_FAMILIES,
    SITES,
    model_of,
    tiny_model,
    word_tokenizer,
)
from tests.reference import sparse as reference

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "models.md"
# title and what is special about the blocks, of the families in the table
ABOUT = {
    "llama": ("Llama", ""),
    "mistral": ("Mistral", ""),
    "mixtral": ("Mixtral", "experts"),
    "qwen2": ("Qwen 2", ""),
    "qwen3": ("Qwen 3", ""),
    "qwen3_moe": ("Qwen 3 MoE", "experts"),
    "gemma2": ("Gemma 2", "post-norms"),
    "gemma3": ("Gemma 3, text", "post-norms"),
    "gemma3 with vision": ("Gemma 3, with vision", "post-norms; text inputs"),
    "gemma4": ("Gemma 4, text", ""),
    "olmo2": ("OLMo 2", "post-norms only"),
    "phi": ("Phi", "parallel"),
    "phi3": ("Phi 3", ""),
    "cohere": ("Cohere", "parallel"),
    "gpt_oss": ("gpt-oss", "experts"),
    "gpt2": ("GPT-2", ""),
    "gpt_neox": ("GPT-NeoX", "parallel"),
    "falcon": ("Falcon", "parallel"),
    "falcon, new decoder": ("Falcon, new decoder", "parallel, two norms"),
    "falcon, alibi": ("Falcon, RW", "sequential, ALiBi"),
    "opt": ("OPT", "mlp_out is that of fc2"),
    "opt, post-norm": ("OPT, 350m", ""),
    "granite": ("Granite", ""),
    "bloom": ("BLOOM", ""),
    "mamba": ("Mamba", "state space"),
    "mamba2": ("Mamba 2", "state space"),
    "qwen3_5": ("Qwen 3.5, text", "gated delta nets, attention"),
    "qwen3_next": ("Qwen 3 Next", "gated delta nets, attention, experts"),
    "lfm2": ("LFM 2", "convolutions, attention"),
    "falcon_h1": ("Falcon H1", "Mamba 2 beside attention"),
    "nemotron_h": ("Nemotron H", "Mamba 2, attention, MLPs: one a block"),
    "granitemoehybrid": ("Granite 4, hybrid", "Mamba 2, attention, experts"),
    "jamba": ("Jamba", "Mamba, attention, experts"),
    "bamba": ("Bamba", "Mamba 2, attention"),
    "zamba2": ("Zamba 2", "Mamba 2, shared attention"),
    "recurrent_gemma": ("RecurrentGemma", "recurrences, which read left padding; attention"),
}
STEERED = [*sorted(MORE_FAMILIES), *HYBRIDS]
SUBLAYERED = [family for family in (*FAMILIES, *STEERED) if family not in NO_SUBLAYERS]


def refusal(model, site):
    """The reason for which a site is refused, or "" where it is not."""
    try:
        resolve(model, fg.Hookpoint(0, site))
    except fg.HookpointError as error:
        return re.split(r"; |: |\. ", str(error))[1]
    return ""


def discrepancy(model, layer, ids, sites):
    """Largest |resid_pre + sites − resid_post| of a block, relative to the largest activation."""
    points = [fg.Hookpoint(layer, site) for site in ("resid_pre", *sites, "resid_post")]
    *terms, after = (acts.double() for acts in fg.record(model, ids, None, points).values())
    return float((sum(terms) - after).abs().max() / after.abs().max())


def works(model, site):
    """Whether a site holds in every block: residual streams join up, sublayers add up to the block."""
    ids = torch.tensor([[0, 5, 9, 40, 7, 12], [0, 33, 4, 21, 6, 50]])
    if refusal(model, site):
        return False
    if site in ("attn_out", "mlp_out"):
        # float32 sums of three terms
        return all(discrepancy(model, layer, ids, ("attn_out", "mlp_out")) < 1e-5 for layer in range(LAYERS))
    after = [fg.Hookpoint(layer, "resid_post") for layer in range(LAYERS - 1)]
    before = [fg.Hookpoint(layer + 1, "resid_pre") for layer in range(LAYERS - 1)]
    acts = fg.record(model, ids, None, [*after, *before, fg.Hookpoint(0, "resid_pre"), fg.Hookpoint(LAYERS - 1)])
    return all(torch.equal(acts[a], acts[b]) for a, b in zip(after, before, strict=True))


def table():
    """Which site of which family holds, in Markdown."""
    lines = [f"| model | {' | '.join(SITES)} | blocks |", "|---" * (len(SITES) + 2) + "|"]
    for family, (title, note) in ABOUT.items():
        model = model_of(family)
        marks = ["✓" if works(model, site) else "–" for site in SITES]
        lines.append(f"| {title} | {' | '.join(marks)} | {note or refusal(model, 'mlp_out')} |")
    checked = ", ".join(family for family in OTHER_FAMILIES if all(works(model_of(family), s) for s in SITES))
    lines += ["", f"All four sites also hold in: {checked}."]
    return "\n".join(lines)


def test_the_docs_have_the_table():
    block = re.search(r"<!-- families -->\n(.*?)\n<!-- /families -->", PAGE.read_text(encoding="utf-8"), re.S)
    assert block, f"{PAGE} has no families block"
    assert block[1] == table(), "print the table with: python -m tests.test_families"


@pytest.mark.parametrize("family", [*FAMILIES, *STEERED, *OTHER_FAMILIES])
def test_every_site_holds_or_is_refused(family):
    model = model_of(family)
    for site in SITES:
        if family in NO_SUBLAYERS and site in ("attn_out", "mlp_out"):
            with pytest.raises(fg.HookpointError, match=f"{NO_SUBLAYERS[family]}.*resid_post"):
                resolve(model, fg.Hookpoint(0, site))
        else:
            assert works(model, site), site


def test_every_known_block_is_checked():
    seen = {type(blocks_of(model_of(f))[0]).__name__ for f in (*FAMILIES, *MORE_FAMILIES, *OTHER_FAMILIES)}
    assert set(_SUBLAYERS) <= seen


def test_an_unknown_block_is_refused_at_its_sublayers():
    model = copy.deepcopy(model_of("llama"))
    for block in blocks_of(model):
        block.__class__ = type("OtherDecoderLayer", (type(block),), {})
    assert resolve(model, fg.Hookpoint(1)) == (blocks_of(model)[1], False)
    with pytest.raises(fg.HookpointError, match=r"OtherDecoderLayer: .* not known"):
        resolve(model, fg.Hookpoint(1, "mlp_out"))


def test_several_residual_streams_are_refused():
    flat = torch.randn(6, 32)
    assert torch.equal(reshape_by_token(flat, 2, 3), flat.view(2, 3, 32))
    with pytest.raises(fg.HookpointError, match="residual streams"):
        reshape_by_token(torch.zeros(2, 3, 4, 32), 2, 3)  # the shape of DeepSeek-V4's


@pytest.mark.parametrize("family", [*FAMILIES, *STEERED])
def test_module_names_resolve_to_their_modules(family):
    """The names of PyTorch's own table, of blocks and of what sublayers add, lead back to the modules."""
    model = model_of(family)
    names = {module: name for name, module in model.named_modules()}
    for layer, block in enumerate(blocks_of(model)):
        for name in (names[block], f"{names[block]}.output"):
            assert resolve(model, fg.Hookpoint.parse(name)) == (block, False)
        assert resolve(model, fg.Hookpoint.parse(f"{names[block]}.input")) == (block, True)
        for site in () if family in NO_SUBLAYERS else ("attn_out", "mlp_out"):
            module, _ = resolve(model, fg.Hookpoint.parse(f"blocks.{layer}.hook_{site}"))
            if names[module].endswith("post_attention_layernorm"):
                continue  # refused: the same name is the MLP's norm elsewhere
            for name in (names[module], f"{names[module]}.output"):
                assert resolve(model, fg.Hookpoint.parse(name)) == (module, False)
    assert model_identity(model)["layers"] == LAYERS
    assert model_identity(model)["d_model"] == d_model(model) == D_MODEL


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_a_module_before_its_post_norm_is_no_site(family):
    for name in ("mlp", "self_attn"):
        with pytest.raises(fg.HookpointError, match=r"post_\w+_layernorm.*hook_(mlp|attn)_out"):
            resolve(model_of(family), fg.Hookpoint.parse(f"model.layers.1.{name}"))


def test_blocks_of_a_vision_tower_are_not_the_models():
    model = model_of("gemma3 with vision")
    towers = [name for name, _ in model.named_modules() if re.search(r"vision.*\.layers\.0$", name)]
    assert towers
    for name in towers:
        with pytest.raises(fg.HookpointError):
            fg.Hookpoint.parse(name)


@pytest.mark.parametrize("family", [*FAMILIES, *(f for f in STEERED if f != "recurrent_gemma")])  # reads left padding
def test_mixed_rows_equal_the_recompute(family):
    """Left padding, a cache, another composition in each row; sublayers where they are sites."""
    model, tokenizer = model_of(family), word_tokenizer()
    sublayers = family in SUBLAYERED
    first = [vector(1).add(2.0), *([vector(2, site="mlp_out").add(2.0)] if sublayers else [])]
    third = vector(3, layer=0, site="attn_out" if sublayers else "resid_post").affine(0.7, scope="reply")
    expected = rows_of(model, tokenizer, [first, [], [third]])
    assert run(model, batch(tokenizer), [first, None, third]) == expected
    assert expected != rows_of(model, tokenizer, [[], [], []])


def last_block(model, inputs):
    """Output (batch, tokens, d_model) of the last block in a plain forward pass of the whole model."""
    kept = []
    handle = blocks_of(model)[-1].register_forward_hook(lambda _, __, out: kept.append(hidden_states_of(out)))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("family", STEERED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_forward_touches_real_tokens_only(family, side):
    model, inputs = model_of(family), batch(word_tokenizer(), side)
    real = inputs["attention_mask"].bool()
    plain = last_block(model, inputs)
    with fg.steer(model, vector(1, layer=LAYERS - 1).add(1.0)):
        steered = last_block(model, inputs)
    assert torch.equal((steered != plain).any(-1), real & ~(real & (real.cumsum(1) == 1)))


@pytest.mark.parametrize("family", STEERED)
@pytest.mark.filterwarnings("ignore:.*attention sinks")  # that a random Mamba has
def test_collect_equals_one_text_at_a_time(family):
    model, tokenizer, sae = model_of(family), word_tokenizer(), make_sae()
    sites = SITES if family in SUBLAYERED else SITES[:2]
    stats = fg.collect(model, tokenizer, SET, sae=sae, hookpoints=[f"blocks.0.hook_{site}" for site in sites])
    cases = [(fg.Hookpoint(0, site), "residual", None) for site in sites] + [(sae.hookpoint, "feature", sae)]
    for at, space, encoder in cases:
        _, contrast = stats.at(space, at)
        for side, texts in (("positive", UP), ("negative", DOWN)):
            count, mean, m2 = reference.moments(naive_examples(model, tokenizer, texts, at, encoder))
            got = getattr(contrast, side)
            assert got.count == count
            # float32 forward passes at other batch shapes
            assert np.allclose(got.mean.numpy(), mean, rtol=1e-4, atol=1e-4)
            assert np.allclose(got.m2.numpy(), m2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", STEERED)
def test_record_stops_at_the_last_hookpoint(family):
    model, ran = model_of(family), []
    handles = [b.register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n, b in enumerate(blocks_of(model))]
    fg.record(model, torch.tensor([[0, 5, 9]]), None, [fg.Hookpoint(1), fg.Hookpoint(0, "resid_pre")])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


@pytest.mark.parametrize("family", STEERED)
def test_logit_lens_is_what_the_model_does_after_its_last_block(family):
    """U(norm(v)) − U(norm(0)), from the model itself run with v and with 0 for its last block's output."""
    model = model_of(family)
    v = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(4))
    logits = []
    for h in (v, torch.zeros_like(v)):

        def replace(_, __, out, h=h):
            return (h[None], *out[1:]) if isinstance(out, tuple) else h[None]

        handle = blocks_of(model)[-1].register_forward_hook(replace)
        with torch.no_grad():
            logits.append(model(torch.tensor([[0, 5, 9]]), use_cache=False).logits[0])
        handle.remove()
    # float32, logits of size ~10
    assert torch.allclose(logit_lens(model, v), logits[0] - logits[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ["gemma3", "falcon", "mixtral", "opt"])
def test_bfloat16(family):
    model, tokenizer = tiny_model(family, dtype=torch.bfloat16), word_tokenizer()
    inputs = batch(tokenizer)
    for layer in range(LAYERS):
        # two sums rounded to 8 bits
        assert discrepancy(model, layer, inputs["input_ids"], ("attn_out", "mlp_out")) < 2 * 2**-8
    stats = fg.collect(model, tokenizer, SET, hookpoints="blocks.1.hook_mlp_out")
    assert torch.isfinite(stats.at("residual")[1].difference).all()
    at, item = fg.Hookpoint(1, "mlp_out"), vector(1, site="mlp_out").clamp(5.0, bos=True)
    with torch.no_grad():
        plain = model(**inputs).logits
        with fg.steer(model, [item, None, item]):
            mixed = model(**inputs).logits
            h = fg.record(model, inputs["input_ids"], inputs["attention_mask"], [at])[at]
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(mixed[0], plain[0])
    real = inputs["attention_mask"].bool()
    reached = h.float() @ (item.direction / item.direction.norm())
    # components rounded to 8 bits, 32 of them
    assert torch.allclose(reached[0][real[0]], torch.tensor(5.0), atol=float(h.float().norm(dim=-1).max()) * 2**-8)


@pytest.mark.parametrize(("family", "drops"), [("opt", True), ("falcon", False), ("gpt2", True), ("gpt_neox", False)])
def test_train_mode_with_dropout_warns(family, drops):
    model = tiny_model(family)
    ids = torch.tensor([[0, 5, 9]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg.record(model, ids, None, [fg.Hookpoint(0)])
        model.train()
        if not drops:
            fg.record(model, ids, None, [fg.Hookpoint(0)])
    if drops:
        with pytest.warns(fg.errors.FgsteerWarning, match="eval"):
            fg.record(model, ids, None, [fg.Hookpoint(0)])
        with pytest.warns(fg.errors.FgsteerWarning, match="eval"), fg.steer(model, None):
            pass


if __name__ == "__main__":
    print(table())
