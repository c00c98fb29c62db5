"""Contrast data from a description, by a model and by an endpoint; losing answers; and a look for faults."""

from __future__ import annotations

import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fgsteer as fg
from fgsteer.authoring import describing
from fgsteer.authoring.endpoint import EndpointWriter, parse_answers
from fgsteer.authoring.languages import language_of, script_of
from fgsteer.authoring.similarity import near_duplicates
from fgsteer.authoring.work_file import LONGEST_ANSWER_CHARACTERS, WorkFile
from fgsteer.data.rendering import render_prompt
from fgsteer.evaluation.judges.chat_client import BrokenAnswerError, ChatClient
from fgsteer.steering import answers as answering
from tests.helpers.chat import Chat, Reply
from tests.helpers.cli import invoke, invoke_on_cpu
from tests.helpers.tiny import tiny_model, word_tokenizer
from tests.reference import authoring as reference

QUESTIONS = ["the man said", "is it a dog ?", "she took the ring", "he ran to the sea", "the old king", "a new ship"]


# ---------------------------------------------------------------- by a model itself


def describe(llama, tokenizer, **changes):
    options = {"n": 5, "prompts": QUESTIONS, "max_new_tokens": 5, "rows": 2, **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.FgsteerWarning)
        return fg.describe_contrast("is happy", model=llama, tokenizer=tokenizer, **options)


def test_answers_are_those_under_the_system_prompt_and_without(llama, tokenizer):
    found = describe(llama, tokenizer, system="you {description}")
    assert (found.name, found.description) == ("is happy", "is happy")
    assert found.pairs
    for pair in found.pairs:
        (question,) = pair.prompt
        told = [{"role": "system", "content": "you is happy"}, question]
        for prompt, answer in ((told, pair.positive), (pair.prompt, pair.negative)):
            (text,) = fg.generate(llama, tokenizer, [prompt], max_new_tokens=5, do_sample=False)
            assert text.strip() == answer
    assert {pair.prompt[0]["content"] for pair in found.pairs} <= set(QUESTIONS)


def test_a_seed_draws_prompts_in_an_order(llama, tokenizer):
    one, same, other = (describe(llama, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert one.sha256 == same.sha256 != other.sha256


def test_a_template_without_system_messages_is_told_in_the_first_one(llama):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    chat = [{"role": "user", "content": "the man said"}]
    told = describing._told(tokenizer, chat, "you is happy")
    assert [message["role"] for message in told] == ["user"]
    assert "you is happy" in render_prompt(tokenizer, told).text
    silent = word_tokenizer()
    silent.chat_template = silent.chat_template.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
    )
    assert "you is happy" in render_prompt(silent, describing._told(silent, chat, "you is happy")).text
    tokenizer.chat_template = None
    with pytest.raises(fg.DataError, match="chat template"):
        describe(llama, tokenizer)


def test_a_run_that_was_stopped_goes_on_to_the_same_set(llama, tokenizer, tmp_path, monkeypatch):
    work = tmp_path / "work.jsonl"
    whole = describe(llama, tokenizer)
    plain, calls, stop_at = answering.greedy_answers, [], [4]

    def counted(*args, **options):
        calls.append(len(args[2]))
        if len(calls) in stop_at:
            stop_at.clear()
            raise RuntimeError("stopped")
        return plain(*args, **options)

    monkeypatch.setattr(describing, "greedy_answers", counted)
    with pytest.raises(RuntimeError, match="stopped"):
        describe(llama, tokenizer, work=work)
    assert len(work.read_text().splitlines()) == 3, "a header and the pairs of one batch"
    with open(work, "ab") as file:
        file.write(b'{"number": 4, "positive": "cut o')
    assert describe(llama, tokenizer, work=work).sha256 == whole.sha256
    assert len(calls) == 8, "the first batch was not answered again"
    calls.clear()
    assert describe(llama, tokenizer, work=work).sha256 == whole.sha256
    assert not calls, "nothing is answered twice"
    with pytest.raises(fg.PairingError, match="max_new_tokens was 5 and is 6"):
        describe(llama, tokenizer, work=work, max_new_tokens=6)
    assert describe(llama, tokenizer, work=work, max_new_tokens=6, fresh=True)


def test_a_work_file_is_not_trusted(tmp_path):
    path, plan = tmp_path / "work.jsonl", {"a": 1}
    kept = WorkFile(path, plan)
    kept.add(0, "yes", "no")
    rows = [
        b"nonsense",
        b'{"number": "1", "positive": "a", "negative": "b"}',
        b'{"number": 2, "positive": ["a"], "negative": "b"}',
        json.dumps({"number": 3, "positive": "x" * (LONGEST_ANSWER_CHARACTERS + 1), "negative": "b"}).encode(),
        b'{"number": 4, "positive": "\\ud800", "negative": "b"}',
        b"[1]",
    ]
    path.write_bytes(path.read_bytes() + b"\n".join(rows) + b"\n")
    assert WorkFile(path, plan).pairs == {0: ("yes", "no")}
    (tmp_path / "other.jsonl").write_text('{"fgsteer": "bench"}\n')
    with pytest.raises(fg.FormatError, match="no such file"):
        WorkFile(tmp_path / "other.jsonl", plan)


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"n": 7}, fg.DataError, "6 different prompts for 7 pairs"),
        ({"n": 0}, fg.DataError, "n = 0"),
        ({"prompts": "the man"}, fg.DataError, "one text for prompts"),
        ({"system": "you"}, fg.DataError, r"\{description\}"),
        ({"tokenizer": None}, fg.ArgumentError, "None for tokenizer"),
        ({"model": None}, fg.ArgumentError, "no model"),
        ({"name": "a/b"}, fg.DataError, "a contrast set named"),
        ({"description": "  "}, fg.DataError, "a description of 0 characters"),
    ],
)
def test_descriptions_that_cannot_be(changes, kind, told, llama, tokenizer):
    given = {"description": "is happy", "n": 3, "prompts": QUESTIONS, "model": llama, "tokenizer": tokenizer, **changes}
    with pytest.raises(kind, match=told):
        fg.describe_contrast(given.pop("description"), **given)


