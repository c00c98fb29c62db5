"""Training of sparse autoencoders: what is trained on, in which order, with which gradients, and what is saved."""

from __future__ import annotations

import json
from contextlib import contextmanager
from itertools import chain

import pytest
import torch

import fgsteer as fg
from fgsteer.training import activation_store
from fgsteer.training.activation_store import ActivationReader, ActivationStream, split_into_blocks
from fgsteer.training.shuffling import Place, ShuffledBatches
from fgsteer.training.trainer import TrainingRun
from tests.helpers.cli import invoke_on_cpu
from tests.helpers.saes import make_sae
from tests.helpers.tiny import WORDS

AT = fg.Hookpoint(1)


@contextmanager
def refused(kind, *words):
    """A block that is refused by an error of a kind that says all of these words."""
    with pytest.raises(kind) as info:
        yield
    for word in words:
        assert word in str(info.value)


def make_texts(count=24, length=12):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, len(WORDS), (count, length), generator=generator)
    return [" ".join(WORDS[i] for i in row[: 4 + number % (length - 4)]) for number, row in enumerate(draws)]


def naive_activations(model, tokenizer, texts, context, ratio):
    """Activations by whole passes, a block at a time: what is left after position 0 and special tokens, by norm."""
    rows = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        special = ids[0] == tokenizer.bos_token_id
        head, body = (ids[:1], ids[1:]) if special else ([], ids)
        size = context - len(head)
        for start in range(0, len(body), size):
            block = head + body[start : start + size]
            with torch.no_grad():
                hidden = model(torch.tensor([block]), output_hidden_states=True).hidden_states[AT.layer + 1][0]
            rows += [hidden[n] for n in range(1, len(block)) if block[n] not in tokenizer.all_special_ids]
    acts = torch.stack(rows)
    norms = acts.norm(dim=1)
    return acts[norms <= ratio * norms.median()]


def in_order(acts):
    return acts[acts[:, 0].float().argsort()]


@pytest.fixture
def texts():
    return make_texts()


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(activation_store, "SHARD_TOKENS", 40)


def stored(model, tokenizer, texts, folder, **options):
    return fg.store_activations(model, tokenizer, texts, [AT], folder, dtype=torch.float32, **options)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("ratio", [1e9, 1.05])
def test_what_is_stored_is_what_whole_passes_give(llama, tokenizer, texts, tmp_path, monkeypatch, ratio):
    if ratio < 2:  # the median is that of a shard: with one shard there is one median
        monkeypatch.setattr(activation_store, "SHARD_TOKENS", 10**6)
    store = stored(llama, tokenizer, texts, tmp_path / "acts", context=7, max_norm_ratio=ratio)
    acts = torch.cat(list(store.shards(AT)))
    expected = naive_activations(llama, tokenizer, texts, 7, ratio)
    assert sum(store.counts[AT]) == len(acts) == len(expected)
    assert store.left_out[AT] == len(naive_activations(llama, tokenizer, texts, 7, 1e9)) - len(expected)
    assert (store.left_out[AT] > 0) == (ratio < 2)
    # the same float32 numbers up to the order of sums in batches with padding
    torch.testing.assert_close(in_order(acts), in_order(expected), rtol=1e-4, atol=1e-5)


def test_blocks_leave_out_position_0_and_special_tokens(tokenizer):
    text = f"{tokenizer.bos_token} the bride {tokenizer.eos_token} a church"
    (block,) = split_into_blocks(tokenizer, [text], context=16, prepend_bos=None)
    kept = {block.ids[place] for place in block.selected}
    assert 0 not in block.selected
    assert not kept & set(tokenizer.all_special_ids)
    assert len(block.selected) == len([i for i in block.ids[1:] if i not in tokenizer.all_special_ids])


@pytest.mark.usefixtures("small_shards")
def test_a_killed_store_goes_on_to_the_same_shards(llama, tokenizer, texts, tmp_path, monkeypatch):
    whole = stored(llama, tokenizer, texts, tmp_path / "whole", context=8)
    original, calls = ActivationReader.read, []

    def dies(self, blocks, hookpoints):
        calls.append(blocks)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, blocks, hookpoints)

    monkeypatch.setattr(ActivationReader, "read", dies)
    with pytest.raises(KeyboardInterrupt):
        stored(llama, tokenizer, texts, tmp_path / "killed", context=8)
    with refused(fg.FormatError, "no finished store", "again"):
        fg.ActivationStore(tmp_path / "killed")
    resumed = stored(llama, tokenizer, texts, tmp_path / "killed", context=8)
    assert len(calls) == 1 + len(whole.counts[AT])  # the two shards that were written are not made again
    for a, b in zip(whole.shards(AT), resumed.shards(AT), strict=True):
        assert torch.equal(a, b)
    with refused(fg.PairingError, "context"):
        stored(llama, tokenizer, texts, tmp_path / "killed", context=9)
    with refused(fg.HookpointError, "blocks.0"):
        next(resumed.shards(fg.Hookpoint(0)))


