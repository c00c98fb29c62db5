"""Models in several places and in few bits: split, offloaded, bfloat16 and quantised ones steer and are read alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fgsteer as fg
from fgsteer.interventions import apply
from tests.helpers.saes import make_sae
from tests.helpers.tiny import D_MODEL, LAYERS, VOCAB

PROMPTS = ["the man", "a dog sat on the bread", "she took the ring"]
DATA = fg.ContrastSet("x", positives=["the bride wore a ring", "the groom"], negatives=["a dog sat", "a cat"])


def vector(seed=1, layer=1, site="resid_post", width=D_MODEL):
    draw = torch.Generator().manual_seed(seed)
    return fg.SteeringVector(torch.randn(width, generator=draw) * 3, fg.Hookpoint(layer, site))


def clamp():
    sae = make_sae("jumprelu")
    return fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={1: 2.0, 3: 0.5})


def entries():
    return [[vector(1).add(2.0), vector(2, 2).ablate()], None, [clamp(), vector(3, 1, "z").add(1.0)]]


def tokens(model, tokenizer, steering):
    return fg.generate(model, tokenizer, PROMPTS, steering=steering, max_new_tokens=5, do_sample=False)


@pytest.fixture
def offloaded(llama, tmp_path):
    """The model with its middle block on disk, brought in by accelerate's hooks for each pass."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate splits models")
    model = copy.deepcopy(llama)
    places = {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(LAYERS)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert next(model.model.layers[1].parameters()).is_meta
    return model


def test_a_block_on_disk_is_steered_and_read_as_any(llama, offloaded, tokenizer):
    assert tokens(offloaded, tokenizer, entries()) == tokens(llama, tokenizer, entries())
    assert tokens(offloaded, tokenizer, None) == tokens(llama, tokenizer, None)
    sae = make_sae("jumprelu")
    found, expected = (fg.collect(model, tokenizer, DATA, sae=sae) for model in (offloaded, llama))
    for space in ("residual", "feature"):
        assert torch.equal(found.at(space)[1].difference, expected.at(space)[1].difference)


def test_accelerates_forward_comes_back(offloaded):
    block = offloaded.model.layers[1]
    own = vars(block)["forward"]
    with fg.steer(offloaded, vector().add(1.0)):
        assert vars(block)["forward"] is not own
    assert vars(block)["forward"] is own


@pytest.mark.gpu
def test_gpu_twin_of_a_split_model(llama, tokenizer):
    """The first block on the GPU, the rest on the host: hidden states cross over inside the steered stretch."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate splits models")
    places = {f"model.layers.{n}": "cpu" if n else 0 for n in range(LAYERS)}
    places |= {"model.embed_tokens": 0, "model.norm": "cpu", "model.rotary_emb": 0, "lm_head": "cpu"}
    split = accelerate.dispatch_model(copy.deepcopy(llama), places, main_device=0, force_hooks=True)
    steering = [vector(1, 0).add(2.0), None, vector(2, 2).ablate()]
    assert tokens(split, tokenizer, steering) == tokens(llama, tokenizer, steering)


def check_recorded(model, tokenizer):
    """Steered activations are those that the kernel makes of the recorded ones, bit for bit."""
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    streams = vector(width=model.config.hidden_size)
    heads = vector(1, 1, "z", model.config.hidden_size)
    for item in (streams.add(2.0, bos=True), streams.ablate(bos=True), heads.add(1.0, bos=True)):
        at = item.hookpoint
        plain = fg.record(model, inputs["input_ids"], inputs["attention_mask"], [at])[at]
        with fg.steer(model, item):
            steered = fg.record(model, inputs["input_ids"], inputs["attention_mask"], [at])[at]
        real = inputs["attention_mask"].bool()
        assert steered.dtype == plain.dtype
        assert torch.equal(steered[real], apply(plain, item.update())[real])
        assert torch.equal(steered[~real], plain[~real])


def test_bfloat16(llama, tokenizer):
    model = copy.deepcopy(llama).bfloat16()
    check_recorded(model, tokenizer)
    assert tokens(model, tokenizer, entries())[1] == tokens(model, tokenizer, None)[1]


def test_int8_weights(llama, tokenizer):
    """Linear layers in eight bits, whose modules hold no floating-point weight to look at."""
    model = torch.ao.quantization.quantize_dynamic(llama, {nn.Linear}, dtype=torch.qint8)
    assert not list(model.model.layers[1].self_attn.o_proj.parameters())
    check_recorded(model, tokenizer)
    assert len(tokens(model, tokenizer, entries())) == len(PROMPTS)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(tokenizer, tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises")
    from transformers import BitsAndBytesConfig

    width = 64  # four bits come in blocks of 64
    shape = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **shape)).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    check_recorded(model, tokenizer)
    assert len(fg.collect(model, tokenizer, DATA, hookpoints=["blocks.1.hook_resid_post"]).residual) == 1
