"""What a token is: BOS once, EOS never, templates' tails, contexts as SAEs were trained on, windows of models."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import fgsteer as fg
from fgsteer.activations.tokens import TokenReader, encode_prompts
from tests.helpers.saes import make_sae
from tests.helpers.tiny import D_MODEL, word_tokenizer

AT = "blocks.1.hook_resid_post"
USER = [{"role": "user", "content": "the man said"}]
YES = [{"role": "assistant", "content": "tea and bread"}]
# float32 forward passes at other batch shapes
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def with_eos():
    """A tokenizer that writes BOS before and EOS behind every text."""
    from tokenizers import processors

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    assert tokenizer("the")["input_ids"] == [0, 4, 2]
    return tokenizer


def with_tail():
    """A tokenizer whose template writes BOS itself, and two tokens behind every message."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }} {% for m in messages %}{{ m['role'] }} {{ m['content'] }} ! . {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    return tokenizer


class SlowTokenizer(PreTrainedTokenizerFast):
    """The same tokenizer, which does not tell where in the text its tokens stand."""

    is_fast = False


def slow(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.__class__ = SlowTokenizer
    return other


def alone(model, ids, at=AT):
    """Activations (tokens, d_model) of one row of ids."""
    return fg.record(model, torch.tensor([ids]), None, [fg.Hookpoint.parse(at)])[fg.Hookpoint.parse(at)][0]


def mean(model, tokenizer, positive, **options):
    """The positive mean that ``collect`` reads from one text, (d_model,) float64."""
    contrast = (
        fg.ContrastSet("x", pairs=[positive])
        if isinstance(positive, fg.ContrastPair)
        else fg.ContrastSet("x", positives=[positive], negatives=["the dog"])
    )
    stats = fg.collect(model, tokenizer, contrast, hookpoints=AT, **options)
    return stats.at("residual")[1].positive.mean


def row_of(tokenizer, prompt, completion, **options):
    """(tokens as text, those that are read) of one text."""
    ((row,),) = TokenReader(tokenizer, **options).rows([(prompt, completion, True)])
    pieces = [tokenizer.decode([i]) for i in row.ids]
    return pieces, [pieces[place] for place in row.selected]


def assert_mean(found, expected):
    assert np.allclose(found, expected.double().mean(0), **CLOSE)


def test_eos_behind_a_text_is_never_read_nor_continued(llama):
    tokenizer, plain = with_eos(), word_tokenizer()
    for rule in ("all", "last", -1):
        expected = mean(llama, plain, "the man said yes", tokens=rule)
        assert np.allclose(mean(llama, tokenizer, "the man said yes", tokens=rule), expected, **CLOSE)
    pairs = [("the man", "said yes"), ("", "a dog ran")]
    ours, theirs = (fg.log_probabilities(llama, t, pairs) for t in (tokenizer, plain))
    assert ours.counts.tolist() == theirs.counts.tolist() == [2, 3]
    assert torch.allclose(ours.sums, theirs.sums, rtol=1e-4)
    prompts = ["the man", "a"]
    texts = [fg.generate(llama, t, prompts, max_new_tokens=6, do_sample=False) for t in (tokenizer, plain)]
    assert texts[0] == texts[1]


def test_bos_stands_once_before_a_rendered_chat(llama):
    tokenizer = with_tail()
    rendered = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert tokenizer(rendered)["input_ids"][:2] == [0, 0]  # what goes wrong when nobody looks
    ids, mask = encode_prompts(tokenizer, [rendered])
    assert ids.tolist() == encode_prompts(tokenizer, [USER])[0].tolist()
    assert ids[0, :2].tolist() == [0, tokenizer.convert_tokens_to_ids("user")]
    assert mask.all()
    options = {"max_new_tokens": 6, "do_sample": False}
    vector = fg.SteeringVector(torch.ones(D_MODEL), fg.Hookpoint(1))
    for steering in (None, vector.add(2.0)):
        by_text, by_messages = (
            fg.generate(llama, tokenizer, prompts, steering=steering, **options) for prompts in ([rendered], [USER])
        )
        assert by_text == by_messages
    conversation = USER + YES
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert np.allclose(mean(llama, tokenizer, whole), mean(llama, tokenizer, conversation), **CLOSE)


def test_the_last_token_is_that_of_the_content(llama):
    tokenizer = with_tail()
    ids = tokenizer(tokenizer.apply_chat_template(USER + YES, tokenize=False), add_special_tokens=False)["input_ids"]
    acts = alone(llama, ids)
    words = tokenizer.convert_ids_to_tokens(ids)
    content = [len(words) - 5, len(words) - 4, len(words) - 3]
    assert [words[place] for place in content] == ["tea", "and", "bread"]
    pair = fg.ContrastPair(YES, [{"role": "assistant", "content": "no"}], USER)
    assert_mean(mean(llama, tokenizer, pair, tokens="last"), acts[content[-1:]])
    assert_mean(mean(llama, tokenizer, pair, tokens="answer"), acts[content])
    assert_mean(mean(llama, tokenizer, pair, tokens="tail"), acts[-2:])
    assert_mean(mean(llama, tokenizer, pair, tokens=-1), acts[-1:])
    assert_mean(mean(llama, tokenizer, pair, tokens="all"), acts[1:])
    found = fg.log_probabilities(llama, tokenizer, [(USER, YES)])
    assert found.counts.tolist() == [3]
    with pytest.raises(fg.DataError, match="selects none of the"):
        mean(llama, tokenizer, "the man", tokens="tail")


def test_slow_tokenizers_find_the_same_tokens():
    for tokenizer in (word_tokenizer(), word_tokenizer(bos=False), with_eos(), with_tail()):
        for prompt, completion in (("the man said", "tea and bread"), ("", "tea"), (USER, YES), (USER, "yes")):
            for rule in ("all", "last", "answer", -1):
                for prepend in (None, True, False):
                    options = {"rule": rule, "prepend_bos": prepend}
                    fast = row_of(tokenizer, prompt, completion, **options)
                    assert row_of(slow(tokenizer), prompt, completion, **options) == fast


def test_the_first_word_is_read_where_there_is_no_bos(models):
    bare = word_tokenizer(bos=False)
    for family in ("gpt2", "qwen2"):
        model = models[family]
        ids = bare("the man said")["input_ids"]
        assert_mean(mean(model, bare, "the man said"), alone(model, ids))
        assert_mean(mean(model, bare, "Love"), alone(model, bare("Love")["input_ids"]))  # one word: no error
        with_bos = [0, *ids]
        assert_mean(mean(model, bare, "the man said", prepend_bos=True), alone(model, with_bos)[1:])
        assert_mean(mean(model, bare, "the man said", prepend_bos=True, bos=True), alone(model, with_bos))
        assert_mean(mean(model, word_tokenizer(), "the man said", prepend_bos=False), alone(model, ids))
    with pytest.raises(fg.DataError, match="special token"):
        mean(models["gpt2"], word_tokenizer(), "the man", tokens=0)
    assert_mean(
        mean(models["gpt2"], bare, "the man", tokens=0), alone(models["gpt2"], bare("the man")["input_ids"])[:1]
    )


def test_eos_stands_in_for_a_bos_that_is_missing(models):
    bare = word_tokenizer(bos=False)
    bare.bos_token = None
    ids = [bare.eos_token_id, *bare("the man")["input_ids"]]
    assert_mean(mean(models["qwen2"], bare, "the man", prepend_bos=True), alone(models["qwen2"], ids)[1:])
    bare.eos_token = None
    with pytest.raises(fg.DataError, match="a tokenizer with a BOS or an EOS token"):
        mean(models["qwen2"], bare, "the man", prepend_bos=True)


def test_contexts_are_those_that_the_sae_was_trained_on(models):
    model, bare, sae = models["gpt2"], word_tokenizer(bos=False), make_sae()
    texts = ["the man said yes", "tea", "a dog sat on bread"]
    contrast = fg.ContrastSet("x", positives=texts, negatives=["the dog"])
    for prepend in (None, False, True):
        trained = replace(sae, prepend_bos=prepend)
        rows = [[0] * bool(prepend) + bare(text)["input_ids"] for text in texts]
        acts = [sae.encode(alone(model, ids))[int(bool(prepend)) :] for ids in rows]
        stats = fg.collect(model, bare, contrast, sae=trained)
        expected = torch.stack([a.mean(0) for a in acts])
        assert_mean(stats.at("feature")[1].positive.mean, expected)
        assert stats.reading["prepend_bos"] is prepend
        every = torch.cat(acts)
        density = fg.measure_density(model, bare, trained, texts)
        assert density.tokens == len(every)
        assert torch.equal(density.fired, (every > 0).sum(0).double())
        examples = fg.measure_examples(model, bare, trained, texts, top=1, window=0)
        top = every.max(0).values
        assert torch.allclose(examples.largest(24)[top > 0], top[top > 0], rtol=1e-4)
    # what is asked for goes before what the SAE says
    stats = fg.collect(model, bare, contrast, sae=replace(sae, prepend_bos=True), prepend_bos=False)
    assert stats.reading["prepend_bos"] is False
    with pytest.raises(fg.ArgumentError, match=r"'no'.* for prepend_bos"):
        fg.collect(model, bare, contrast, sae=sae, prepend_bos="no")


@pytest.mark.parametrize("prepend", [True, False])
def test_rows_are_those_of_sae_lens(models, prepend):
    """The ids that its activation store feeds a GPT-2, and the positions at which it has a text's words."""
    from datasets import Dataset
    from sae_lens import ActivationsStore
    from sae_lens.load_model import HookedProxyLM

    bare = word_tokenizer(bos=False)
    texts = ["the man said yes and no to tea", "a dog sat on bread in the old house", "the king and the queen ran on"]
    size = 7  # tokens of a context
    store = ActivationsStore(
        model=HookedProxyLM(models["gpt2"], bare),
        dataset=Dataset.from_dict({"text": texts}),
        streaming=False,
        hook_name="transformer.h.1",
        hook_head_index=None,
        context_size=size,
        d_in=D_MODEL,
        n_batches_in_buffer=2,
        total_training_tokens=100,
        store_batch_size_prompts=1,
        train_batch_size_tokens=4,
        prepend_bos=prepend,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        disable_concat_sequences=True,
    )
    theirs = [row.tolist() for row, _ in zip(store._iterate_tokenized_sequences(), texts, strict=False)]
    reader = TokenReader(bare, prepend_bos=prepend, max_tokens=size)
    (rows,) = reader.rows([("", text, True) for text in texts])
    ours = sorted(rows, key=lambda row: row.index)
    assert [list(row.ids) for row in ours] == theirs
    assert all(list(row.selected) == list(range(int(prepend), size)) for row in ours)
    batch = torch.tensor(theirs)
    acts = store.get_activations(batch)
    at = fg.Hookpoint(1)
    found = fg.record(models["gpt2"], torch.tensor([list(row.ids) for row in ours]), None, [at])[at]
    assert torch.allclose(acts.reshape(found.shape), found, **CLOSE)


def test_what_saes_were_trained_with_is_read_from_their_configs(tmp_path):
    from fgsteer.saes.formats.sae_lens import parse_sae_lens

    tensors = {"W_enc": torch.ones(4, 6), "W_dec": torch.ones(6, 4), "b_enc": torch.zeros(6), "b_dec": torch.zeros(4)}
    config = {"architecture": "standard", "d_in": 4, "d_sae": 6, "normalize_activations": "none"}
    place = {"hook_name": "blocks.1.hook_resid_post"}
    for told in (True, False):
        assert parse_sae_lens(config, tensors, {**place, "prepend_bos": told}, source="x").prepend_bos is told
        assert parse_sae_lens({**config, **place, "prepend_bos": told}, tensors, {}, source="x").prepend_bos is told
    assert parse_sae_lens(config, tensors, place, source="x").prepend_bos is None
    with pytest.raises(fg.FormatError, match="prepend_bos = 'yes'"):
        parse_sae_lens(config, tensors, {**place, "prepend_bos": "yes"}, source="x")
    assert fg.load_sae("default").prepend_bos is True


def test_texts_beyond_the_window_are_cut_with_one_warning(models, tokenizer):
    long = "the man said " * 40  # 121 tokens; the window is 64
    contrast = fg.ContrastSet("x", positives=[long, "tea"], negatives=[long])
    for model in (models["gpt2"], models["llama"]):
        with pytest.warns(fg.FgsteerWarning, match="2 of 3 texts are longer than the model's window of 64") as told:
            stats = fg.collect(model, tokenizer, contrast, hookpoints=AT)
        assert len(told) == 1
        ids = tokenizer(long)["input_ids"][:64]
        expected = (
            alone(model, ids)[1:].double().mean(0) + alone(model, tokenizer("tea")["input_ids"])[1].double()
        ) / 2
        assert np.allclose(stats.at("residual")[1].positive.mean, expected, **CLOSE)
        fg.collect(model, tokenizer, contrast, hookpoints=AT, max_tokens=20)  # as asked: nothing to say
        with pytest.warns(fg.FgsteerWarning, match="1 of 2 texts"):
            fg.cross_entropies(model, tokenizer, [long, "the tea"], [None])
        with pytest.warns(fg.FgsteerWarning, match="1 of 2 texts"):
            fg.measure_density(model, tokenizer, make_sae(), [long, "tea"])
        with pytest.raises(fg.DataError, match="at most 64 tokens, the model's window, got prompt 1 with 121 tokens"):
            fg.generate(model, tokenizer, ["tea", long], max_new_tokens=2)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(fg.FgsteerError, match="max_tokens"):
            fg.collect(models["llama"], tokenizer, contrast, hookpoints=AT, max_tokens=wrong)


def test_prompts_of_nothing_are_refused(llama, tokenizer):
    bare = word_tokenizer(bos=False)
    for prompts in ([""], ["", "the king"], ["the king", ""]):
        with pytest.raises(fg.DataError, match=r"Prompt \d is empty"):
            fg.generate(llama, bare, prompts, max_new_tokens=3)
        assert len(fg.generate(llama, tokenizer, prompts, max_new_tokens=3)) == len(prompts)  # from BOS


def test_a_letter_that_is_cut_away_is_told(llama, tokenizer):
    pairs = [fg.ContrastPair("A", "B", prompt="the king " * 40)]
    with pytest.raises(fg.DataError, match=r"tokens='letter' selects none of the first 64 of 82 tokens"):
        fg.collect(llama, tokenizer, pairs, hookpoints=AT, tokens="letter")


def test_wrong_rules_are_named(llama, tokenizer):
    contrast = fg.ContrastSet("x", positives=["tea"], negatives=["dog"])
    for rule in ("first", True, None, 1.5):
        with pytest.raises(fg.DataError, match="tokens = "):
            fg.collect(llama, tokenizer, contrast, hookpoints=AT, tokens=rule)
    with pytest.raises(fg.ArgumentError, match=r"'no'.* for bos"):
        fg.collect(llama, tokenizer, contrast, hookpoints=AT, bos="no")


def test_white_space_at_the_end_of_a_prompt_is_the_prompts(llama):
    """Of byte-level tokenizers that do not tell where tokens stand, as those of ByT5."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    for prompt in ("a\n", "a  ", "the man said:\n\n"):
        ((row,),) = TokenReader(tokenizer, rule="answer", joint="").rows([(prompt, "b c", True)])
        assert tokenizer.decode([row.ids[place] for place in row.selected]) == "b c"
        assert row.prompt_length == len(prompt.encode())


def test_what_a_template_writes_into_the_answers_turn_is_no_answer():
    """As Qwen 3's <think></think>; it may hold the answer's words, as "channel" in gpt-oss's holds "a"."""
    for written in ("( )", "( tea and bread )"):
        tokenizer = with_tail()
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "{{ m['role'] }} {{ m['content'] }}",
            f"{{{{ m['role'] }}}} {{% if m['role'] == 'assistant' %}}{written} {{% endif %}}{{{{ m['content'] }}}}",
        )
        for rule in ("answer", "last"):
            read = row_of(tokenizer, USER, YES, rule=rule)[1]
            assert read == (["tea", "and", "bread"] if rule == "answer" else ["bread"])