def test_activations_too_large_for_a_dtype_are_refused(llama, tokenizer, texts, tmp_path, monkeypatch):
    from fgsteer.activations.recording import record

    def huge(*args):
        return {hookpoint: values * 1e6 for hookpoint, values in record(*args).items()}

    monkeypatch.setattr(activation_store, "record", huge)
    with refused(fg.DataError, "float16", "float32"):
        fg.store_activations(llama, tokenizer, texts, [AT], tmp_path / "acts")


class Numbered:
    """A source of shards whose tokens are numbers, so that an order can be read off."""

    plan = {"numbers": True}  # noqa: RUF012

    def __init__(self, sizes=(5, 7, 6), repeats=True):
        self.sizes, self.repeats = sizes, repeats

    def shards(self, hookpoint, first=0):
        start = 0
        for number, size in enumerate(self.sizes):
            if number >= first:
                yield torch.arange(start, start + size, dtype=torch.float16)[:, None]
            start += size


def drawn(batches, count):
    return [next(batches).flatten().tolist() for _ in range(count)]


def test_an_epoch_draws_every_token_once_and_shuffles_shards_together():
    batches = ShuffledBatches(Numbered(), AT, batch=3, seed=1, buffer_tokens=18)
    first, second = drawn(batches, 6), drawn(batches, 6)
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(18))
    assert first != second
    assert any(max(batch) >= 12 and min(batch) < 5 for batch in first)  # of the first and the last shard
    assert drawn(ShuffledBatches(Numbered(), AT, batch=3, seed=2, buffer_tokens=18), 6) != first


@pytest.mark.parametrize("used", [0, 1, 2, 3, 5, 7, 11])
def test_batches_go_on_from_a_place(used):
    options = {"batch": 4, "seed": 0, "buffer_tokens": 8}
    batches = ShuffledBatches(Numbered(), AT, **options)
    drawn(batches, used)
    place = batches.place
    expected = drawn(batches, 8)
    assert drawn(ShuffledBatches(Numbered(), AT, place=place, **options), 8) == expected


def test_a_source_that_is_too_small_or_ends_is_refused():
    with refused(fg.DataError, "18 tokens", "19"):
        next(ShuffledBatches(Numbered(), AT, batch=19, seed=0))
    once = ShuffledBatches(Numbered(repeats=False), AT, batch=9, seed=0)
    drawn(once, 2)
    with refused(fg.DataError, "end before", "store=True"):
        next(once)


@pytest.mark.parametrize("dead", [(), (0, 3, 4, 9)])
@pytest.mark.parametrize("centred", [True, False])
def test_the_sparse_step_has_the_losses_and_gradients_of_sae_lens(dead, centred):
    import sae_lens
    from sae_lens.saes.sae import TrainStepInput

    from fgsteer.training.sparse_topk import SparseTopKTrainingSAE

    torch.manual_seed(0)
    x = torch.randn(300, 6, dtype=torch.float64)  # more rows than are gathered at once
    mask = torch.zeros(16, dtype=torch.bool)
    mask[list(dead)] = True
    outputs, gradients = [], []
    for kind in (sae_lens.TopKTrainingSAE, SparseTopKTrainingSAE):
        torch.manual_seed(1)
        config = sae_lens.TopKTrainingSAEConfig(k=3, d_in=6, d_sae=16, dtype="float64", apply_b_dec_to_input=centred)
        sae = kind(config)
        with torch.no_grad():
            sae.W_dec *= torch.linspace(0.5, 2, 16)[:, None]  # norms that decide what is kept
            sae.b_dec += 0.3
            sae.b_enc += torch.linspace(-0.5, 0.5, 16)
        output = sae.training_forward_pass(TrainStepInput(x, {}, mask if dead else None, 0, False))
        output.loss.backward()
        outputs.append(output)
        gradients.append({name: p.grad for name, p in sae.named_parameters()})
    ours, theirs = outputs[1], outputs[0]
    assert set(ours.losses) == set(theirs.losses)
    assert (float(ours.losses["auxiliary_reconstruction_loss"].detach()) > 0) == bool(dead)
    for name, loss in theirs.losses.items():
        torch.testing.assert_close(ours.losses[name], loss, rtol=1e-12, atol=1e-12)  # float64, other order of sums
    torch.testing.assert_close(ours.feature_acts.to_dense(), theirs.feature_acts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.sae_out, theirs.sae_out, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-11, atol=1e-11)


