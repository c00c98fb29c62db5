"""Scores of given texts under a scope: those of feeding the prompt, then the completion token by token."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.activations.tokens import encode_prompts
from fgsteer.evaluation.metrics.propensity import Propensity
from fgsteer.interventions import SCOPES
from fgsteer.models.hookpoints import resolve
from tests.helpers.tiny import D_MODEL, word_tokenizer

AT = fg.Hookpoint(1)
V = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
PAIRS = [
    ("the bride wore a", "ring and said yes"),
    ("the man", "ran"),
    ("is the old king happy ?", "no"),
    ("", "a dog sat on bread"),
]
QUESTIONS = [fg.ContrastPair("yes", "no", prompt="the man said"), fg.ContrastPair("tea", "war", prompt="I think")]
# float32 logits of other batch shapes and of a cache, sums of up to five tokens, in nats
CLOSE: dict[str, Any] = {"rel": 1e-4, "abs": 1e-4}


def add(scope="all", coefficient=2.0, **options):
    return fg.Add(hookpoint=AT, direction=V, coefficient=coefficient, scope=scope, **options)


def is_steered(scope, bos, place, prompt_length):
    """Whether a plain reading of the scopes' meaning steers the token at a place; position 0 holds BOS here."""
    if place == 0 and not bos:
        return False
    return {
        "all": True,
        "prompt": place < prompt_length,
        "generated": place >= prompt_length,
        "reply": place >= prompt_length - 1,
        "last_prompt": place == prompt_length - 1,
    }[scope]


@torch.no_grad()
def step_by_step(model, tokenizer, prompt, completion, scope, bos=False, coefficient=2.0):
    """(next-token log-probabilities (answer, vocabulary), the answer's ids), through the cache by a plain hook."""
    ids = tokenizer(f"{prompt} {completion}".strip())["input_ids"]
    length = len(tokenizer(prompt)["input_ids"]) if prompt else 1
    now = []

    def hook(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        on = torch.tensor([float(is_steered(scope, bos, place, length)) for place in now])
        changed = hidden + coefficient * on[:, None] * V
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = resolve(model, AT)[0].register_forward_hook(hook)
    try:
        now[:] = range(length)
        out = model(torch.tensor([ids[:length]]), use_cache=True)
        rows = [out.logits[0, -1]]
        for place in range(length, len(ids) - 1):
            now[:] = [place]
            out = model(torch.tensor([[ids[place]]]), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1])
    finally:
        handle.remove()
    return torch.stack(rows).log_softmax(-1), torch.tensor(ids[length:])


def total(model, tokenizer, prompt, completion, scope, **options):
    rows, ids = step_by_step(model, tokenizer, prompt, completion, scope, **options)
    return float(rows.gather(1, ids[:, None]).sum())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
def test_log_probabilities_are_those_of_feeding_token_by_token(family_model, tokenizer, scope, bos):
    expected = [total(family_model, tokenizer, *pair, scope, bos=bos) for pair in PAIRS]
    for batch_tokens in (1, 1000):
        found = fg.log_probabilities(
            family_model, tokenizer, PAIRS, [None, add(scope, bos=bos), add("all")], batch_tokens=batch_tokens
        )
        assert found.sums[1].tolist() == pytest.approx(expected, **CLOSE)
    if scope != "all":  # scopes are told apart, by ten times the tolerance
        assert not torch.allclose(found.sums[1], found.sums[2], atol=1e-3)
    assert float((found.sums[1] - found.sums[0])[0].abs()) > 1e-3


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
def test_all_special_tokens_before_a_text_are_its_prompt(llama, scope):
    """Some tokenizers put two in front, as GLM's: ``generate`` is given both, so neither counts as generated."""
    from tokenizers import processors

    tokenizer = word_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> <s> $A", special_tokens=[("<pad>", 1), ("<s>", 0)]
    )
    assert encode_prompts(tokenizer, [""])[0].tolist() == [[1, 0]]
    ids = tokenizer("ring and said yes")["input_ids"]
    with torch.no_grad(), fg.steer(llama, add(scope)):
        out = llama(torch.tensor([ids[:2]]), use_cache=True)
        rows = [out.logits[0, -1]]
        for token in ids[2:-1]:
            out = llama(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1])
    expected = torch.stack(rows).log_softmax(-1).gather(1, torch.tensor(ids[2:])[:, None]).sum()
    found = fg.log_probabilities(llama, tokenizer, [("", "ring and said yes")], [add(scope)]).sums
    assert float(found) == pytest.approx(float(expected), **CLOSE)


