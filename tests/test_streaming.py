"""fg.stream: the text of fg.generate piece by piece; errors, early ends, a thread with a streamer of its own."""

from __future__ import annotations

import gc
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

import fgsteer as fg
from tests.helpers.tiny import D_MODEL, tiny_model

AT = fg.Hookpoint(1)
PROMPT = "the man sat"
CHAT = [{"role": "user", "content": "the old king"}]


@pytest.fixture
def item():
    draw = torch.Generator().manual_seed(3)
    return fg.SteeringVector(torch.randn(D_MODEL, generator=draw), AT).add(3.0)


def is_free(model):
    """Whether nothing steers the model and no thread of a stream runs."""
    names = ("generate", "__getstate__")
    running = [thread for thread in threading.enumerate() if thread.name == "fgsteer.stream"]
    return not running and not any(name in vars(m) for m in model.modules() for name in names)


@pytest.mark.parametrize("prompt", [PROMPT, CHAT])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2, "eos_token_id": 79},
    ],
)
def test_a_stream_joined_is_what_generate_gives(llama, tokenizer, item, prompt, options):
    for steering in (None, item, [[item, item]], [None]):
        torch.manual_seed(1)
        told = list(fg.stream(llama, tokenizer, prompt, steering=steering, max_new_tokens=12, **options))
        torch.manual_seed(1)
        expected = fg.generate(llama, tokenizer, [prompt], steering=_listed(steering), max_new_tokens=12, **options)
        assert ["".join(told)] == expected
        assert len(told) > 3
        assert all(told)
    assert is_free(llama)


def _listed(steering):
    return steering if isinstance(steering, list) or steering is None else [steering]


def byte_tokenizer():
    """A token a byte, as in byte-level BPE: characters of several bytes come in pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


class Writer(torch.nn.Module):
    """Stands in for a model: puts the tokens of a text to the streamer one by one."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, text, error=None):
        super().__init__()
        self.generation_config = GenerationConfig()
        self.ids, self.error = tokenizer(text)["input_ids"], error
        self.config, self.training = PretrainedConfig(), False
        self.embedding = torch.nn.Embedding(2, 2)

    def get_input_embeddings(self):
        return self.embedding

    def get_decoder(self):
        return self.embedding

    def generate(self, input_ids, streamer, stopping_criteria, **_):
        streamer.put(input_ids)
        for token in self.ids:
            streamer.put(torch.tensor([token]))
            if bool(stopping_criteria(input_ids, None).all()):
                return
        if self.error:
            raise self.error
        streamer.end()


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("the cat sat\non  the\n\n mat .", "the"),
        ("naïve café 北京 is 🌊 wide", "naï"),
        ("北京的大海", "北"),
        (" x", None),
        ("", None),
        ("one-word", "one-word"),
    ],
)
def test_pieces_are_whole_characters_and_words(text, first):
    tokenizer = byte_tokenizer()
    told = list(fg.stream(Writer(tokenizer, text), tokenizer, "a"))
    assert "".join(told) == text
    assert "\ufffd" not in "".join(told)
    assert first is None or told[0] == first


def test_an_error_of_generation_is_raised_where_the_pieces_are_read(llama, tokenizer, item):
    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            if input_ids.shape[1] > 6:
                raise RuntimeError("mine")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    told = []

    def read():
        for piece in fg.stream(
            llama, tokenizer, PROMPT, steering=item, max_new_tokens=9, stopping_criteria=StoppingCriteriaList([Fails()])
        ):
            told.append(piece)

    with pytest.raises(RuntimeError, match="mine"):
        read()
    assert told
    assert is_free(llama)