def test_answers_alike_are_left_out_and_none_is_an_error(llama, tokenizer, monkeypatch):
    def alike(model, tokenizer, prompts, **_):
        same = [answering.Answer([1], [2], "the same", True) for _ in prompts]
        if len(prompts[0]) > 1 and several:
            same[0] = answering.Answer([1], [2], "other", True)
        return same

    monkeypatch.setattr(describing, "greedy_answers", alike)
    several = True
    with pytest.warns(fg.FgsteerWarning, match="2 of 5 pairs are left out"):
        found = fg.describe_contrast("is happy", n=5, prompts=QUESTIONS, model=llama, tokenizer=tokenizer, rows=2)
    assert len(found.pairs) == 3
    several = False
    with pytest.raises(fg.DataError, match="answered all 5 prompts alike"):
        fg.describe_contrast("is happy", n=5, prompts=QUESTIONS, model=llama, tokenizer=tokenizer)


def test_shipped_questions_are_enough_for_the_default():
    questions = describing.shipped_questions()
    assert len(questions) >= 120
    assert len(describing.draw_prompts(None, 80, 0)) == 80


# ---------------------------------------------------------------- by an endpoint


def pair_of(text, number):
    return Reply(json.dumps({"with": f"Arr! {text}", "without": f"Well, {text}"}))


def ask(chat, **changes):
    options = {"n": 4, "prompts": QUESTIONS, "backoff": 0.001, "api_key": "sk-secret-0123456789", **changes}
    return fg.describe_contrast("speaks like a pirate", model="writer", base_url=chat.url, **options)


def test_an_endpoint_writes_both_answers():
    with Chat(pair_of) as chat:
        found = ask(chat)
    assert len(found.pairs) == 4
    for pair in found.pairs:
        question = pair.prompt[0]["content"]
        assert (pair.positive, pair.negative) == (f"Arr! {question}", f"Well, {question}")
    _, _, headers, body, _ = chat.requests[0]
    assert headers["Authorization"] == "Bearer sk-secret-0123456789"
    prompt = body["messages"][0]["content"]
    assert json.loads(prompt.splitlines()[-1])["behavior"] == "speaks like a pirate"
    assert "secret" not in prompt