class Directions:
    """Tokens that are sparse sums of a few directions: what a sparse autoencoder can find."""

    plan = {"directions": 24}  # noqa: RUF012
    repeats = True

    def __init__(self, tokens=4096):
        generator = torch.Generator().manual_seed(3)
        directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)
        active = torch.rand(tokens, 24, generator=generator) < 0.08
        self.tokens = (active * torch.rand(tokens, 24, generator=generator).add(0.5)) @ directions * 30
        self.tokens = self.tokens[self.tokens.norm(dim=1) > 0]

    def width(self, hookpoint):
        return 16

    def shards(self, hookpoint, first=0):
        yield from self.tokens.split(1024)[first:]


SETTINGS = {"d_sae": 48, "k": 4, "batch": 256, "tokens": 256 * 60, "lr": 5e-3}


def explained(sae, x):
    return 1 - float((x - sae.decode(sae.encode(x))).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "matryoshka"])
def test_every_kind_learns_and_loads_in_sae_lens(kind, tmp_path):
    import sae_lens

    source = Directions()
    settings = fg.SAETraining(kind=kind, **SETTINGS)
    sae = fg.fit_sae(source, AT, tmp_path / "sae", settings=settings, metadata={"model_name": "me/tiny"})
    assert (sae.d_sae, sae.hookpoint, sae.model_name) == (48, AT, "me/tiny")
    assert explained(sae, source.tokens) > 0.6  # 4 of 48 features for 2 of 24 directions; untrained it is below 0.1
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    x = source.tokens[:50]
    torch.testing.assert_close(theirs.decode(theirs.encode(x)), sae.decode(sae.encode(x)), rtol=1e-4, atol=1e-3)
    notes = json.loads((tmp_path / "sae" / "training.json").read_text())
    assert notes["training"]["kind"] == kind
    assert notes["losses"][-1]["unexplained"] < notes["losses"][0]["unexplained"]
    assert notes["losses"][-1]["step"] == 60
    assert not (tmp_path / "sae.work" / "checkpoint.safetensors").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "matryoshka"])
def test_gpu_twin_of_training(kind, tmp_path):
    """On a GPU a run learns as well as on a CPU, and what it saves loads where there is none."""
    settings, found = fg.SAETraining(kind=kind, **SETTINGS), {}
    for device in ("cpu", "cuda"):
        sae = fg.fit_sae(Directions(), AT, tmp_path / device, settings=settings, device=device)
        found[device] = explained(sae, Directions().tokens)
        assert json.loads((tmp_path / device / "cfg.json").read_text())["device"] == "cpu"
    assert found["cuda"] == pytest.approx(found["cpu"], abs=0.05)  # the order of sums parts the runs a little


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_a_killed_training_goes_on_to_the_same_weights(kind, tmp_path, monkeypatch):
    settings = fg.SAETraining(kind=kind, **SETTINGS)
    whole = fg.fit_sae(Directions(), AT, tmp_path / "whole", settings=settings)
    original, steps = TrainingRun.run, []

    def dies(self, progress, seconds=0.0):
        def counting(done, total):
            steps.append(done)
            if done == 23 and len(steps) == 23:
                raise KeyboardInterrupt
            progress(done, total)

        original(self, counting, seconds)

    monkeypatch.setattr(TrainingRun, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        fg.fit_sae(Directions(), AT, tmp_path / "killed", settings=settings)
    assert not (tmp_path / "killed").exists()
    other = fg.SAETraining(kind=kind, **{**SETTINGS, "lr": 1e-3})
    with refused(fg.PairingError, "lr"):
        fg.fit_sae(Directions(), AT, tmp_path / "killed", settings=other)
    resumed = fg.fit_sae(Directions(), AT, tmp_path / "killed", settings=settings)
    assert steps[23] == 24
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name))
    assert torch.equal(fg.fit_sae(Directions(), AT, tmp_path / "killed", settings=settings).W_dec, resumed.W_dec)
    assert steps[-1] == 60


