"""Where a token is: teacher-forced passes against feeding prompt and completion, start tokens, packed sequences."""

from __future__ import annotations

import pytest
import torch

import fgsteer as fg
from fgsteer.interventions import SCOPES
from tests.tiny import D_MODEL

PROMPTS = ["the man", "a dog sat on the bread", "she took the ring of the king"]
COMPLETIONS = ["was happy", "and ran to the sea", "in"]
# float32: one pass and several over the same tokens add in another order; logits of size ~10 and three layers
CLOSE = {"rtol": 1e-4, "atol": 5e-4}


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
    mask = torch.tensor(mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # what GPT-2 needs under left padding
    return {"input_ids": torch.tensor(ids), "attention_mask": mask, "position_ids": positions}, columns


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
@pytest.mark.parametrize("scope", SCOPES)
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
    for scope, where in (("generated", real), ("last_prompt_on", real), ("all", real)):
        item = vector(layer=2).add(1.0, scope=scope, bos=True)
        assert torch.equal(changed(llama, inputs, item, prompt_lengths=[0, 0]), where)


def test_prompt_lengths_that_cannot_be_meant_are_refused(llama, tokenizer):
    inputs, columns = padded(rows_of(tokenizer), "left")
    item = vector().add(1.0, scope="generated")
    for wrong in ([], [1.5], [-1], [True], "12", [None], torch.tensor([1.0]), torch.tensor([[1]]), 3):
        with pytest.raises(fg.SteeringError, match="prompt_lengths"), fg.steer(llama, item, prompt_lengths=wrong):
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
        pytest.raises(fg.SteeringError, match="leave prompt_lengths out"),
        fg.steer(llama, item, prompt_lengths=columns),
    ):
        llama.generate(**inputs, max_new_tokens=1)
