"""SmolLM2-135M-Instruct: loading, steering, collecting under its chat template, SAEs and exports."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fgsteer as fg
from fgsteer.activations.tokens import TokenReader
from fgsteer.models.shipped import SHIPPED
from tests.helpers.cli import invoke

pytestmark = pytest.mark.real

LAYER = 12
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# what the template makes of the question and an answer, written out
BEFORE = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
ANSWERS, TAIL = ("It is Paris, dear sir.", "Paris."), "<|im_end|>\n"
WEDDING = ("wedding", "marr", "bride", "groom", "ceremony", "vow", "union")
PROMPTS = ["I think", "The next day", "She said that", "My favourite memory is"]


@pytest.fixture(scope="module")
def wedding(smollm2):
    model, tokenizer = smollm2
    return fg.caa(fg.collect(model, tokenizer, "wedding", hookpoints=[LAYER]))


def said(answer):
    """An answer as the assistant's message."""
    return [{"role": "assistant", "content": answer}]


@torch.no_grad()
def logits(model, ids):
    return model(ids.to(model.device)).logits.float()


def write(smollm2, prompts, steering=None, tokens=24):
    model, tokenizer = smollm2
    return fg.generate(model, tokenizer, prompts, steering=steering, max_new_tokens=tokens, do_sample=False)


def test_the_model_is_the_one_that_the_table_names_and_knows_what_it_should(smollm2):
    model, tokenizer = smollm2
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (model.dtype, config._name_or_path) == (torch.float32, "fgsteer/smollm2")
    assert SHIPPED["smollm2"].weights.module not in sys.modules  # importing it could run anything
    assert tokenizer(BEFORE, add_special_tokens=False)["input_ids"].count(tokenizer.bos_token_id) == 3
    assert "Paris" in write(smollm2, "The capital of France is", tokens=8)[0]


def test_it_chats(smollm2):
    (reply,) = write(smollm2, [QUESTION])
    assert "Paris" in reply
    assert "<|im_" not in reply


def test_steering_changes_texts_and_ends_with_its_block(smollm2, wedding):
    model, tokenizer = smollm2
    ids = tokenizer("She said that he", return_tensors="pt")["input_ids"]
    before, plain = logits(model, ids), write(smollm2, PROMPTS)
    steered = write(smollm2, PROMPTS, wedding.add(3.0))
    with fg.steer(model, wedding.add(3.0)):
        assert not torch.allclose(logits(model, ids), before, atol=0.1)
    assert torch.equal(logits(model, ids), before)
    assert write(smollm2, PROMPTS) == plain

    def words(texts):
        return sum(text.lower().count(word) for text in texts for word in WEDDING)

    assert words(steered) > words(plain), steered
    chat = write(smollm2, [QUESTION, QUESTION], [None, wedding.add(6.0)])
    assert chat[0] == write(smollm2, [QUESTION])[0] != chat[1]


