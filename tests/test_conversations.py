"""Rows that are conversations: the prompt is said once, and the answer is the assistant's last message."""

from __future__ import annotations

import json

import pytest
import torch

import fgsteer as fg
from fgsteer.activations.tokens import TokenReader
from fgsteer.data.rendering import render, render_prompt
from tests.helpers.tiny import word_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "the old king"}
OTHER = {"role": "system", "content": "the new queen"}
Q, YES, NO = user("is it war ?"), assistant("yes"), assistant("no")
TURNS = [user("the man"), assistant("ran")]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("is it war ?", [Q, YES], [Q, NO], [Q]),  # UltraFeedback
        ("", [Q, YES], [Q, NO], [Q]),  # implicit prompt, as in TRL
        ([Q], [Q, YES], [Q, NO], [Q]),
        ("is it war ?", [SYSTEM, Q, YES], [SYSTEM, Q, NO], [SYSTEM, Q]),
        ([SYSTEM], [Q, YES], [Q, NO], [SYSTEM, Q]),
        ([SYSTEM, Q], [Q, YES], [Q, NO], [SYSTEM, Q]),
        ([SYSTEM], [SYSTEM, Q, YES], [SYSTEM, Q, NO], [SYSTEM, Q]),
        ([SYSTEM, Q], [SYSTEM, Q, YES], [SYSTEM, Q, NO], [SYSTEM, Q]),
        ("is it war ?", [*TURNS, SYSTEM, Q, YES], [*TURNS, SYSTEM, Q, NO], [*TURNS, SYSTEM, Q]),
        (TURNS, [Q, YES], [Q, NO], [*TURNS, Q]),
        ("is it war ?", [*TURNS, Q, YES], [*TURNS, Q, NO], [*TURNS, Q]),
        ("is it war ?", [YES], [NO], "is it war ?"),
        ("is it war ?", "yes", "no", "is it war ?"),
        ("is it war ?", [Q, YES], "no", [Q]),
        ("is it war ?", [YES], "no", "is it war ?"),  # one format for both sides
        ("the man", [*TURNS, Q, YES], [*TURNS, Q, NO], [*TURNS, Q]),  # the conversation's first turn
    ],
)
def test_the_prompt_is_said_once(tmp_path, prompt, chosen, rejected, expected):
    pair = fg.ContrastPair(chosen, rejected, prompt)
    assert pair.prompt == expected
    both = ("yes", "no") if isinstance(chosen, str) and isinstance(rejected, str) else ([YES], [NO])
    assert (pair.positive, pair.negative) == both
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    assert fg.load_contrast(path).pairs == (pair,)


def test_ultrafeedback_rows_render_the_question_once(llama):
    tokenizer = word_tokenizer()
    pair = fg.ContrastPair([Q, YES], [Q, NO], "is it war ?")
    text = render(tokenizer, pair.prompt, pair.positive).text
    assert text == "user is it war ? . assistant yes . "
    stats = [
        fg.collect(llama, tokenizer, [p], hookpoints="blocks.1.hook_resid_post", tokens="answer")
        for p in (pair, fg.ContrastPair([YES], [NO], "is it war ?"), fg.ContrastPair([Q, YES], [Q, NO]))
    ]
    means = [s.at("residual")[1].difference for s in stats]
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])


def read(tokenizer, contrast, rule="answer"):
    triples = [(*text, True) for text in contrast.side(True)]
    (rows,) = TokenReader(tokenizer, rule=rule).rows(triples)
    return [" ".join(tokenizer.decode([row.ids[place]]) for place in row.selected) for row in rows]


def test_the_answer_of_a_conversation_is_its_last_assistants_message():
    tokenizer = word_tokenizer()
    alone = fg.ContrastSet("x", positives=[[SYSTEM, Q, assistant("tea and bread")]], negatives=["no"])
    assert read(tokenizer, alone) == ["tea and bread"]
    differing = fg.ContrastPair([SYSTEM, user("the sea ?"), YES], [SYSTEM, Q, NO])
    assert differing.prompt == [SYSTEM]
    assert read(tokenizer, fg.ContrastSet("x", pairs=[differing])) == ["yes"]
    only_user = fg.ContrastSet("x", positives=[[user("tea and bread")]], negatives=["no"])
    assert read(tokenizer, only_user) == ["user tea and bread"]


def test_a_message_that_the_assistant_has_begun_is_continued(llama):
    tokenizer = word_tokenizer()
    begun = [Q, assistant("the man")]
    assert render_prompt(tokenizer, begun).text == "user is it war ? . assistant the man"
    for completion, text in (("said yes", "said yes"), ([assistant("said yes")], "said yes . ")):
        rendered = render(tokenizer, begun, completion)
        assert rendered.text == f"user is it war ? . assistant the man {text}"
        assert rendered.text[rendered.completion_start : rendered.end] == "said yes"
    pair = fg.ContrastPair("said yes", "said no", begun)
    assert read(tokenizer, fg.ContrastSet("x", pairs=[pair])) == ["said yes"]
    options = {"max_new_tokens": 5, "do_sample": False}
    by_hand = llama.generate(
        tokenizer("user is it war ? . assistant the man", return_tensors="pt", add_special_tokens=False)["input_ids"],
        **options,
    )
    expected = tokenizer.decode(by_hand[0, 9:], skip_special_tokens=True)
    assert fg.generate(llama, tokenizer, [begun], **options) == [expected]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("the sea ?", [Q, YES], [Q, NO]),
        ([user("the sea ?")], [Q, YES], [Q, NO]),
        ("", [Q, YES], "no"),
        ("the sea ?", [Q, YES], "no"),
        ([SYSTEM], [OTHER, Q, YES], [OTHER, Q, NO]),
        ([SYSTEM, Q], [OTHER, Q, YES], [OTHER, Q, NO]),
    ],
)
def test_two_prompts_are_refused(prompt, chosen, rejected):
    with pytest.raises(fg.DataError, match="prompt"):
        fg.ContrastPair(chosen, rejected, prompt)


def test_a_template_that_refuses_roles_is_told():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    for call in (
        lambda: render(tokenizer, [SYSTEM, Q], [YES]),
        lambda: render(tokenizer, [SYSTEM, Q], "yes"),
        lambda: render_prompt(tokenizer, [SYSTEM, Q]),
    ):
        with pytest.raises(fg.DataError, match=r"roles system, user.*System role not supported"):
            call()