def test_a_block_around_scoring_knows_the_boundary_too(llama, tokenizer):
    """``steer`` by the caller, and scores or statistics taken inside it."""
    for scope in ("prompt", "generated", "reply"):
        with fg.steer(llama, add(scope)):
            inside = fg.log_probabilities(llama, tokenizer, PAIRS[:3]).sums[0].tolist()
        assert inside == pytest.approx([total(llama, tokenizer, *pair, scope) for pair in PAIRS[:3]], **CLOSE)
    contrast = [fg.ContrastPair("ring and said yes", "tea", prompt="the bride wore a")]
    late = fg.Hookpoint(2)
    with fg.steer(llama, add("generated")):
        prompt, answer = (
            fg.collect(llama, tokenizer, contrast, hookpoints=[AT, late], tokens=rule) for rule in (2, "answer")
        )
    plain = fg.collect(llama, tokenizer, contrast, hookpoints=[AT, late], tokens=2)
    plain_answer = fg.collect(llama, tokenizer, contrast, hookpoints=[AT], tokens="answer")
    for at in (AT, late):  # a token of the prompt: untouched, there and in later layers
        assert torch.allclose(prompt.residual[at].positive.mean, plain.residual[at].positive.mean, atol=1e-5)
    shift = answer.residual[AT].positive.mean - plain_answer.residual[AT].positive.mean
    assert torch.allclose(shift, 2.0 * V.double(), atol=1e-4)


def test_answers_and_slopes_know_the_boundary(llama, tokenizer):
    for scope in ("generated", "reply"):
        found = fg.answer_probabilities(llama, tokenizer, QUESTIONS, [None, add(scope)])
        for place, pair in enumerate(QUESTIONS):
            up, down = (total(llama, tokenizer, pair.prompt, side, scope) for side in (pair.positive, pair.negative))
            assert float(found.difference[1, place]) == pytest.approx(up - down, **CLOSE)
        moved = (found.share[1] - found.share[0]).abs()
        # answers of one token are decided at the prompt's last token, which "generated" leaves alone
        assert bool((moved > 1e-3).all()) == (scope == "reply")
    slopes = fg.measure_steerability(llama, tokenizer, lambda c: add("reply", c), QUESTIONS, [-1.0, 0.0, 1.0]).slopes
    for place, pair in enumerate(QUESTIONS):
        up, down = (
            [total(llama, tokenizer, pair.prompt, side, "reply", coefficient=c) for c in (-1.0, 1.0)]
            for side in (pair.positive, pair.negative)
        )
        assert float(slopes[place]) == pytest.approx(((up[1] - down[1]) - (up[0] - down[0])) / 2, **CLOSE)


