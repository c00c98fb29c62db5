"""The endpoint judge against a loopback server that also misbehaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from threading import Barrier

import pytest

import fgsteer as fg
from fgsteer.evaluation.chat import BrokenAnswerError, _seconds
from fgsteer.evaluation.endpoint import read_score
from tests.chat import Chat, Reply

KEY = "sk-a-secret-key-0123456789"
TEXTS = [f"text number {i}" for i in range(6)]


def judge(chat, **options):
    options = {"api_key": KEY, "backoff": 0.001, "timeout": 60.0, **options}
    return fg.EndpointJudge("judge-model", base_url=chat.url, **options)


def by_number(text, _):
    """Scores 1 to 6 by the text's number; the first texts answer last."""
    number = int(text.split()[-1])
    return Reply(f'{{"score": {number + 1}}}', delay=0.05 - 0.01 * number)


def test_scores_are_normalised_and_in_the_order_of_the_texts():
    with Chat(by_number) as chat:
        scores = judge(chat).score(TEXTS, "wedding")
    # (score − 1)/9 in float32
    assert scores.tolist() == pytest.approx([i / 9 for i in range(6)], abs=1e-7)
    _, path, headers, body, _ = chat.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "judge-model"
    assert body["temperature"] == 0
    assert body["response_format"] == {"type": "json_object"}


def test_each_criterion_asks_its_own_question():
    with Chat(lambda text, n: Reply()) as chat:
        made = judge(chat, behaviors={"rhyme": "lines that rhyme {so}"})
        made.score(["a {text}"], "wedding")
        made.score(["a {text}"], "rhyme")
        made.score(["a {text}"], "something else")
        made.coherence(["a {text}"])
    prompts = [body["messages"][0]["content"] for _, _, _, body, _ in chat.requests]
    assert len(set(prompts)) == 4
    parts = ("bride, groom", "lines that rhyme {so}", "something else", "coherent")
    for prompt, part in zip(prompts, parts, strict=True):
        assert part in prompt
        assert "<text>\na {text}\n</text>" in prompt
        assert '{"score": n}' in prompt


def test_no_key_no_header_and_the_key_of_the_environment(monkeypatch):
    with Chat(lambda text, n: Reply()) as chat:
        monkeypatch.setenv("OPENAI_API_KEY", "of-the-environment\n")
        judge(chat, api_key=None).coherence(["one"])
        monkeypatch.delenv("OPENAI_API_KEY")
        judge(chat, api_key=None).coherence(["one"])
    found = [headers.get("Authorization") for _, _, headers, _, _ in chat.requests]
    assert found == ["Bearer of-the-environment", None]


def test_options_of_the_request_win():
    with Chat(lambda text, n: Reply()) as chat:
        options = {"temperature": 0.5, "max_completion_tokens": 32, "response_format": {"type": "text"}}
        judge(chat, options=options).coherence(["one"])
    assert chat.requests[0][3].items() >= options.items()


PASSING = {
    "429": Reply(status=429, headers={"Retry-After": "0"}),
    "500": Reply(status=500, body="<html>oops</html>"),
    "503": Reply(status=503, body=""),
    "dropped": Reply(drop=True),
    "cut short": Reply(cut=True),
    "time-out": Reply(delay=0.6),
}


@pytest.mark.parametrize("trouble", PASSING)
def test_what_passes_is_asked_again(trouble):
    with Chat(lambda text, n: PASSING[trouble] if n < 3 else Reply('{"score": 10}')) as chat:
        slow = {"timeout": 0.3, "attempts": 50} if trouble == "time-out" else {}
        assert judge(chat, **slow).coherence(["one"]).tolist() == [1.0]
    assert len(chat.requests) >= 3


def test_what_does_not_pass_ends_with_the_text_named():
    with Chat(lambda text, n: PASSING["500"]) as chat, pytest.raises(fg.JudgeError, match=r"'a poor text'.*HTTP 500"):
        judge(chat, attempts=4).coherence(["a poor text"])
    assert len(chat.requests) == 4


