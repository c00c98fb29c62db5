"""Where a token is: teacher-forced passes against feeding prompt and completion, start tokens, packed sequences."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import fgsteer as fg
from fgsteer.interventions import SCOPES
from fgsteer.models.properties import start_ids
from tests.helpers.tiny import D_MODEL, tiny_model

PROMPTS = ["the man", "a dog sat on the bread", "she took the ring of the king"]
COMPLETIONS = ["was happy", "and ran to the sea", "in"]
# float32: one pass and several over the same tokens add in another order; logits of size ~10 and three layers
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 5e-4}


def vector(seed=1, layer=1):
    draw = torch.Generator().manual_seed(seed)
    direction, reference = torch.randn(2, D_MODEL, generator=draw) * 3
    return fg.SteeringVector(direction, fg.Hookpoint(layer), reference=reference)


def entries(scope, bos):
    """Another composition for each of three rows."""
    return [vector(1).add(2.0, scope=scope, bos=bos), None, [vector(2, 0).affine(0.7, scope=scope), vector(3).ablate()]]


def ids_of(tokenizer, text, special=True):
    return tokenizer(text, add_special_tokens=special, return_token_type_ids=False)["input_ids"]


def rows_of(tokenizer):
    """(prompt ids, completion ids) of each row."""
    return [(ids_of(tokenizer, p), ids_of(tokenizer, c, False)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


def padded(rows, side):
    """(inputs of one pass over the rows, columns before each completion)."""
    width = max(len(p) + len(c) for p, c in rows)
    ids, mask, columns = [], [], []
    for prompt, completion in rows:
        row, pad = prompt + completion, [1] * (width - len(prompt) - len(completion))
        ids.append(pad + row if side == "left" else row + pad)
        mask.append([0] * len(pad) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(pad))
        columns.append(len(prompt) + (len(pad) if side == "left" else 0))
    real = torch.tensor(mask)
    positions = (real.cumsum(1) - 1).clamp(min=0)  # what GPT-2 needs under left padding
    return {"input_ids": torch.tensor(ids), "attention_mask": real, "position_ids": positions}, columns


@torch.no_grad()
def fed(model, steering, prompt, completion):
    """Logits of one row whose prompt is read first and whose completion follows token by token, with a cache."""
    with fg.steer(model, steering):
        out = model(torch.tensor([prompt]), use_cache=True)
        logits = [out.logits]
        for token in completion:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1)[0]


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("scope", [*SCOPES, "first:2", "last:2", "ends:1,2", "at:0,2,9"])
def test_prompt_lengths_are_feeding_the_prompt_and_then_the_completion(family_model, tokenizer, scope, bos):
    rows = rows_of(tokenizer)
    shared = vector(1).add(2.0, scope=scope, bos=bos)
    for steering, each in ((shared, [shared] * 3), (entries(scope, bos), entries(scope, bos))):
        expected = [fed(family_model, item, *row) for item, row in zip(each, rows, strict=True)]
        for side in ("left", "right"):
            inputs, columns = padded(rows, side)
            with torch.no_grad(), fg.steer(family_model, steering, prompt_lengths=columns):
                logits = family_model(**inputs).logits
            for row, mask, reference in zip(logits, inputs["attention_mask"], expected, strict=True):
                torch.testing.assert_close(row[mask.bool()], reference, **CLOSE)


def test_prompt_lengths_hold_in_every_pass_and_form(llama, tokenizer):
    rows, item = rows_of(tokenizer), vector().add(2.0, scope="generated")
    (inputs, columns), longer = padded(rows, "right"), [(p + c, c) for p, c in rows]
    with torch.no_grad(), fg.steer(llama, item, prompt_lengths=torch.tensor(columns)):
        first, again = llama(**inputs).logits, llama(**inputs).logits
        embedded = llama(
            inputs_embeds=llama.get_input_embeddings()(inputs["input_ids"]), attention_mask=inputs["attention_mask"]
        ).logits
        other, _ = padded(longer, "right")
        assert llama(**other).logits.shape[1] > first.shape[1]
    assert torch.equal(first, again)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(embedded[real], first[real], **CLOSE)


@torch.no_grad()
def changed(model, inputs, item, **options):
    """Mask (batch, tokens) of the tokens that steering the output of the last block changes."""
    found = []
    handle = model.model.layers[-1].register_forward_hook(lambda _, __, out: found.append(out))
    try:
        model(**inputs)
        with fg.steer(model, item, **options):
            model(**inputs)
    finally:
        handle.remove()
    return (found[0] != found[1]).any(-1)


def test_a_pass_without_a_prompt_is_all_completion(llama):
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 1]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    real = inputs["attention_mask"].bool()
    for scope, where in (("generated", real), ("reply", real), ("all", real)):
        item = vector(layer=2).add(1.0, scope=scope, bos=True)
        assert torch.equal(changed(llama, inputs, item, prompt_lengths=[0, 0]), where)


def test_prompt_lengths_that_cannot_be_meant_are_refused(llama, tokenizer):
    inputs, columns = padded(rows_of(tokenizer), "left")
    item = vector().add(1.0, scope="generated")
    for wrong in ([], [1.5], [-1], [True], "12", [None], torch.tensor([1.0]), torch.tensor([[1]]), 3):
        with (
            pytest.raises(fg.SteeringError, match="first completion token"),
            fg.steer(llama, item, prompt_lengths=wrong),
        ):
            pass
    with (
        pytest.raises(fg.SteeringError, match="3 entries and 2"),
        fg.steer(llama, [item] * 3, per_row=True, prompt_lengths=[1, 2]),
    ):
        pass
    with (
        pytest.raises(fg.SteeringError, match="2 prompt_lengths for a batch of 3"),
        fg.steer(llama, item, prompt_lengths=[1, 2]),
    ):
        llama(**inputs)
    with pytest.raises(fg.SteeringError, match="99 in a pass of"), fg.steer(llama, item, prompt_lengths=[1, 99, 1]):
        llama(**inputs)
    with (
        pytest.raises(fg.SteeringError, match="Leave prompt_lengths out"),
        fg.steer(llama, item, prompt_lengths=columns),
    ):
        llama.generate(**inputs, max_new_tokens=1)


# ---------------------------------------------------------------- position 0


START = [[0, 5, 6, 7], [2, 5, 6, 7], [5, 0, 6, 2], [5, 6, 7, 8]]  # BOS, EOS, and words


def test_start_ids_are_those_of_the_configs():
    model = copy.deepcopy(tiny_model("gpt2"))
    model.generation_config = GenerationConfig(bos_token_id=7, eos_token_id=[8, 2])
    assert start_ids(model) == {0, 2, 7, 8}
    model.config.bos_token_id = model.config.eos_token_id = None
    model.generation_config = GenerationConfig()
    assert start_ids(model) == frozenset()
    assert start_ids(torch.nn.Linear(1, 1)) == frozenset()


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_spared_is_a_start_token_and_no_word(models, side, embedded):
    model = models["gemma2"]  # scales what it embeds
    ids = torch.tensor([[1, 1, *row] if side == "left" else [*row, 1, 1] for row in START])
    inputs = {"input_ids": ids, "attention_mask": ids.ne(1).long()}
    if embedded:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    expected = ids.ne(1)
    expected[0, ids[0].tolist().index(0)] = expected[1, ids[1].tolist().index(2)] = False
    assert torch.equal(changed(model, inputs, vector(layer=2).add(1.0)), expected)
    assert torch.equal(changed(model, inputs, vector(layer=2).add(1.0, bos=True)), ids.ne(1))


@pytest.mark.parametrize("embedded", [False, True])
def test_without_a_start_token_that_the_model_has_nothing_is_spared(llama, embedded):
    model = copy.deepcopy(llama)
    inputs = {"input_ids": torch.tensor(START)}
    if embedded:
        inputs = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    for bos in (None, 999, -1):
        model.config.bos_token_id = model.generation_config.bos_token_id = bos
        model.config.eos_token_id = None
        assert changed(model, inputs, vector(layer=2).add(1.0)).all()


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}]
)
def test_the_first_word_is_steered_in_generate(llama, options):
    """Left padding with chunks: a row's position 0 stands in a later chunk than another's."""
    ids = torch.tensor([[1, 1, 1, 5, 6], [1, 1, 1, 0, 6], [0, 5, 6, 7, 8], [5, 6, 7, 8, 9]])
    mask, item = ids.ne(1).long(), vector().add(2.0, scope="prompt")
    with fg.steer(llama, item):
        out = llama.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **options)
    for row, real, got in zip(ids, mask.bool(), out, strict=True):
        alone = row[real]
        every = vector().add(2.0, scope="prompt", bos=int(alone[0]) != 0)
        with fg.steer(llama, every):
            expected = llama.generate(
                alone[None], attention_mask=torch.ones_like(alone[None]), max_new_tokens=4, do_sample=False
            )
        assert got[5:].tolist() == expected[0, len(alone) :].tolist()


def test_a_text_of_one_word_is_steered(llama):
    assert changed(llama, {"input_ids": torch.tensor([[5]])}, vector(layer=2).add(1.0)).all()


# ---------------------------------------------------------------- packed sequences


SEQUENCES = [[[0, 5, 6], [7, 8], [0, 9, 10, 11]], [[5], [6], [0, 7, 8, 9, 10]]]


def packed():
    """(ids, positions, 4-D mask of blocks, rows of (begin, end)): several sequences a row, padding behind."""
    width = 11
    ids, positions = torch.ones(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    mask, spans = torch.full((2, 1, width, width), torch.finfo(torch.float32).min), []
    for row, sequences in enumerate(SEQUENCES):
        end = 0
        for sequence in sequences:
            begin, end = end, end + len(sequence)
            ids[row, begin:end] = torch.tensor(sequence)
            positions[row, begin:end] = torch.arange(len(sequence))
            mask[row, 0, begin:end, begin:end].triu_(1)
            spans.append((row, begin, end))
    return ids, positions, mask, spans


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bos", [False, True])
def test_packed_sequences_are_steered_as_each_alone(family_model, scope, bos):
    ids, positions, mask, spans = packed()
    item = vector().add(2.0, scope=scope, bos=bos)
    for steering in (None, item):
        with torch.no_grad(), fg.steer(family_model, steering):
            together = family_model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for (row, begin, end), sequence in zip(spans, chain(*SEQUENCES), strict=True):
            with torch.no_grad(), fg.steer(family_model, steering):
                alone = family_model(torch.tensor([sequence]), use_cache=False).logits[0]
            torch.testing.assert_close(together[row, begin:end], alone, **CLOSE)


def test_packed_rows_without_a_mask_and_places_of_a_padded_one(llama):
    """Transformers finds packed sequences by their positions alone; rows padded on the left are not packed."""
    ids, positions, _, spans = packed()
    item = vector(layer=2).add(1.0, scope="reply")
    lasts = torch.zeros(1, 9, dtype=torch.bool)
    lasts[0, [end - 1 for row, _, end in spans if row == 0]] = True
    inputs = {"input_ids": ids[:1, :9], "position_ids": positions[:1, :9]}
    assert torch.equal(changed(llama, inputs, item), lasts)
    padded_row = {
        "input_ids": torch.tensor([[1, 1, 0, 5, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 0, 1, 2]]),
    }
    assert changed(llama, padded_row, item).tolist() == [[False] * 4 + [True]]
    with pytest.raises(fg.SteeringError, match="packed in a row"), fg.steer(llama, item, prompt_lengths=[3]):
        llama(**inputs)


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
def test_other_prompt_lengths_compile_nothing(llama, tokenizer):
    torch._dynamo.reset()
    inputs, columns = padded(rows_of(tokenizer), "left")
    model = torch.compile(copy.deepcopy(llama), backend="eager")
    for number, lengths in enumerate((columns, [n + 1 for n in columns])):
        item = vector().add(1.0 + number, scope="generated")
        with torch.no_grad(), fg.steer(llama, item, prompt_lengths=lengths):
            expected = llama(**inputs).logits
        stance = torch.compiler.set_stance("fail_on_recompile" if number else "default")
        with torch.no_grad(), stance, fg.steer(model, item, prompt_lengths=lengths):
            torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
    torch._dynamo.reset()