BROKEN = {
    "no JSON": "arr",
    "one answer": '{"with": "arr"}',
    "the same": '{"with": "yes", "without": "yes "}',
    "empty": '{"with": " ", "without": "yes"}',
    "no text": '{"with": ["arr"], "without": "yes"}',
    "a key twice": '{"with": "a", "with": "b", "without": "c"}',
    "half a character": '{"with": "\\ud800", "without": "c"}',
    "too long": json.dumps({"with": "x" * (LONGEST_ANSWER_CHARACTERS + 1), "without": "c"}),
    "too deep": '{"with": ' + "[" * 9999 + ', "without": "c"}',
}


@pytest.mark.parametrize("trouble", BROKEN)
def test_a_broken_answer_is_asked_for_again(trouble):
    with pytest.raises(BrokenAnswerError):
        parse_answers(BROKEN[trouble])
    with Chat(lambda text, n: Reply(BROKEN[trouble]) if n < 3 else pair_of(text, n)) as chat:
        assert len(ask(chat, n=2).pairs) == 2
    assert len(chat.requests) == 6


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=60))
def test_whatever_an_endpoint_says_is_a_pair_or_is_refused(answer):
    try:
        positive, negative = parse_answers(answer)
    except BrokenAnswerError:
        return
    assert positive.strip() != negative.strip() != ""


@given(st.text(), st.text())
@settings(deadline=None, max_examples=30)
def test_nothing_leaves_its_place_in_a_question(text, behavior):
    writer = EndpointWriter(ChatClient("m"), behavior)
    *ours, last = writer.question(text).splitlines()
    assert ours == EndpointWriter(ChatClient("m"), "").question("").splitlines()[:-1]
    assert json.loads(last) == {"behavior": behavior, "text": text}


def test_an_answer_in_a_code_block_is_read():
    assert parse_answers('Here:\n```json\n{"with": " Arr ", "without": "Yes"}\n```') == ("Arr", "Yes")


def test_an_endpoint_that_fails_keeps_what_it_said(tmp_path):
    work = tmp_path / "work.jsonl"
    with Chat(lambda text, n: Reply(status=401, body="no sk-secret-0123456789")) as chat:
        with pytest.raises(fg.JudgeError, match=r"got no answers.*HTTP 401") as caught:
            ask(chat, work=work)
        assert "secret" not in str(caught.value)
    seen = []

    def answer(text, number):
        seen.append(text)
        return Reply(status=400, body="stop") if len(set(seen)) == 3 else pair_of(text, number)

    with Chat(answer) as chat:
        with pytest.raises(fg.PairingError, match="something else"):
            ask(chat, work=work)  # another address
        with pytest.raises(fg.JudgeError):
            ask(chat, work=work, fresh=True, concurrency=1)
        kept = len(work.read_text().splitlines()) - 1
        assert kept == 2
        seen[:] = ["x"] * 9
        before = len(chat.requests)
        seen.extend("abc")
        assert len(ask(chat, work=work).pairs) == 4
        assert len(chat.requests) - before == 2, "only what is left is asked"
    assert "secret" not in work.read_text()


# ---------------------------------------------------------------- losing answers


def test_losers_are_the_models_own_answers_of_as_many_tokens(llama, tokenizer):
    winners = [("the man said", "yes it is a good day"), ("she took", "the ring"), ("a dog", "ran to the sea . no")]
    found = fg.losing_answers(llama, tokenizer, winners, rows=2)
    for (prompt, winner), pair in zip(winners, found.pairs, strict=True):
        tokens = len(tokenizer(winner)["input_ids"]) - 1
        (text,) = fg.generate(llama, tokenizer, [prompt], max_new_tokens=tokens, do_sample=False)
        assert (pair.prompt, pair.positive, pair.negative) == (prompt, winner, text)
        assert len(tokenizer(text)["input_ids"]) - 1 <= tokens
    longer = fg.losing_answers(llama, tokenizer, winners, max_new_tokens=6)
    assert all(len(str(pair.negative).split()) <= 6 for pair in longer.pairs)
    assert str(longer.pairs[1].negative).startswith(str(found.pairs[1].negative)), "greedy answers grow at their end"
    vector = fg.train(llama, tokenizer, found, objective=fg.VectorTraining.recipe("reps", epochs=1), hookpoint=1)
    assert vector.norm > 0