def test_retry_after_is_honoured():
    busy = Reply(status=429, headers={"Retry-After": "1"})
    with Chat(lambda text, n: busy if n == 1 else Reply()) as chat:
        judge(chat).coherence(["one"])
    first, second = (request[0] for request in chat.requests)
    assert second - first >= 1


def test_back_off_doubles():
    with Chat(lambda text, n: PASSING["500"] if n < 5 else Reply()) as chat:
        judge(chat, backoff=0.04).coherence(["one"])
    times = [request[0] for request in chat.requests]
    for doubling, (before, after) in enumerate(pairwise(times)):
        assert after - before >= 0.04 * 2**doubling / 2  # the jitter takes at most half


def test_a_retry_after_of_hours_is_not_waited_out():
    hours = Reply(status=429, headers={"Retry-After": "36000"})
    with Chat(lambda text, n: hours) as chat, pytest.raises(fg.JudgeError, match="36000 s"):
        judge(chat).coherence(["one"])
    assert len(chat.requests) == 1


def test_retry_after_as_a_date():
    soon = datetime.now(UTC) + timedelta(seconds=90)
    assert _seconds(format_datetime(soon, usegmt=True)) == pytest.approx(90, abs=2)  # a date has whole seconds
    assert _seconds("1.5") == 1.5
    for nothing in (None, "", "-3", "soon", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 -0000"):
        assert _seconds(nothing) == 0


@pytest.mark.parametrize(("status", "body"), [(401, f"bad key {KEY}"), (404, "no model"), (429, "insufficient_quota")])
def test_what_asking_again_cannot_mend_is_raised_at_once(status, body):
    refusal, message = Reply(status=status, body=body), f"HTTP {status}"
    with Chat(lambda text, n: refusal) as chat, pytest.raises(fg.JudgeError, match=message) as caught:
        judge(chat).coherence(["one"])
    assert len(chat.requests) == 1
    error = caught.value
    while error is not None:
        assert KEY not in str(error)
        error = error.__cause__ or error.__context__


def test_a_redirect_does_not_carry_the_key_on():
    with Chat(lambda text, n: Reply()) as other:
        there = Reply(status=302, headers={"Location": other.url})
        with Chat(lambda text, n: there) as chat, pytest.raises(fg.JudgeError, match="HTTP 302"):
            judge(chat).coherence(["one"])
    assert not other.requests


@pytest.mark.parametrize("status", [400, 422])
def test_json_mode_is_left_out_where_it_is_refused(status):
    with Chat(lambda text, n: Reply(status=status, body="response_format?") if n == 1 else Reply()) as chat:
        made = judge(chat)
        assert made.coherence(["one"]).tolist() == pytest.approx([6 / 9])
        chat.requests.clear()
        made.score(["one"], "wedding")
    assert ["response_format" in request[3] for request in chat.requests] == [False]


def test_json_mode_stays_where_something_else_was_refused():
    with Chat(lambda text, n: Reply(status=400, body="too long") if text == "long" else Reply()) as chat:
        made = judge(chat)
        with pytest.raises(fg.JudgeError, match="too long"):
            made.coherence(["long"])
        made.coherence(["short"])
    assert ["response_format" in request[3] for request in chat.requests] == [True, False, True]


ANSWERS = {
    '{"score": 4}': 4,
    'Sure!\n```json\n{"score": 10}\n```': 10,
    '{"reason": "dull", "score": "3"}': 3,
    '{"score": 8.0}': 8,
    '<think>maybe {"score": 2}?</think> {"score": 5}': 5,
    " 6\n": 6,
    '{"score": 1} {"other": 2}': 1,
}
BROKEN = [
    "",
    "The text is fine.",
    '{"score": 4',
    '{"score": 0}',
    '{"score": 11}',
    '{"score": -3}',
    '{"score": 7.5}',
    '{"score": true}',
    '{"score": null}',
    '{"score": [4]}',
    '{"score": 3} no: {"score": 12}',
    '{"rating": 4}',
    "7/10",
    '{"score": ' + "9" * 6000 + "}",
    '{"score": ' + "[" * 100_000 + "}",
]


def test_scores_are_read_from_what_models_write():
    assert {answer: read_score(answer) for answer in ANSWERS} == ANSWERS


@pytest.mark.parametrize("answer", BROKEN, ids=range(len(BROKEN)))
def test_no_score_is_made_up(answer):
    with pytest.raises(BrokenAnswerError):
        read_score(answer)


NO_COMPLETION = [Reply(None), *(Reply(body=body) for body in ("<html>", "[]", "", '{"choices": []}'))]


@pytest.mark.parametrize("broken", [Reply('{"score": 11}'), Reply("so {so"), *NO_COMPLETION], ids=range(7))
def test_broken_answers_are_asked_for_again_then_refused(broken):
    with Chat(lambda text, n: broken if n < 3 else Reply()) as chat:
        assert judge(chat).coherence(["one"]).tolist() == pytest.approx([6 / 9])
    with Chat(lambda text, n: broken) as chat, pytest.raises(fg.JudgeError, match=r"'a poor text'.*3 answers"):
        judge(chat).coherence(["a poor text"])
    assert len(chat.requests) == 3


def test_no_more_requests_are_open_than_allowed():
    three = Barrier(3, timeout=60)

    def reply(text, n):
        three.wait()
        return Reply(delay=0.02)

    with Chat(reply) as chat:
        judge(chat, concurrency=3).coherence([f"text {i}" for i in range(12)])
    assert len(chat.requests) == 12
    assert chat.most_open == 3


def test_a_failure_ends_the_rest_soon():
    def reply(text, n):
        return Reply(status=401) if text == "text 0" else Reply(status=429, headers={"Retry-After": "300"}, delay=0.02)

    began = time.monotonic()
    with Chat(reply) as chat, pytest.raises(fg.JudgeError, match=r"text 0.*HTTP 401"):
        judge(chat, concurrency=4).coherence([f"text {i}" for i in range(50)])
    assert time.monotonic() - began < 60  # not the 300 s that the others were told to wait
    assert len(chat.requests) <= 8


def test_what_was_answered_is_not_asked_again(tmp_path):
    cache = tmp_path / "answers.jsonl"
    with Chat(by_number) as chat:
        first = judge(chat, cache=cache).score([*TEXTS, TEXTS[0]], "wedding")
        assert len(chat.requests) == len(TEXTS)
        chat.requests.clear()
        again = judge(chat, cache=cache)
        assert again.score([*TEXTS, TEXTS[0]], "wedding").tolist() == first.tolist()
        assert not chat.requests
        judge(chat, cache=cache, options={"seed": 1}).score(TEXTS[:1], "wedding")
        again.score(TEXTS[:1], "sea")
        again.coherence(TEXTS[:1])
        fg.EndpointJudge("another", base_url=chat.url, cache=cache).score(TEXTS[:1], "wedding")
        assert len(chat.requests) == 4
    rows = [json.loads(line) for line in cache.read_text().splitlines()]
    assert len(rows) == len(TEXTS) + 4
    assert all(set(row) == {"key", "score"} for row in rows)
    assert KEY not in cache.read_text() + repr(again) + repr(vars(again))


@pytest.mark.parametrize("cut", [1, 40, 81])
def test_a_line_cut_short_costs_one_question(tmp_path, cut):
    cache = tmp_path / "answers.jsonl"
    with Chat(by_number) as chat:
        first = judge(chat, cache=cache).score(TEXTS, "wedding").tolist()
        cache.write_bytes(cache.read_bytes()[:-cut])
        for asked in (1, 0):
            chat.requests.clear()
            assert judge(chat, cache=cache).score(TEXTS, "wedding").tolist() == first
            # without its newline alone a line still says all
            assert len(chat.requests) == (0 if cut == 1 else asked)


def test_only_a_cache_is_added_to(tmp_path):
    records = tmp_path / "records.jsonl"
    records.write_text('{"concept": "wedding"}\n{"concept": "sea"}\n')
    with Chat(by_number) as chat:
        for path in (records, tmp_path):
            with pytest.raises(fg.FormatError):
                judge(chat, cache=path)
        (tmp_path / "file").write_text("")
        for folder, told in (("file", "is no folder"), ("typo", "there is no folder")):
            with pytest.raises(fg.FormatError, match=f"cannot write .*{told}"):  # before anything is asked
                judge(chat, cache=tmp_path / folder / "answers.jsonl")


RUN = """
import sys, fgsteer as fg
judge = fg.EndpointJudge("judge-model", base_url=sys.argv[1], api_key="", cache=sys.argv[2], concurrency=2)
judge.score([f"text number {i}" for i in range(40)], "wedding")
"""


def test_a_killed_run_resumes(tmp_path):
    cache = tmp_path / "answers.jsonl"
    texts = [f"text number {i}" for i in range(40)]
    runs = []

    def reply(text, n):
        if runs and len(chat.requests) == 12:
            runs.pop().kill()
        return Reply(f'{{"score": {int(text.split()[-1]) % 10 + 1}}}', delay=0.01)

    with Chat(reply) as chat:
        run = subprocess.Popen([sys.executable, "-c", RUN, chat.url, str(cache)])
        runs.append(run)
        assert run.wait() != 0
        while chat.open:  # what it had sent is still under way
            time.sleep(0.01)
        kept = cache.read_text().count("\n")
        assert 10 <= kept < 12  # two at a time: the twelfth was sent when ten were kept
        chat.requests.clear()
        scores = judge(chat, cache=cache).score(texts, "wedding")
    assert len(chat.requests) == 40 - kept
    assert scores.tolist() == pytest.approx([(i % 10) / 9 for i in range(40)], abs=1e-7)


def test_estimate_asks_nothing_and_counts_what_is_new():
    with Chat(lambda text, n: Reply()) as chat:
        made = judge(chat)
        texts = ["one text", "another", "one text"]
        before = made.estimate(texts, "wedding", input_price=2.0, output_price=10.0)
        assert not chat.requests
        made.score(texts, "wedding")
        made.coherence(texts)
        prompts = [body["messages"][0]["content"] for _, _, _, body, _ in chat.requests]
        after = made.estimate([*texts, "a third"], "wedding", input_price=2.0)
    tokens = sum(-(-len(prompt) // 4) for prompt in prompts)
    assert before == fg.CostEstimate(4, 0, tokens, 32, pytest.approx((tokens * 2 + 32 * 10) / 1e6))
    assert (after.calls, after.cached, after.output_tokens) == (2, 4, 16)


def test_no_texts_no_request():
    with Chat(lambda text, n: Reply()) as chat:
        assert judge(chat).coherence([]).shape == (0,)
        with pytest.raises(fg.DataError, match="one string"):
            judge(chat).coherence("one")
    assert not chat.requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "file:///etc"}, "base_url"),
        ({"base_url": "http://[bad"}, "base_url"),
        ({"base_url": "https://a host/v1"}, "base_url"),
        ({"api_key": "sk-1\r\nX-Other: 1"}, "API key"),
        ({"concurrency": 0}, "concurrency"),
        ({"answers": 0}, "answers"),
        ({"attempts": 0}, "attempts"),
        ({"timeout": 0.0}, "timeout"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(fg.JudgeError, match=message) as caught:
        fg.EndpointJudge("m", **options)
    assert "sk-1" not in str(caught.value)
