"""Which models enter: causal LMs of any form are read and steered right, anything else is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, LlamaConfig

import fgsteer as fg
from fgsteer.activations.outputs import hidden_states_of, replace_hidden_states
from fgsteer.models.hookpoints import blocks_of, decoder_of
from tests.helpers.tiny import (
    D_MODEL,
    FAMILIES,
    HYBRIDS,
    LAYERS,
    MORE_FAMILIES,
    ODD_FAMILIES,
    VOCAB,
    model_of,
)

ROWS = [[0, 5, 9, 40, 7, 12, 33, 21], [0, 33, 4], [0, 6, 50, 17, 22]]
NEW = 5


def direction():
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))


def hidden(output):
    """The hidden states of a block's output in any form, found without the package."""
    return output if isinstance(output, torch.Tensor) else output[0]


def add(_, __, output):
    """What ``fg.Add`` at every token does, as a hook of its own."""
    h = hidden(output) + 2.0 * direction()
    return h if isinstance(output, torch.Tensor) else type(output)([h, *output[1:]])


def alone(model, row, hook=None):
    """Outputs (tokens, d_model) of all blocks and logits of one row, by plain hooks in a plain forward pass."""
    kept = {}
    handles = [blocks_of(model)[1].register_forward_hook(hook)] if hook else []
    for layer, block in enumerate(blocks_of(model)):

        def keep(_, __, output, layer=layer):
            kept[layer] = hidden(output).reshape(len(row), -1).clone()

        handles.append(block.register_forward_hook(keep))
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0]
    for handle in handles:
        handle.remove()
    return kept, logits


def greedy(model, row, hook):
    """Greedy tokens, all of it recomputed at every step."""
    ids = list(row)
    for _ in range(NEW):
        ids.append(int(alone(model, ids, hook)[1][-1].argmax()))
    return ids[len(row) :]


@pytest.mark.parametrize("family", ODD_FAMILIES)
def test_batches_read_what_plain_hooks_do(family):
    model = model_of(family)
    width = max(map(len, ROWS))
    ids = torch.tensor([row + [1] * (width - len(row)) for row in ROWS])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ROWS])
    points = [fg.Hookpoint(layer) for layer in range(LAYERS)]
    acts = fg.record(model, ids, real, points)
    for number, row in enumerate(ROWS):
        expected, _ = alone(model, row)
        for layer, at in enumerate(points):
            # float32 at another batch shape
            assert torch.allclose(acts[at][number, : len(row)], expected[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ODD_FAMILIES)
def test_steering_is_what_a_plain_hook_does(family):
    model = model_of(family)
    item = fg.Add(hookpoint=fg.Hookpoint(1), direction=direction(), coefficient=2.0, bos=True)
    changed = False
    for row in ROWS:
        with fg.steer(model, item), torch.no_grad():
            logits = model(torch.tensor([row])).logits[0]
            ids = model.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False, pad_token_id=1)
        assert torch.equal(logits, alone(model, row, add)[1])
        assert ids[0, len(row) :].tolist() == greedy(model, row, add)
        changed |= greedy(model, row, add) != greedy(model, row, None)
    assert changed


def test_a_wrapper_of_images_and_text_leads_to_the_same_blocks():
    """Llama 4 with vision gives its language model with the head as decoder."""
    from transformers import Llama4ForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    config = AutoConfig.for_model("llama4", text_config=ODD_FAMILIES["llama4"]().to_dict(), vision_config=vision)
    model = Llama4ForConditionalGeneration(config).eval()
    assert decoder_of(model) is model.language_model.model
    assert blocks_of(model) is model.language_model.model.layers


def test_a_block_that_returns_a_list_still_does():
    block = blocks_of(model_of("openai-gpt"))[1]
    kept = []
    with fg.steer(model_of("openai-gpt"), fg.Add(hookpoint=fg.Hookpoint(1), direction=direction())):
        handle = block.register_forward_hook(lambda _, __, output: kept.append(output))
        model_of("openai-gpt")(torch.tensor([ROWS[0]]))
    handle.remove()
    assert isinstance(kept[0], list)


def test_outputs_keep_their_form_and_others_are_refused():
    old, new = torch.zeros(1), torch.ones(1)
    assert replace_hidden_states(old, new) is new
    assert replace_hidden_states((old, "weights"), new) == (new, "weights")
    assert replace_hidden_states([old, "weights"], new) == [new, "weights"]
    for output in ({"hidden": old}, [], None):
        with pytest.raises(fg.HookpointError, match="a tensor, or a tuple that begins with one"):
            hidden_states_of(output)


