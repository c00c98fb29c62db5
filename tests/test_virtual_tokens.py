"""PEFT: virtual tokens before every text are never steered and no part of the prompt; LoRA changes no places."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.interventions import SCOPES
from fgsteer.models.hookpoints import resolve
from fgsteer.models.properties import virtual_tokens
from tests.helpers.tiny import D_MODEL, HEADS, LAYERS, tiny_model
from tests.reference import apply as reference

peft = pytest.importorskip("peft", reason="peft trains prompts")
pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported")

VIRTUAL, NEW = 4, 3
IDS = torch.tensor([[1, 1, 0, 5, 6], [7, 8, 9, 10, 11]])  # left-padded; the second begins with a word
MASK = IDS.ne(1).long()
KINDS = ["prompt", "p", "prefix", "cpt", "lora"]
CASES = [*(("llama", kind) for kind in KINDS), ("gpt2", "prompt"), ("gpt2", "prefix"), ("gemma2", "p")]
# float32: steps with a cache and whole passes add in another order; logits of size ~10
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 5e-4}


@functools.cache
def peft_model(family, kind):
    base = tiny_model(family)
    heads = getattr(base.config, "num_key_value_heads", HEADS)
    shape = {"task_type": "CAUSAL_LM", "num_layers": LAYERS, "token_dim": D_MODEL, "num_attention_heads": HEADS}
    kv = {**shape, "token_dim": heads * D_MODEL // HEADS, "num_attention_heads": heads}
    types = [1, 2, 3, 4]
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**shape, num_virtual_tokens=VIRTUAL),
        "p": lambda: peft.PromptEncoderConfig(**shape, num_virtual_tokens=VIRTUAL, encoder_hidden_size=16),
        "prefix": lambda: peft.PrefixTuningConfig(**kv, num_virtual_tokens=VIRTUAL),
        "cpt": lambda: peft.CPTConfig(
            **shape, cpt_token_ids=[0, 5, 6, 7], cpt_mask=[1] * VIRTUAL, cpt_tokens_type_mask=types
        ),
        "multitask": lambda: peft.MultitaskPromptTuningConfig(**shape, num_virtual_tokens=VIRTUAL, num_tasks=2),
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    }[kind]()
    torch.manual_seed(1)
    return peft.get_peft_model(base, config).eval()


def add(scope="all", bos=False, layer=1, seed=1):
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed)) * 3
    return fg.Add(hookpoint=fg.Hookpoint(layer), direction=direction, coefficient=2.0, scope=scope, bos=bos)


@torch.no_grad()
def recomputed(model, kind, ids, mask, prompt_length, item):
    """Logits (tokens, vocabulary) of one row without steer: a hook that is told every place."""
    pads = int((mask == 0).sum())
    spares = int(ids[pads]) in (0, 2)  # a start token, BOS or EOS
    where = reference.positions(item.scope, len(ids), prompt_length, pads, bos=item.bos or not spares)
    columns = [i + (VIRTUAL if kind in ("prompt", "p", "cpt") else 0) for i in where]

    def hook(_, __, output):
        h = (output[0] if isinstance(output, tuple) else output).clone()
        h[0, columns] += item.coefficient * item.direction
        return (h, *output[1:]) if isinstance(output, tuple) else h

    places = {}
    if kind in ("prefix", "lora"):  # what generate passes; prompt tuning ignores it
        places = {"position_ids": (mask.cumsum(0) - 1).clamp(min=0)[None]}
    handle = resolve(model, item.hookpoint)[0].register_forward_hook(hook)
    try:
        return model(input_ids=ids[None], attention_mask=mask[None], **places).logits[0][-len(ids) :]
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_generate_equals_the_recompute(family, kind, scope):
    model = peft_model(family, kind)
    length = IDS.shape[1]
    for entries in ([add(scope)] * 2, [add(scope, bos=True), add(scope, layer=0, seed=2)]):
        # PEFT's prefix tuning fails without a cache, steered or not
        for options in ({},) if kind == "prefix" else ({}, {"use_cache": False}):
            with fg.steer(model, entries, per_row=True):
                out = model.generate(
                    input_ids=IDS,
                    attention_mask=MASK,
                    max_new_tokens=NEW,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                    **options,
                )
            masks = torch.cat([MASK, torch.ones(2, NEW, dtype=torch.long)], 1)
            for row, mask, item, *logits in zip(out.sequences, masks, entries, *out.logits, strict=True):
                expected = recomputed(model, kind, row, mask, length, item)[length - 1 : -1]
                torch.testing.assert_close(torch.stack(logits), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_plain_passes_equal_the_recompute(family, kind):
    model = peft_model(family, kind)
    mask = MASK
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if kind in ("prefix", "lora") else {}
    for scope in SCOPES:
        for lengths in (None, [4, 2]):
            item = add(scope)
            with torch.no_grad(), fg.steer(model, item, prompt_lengths=lengths):
                got = model(input_ids=IDS, attention_mask=mask, **places).logits[:, -IDS.shape[1] :]
            for number, row in enumerate(got):
                length = IDS.shape[1] if lengths is None else lengths[number]
                expected = recomputed(model, kind, IDS[number], mask[number], length, item)
                real = mask[number].bool()
                torch.testing.assert_close(row[real], expected[real], **CLOSE)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_beams_share_the_prompts_entry(kind):
    model, options = peft_model("llama", kind), {"max_new_tokens": NEW, "num_beams": 2, "do_sample": False}
    entries = [add("prompt"), add("reply", seed=3)]
    with fg.steer(model, entries, per_row=True):
        together = model.generate(input_ids=IDS, attention_mask=MASK, **options)
    for n, item in enumerate(entries):
        with fg.steer(model, item):
            alone = model.generate(input_ids=IDS[n : n + 1], attention_mask=MASK[n : n + 1], **options)
        assert together[n].tolist() == alone[0].tolist()


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_text_without_a_mask_or_without_its_virtual_tokens(kind):
    model, item, ids = peft_model("llama", kind), add("prompt", layer=LAYERS - 1), IDS[1:]
    found = []
    handle = resolve(model, item.hookpoint)[0].register_forward_hook(lambda _, __, out: found.append(out))

    def changed(run):
        found.clear()
        with torch.no_grad():
            run()
            with fg.steer(model, item):
                run()
        return (found[0] != found[1]).any(-1)[0].tolist()

    real, none = [True] * 5, [] if kind == "prefix" else [False] * VIRTUAL
    assert changed(lambda: model(input_ids=ids)) == none + real
    assert changed(lambda: model.base_model(ids)) == real
    with model.disable_adapter():
        assert virtual_tokens(model) == 0
        assert changed(lambda: model(ids)) == real
    handle.remove()


def test_how_many_there_are(llama):
    assert virtual_tokens(llama) == virtual_tokens(peft_model("llama", "lora")) == 0
    assert {virtual_tokens(peft_model("llama", kind)) for kind in ("prompt", "p", "prefix", "cpt")} == {VIRTUAL}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_model("llama", "multitask")
    with pytest.raises(fg.HookpointError, match=r"MULTITASK_PROMPT_TUNING.*differ by task"), fg.steer(model, add()):
        pass


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_is_read_and_scored_stands_behind_them(family, kind, tokenizer):
    """``record``, ``collect`` and log-probabilities are those of the whole model with its virtual tokens."""
    model, at = peft_model(family, kind), fg.Hookpoint(1)
    ids = torch.tensor([tokenizer("the man said yes")["input_ids"]])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    expected = out.hidden_states[2][:, -ids.shape[1] :]
    assert torch.allclose(fg.record(model, ids, None, [fg.Hookpoint(0), at])[at], expected, **CLOSE)
    pairs = [fg.ContrastPair("yes", "no", prompt="the man said"), fg.ContrastPair("tea", "war and bread")]
    stats = fg.collect(model, tokenizer, pairs[:1], hookpoints=at, tokens="last")
    assert torch.allclose(stats.at("residual")[1].positive.mean, expected[0, -1].double(), **CLOSE)
    shared = [fg.collect(model, tokenizer, pairs, hookpoints=at, share_prefixes=share) for share in (True, False)]
    for one, other in zip(*(s.residual.values() for s in shared), strict=True):
        assert torch.allclose(one.difference, other.difference, **CLOSE)
    log_p = out.logits[0, -ids.shape[1] :].log_softmax(-1)
    found = fg.log_probabilities(model, tokenizer, [("the man said", "yes")], [None])
    assert torch.allclose(found.sums, log_p[3, ids[0, 4]].double(), **CLOSE)