def test_products_in_bfloat16_learn_as_well(tmp_path):
    """autocast, which is for devices that multiply faster in it: the same run up to its rounding."""
    found = [
        explained(fg.fit_sae(Directions(), AT, tmp_path / str(autocast), settings=settings), Directions().tokens)
        for autocast in (False, True)
        for settings in [fg.SAETraining(autocast=autocast, **SETTINGS)]
    ]
    assert found[1] == pytest.approx(found[0], abs=0.03)  # 8 bits of mantissa in 60 steps


def test_a_damaged_checkpoint_is_told_as_such(tmp_path):
    work = tmp_path / "sae.work"
    work.mkdir()
    (work / "checkpoint.safetensors").write_bytes(b"no tensors")
    with refused(fg.FormatError, "checkpoint.safetensors"):
        fg.fit_sae(Directions(), AT, tmp_path / "sae", settings=fg.SAETraining(**SETTINGS))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "relu"}, ("kind = 'relu'", "topk")),
        ({"k": 0}, ("k = 0",)),
        ({"warm_up": 0.8, "decay": 0.5}, ("1.3", "shares")),
        ({"tokens": 100, "batch": 200}, ("tokens = 100", "batch = 200")),
        ({"dtype": "int8"}, ("int8", "float16")),
        ({"lr": float("nan")}, ("lr",)),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with refused(fg.DataError, *words):
        fg.SAETraining(**settings)


def identity_sae(width):
    """An SAE that reconstructs everything: a positive and a negative feature for each coordinate."""
    eye = torch.eye(width)
    return fg.SAE(
        torch.cat([eye, -eye], 1), torch.cat([eye, -eye]), torch.zeros(2 * width), torch.zeros(width), AT, "relu"
    )


def test_an_sae_that_reconstructs_everything_costs_nothing(llama, tokenizer, texts):
    sae = identity_sae(llama.config.hidden_size)
    quality = fg.measure_sae(llama, tokenizer, sae, texts, context=8)
    assert quality.explained_variance == pytest.approx(1, abs=1e-6)  # float32 sums
    assert quality.ce_spliced == pytest.approx(quality.ce, abs=1e-6)
    assert quality.ce_score == pytest.approx(1, abs=1e-4)
    assert quality.l0 == pytest.approx(sae.d_model, rel=0.01)  # one of each pair, zeros aside
    silent = fg.SAE(sae.W_enc * 0, sae.W_dec, sae.b_enc, sae.b_dec, AT, "relu")
    nothing = fg.measure_sae(llama, tokenizer, silent, texts, context=8)
    assert nothing.ce_spliced == nothing.ce_zeroed
    assert (nothing.dead, nothing.l0) == (1, 0)


@pytest.mark.parametrize("batch_tokens", [8, 1000])
def test_quality_is_what_a_naive_reading_gives(llama, tokenizer, texts, batch_tokens):
    sae = make_sae(d_model=llama.config.hidden_size, layer=AT.layer)
    quality = fg.measure_sae(llama, tokenizer, sae, texts, context=64, batch_tokens=batch_tokens, max_norm_ratio=None)
    x = naive_activations(llama, tokenizer, texts, 64, 1e9)
    assert quality.tokens == len(x)
    assert quality.explained_variance == pytest.approx(explained(sae, x), abs=1e-4)
    acts = sae.encode(x)
    assert quality.l0 == pytest.approx(float((acts > 0).sum(1).float().mean()))
    assert quality.dead == pytest.approx(1 - float((acts > 0).any(0).float().mean()))
    loss = {"plain": 0.0, "spliced": 0.0, "zeroed": 0.0}
    scored = 0
    block = llama.model.layers[AT.layer]
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        scored += ids.shape[1] - 1
        for name, change in (
            ("plain", lambda h: h),
            ("spliced", lambda h: sae.decode(sae.encode(h))),
            ("zeroed", lambda h: h * 0),
        ):

            def hook(_, __, output, change=change):
                hidden = output[0] if isinstance(output, tuple) else output
                new = torch.cat([hidden[:, :1], change(hidden[:, 1:])], 1)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handle = block.register_forward_hook(hook)
            with torch.no_grad():
                loss[name] += float(llama(ids, labels=ids).loss) * (ids.shape[1] - 1)
            handle.remove()
    for name, ours in (("plain", quality.ce), ("spliced", quality.ce_spliced), ("zeroed", quality.ce_zeroed)):
        assert ours == pytest.approx(loss[name] / scored, abs=1e-4)  # float32, batches padded to other lengths