def tiny_config(model_type, **extra):
    names = ("hidden_size", "d_model", "dim", "n_embd")
    shape = {
        "vocab_size": VOCAB,
        **dict.fromkeys(names, D_MODEL),
        **dict.fromkeys(
            ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers"), 2
        ),
        **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 48),
        "d_kv": 8,
        "pad_token_id": 1,
        "decoder_start_token_id": 0,
    }
    known = AutoConfig.for_model(model_type)
    mapped = set(getattr(type(known), "attribute_map", {}))
    return AutoConfig.for_model(
        model_type, **{key: value for key, value in shape.items() if hasattr(known, key) and key not in mapped}, **extra
    )


def refused(model, told):
    """Refused alike wherever a model enters, before it runs."""
    model.eval().forward = None
    item = fg.Add(hookpoint=fg.Hookpoint(0), direction=direction())
    ids = torch.tensor([ROWS[0]])
    with pytest.raises(fg.HookpointError, match=told):
        fg.record(model, ids, None, [fg.Hookpoint(0)])
    with pytest.raises(fg.HookpointError, match=told), fg.steer(model, item):
        pass
    with pytest.raises(fg.HookpointError, match=told):
        blocks_of(model)


@pytest.mark.parametrize("kind", ["t5", "bart", "mbart", "marian", "pegasus", "blenderbot", "mt5"])
def test_encoder_decoders_are_refused(kind):
    model = AutoModelForSeq2SeqLM.from_config(tiny_config(kind))
    refused(model, rf"causal LM.*{type(model).__name__}, an encoder–decoder model.*decoder-only")


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert", "electra"])
def test_masked_language_models_are_refused(kind):
    refused(AutoModelForMaskedLM.from_config(tiny_config(kind)), "not supported|attends to later tokens")


def test_attention_that_looks_ahead_is_refused():
    """ModernBERT has one list of blocks, as causal LMs have."""
    model = AutoModelForMaskedLM.from_config(tiny_config("modernbert"))
    refused(model, "ModernBertForMaskedLM, whose ModernBertEncoderLayer attends to later tokens")


def test_xlnet_is_refused():
    from transformers import XLNetLMHeadModel

    refused(XLNetLMHeadModel(tiny_config("xlnet")), "XLNetLMHeadModel, whose blocks keep tokens before rows")


class SequenceFirst(nn.Module):
    """A stack that keeps tokens before rows, as ChatGLM's remote code does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = LlamaConfig(hidden_size=D_MODEL, num_hidden_layers=LAYERS)
        self.embed = nn.Embedding(VOCAB, D_MODEL)
        self.layers = nn.ModuleList(nn.Linear(D_MODEL, D_MODEL) for _ in range(LAYERS))

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        h = self.embed(input_ids).transpose(0, 1)
        for layer in self.layers:
            h = layer(h)
        return h.transpose(0, 1)


def test_tokens_before_rows_are_refused():
    model, at = SequenceFirst().eval(), fg.Hookpoint(1)
    ids = torch.tensor([[0, 5, 9], [0, 33, 4]])
    with pytest.raises(fg.HookpointError, match=r"\(2, 3, width\), got .*\(3, 2, 32\), with tokens before rows"):
        fg.record(model, ids, torch.ones_like(ids), [at])
    with (
        pytest.raises(fg.HookpointError, match="tokens before rows"),
        fg.steer(model, fg.Add(hookpoint=at, direction=direction())),
    ):
        model(ids)
    one = fg.record(model, ids[:1], None, [at])[at]  # a single row is the same in both orders
    assert torch.equal(one[0], model.layers[1](model.layers[0](model.embed(ids[0]))))


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *HYBRIDS, *ODD_FAMILIES])
def test_hidden_states_are_the_steered_ones(family):
    """What the model returns under ``output_hidden_states`` is what its next block was given."""
    model, ids = model_of(family), torch.tensor([ROWS[0]])
    item = fg.Add(hookpoint=fg.Hookpoint(0), direction=direction(), coefficient=2.0, bos=True)
    given = []
    handle = blocks_of(model)[1].register_forward_pre_hook(
        lambda _, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with fg.steer(model, item), torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    handle.remove()
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True).hidden_states

    def among(tensors):
        return any(torch.equal(state.flatten(), given[0].flatten()) for state in tensors)

    assert among(states)  # the second of them, but the first of Mamba's, which has no embeddings there
    assert not among(plain)
