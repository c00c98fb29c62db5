"""Steering of cached keys and values: against passes written out, in every way to generate, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache

import fgsteer as fg
from fgsteer.activations.tokens import encode_prompts
from fgsteer.models.hookpoints import blocks_of
from fgsteer.serving.writer import servable
from fgsteer.storage.files import read_tensors, write_tensors
from tests.helpers.steering import NEW, PROMPTS, batch, naive_change, run, vector
from tests.helpers.tiny import D_MODEL, FAMILIES, LAYERS, model_of, tiny_model
from tests.reference import apply as reference_apply
from tests.reference import caching as reference

POSITIVES = ["the bride wore a ring", "a happy wedding in the church"]
NEGATIVES = ["the dog sat", "the old king took the ship and ran to the sea", "a man"]
CHAT = [{"role": "user", "content": "was the king happy ?"}]
# what is steered beside full attention: one key and value head, windows of 8 tokens, ALiBi, parallel blocks, experts
OTHERS = ["mistral", "gemma3", "gemma3 with vision", "falcon", "bloom", "opt", "phi", "gpt_oss", "gemma4"]


def heads_of(model):
    """(n_kv_heads, d_head) of the last layer, as its cache has them."""
    with torch.no_grad():
        layer = model(torch.tensor([[0, 5]]), use_cache=True).past_key_values.layers[-1]
    return layer.keys.shape[1], layer.keys.shape[3]


def steering_of(model, seed=0, layers=range(LAYERS), **coefficients):
    """Random changes, large enough for other tokens to be chosen."""
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, len(layers), *heads_of(model), generator=g)
    coefficients = {"value_coefficient": 6.0, "key_coefficient": 2.0} | coefficients
    return fg.CacheSteering(layers=layers, keys=keys, values=values, d_model=D_MODEL, **coefficients)


def changes_of(*items: fg.CacheSteering):
    """The changes of each layer, as the reference takes them."""
    changes = {}
    for item in items:
        for number, layer in enumerate(item.layers):
            keys, values = item.keys[number].double(), item.values[number].double()
            added = (item.key_coefficient * keys, item.value_coefficient * values)
            before = changes.get(layer, (0, 0))
            changes[layer] = (before[0] + added[0], before[1] + added[1])
    return changes


def ids_of(tokenizer, prompt):
    return encode_prompts(tokenizer, [prompt])[0][0].tolist()


def expected(model, tokenizer, prompt, *items, **options):
    return reference.greedy(model, ids_of(tokenizer, prompt), changes_of(*items), NEW, **options)


# ---------------------------------------------------------------- against passes that are written out


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_generation_equals_passes_that_are_written_out(family, tokenizer):
    model = model_of(family)
    item = steering_of(model, value_coefficient=60.0)
    rows = [expected(model, tokenizer, prompt, item) for prompt in PROMPTS]
    assert run(model, batch(tokenizer), item) == rows
    assert rows != run(model, batch(tokenizer), None), "these changes are too small to test anything"
    values = replace(item, key_coefficient=0.0)
    assert run(model, batch(tokenizer), values) == [expected(model, tokenizer, p, values) for p in PROMPTS]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", [[2], [0, 1]])
def test_bfloat16_and_some_layers(family, layers, tokenizer):
    model = tiny_model(family, dtype=torch.bfloat16)
    item = steering_of(model, layers=layers)
    for prompt in PROMPTS:  # alone: with padding, sums in bfloat16 round otherwise
        ids = torch.tensor([ids_of(tokenizer, prompt)])
        (row,) = run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, item)
        assert row == expected(model, tokenizer, prompt, item)


def test_rows_get_their_own_and_compositions_add_up(llama, tokenizer):
    one, other = steering_of(llama, 1), steering_of(llama, 2, layers=[2, 1])
    entries = [one, None, [other, one]]
    rows = [expected(llama, tokenizer, p, *items) for p, items in zip(PROMPTS, [[one], [], [other, one]], strict=True)]
    assert run(llama, batch(tokenizer), entries) == rows
    assert rows[1] == run(llama, batch(tokenizer), None)[1]
    assert run(llama, batch(tokenizer), [one, other], per_row=False) == [
        expected(llama, tokenizer, p, one, other) for p in PROMPTS
    ]


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")  # "prompt" and "first:2" of two-token prompts
@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "reply", "last_prompt", "first:2", "last:2", "at:0,2"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scopes_of_interventions_beside_it_mean_the_same_tokens(family, scope, tokenizer):
    model = model_of(family)
    item, added = steering_of(model), vector(1, 0).add(0.7, scope=scope)

    def edit(h, before, prompt_length):
        length = before + h.shape[1]
        tokens = reference_apply.positions(scope, max(length, prompt_length), prompt_length, 0)
        return naive_change(h[0], added, [i - before for i in tokens if before <= i < length])[None]

    block = blocks_of(model)[0]
    rows = [expected(model, tokenizer, p, item, edit={block: edit}) for p in PROMPTS]
    assert run(model, batch(tokenizer), [added, item], per_row=False) == rows
    alone = [expected(model, tokenizer, p, edit={block: edit}) for p in PROMPTS]
    assert run(model, batch(tokenizer), [[added], [item, added], None])[:2] == [alone[0], rows[1]]


def test_values_of_the_last_layer_add_what_attention_reads_of_them(tokenizer):
    """To the next token's attention output: Σ_heads (weight on the changed position) · W_O S_v of its own head."""
    model = tiny_model("llama", dtype=torch.float64)
    model.set_attn_implementation("eager")  # gives weights
    attention: Any = blocks_of(model)[-1].self_attn
    ids = torch.tensor([ids_of(tokenizer, PROMPTS[1])])
    item = steering_of(model, layers=[LAYERS - 1], key_coefficient=0.0)
    outputs = []
    handle = attention.register_forward_hook(lambda _, __, output: outputs.append(output[0][0, -1]))
    with torch.no_grad():  # in two parts as well: norms are in float32, and round otherwise
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        unsteered = model(ids[:, -1:], past_key_values=cache, use_cache=True, output_attentions=True)
    weights = unsteered.attentions[-1][0, :, -1, -2]
    run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, item)
    handle.remove()
    heads, d_head = len(weights), item.values.shape[2]
    change = torch.zeros(D_MODEL, dtype=torch.float64)
    for head in range(heads):
        shared = item.values[0, head // (heads // item.values.shape[1])].double() * item.value_coefficient
        change += weights[head] * attention.o_proj.weight[:, head * d_head : (head + 1) * d_head] @ shared
    # two parts unsteered, two steered; float64 sums of 32 products of size 10
    torch.testing.assert_close(outputs[3] - outputs[1], change, atol=1e-12, rtol=0.0)
    assert float(change.detach().norm()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coefficients_of_zero_keep_every_bit(dtype, tokenizer):
    model = tiny_model("llama", dtype=dtype)
    zero = steering_of(model, value_coefficient=0.0, key_coefficient=0.0)
    logits = []
    for steering in (None, zero, [zero, None, [zero]]):
        with fg.steer(model, steering):
            out = model.generate(**batch(tokenizer), max_new_tokens=3, output_logits=True, return_dict_in_generate=True)
        logits.append(torch.stack(out.logits))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    with fg.steer(model, zero):
        model(**batch(tokenizer))  # which is refused to steering that changes something


# ---------------------------------------------------------------- every way to generate


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_beams_and_several_sequences_equal_each_prompt_alone(family, tokenizer):
    model = model_of(family)
    entries = [steering_of(model), None, [steering_of(model, 2), vector(2, 0).add(0.5, scope="reply")]]
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        together = fg.generate(model, tokenizer, PROMPTS, steering=entries, max_new_tokens=NEW, **options)
        alone = [
            text
            for prompt, entry in zip(PROMPTS, entries, strict=True)
            for text in fg.generate(model, tokenizer, prompt, steering=[entry], max_new_tokens=NEW, **options)
        ]
        assert together == alone
    sampled = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}  # one token to draw from
    texts = fg.generate(model, tokenizer, PROMPTS, steering=entries, max_new_tokens=NEW, **sampled)
    greedy = fg.generate(model, tokenizer, PROMPTS, steering=entries, max_new_tokens=NEW, do_sample=False)
    assert texts == [text for text in greedy for _ in range(2)]


def test_samples_are_drawn_as_without_it_where_it_changes_little(llama, tokenizer):
    item = steering_of(llama, value_coefficient=1e-6, key_coefficient=0.0)
    texts = []
    for steering in (None, item, replace(item, value_coefficient=6.0)):
        torch.manual_seed(0)
        texts.append(fg.generate(llama, tokenizer, PROMPTS, steering=steering, max_new_tokens=NEW, do_sample=True))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": n} for n in (1, 2, 3, 5)] + [{"prompt_lookup_num_tokens": 3}]
)
def test_prompts_read_in_chunks_and_assisted_decoding(options, llama, tokenizer):
    item = steering_of(llama)
    for prompt in (PROMPTS[1], "the man was the man was the man was"):
        ids = torch.tensor([ids_of(tokenizer, prompt)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert run(llama, inputs, item, **options) == [expected(llama, tokenizer, prompt, item)]


def test_a_cache_of_the_prompts_beginning(llama, tokenizer):
    ids = torch.tensor([ids_of(tokenizer, PROMPTS[2])])
    item = steering_of(llama)
    for cached in (2, ids.shape[1] - 1):
        cache = DynamicCache(config=llama.config)
        with torch.no_grad():
            llama(ids[:, :cached], past_key_values=cache, use_cache=True)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        assert run(llama, inputs, item) == [expected(llama, tokenizer, PROMPTS[2], item)]


def test_embeddings_as_prompt(llama, tokenizer):
    ids, item = torch.tensor([ids_of(tokenizer, PROMPTS[1])]), steering_of(llama)
    inputs = {"inputs_embeds": llama.get_input_embeddings()(ids).detach(), "attention_mask": torch.ones_like(ids)}
    with fg.steer(llama, item):
        out = llama.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert out.tolist() == [expected(llama, tokenizer, PROMPTS[1], item)]


def test_texts_conversations_and_streams(llama, tokenizer):
    item = steering_of(llama)
    assert "forward" not in vars(llama)
    for prompt in (PROMPTS[1], CHAT, [*CHAT, {"role": "assistant", "content": "the king"}]):
        text = tokenizer.decode(expected(llama, tokenizer, prompt, item), skip_special_tokens=True)
        options = {"steering": item, "max_new_tokens": NEW, "do_sample": False}
        assert fg.generate(llama, tokenizer, [prompt], **options) == [text]
        assert "".join(fg.stream(llama, tokenizer, prompt, **options)) == text
    compared = fg.compare(llama, tokenizer, PROMPTS[1], item, max_new_tokens=NEW, do_sample=False)
    assert compared.steered != compared.unsteered
    assert "forward" not in vars(llama), "the model's own forward is back"


def test_nested_blocks_add_up(llama, tokenizer):
    one, other = steering_of(llama, 1), steering_of(llama, 2, layers=[1])
    both = expected(llama, tokenizer, PROMPTS[1], one, other)
    with fg.steer(llama, one):
        assert run(llama, batch(tokenizer), [None, other, None])[1] == both


@pytest.mark.slow
def test_compiled_models(tokenizer):
    """By the backend that compiles nothing: what is traced is what could break."""
    model = tiny_model("llama")
    item, inputs = steering_of(model), batch(tokenizer)
    rows = [expected(model, tokenizer, prompt, item) for prompt in PROMPTS]
    assert run(torch.compile(model, backend="eager"), inputs, item) == rows
    model.compile(backend="eager")
    assert run(model, inputs, item) == rows


def test_adapters(tokenizer):
    model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).eval()
    item = steering_of(model)
    assert run(model, batch(tokenizer), item) == [expected(model, tokenizer, p, item) for p in PROMPTS]


# ---------------------------------------------------------------- building


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch_tokens", [None, 1])
def test_the_builder_is_the_mean_difference_of_last_tokens(family, batch_tokens, tokenizer):
    model = model_of(family)
    contrast = fg.ContrastSet("x", positives=POSITIVES, negatives=NEGATIVES)
    item = fg.cache_steering(model, tokenizer, contrast, value_coefficient=6.0, batch_tokens=batch_tokens)
    sides = [[ids_of(tokenizer, text) for text in texts] for texts in (POSITIVES, NEGATIVES)]
    for layer in range(LAYERS):
        for which, states in enumerate((item.keys, item.values)):
            truth = reference.mean_difference(model, sides, layer, which).float()
            # float32 passes with and without padding; entries are of size 1 to 10
            torch.testing.assert_close(states[layer], truth, atol=1e-4, rtol=1e-4)
    assert (item.layers, item.d_model, item.value_coefficient, item.key_coefficient) == ((0, 1, 2), D_MODEL, 6.0, 0.0)
    some = fg.cache_steering(model, tokenizer, contrast, layers=[2, 0], batch_tokens=batch_tokens)
    assert torch.equal(some.values, item.values[[2, 0]])


def test_the_builder_reads_chats_and_pairs_as_they_are_continued(llama, tokenizer):
    said = {"role": "assistant", "content": "the king"}
    pairs = [
        fg.ContrastPair([{"role": "user", "content": "a happy man"}], [{"role": "user", "content": "a sad man"}]),
        fg.ContrastPair("yes", "no", prompt="is it war ?"),
        fg.ContrastPair([said], [{"role": "assistant", "content": "a dog"}], prompt=CHAT),
    ]
    item = fg.cache_steering(llama, tokenizer, pairs)
    sides = [
        [
            ids_of(tokenizer, [{"role": "user", "content": f"a {word} man"}]),
            ids_of(tokenizer, f"is it war ? {answer}"),
            ids_of(tokenizer, [*CHAT, {"role": "assistant", "content": text}]),
        ]
        for word, answer, text in (("happy", "yes", "the king"), ("sad", "no", "a dog"))
    ]
    for layer in range(LAYERS):
        truth = reference.mean_difference(llama, sides, layer, 1).float()
        torch.testing.assert_close(item.values[layer], truth, atol=1e-4, rtol=1e-4)  # as above


def test_what_the_builder_refuses(llama, tokenizer):
    sides = {"positive": POSITIVES, "negative": NEGATIVES}
    with pytest.raises(fg.SelectionError, match="same mean"):
        fg.cache_steering(llama, tokenizer, {"positive": POSITIVES, "negative": POSITIVES})
    for layers in ([3], [-1], [0.5]):
        with pytest.raises(fg.FgsteerError, match="from 0 to 2"):
            fg.cache_steering(llama, tokenizer, sides, layers=layers)
    with pytest.raises(fg.SteeringError, match="each once"):
        fg.cache_steering(llama, tokenizer, sides, layers=[1, 1])
    with pytest.raises(fg.DataError, match=r"prompt 2 \(negative\) with 1002 tokens"):
        fg.cache_steering(llama, tokenizer, {"positive": POSITIVES[:1], "negative": ["a dog", "a " * 1001]})
    for family, match in (("mamba", "no cache of keys"), ("qwen3_5", "LinearAttention"), ("deepseek_v3", "made from")):
        with pytest.raises(fg.SteeringError, match=match):
            fg.cache_steering(model_of(family), tokenizer, sides)


# ---------------------------------------------------------------- refusals


def test_caches_that_cannot_be_steered(llama, tokenizer):
    item, passes = steering_of(llama), []
    handle = blocks_of(llama)[0].register_forward_hook(lambda *_: passes.append(1))
    for options, match in (
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"cache_implementation": "offloaded"}, "DynamicCache, offloaded"),
        ({"use_cache": False}, "use_cache=False"),
    ):
        with pytest.raises(fg.SteeringError, match=match):
            fg.generate(llama, tokenizer, PROMPTS, steering=item, max_new_tokens=2, **options)

    class Quantised(DynamicCache):
        pass

    with pytest.raises(fg.SteeringError, match="Quantised"):
        fg.generate(llama, tokenizer, PROMPTS, steering=item, max_new_tokens=2, past_key_values=Quantised())
    handle.remove()
    assert not passes, "refused before anything runs"