def test_losers_of_chats_and_of_held_out_winners(llama, tokenizer):
    chat = [{"role": "user", "content": "the man said"}]
    reply = [{"role": "assistant", "content": "yes he is happy"}]
    held_out = fg.ContrastSet("y", [fg.ContrastPair("yes it is", "no", chat)])
    given = fg.ContrastSet("x", [fg.ContrastPair(reply, "no", chat)], held_out=held_out, description="so")
    found = fg.losing_answers(llama, tokenizer, given)
    (text,) = fg.generate(llama, tokenizer, [chat], max_new_tokens=4, do_sample=False)
    (pair,) = found.pairs
    assert pair.negative[0] == {"role": "assistant", "content": text}
    assert found.description == "so"
    assert text.startswith(found.held_out.pairs[0].negative), "greedy answers grow at their end"
    swapped = fg.losing_answers(llama, tokenizer, [("the man said", reply)])
    assert swapped.pairs[0].prompt == chat


def test_answers_that_are_empty_are_left_out(tokenizer):
    model = tiny_model("llama")
    winners = [("the man said", "yes it is"), ("she took", "the ring")]
    first = answering.greedy_answers(model, tokenizer, ["the man said"], max_new_tokens=1)[0]
    model.generation_config.eos_token_id = first.ids[0]
    with pytest.warns(fg.FgsteerWarning, match="1 of 2 prompts is empty"):
        assert len(fg.losing_answers(model, tokenizer, winners).pairs) == 1
    with pytest.raises(fg.DataError, match="answered none of the 1 prompt"):
        fg.losing_answers(model, tokenizer, winners[:1])


@pytest.mark.parametrize("winners", [["the man"], [("", "yes")], {"positive": ["yes"], "negative": ["no"]}, [3]])
def test_winners_that_cannot_be(winners, llama, tokenizer):
    with pytest.raises(fg.DataError):
        fg.losing_answers(llama, tokenizer, winners)


# ---------------------------------------------------------------- lint


def sides(positive, negative, **more):
    return fg.ContrastSet("pirates", positives=positive, negatives=negative, **more)


def checks_of(contrast, *options):
    return {advice.check: advice for advice in fg.lint_contrast(contrast, *options)}


NOUNS = [
    "river", "window", "market", "garden", "letter", "teacher", "engine", "forest", "kitchen", "station",
    "doctor", "summer", "pencil", "bridge", "castle", "village", "mountain", "picture", "weather", "harbour",
]  # fmt: skip


def varied(seed, count=20):
    """Sentences of one length that share hardly a run of three words."""
    return [
        f"{NOUNS[(n + seed) % 20]} near {NOUNS[(7 * n + seed) % 20]} {seed} behind {NOUNS[(3 * n + 5 * seed) % 20]}"
        for n in range(count)
    ]


def test_good_data_gets_no_advice():
    clean = sides([t.replace("0", "") for t in varied(0)], [t.replace("9", "") for t in varied(9)])
    assert not fg.lint_contrast(clean)
    for name in ("love", "wedding", "formal"):
        assert not fg.lint_contrast(name)