def test_costs_know_the_boundary(llama, tokenizer):
    texts = PAIRS[:3]
    for scope in SCOPES:
        steered = [step_by_step(llama, tokenizer, *pair, scope) for pair in texts]
        plain = [step_by_step(llama, tokenizer, *pair, "all", coefficient=0.0) for pair in texts]
        count = sum(len(ids) for _, ids in steered)
        loss = -sum(float(rows.gather(1, ids[:, None]).sum()) for rows, ids in steered) / count
        assert fg.cross_entropies(llama, tokenizer, texts, [add(scope)])[0] == pytest.approx(loss, **CLOSE)
        kl = sum(float((p.exp() * (p - q)).sum()) for (p, _), (q, _) in zip(plain, steered, strict=True)) / count
        assert fg.kl_divergences(llama, tokenizer, texts, [add(scope)])[0] == pytest.approx(kl, **CLOSE)
        c = fg.calibrate(llama, tokenizer, functools.partial(add, scope), texts, target_kl=0.05)
        assert fg.kl_divergences(llama, tokenizer, texts, [add(scope, c)])[0] == pytest.approx(0.05, rel=0.021)
    # a text without a prompt: its first token stands for the prompt, as where generate begins from BOS
    whole = ["the king of the old sea", "tea and bread"]
    losses = fg.cross_entropies(llama, tokenizer, whole, [add("all"), add("generated"), add("reply")])
    assert losses[1] == pytest.approx(losses[0], **CLOSE)
    assert losses[2] == pytest.approx(losses[0], **CLOSE)
    for call in (
        lambda: fg.cross_entropies(llama, tokenizer, whole, [add("prompt")]),
        lambda: fg.kl_divergences(llama, tokenizer, whole, [[add("all"), add("prompt")]]),
        lambda: fg.calibrate(llama, tokenizer, lambda c: add("prompt", c), whole, target_kl=0.05),
    ):
        with pytest.raises(fg.SteeringError, match="scope 'prompt' on texts without a prompt"):
            call()


def test_propensity_knows_the_boundary(llama, tokenizer):
    contrast = fg.ContrastSet("x", pairs=QUESTIONS)
    values, _ = Propensity(contrast).values(llama, tokenizer, [add("reply")])
    expected = [
        total(llama, tokenizer, prompt, text, "reply") for side in (True, False) for prompt, text in contrast.side(side)
    ]
    assert values[0].tolist() == pytest.approx(expected, **CLOSE)


def test_a_chat_ends_its_prompt_where_the_assistant_begins(llama):
    tokenizer = word_tokenizer()
    user = [{"role": "user", "content": "the man said"}]
    found = fg.log_probabilities(llama, tokenizer, [(user, "tea and bread")], [add("generated"), add("prompt")])
    text = "user the man said . assistant"
    bare = word_tokenizer(bos=False)  # the template writes no BOS
    for number, scope in enumerate(("generated", "prompt")):
        rows, ids = step_by_step(llama, bare, text, "tea and bread", scope, bos=True)
        assert float(found.sums[number]) == pytest.approx(float(rows.gather(1, ids[:, None]).sum()), **CLOSE)


def test_the_default_model_by_hand():
    """A sentence on the embedded default: the change of log p that a plain hook makes where generate would put it."""
    model, tokenizer = fg.load_model("default")
    at = fg.Hookpoint(2)
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    direction *= 12.0 / direction.norm()
    prompt, completion = "The day of the wedding she wore a white", " war of the king"
    ids = tokenizer(prompt + completion)["input_ids"]
    length = len(tokenizer(prompt)["input_ids"])
    assert ids[:length] == tokenizer(prompt)["input_ids"]
    on = torch.zeros(len(ids))

    def hook(_, __, output):
        return output + on[:, None] * direction

    def log_p():
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        rows = logits.float().log_softmax(-1)[length - 1 : -1]
        return float(rows.gather(1, torch.tensor(ids[length:])[:, None]).sum())

    handle = resolve(model, at)[0].register_forward_hook(hook)
    try:
        plain = log_p()
        for scope, places in (
            ("all", slice(1, None)),
            ("prompt", slice(1, length)),
            ("generated", slice(length, None)),
            ("reply", slice(length - 1, None)),
        ):
            on[:] = 0.0
            on[places] = 1.0
            expected = log_p() - plain
            on[:] = 0.0
            steering = fg.Add(hookpoint=at, direction=direction, scope=scope)
            sums = fg.log_probabilities(model, tokenizer, [(prompt, completion)], [None, steering], joint="").sums
            assert float(sums[1] - sums[0]) == pytest.approx(expected, abs=1e-4)
            assert math.fabs(expected) > 1e-2  # a hundred times the tolerance
    finally:
        handle.remove()