@pytest.mark.parametrize("how", ["break", "close", "collected", "raise"])
def test_a_stream_that_is_left_ends_and_frees_the_model(llama, tokenizer, item, how):
    steps = []

    class Counts(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            steps.append(input_ids.shape[1])
            time.sleep(0.001)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    pieces: Any = fg.stream(llama, tokenizer, PROMPT, steering=item, max_new_tokens=5000, stopping_criteria=[Counts()])
    if how == "break":
        for _ in pieces:
            break
        pieces = None
    elif how == "raise":
        with pytest.raises(KeyError):
            pieces.throw(KeyError) if next(pieces) else None
    else:
        next(pieces)
        pieces.close() if how == "close" else None
        pieces = None
    gc.collect()
    assert is_free(llama)
    assert len(steps) < 1000
    count = len(steps)
    time.sleep(0.02)
    assert len(steps) == count
    with fg.steer(llama, item):
        llama(torch.tensor([[0, 5, 6]]))


def test_a_stream_that_is_never_read_runs_nothing(llama, tokenizer, item):
    pieces: Any = fg.stream(llama, tokenizer, PROMPT, steering=item)
    assert is_free(llama)
    with fg.steer(llama, item):
        llama(torch.tensor([[0, 5, 6]]))
    pieces.close()


def test_what_a_stream_refuses_before_it_runs(llama, tokenizer, item):
    wide = fg.SteeringVector(torch.ones(7), AT).add()
    for error, match, prompt, options in [
        (fg.DataError, "got an int, 3, in prompt", 3, {}),
        (fg.DataError, "message 0", ["a", "b"], {}),
        (fg.DataError, "num_beams = 2", PROMPT, {"num_beams": 2}),
        (
            fg.DataError,
            "num_return_sequences = 3",
            PROMPT,
            {"generation_config": GenerationConfig(num_return_sequences=3, do_sample=True)},
        ),
        (fg.DataError, "streamer", PROMPT, {"streamer": None}),
        (fg.SteeringError, "2 steering entries", PROMPT, {"steering": [item, None]}),
        (fg.PairingError, "7", PROMPT, {"steering": wide}),
    ]:
        with pytest.raises(error, match=match):
            fg.stream(llama, tokenizer, prompt, **options)
    with fg.steer(llama, item):
        llama(torch.tensor([[0, 5, 6]]))
        with pytest.raises(fg.SteeringError, match="outside any block"):
            fg.stream(llama, tokenizer, PROMPT)
    assert is_free(llama)


def test_the_model_is_the_streams_while_it_runs(llama, tokenizer, item):
    pieces: Any = fg.stream(llama, tokenizer, PROMPT, steering=item, max_new_tokens=5000)
    next(pieces)
    with pytest.raises(fg.SteeringError, match="another thread"), fg.steer(llama, item):
        pass
    with pytest.raises(fg.SteeringError, match="another thread"):
        llama(torch.tensor([[0, 5, 6]]))
    pieces.close()
    assert is_free(llama)


def test_a_stream_computes_as_its_thread_would(tokenizer, item):
    """Autocast belongs to a thread."""
    model, seen = tiny_model("llama"), []
    handle = model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        list(fg.stream(model, tokenizer, PROMPT, steering=item, max_new_tokens=2))
    handle.remove()
    assert set(seen) == {torch.bfloat16}


# ---------------------------------------------------------------- a thread and a streamer, inside a block


@pytest.mark.parametrize("own", ["TextIteratorStreamer", "another"])
def test_generate_with_a_streamer_in_a_thread_fails_in_the_caller(llama, tokenizer, item, own):
    """Its reader does not hang, and the block's exit says what to call."""
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    errors, ends = [], []
    other = SimpleNamespace(put=None, end=lambda: ends.append(1))

    def work(**options):
        try:
            llama.generate(**inputs, **options)
        except Exception as error:
            errors.append(error)

    def block():
        with fg.steer(llama, item):
            streamer = TextIteratorStreamer(tokenizer, timeout=60) if own == "TextIteratorStreamer" else other
            thread = threading.Thread(target=work, kwargs={"streamer": streamer, "max_new_tokens": 4})
            thread.start()
            told = "".join(streamer) if own == "TextIteratorStreamer" else ""
            thread.join(60)
            assert told == ""

    with pytest.raises(fg.SteeringError, match=r"fgsteer\.stream\("):
        block()
    assert isinstance(errors[0], fg.SteeringError)
    assert len(ends) == (own == "another")
    assert is_free(llama)