def test_prompts_beyond_learned_positions_are_refused_before_any_work(models, tokenizer):
    gpt2, long = models["gpt2"], " ".join(["the"] * 60)  # of 64 positions
    at = fg.Hookpoint(1)
    with pytest.raises(fg.DataError, match="61 tokens and 30 new ones"):
        fg.generate(gpt2, tokenizer, [long], max_new_tokens=30)
    with pytest.raises(fg.DataError, match="61 tokens and 30 new ones"):
        fg.stream(gpt2, tokenizer, long, max_new_tokens=30)
    with pytest.raises(fg.DataError, match="a row of 70 tokens"):
        fg.record(gpt2, torch.zeros(1, 70, dtype=torch.long), None, [1])
    assert fg.record(gpt2, torch.zeros(1, 64, dtype=torch.long), None, [1])[at].shape == (1, 64, D_MODEL)
    with pytest.raises(fg.DataError, match="at most 64 tokens, the model's window"):
        fg.output_scores(gpt2, tokenizer, make_sae(), [1], prompt=f"{long} {long}")
    with pytest.raises(fg.DataError, match="cut before what is read"):
        fg.log_probabilities(gpt2, tokenizer, [(f"{long} {long}", "yes")])
    with pytest.raises(fg.DataError, match="batch_tokens = -1"):
        fg.collect(
            gpt2, tokenizer, fg.ContrastSet("x", positives=["tea"], negatives=["a"]), hookpoints=1, batch_tokens=-1
        )