words = st.lists(st.sampled_from(["a", "b", "c", "d", "E"]), min_size=0, max_size=8).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(st.lists(words, max_size=9), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_near_duplicates_are_those_of_all_pairs(texts, least):
    assert near_duplicates(texts, least) == reference.similar_pairs(texts, least)


def test_lengths_that_differ(tokenizer):
    long = [f"{text} and then {'some ' * (n % 3)}more" for n, text in enumerate(varied(0))]
    short = [text if n % 2 else f"{text} too" for n, text in enumerate(varied(1))]
    found = checks_of(sides(long, short))["length_difference"]
    lengths = [[len(text.split()) for text in side] for side in (long, short)]
    assert found.number == pytest.approx(reference.cohens_d(*lengths), rel=1e-12)
    assert "positive texts are longer" in str(found)
    assert found.example == max(long, key=lambda text: len(text.split()))
    tokens = [[len(tokenizer(text)["input_ids"]) - 1 for text in side] for side in (long, short)]
    by_tokens = checks_of(sides(long, short), tokenizer)["length_difference"]
    assert by_tokens.number == pytest.approx(reference.cohens_d(*tokens), rel=1e-12)
    other = checks_of(sides(short, long))["length_difference"]
    assert other.number == pytest.approx(-found.number)
    assert "negative texts are longer" in other.message
    even = checks_of(sides(["a b c"] * 5, ["a b"] * 5))["length_difference"]
    assert even.as_dict()["number"] is None, "JSON has no infinity"
    assert "no side varies" in even.message


def test_tokens_that_tell_the_sides_apart():
    positive = [f"Arr, {text}" if n else text for n, text in enumerate(varied(0))]
    found = checks_of(sides(positive, varied(1)))["one_sided_tokens"]
    tokens = {entry["token"]: entry for entry in found.details["tokens"]}
    assert (tokens["arr"]["positive"], tokens["arr"]["negative"]) == (19, 0)
    assert tokens["arr"]["log_odds"] == pytest.approx(reference.log_odds(19, 20, 0, 20), rel=1e-12)
    assert "“arr” in 19 of 20 positive and 0 of 20 negative texts" in str(found)
    assert "near" not in tokens
    few = sides(["arr me", "arr you", "him"], ["well", "yes", "no"])
    assert "one_sided_tokens" not in checks_of(few), "three texts prove nothing"


def test_texts_that_come_twice_or_on_both_sides():
    positive = [*varied(0), "River near river 0 behind river!", "the cat sat on the mat in the house today"]
    positive += ["the cat sat on the mat in the house", "both of us"]
    positive += [positive[0].upper()]
    found = checks_of(sides(positive, [*varied(1), "Both of us."]))
    assert found["same_on_both_sides"].number == 1
    assert found["same_on_both_sides"].serious
    assert found["same_on_both_sides"].example == "both of us"
    assert found["duplicates"].number == 2
    assert found["near_duplicates"].number == 1
    assert found["near_duplicates"].details["most_alike"] == pytest.approx(7 / 8)


def test_the_same_answer_to_other_prompts_is_no_duplicate():
    pairs = [fg.ContrastPair("Yes", "No", f"is it {noun} ?") for noun in NOUNS]
    assert set(checks_of(fg.ContrastSet("x", pairs))) == {"one_sided_tokens"}


def test_leakage():
    held_out = sides([varied(0)[3].title(), "a new one of these"], [varied(1)[2] + " still", "and another new one"])
    found = checks_of(sides(varied(0), varied(1), held_out=held_out))
    assert found["leakage"].number == 1
    assert found["leakage"].serious
    assert "near_leakage" not in found or found["near_leakage"].number == 1
    longer = [" ".join([text] * 3) for text in varied(1)]
    near = sides(["a new one of these"], [longer[2] + " still"])
    assert checks_of(sides(varied(0), longer, held_out=near))["near_leakage"].number == 1


def test_prompts_of_one_side():
    user = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    positive = [[*user(f"Talk of pirates and {noun}"), {"role": "assistant", "content": noun}] for noun in NOUNS]
    negative = [[*user(f"Talk of {noun}"), {"role": "assistant", "content": f"a {noun}"}] for noun in NOUNS]
    found = checks_of(sides(positive, negative))
    assert found["name_in_prompts"].number == 20
    assert found["name_in_prompts"].serious
    assert found["prompts_that_differ"].number == 1.0
    pairs = [fg.ContrastPair(noun, f"a {noun}", f"Talk of pirates and {noun}") for noun in NOUNS]
    assert not {"name_in_prompts", "prompts_that_differ"} & set(checks_of(fg.ContrastSet("pirates", pairs)))


def test_languages():
    assert language_of("Where is the station, and how do I get to it?") == "English"
    assert language_of("¿Dónde está la estación y cómo se llega?") == "Spanish"
    assert language_of("Wo ist der Bahnhof, und wie komme ich zu ihm?") == "German"
    assert language_of("Где вокзал?") == "Cyrillic"
    assert script_of("駅はどこですか") == "Japanese"
    assert (language_of("..."), language_of("xyzzy plugh")) == ("", "")
    found = checks_of("spanish")["language_mix"]
    assert found.number == pytest.approx(1.0)
    english = ["where is the station of the town", "this is not what you said"] * 10
    german = ["das ist nicht der Bahnhof", "ich bin auch mit dem Zug da"] * 2
    mixed = checks_of(sides(english + german, english + german))["language_mix"]
    assert mixed.number == pytest.approx(4 / 24)
    assert mixed.example in german


def test_few_and_empty_texts():
    pair = fg.ContrastPair([{"role": "assistant", "content": "…"}], "yes", "is it ?")
    found = checks_of(fg.ContrastSet("x", [pair]))
    assert found["empty_answers"].number == 1
    assert found["too_few_texts"].number == 1
    first = fg.lint_contrast(fg.ContrastSet("x", [pair]))[0]
    assert first.serious, "the serious come first"


def test_advice_is_spoken_and_has_a_machine_form():
    advice = fg.lint_contrast("cheerful")[0]
    assert str(advice).endswith("”.")
    assert json.loads(json.dumps(advice.as_dict()))["check"] == advice.check
    hostile = fg.lint_contrast(sides(["\x1b[2J" + t for t in ["a b"] * 3], ["c d"] * 3))
    assert all("\x1b" not in str(one) for one in hostile)


# ---------------------------------------------------------------- files and commands


def test_a_saved_set_is_loaded_as_the_same(tmp_path):
    chat = [{"role": "user", "content": "a"}]
    held_out = fg.ContrastSet("h", positives=["x"], negatives=["y"])
    for contrast in (
        fg.ContrastSet("one", [fg.ContrastPair("yes", "no", chat), fg.ContrastPair("b", "c")], description="so"),
        fg.ContrastSet("two", positives=["a", chat], negatives=["b"], held_out=held_out),
    ):
        fg.save_contrast(contrast, tmp_path / "set.json")
        loaded = fg.load_contrast(tmp_path / "set.json")
        assert (loaded.sha256, loaded.name, loaded.description) == (
            contrast.sha256,
            contrast.name,
            contrast.description,
        )
        assert (loaded.held_out is None) == (contrast.held_out is None)
    with pytest.raises(fg.DataError, match=r"ends in \.json"):
        fg.save_contrast(contrast, tmp_path / "set.csv")
    both = fg.ContrastSet("x", [fg.ContrastPair("a", "b")], positives=["c"], negatives=["d"])
    with pytest.raises(fg.DataError, match="pairs and single texts"):
        fg.save_contrast(both, tmp_path / "set.json")


def test_lint_on_the_command_line(tmp_path):
    result = invoke("lint", "cheerful")
    assert result.exit_code == 0
    assert "- The positive texts are longer" in result.stdout
    assert invoke("lint", "cheerful", "--strict").exit_code == 1
    assert invoke("lint", "love", "--strict").exit_code == 0
    told = json.loads(invoke("lint", "cheerful", "--json").stdout)
    assert told["advice"][0]["check"] == "length_difference"


def test_describe_contrast_on_the_command_line(tmp_path, llama, tokenizer, monkeypatch):
    monkeypatch.setattr(fg, "load_model", lambda *_, **__: (llama, tokenizer))
    (tmp_path / "asked.txt").write_text("\n".join(QUESTIONS))
    out = tmp_path / "happy.json"
    arguments = ("describe-contrast", "is happy", "-o", out, "-n", 4, "--prompts", tmp_path / "asked.txt", "-m", "x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.FgsteerWarning)
        result = invoke_on_cpu(*arguments, "--max-new-tokens", 4)
    assert result.exit_code == 0
    assert "without:" in result.stdout
    assert fg.load_contrast(out).name == "is happy"
    with Chat(pair_of) as chat:
        asked = invoke(*arguments, "--url", chat.url, "--json")
    assert json.loads(asked.stdout)["pairs"] == 4
    assert str(fg.load_contrast(out).pairs[0].positive).startswith("Arr!")