def test_models_that_cannot_be_steered(llama, tokenizer):
    def steered(model, **changes):
        return fg.generate(model, tokenizer, PROMPTS, steering=replace(steering_of(llama), **changes), max_new_tokens=2)

    with pytest.raises(fg.SteeringError, match="LinearAttentionLayer"):
        steered(model_of("qwen3_5"))
    with pytest.raises(fg.SteeringError, match="without a cache of keys and values"):
        steered(model_of("mamba"))
    with pytest.raises(fg.SteeringError, match="made from"):
        steered(model_of("deepseek_v3"))
    tuned = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    with pytest.raises(fg.SteeringError, match="virtual tokens"):
        steered(tuned)
    config = AutoConfig.for_model("t5", vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(fg.HookpointError, match="encoder–decoder"):
        steered(AutoModelForSeq2SeqLM.from_config(config).eval())
    with pytest.raises(fg.PairingError, match=r"keys have the shape \(2, 8\).*|.*\(4, 8\)"):
        steered(model_of("gpt2"))
    for strength in (1e38, 1e300):
        with pytest.raises(fg.SteeringError, match="in layer 0 that changes entries by"):
            steered(llama, value_coefficient=strength)
    with pytest.raises(fg.PairingError, match="d_model 64"):
        steered(llama, d_model=64)
    with pytest.raises(fg.HookpointError, match="layer 7"):
        steered(llama, layers=[0, 1, 7])
    steering = [steering_of(llama), steering_of(model_of("gpt2"))]
    with pytest.raises(fg.PairingError, match="of the shapes"):
        fg.generate(llama, tokenizer, "the man", steering=steering, max_new_tokens=2)


def test_prompts_and_passes_that_cannot_be_steered(llama, tokenizer):
    item = steering_of(llama)
    one, two = torch.tensor([[0]]), batch(tokenizer, "right")
    with fg.steer(llama, item):
        for inputs, match in (
            ({"input_ids": one}, "prompt 0, which has one token"),
            ({"input_ids": one.new_tensor([[1, 0], [0, 5]]), "attention_mask": one.new_tensor([[0, 1], [1, 1]])}, "0,"),
            (dict(two), "prompt 0, which has one token or is padded on the right"),
        ):
            with pytest.raises(fg.SteeringError, match=match):
                llama.generate(**inputs, max_new_tokens=2)
        with pytest.raises(fg.SteeringError, match="outside of generate"):
            llama(**batch(tokenizer))
    inputs = {"input_ids": one.new_tensor([[1, 0], [0, 5]]), "attention_mask": one.new_tensor([[0, 1], [1, 1]])}
    rows = run(llama, inputs, [None, item])  # the prompt of one token is not steered
    assert rows[0] == run(llama, inputs, None)[0]
    assert rows[1] == reference.greedy(llama, [0, 5], changes_of(item), NEW)
    gate = fg.Projection(vector(2, 0)).last() > 0.0
    with (
        pytest.raises(fg.SteeringError, match="gate on prompts"),
        fg.steer(llama, [item, vector(1).add(1.0, when=gate)]),
    ):
        pass


def test_where_no_text_is_generated_it_is_refused(llama, tokenizer, tmp_path):
    item = steering_of(llama)
    for call in (
        lambda: fg.cross_entropy(llama, tokenizer, PROMPTS, steering=item),
        lambda: fg.cross_entropies(llama, tokenizer, PROMPTS, [item]),
        lambda: fg.kl_divergences(llama, tokenizer, PROMPTS, [[item]]),
        lambda: fg.fold(llama, item),
        lambda: fg.fold(llama, [item]),
        lambda: fg.export.gguf.write(item, tmp_path / "x.gguf", model_type="llama"),
        lambda: servable(item),
    ):
        with pytest.raises((fg.SteeringError, fg.ArgumentError), match="CacheSteering"):
            call()


def test_values_that_are_refused():
    keys = torch.ones(2, 2, 8)
    good = {"layers": [0, 1], "keys": keys, "values": keys, "d_model": 32}
    for changes, error in (
        ({"layers": []}, fg.SteeringError),
        ({"layers": [1, 1]}, fg.SteeringError),
        ({"layers": [0, -1]}, fg.DataError),
        ({"layers": [0, "1"]}, fg.ArgumentError),
        ({"layers": 1}, fg.SteeringError),
        ({"keys": keys[:1]}, fg.PairingError),
        ({"values": keys[0]}, fg.PairingError),
        ({"values": keys.long()}, fg.PairingError),
        ({"values": keys[:, :1]}, fg.PairingError),
        ({"keys": None}, fg.PairingError),
        ({"keys": keys / 0}, fg.SteeringError),
        ({"value_coefficient": float("nan")}, fg.SteeringError),
        ({"key_coefficient": "much"}, fg.ArgumentError),
        ({"d_model": 0}, fg.DataError),
    ):
        with pytest.raises(error):
            fg.CacheSteering(**good | changes)
    item = fg.CacheSteering(**good)
    keys.zero_()
    assert item.keys.all(), "the caller's tensor may change later"


# ---------------------------------------------------------------- files


def test_it_is_the_same_after_a_file(llama, tokenizer, tmp_path):
    path = tmp_path / "s.safetensors"
    item = fg.cache_steering(llama, tokenizer, {"positive": POSITIVES, "negative": NEGATIVES}, layers=[2, 1])
    item = replace(item, value_coefficient=40.0, key_coefficient=0.1, model_name="some/model")
    fg.save_steering(path, [vector(1).add(0.5), item])
    added, loaded = fg.load_steering(path)
    assert isinstance(added, fg.Add)
    assert isinstance(loaded, fg.CacheSteering)
    for name in ("layers", "value_coefficient", "key_coefficient", "d_model", "model_name", "method"):
        assert getattr(loaded, name) == getattr(item, name)
    assert torch.equal(loaded.keys, item.keys)
    assert torch.equal(loaded.values, item.values)
    assert run(llama, batch(tokenizer), loaded) == run(llama, batch(tokenizer), item)
    fg.save_steering(tmp_path / "again.safetensors", fg.load_steering(path))
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    tensors, header = read_tensors(path, kind="steering")
    for change in ({"layers": [0]}, {"layers": "01"}, {"d_model": None}, {"keys": {"tensor": "none"}}, {"more": 1}):
        write_tensors(
            path, tensors, kind="steering", header={"interventions": [{**header["interventions"][1], **change}]}
        )
        with pytest.raises(fg.FgsteerError):
            fg.load_steering(path)


def test_it_warns_of_another_model(llama, tokenizer):
    model = tiny_model("llama")
    model.config._name_or_path = "some/model"
    item = replace(steering_of(llama), model_name="other/one")
    with pytest.warns(fg.PairingWarning, match="made for 'other/one'"):
        fg.generate(model, tokenizer, "the man", steering=item, max_new_tokens=2)


def test_its_repr_is_one_line(llama):
    text = repr(replace(steering_of(llama), model_name="some/model"))
    assert text.startswith("CacheSteering(layers=(0, 1, 2), keys=float32 (3, 2, 8), values=float32 (3, 2, 8)")
    assert "\n" not in text