@pytest.mark.parametrize("rule", ["answer", "tail", "last", "all"])
def test_collecting_reads_the_tokens_of_the_chat_that_it_says(smollm2, rule):
    """Against one plain pass over the chat written out, and the tokens picked by the lengths of its parts."""
    model, tokenizer = smollm2
    pair = fg.ContrastPair(said(ANSWERS[0]), said(ANSWERS[1]), prompt=QUESTION)
    stats = fg.collect(model, tokenizer, [pair], hookpoints=[LAYER], tokens=rule)
    expected = []
    for answer in ANSWERS:
        lengths = [len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (BEFORE, answer, TAIL)]
        ids = tokenizer(BEFORE + answer + TAIL, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert ids.shape[1] == sum(lengths)
        begin, end = lengths[0], lengths[0] + lengths[1]
        picked = {"answer": (begin, end), "tail": (end, None), "last": (end - 1, end), "all": (1, None)}[rule]
        with torch.no_grad():
            states = model(ids.to(model.device), output_hidden_states=True).hidden_states[LAYER + 1][0]
        expected.append(states[slice(*picked)].mean(0))
    found = stats.at("residual")[1].difference
    torch.testing.assert_close(found.float().cpu(), (expected[0] - expected[1]).cpu(), atol=0.02, rtol=1e-3)


def test_the_read_tokens_spell_the_answer(smollm2):
    _, tokenizer = smollm2
    with TokenReader(tokenizer, rule="answer") as reader:
        ((row,),) = reader.rows([(QUESTION, said(ANSWERS[0]), True)])
    ids = torch.tensor(row.ids)
    assert tokenizer.decode(ids) == BEFORE + ANSWERS[0] + TAIL
    assert tokenizer.decode(ids[torch.tensor(row.selected)]) == ANSWERS[0]


def test_an_sae_encodes_as_sae_lens_does_and_its_features_steer(smollm2, sae_folder):
    from sae_lens import SAE

    model, tokenizer = smollm2
    sae, other = fg.load_sae(sae_folder), SAE.load_from_disk(str(sae_folder))
    ids = tokenizer("The bride and the groom walked out of the church together.", return_tensors="pt")["input_ids"]
    states = fg.record(model, ids.to(model.device), None, [sae.hookpoint])[sae.hookpoint][0, 1:].cpu()
    acts = sae.encode(states)
    with torch.no_grad():
        expected = other.encode(states)
    assert ((acts > 0) == (expected > 0)).float().mean() > 0.999
    assert acts.sum() == pytest.approx(float(expected.sum()), rel=1e-3)
    strongest = int(acts.sum(0).argmax())
    vector = fg.from_features(fg.load_sae(sae_folder), [strongest])
    norm = float(states.norm(dim=1).median())
    steered = write(smollm2, PROMPTS[:1], vector.unit().add(0.5 * norm))
    assert steered != write(smollm2, PROMPTS[:1])


@pytest.mark.parametrize("layer", [8, 12, 21])
def test_the_shipped_saes_reconstruct_what_they_never_saw(smollm2, layer):
    """On neutral texts, which nothing was trained on. The figures on the model card are of more and other text."""
    model, tokenizer = smollm2
    quality = fg.measure_sae(model, tokenizer, fg.load_sae("smollm2", f"layer_{layer}"), fg.load_neutral()[0][:24])
    assert quality.explained_variance > 0.8  # the card has .86 and more
    assert quality.l0 == pytest.approx(32, abs=0.1)
    assert quality.ce_spliced - quality.ce < 0.25  # the card has .05 to .13
    assert quality.ce_zeroed - quality.ce > 5


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    *features, text = capsys.readouterr().out.split("\n", 5)
    assert len(features) == 5
    assert any(word in text.lower() for word in WEDDING)
    commands = re.findall(r"^fgsteer .*-m smollm2.*$", readme, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["collect", "build", "generate"]
    for command in commands:
        result = invoke(*shlex.split(command)[1:])
    assert any(word in result.output.lower() for word in WEDDING)


def test_a_control_vector_goes_to_gguf_and_back(smollm2, wedding, tmp_path):
    model, tokenizer = smollm2
    ids = tokenizer("She said that he", return_tensors="pt")["input_ids"]
    fg.export.gguf.write([wedding.add(4.0, bos=True)], tmp_path / "wedding.gguf", model_type="llama")
    (back,) = fg.export.gguf.read(tmp_path / "wedding.gguf")
    with fg.steer(model, wedding.add(4.0, bos=True)):
        expected = logits(model, ids)
    with fg.steer(model, back.add(1.0, bos=True)):
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-3, rtol=1e-3)


def test_a_folded_checkpoint_computes_what_steering_does(smollm2, wedding, tmp_path):
    model, tokenizer = smollm2
    ids = tokenizer("She said that he", return_tensors="pt")["input_ids"]
    fg.export.checkpoint.write([wedding.add(4.0, bos=True)], tmp_path / "folded", model, tokenizer)
    with fg.steer(model, wedding.add(4.0, bos=True)):
        expected = logits(model, ids)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype="float32").eval().to(model.device)
    torch.testing.assert_close(logits(plain, ids), expected, atol=2e-3, rtol=1e-3)