@pytest.mark.parametrize("scope", SCOPES)
def test_harness_answers_know_the_boundary(llama, tokenizer, scope):
    """What lm-evaluation-harness's answers are scored by, one and several to a pass; the harness is not needed."""
    from fgsteer.evaluation.tasks import _score

    pairs = PAIRS[:3]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in pairs]
    rows = [tokenizer(f"{prompt} {completion}")["input_ids"] for prompt, completion in pairs]
    counts = [len(row) - length for row, length in zip(rows, lengths, strict=True)]
    inputs = [row[:-1] for row in rows]
    with fg.steer(llama, add(scope)):
        together = _score(llama, inputs, counts)
        alone = [_score(llama, [row], [count])[0] for row, count in zip(inputs, counts, strict=True)]
    for pair, row, count, *scores in zip(pairs, rows, counts, together, alone, strict=True):
        expected = total(llama, tokenizer, *pair, scope)
        for found in scores:
            assert float(found.gather(1, torch.tensor(row[-count:])[:, None]).sum()) == pytest.approx(expected, **CLOSE)


def test_entries_by_row_around_functions_that_make_batches_are_refused(llama, tokenizer):
    """Texts are sorted by length: an entry would act on another text. A composition for all rows is no such thing."""
    texts = [("the old man of the sea sat and", "sat"), ("the king", "sat")]
    contrast = fg.ContrastSet("x", positives=["the king sat in"], negatives=["the dog"])
    around = (
        lambda: fg.log_probabilities(llama, tokenizer, texts),
        lambda: fg.collect(llama, tokenizer, contrast, hookpoints=1),
        lambda: fg.kl_divergences(llama, tokenizer, texts, [None]),
    )
    for call in around:
        with pytest.raises(fg.SteeringError, match="entries cannot be matched to rows"), fg.steer(llama, [add(), None]):
            call()
        lengths = {"prompt_lengths": [3, 3]}
        with (
            pytest.raises(fg.SteeringError, match="prompt_lengths cannot be matched"),
            fg.steer(llama, add(), **lengths),
        ):
            call()
        with fg.steer(llama, [add(), add("reply")]):
            call()


def test_the_last_position_of_a_prompt_without_a_completion(llama, tokenizer):
    whole = "the day of the wedding"
    kl = [
        fg.kl_divergences(llama, tokenizer, [text], [add("prompt")], at="last")[0]
        for text in (whole, (whole, ""), (whole, []))
    ]
    assert kl[0] > 0
    assert kl == [kl[0]] * 3
    chat = [{"role": "user", "content": "the man"}]
    assert fg.kl_divergences(llama, tokenizer, [(chat, "")], [add("prompt")], at="last")[0] > 0


@pytest.mark.parametrize(
    "texts",
    ["ab", ["ab", ("a",)], [("a", "b", "c")], [None], [3], [("a", None)], [(None, "a")], [({"role": "user"}, "a")]],
)
def test_what_is_no_text_is_refused_wherever_texts_are_scored(llama, tokenizer, texts):
    for call in (
        lambda: fg.cross_entropy(llama, tokenizer, texts),
        lambda: fg.kl_divergences(llama, tokenizer, texts, [None]),
        *([] if texts == ["ab", ("a",)] else [lambda: fg.log_probabilities(llama, tokenizer, texts)]),
    ):
        with pytest.raises(fg.DataError, match="text"):
            call()


def test_messages_are_plain_wherever_texts_are_scored(llama, tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "the old king"}]}]
    plain = [{"role": "user", "content": "the old king"}]
    answer = [{"role": "assistant", "content": "yes"}]
    sums = [fg.log_probabilities(llama, tokenizer, [(prompt, answer)]).sums for prompt in (parts, plain)]
    assert torch.equal(*sums)
    losses = [fg.cross_entropy(llama, tokenizer, [text]) for text in (plain + answer, (plain, answer))]
    assert losses[0] == losses[1] == pytest.approx(-float(sums[0]), rel=1e-5)