@pytest.mark.parametrize("store", [True, False])
def test_train_sae_from_texts_to_a_report(llama, tokenizer, tmp_path, store):
    settings = fg.SAETraining(d_sae=64, k=4, batch=32, tokens=320, lr=1e-3)
    texts = make_texts(160)
    sae, quality = fg.train_sae(
        llama, tokenizer, texts, AT, tmp_path / "sae", settings=settings, held_out=20, store=store, context=16
    )
    notes = json.loads((tmp_path / "sae" / "training.json").read_text())
    assert notes["quality"] == quality.as_dict()
    assert notes["activations"]["context"] == 16
    assert quality.tokens == len(naive_activations(llama, tokenizer, texts[:20], 16, 1e9)) - quality.left_out
    assert sae.prepend_bos == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    assert (tmp_path / "sae.work" / "activations").exists() == store
    again, same = fg.train_sae(
        llama, tokenizer, texts, AT, tmp_path / "sae", settings=settings, held_out=20, store=store, context=16
    )
    assert (again.sha256, same) == (sae.sha256, quality)


def test_train_sae_refuses_before_it_works(llama, tokenizer, tmp_path):
    with refused(fg.HookpointError, "9"):
        fg.train_sae(llama, tokenizer, make_texts(), fg.Hookpoint(9), tmp_path / "sae")
    with refused(fg.DataError, "no held-out text"):
        fg.train_sae(llama, tokenizer, make_texts(), AT, tmp_path / "sae", held_out=0)
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "mine.txt").write_text("keep")
    with refused(fg.FormatError, "exists"):
        fg.train_sae(llama, tokenizer, make_texts(), AT, tmp_path / "sae")
    assert not (tmp_path / "sae.work").exists()


def test_a_stream_reads_what_a_store_keeps(llama, tokenizer, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_store, "SHARD_TOKENS", 40)
    store = stored(llama, tokenizer, texts, tmp_path / "acts", context=8)
    reader = ActivationReader(llama, tokenizer, texts, context=8, dtype=torch.float32)
    for a, b in zip(store.shards(AT, 1), ActivationStream(reader).shards(AT, 1), strict=True):
        assert torch.equal(a, b)
    assert Place() == ShuffledBatches(store, AT, 4, 0).place


def test_the_command_trains_measures_and_refuses(tmp_path):
    corpus, chats = tmp_path / "corpus.txt", tmp_path / "chats.jsonl"
    sentences = [text for name in ("sea", "war") for text in fg.load_contrast(name).positives]
    corpus.write_text("\n".join(sentences))
    rows = [{"text": text} for text in sentences[:10]]
    chats.write_text("\n".join(map(json.dumps, rows)))
    options = ["--hookpoint", "1", "--features", "64", "-k", "8", "--tokens", "512", "--batch", "64", "--held-out", "9"]
    out = tmp_path / "sae"
    shown = invoke_on_cpu("train-sae", corpus, chats, "-o", out, *options, "--json")
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout)
    sae = fg.load_sae(out)
    assert (result["features"], sae.hookpoint, sae.model_name) == (64, AT, "fgsteer/default")
    assert result == {"out": str(out), "features": 64, **json.loads((out / "training.json").read_text())["quality"]}
    again = invoke_on_cpu("train-sae", corpus, chats, "-o", out, *options, "--json")
    assert json.loads(again.stdout) == result  # it finds everything done
    with refused(fg.DataError, "80", "held out"):
        invoke_on_cpu("train-sae", corpus, "-o", tmp_path / "other", *options, "--held-out", "80")
    assert not (tmp_path / "other").exists()


def test_texts_and_conversations_are_read_from_one_file(tmp_path):
    from fgsteer.data.corpora import read_texts

    path = tmp_path / "mixed.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"text": "the sea"}, {"messages": chat}, {"text": None, "messages": chat}, {"text": " "}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert list(read_texts(path)) == ["the sea", chat, chat]
    path.write_text(json.dumps({"title": "no text"}))
    with refused(fg.DataError, "title", "text"):
        list(read_texts(path))
