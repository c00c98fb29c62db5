"""vLLM engines of every shape against Hugging Face hooks, token for token, with all cases in one batch."""

from __future__ import annotations

import gc
import random
from contextlib import contextmanager, suppress

import pytest
import torch

import fgsteer as fg
from fgsteer.activations.tokens import encode_prompts
from fgsteer.effects.rollouts import Sampling, rollout
from fgsteer.models.shipped import DEFAULT, SHIPPED
from fgsteer.serving import VllmWriter, steered_llm, steering
from fgsteer.serving.rows import TableRows
from tests.vllm import hostile
from tests.vllm.cases import (
    PROMPTS,
    SETTINGS,
    TOKENS,
    Continuation,
    cases,
    check,
    continue_with_hooks,
    four_heads,
    ids,
    saes,
    served,
)

pytestmark = pytest.mark.vllm


@contextmanager
def engine(source=DEFAULT, **settings):
    own = {"vectors": served(source), "saes": saes(), "vectors_per_request": 3, "inline_vectors": True}
    llm = steered_llm(source, **own, **SETTINGS | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def run(llm, requests, tokens=TOKENS, **more):
    """Greedy continuations of (prompt, extra_args) pairs in one batch."""
    from vllm import SamplingParams

    settings = {"temperature": 0.0, "max_tokens": tokens, "logprobs": 0, "ignore_eos": True} | more
    params = [SamplingParams(**settings, extra_args=extra) for _, extra in requests]
    outputs = llm.generate([{"prompt_token_ids": list(ids(p))} for p, _ in requests], params, use_tqdm=False)
    return [
        Continuation(list(o.token_ids), [by_id[t].logprob for t, by_id in zip(o.token_ids, o.logprobs, strict=True)])
        for output in outputs
        for o in output.outputs
    ]


def refused(match):
    from vllm.exceptions import VLLMValidationError

    return pytest.raises(VLLMValidationError, match=match)


def check_mixed_batch(llm, source=DEFAULT):
    check(run(llm, [(case.prompt, case.extra) for case in cases(source)]), source)


@pytest.fixture(scope="module")
def eager():
    with engine(enforce_eager=True, enable_prefix_caching=True, block_size=32) as llm:
        yield llm


def test_eager(eager):
    check_mixed_batch(eager)


def test_prefix_cache_is_not_shared_between_steerings(eager):
    """One long prompt under each steering in turn, cold and then from the cache, with unsteered requests between."""
    prompt = " ".join([PROMPTS[2]] * 3)
    assert len(ids(prompt)) > 64  # two blocks of the cache
    asked = [
        ({}, None),
        (steering("middle", scale=1.0), served()["middle"].add(1.0)),
        (steering("middle", scale=-1.0), served()["middle"].add(-1.0)),
        (steering("late", scale=2.0, scope="generated"), served()["late"].add(2.0, scope="generated")),
    ]
    wanted = [continue_with_hooks(prompt, item, 8).tokens for _, item in asked]
    for _ in range(2):
        for (extra, _), tokens in zip(asked, wanted, strict=True):
            assert run(eager, [(prompt, extra)], 8)[0].tokens == tokens
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, extra_args=asked[1][0])
    (output,) = eager.generate([{"prompt_token_ids": list(ids(prompt))}], params, use_tqdm=False)
    assert output.num_cached_tokens > 0  # its own entries are found


def test_several_samples_of_a_request(eager):
    case = next(c for c in cases() if c.label == "add")
    wanted = continue_with_hooks(case.prompt, case.item, 8).tokens
    assert [c.tokens for c in run(eager, [(case.prompt, case.extra)], 8, n=2, temperature=1.0, top_k=1)] == [wanted] * 2


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"steer": "nothing"}, "Nothing is loaded as 'nothing'"),
        ({"steer": "features", "steer_op": "add"}, "feature clamp"),
        ({"steer": "middle", "steer_strength": 2.0}, "steer_strength"),
        ({"steer": "middle", "steer_plan": [1, 9, 9, 0, 99]}, "steer_plan"),
        (steering([{"name": "middle"}] * 4), "at most 3"),
        ({"steer": '[{"name": "middle", "scale": NaN}]'}, "finite"),
    ],
)
def test_a_request_that_cannot_be_is_refused_and_the_engine_lives_on(eager, extra, why):
    with refused(match=why):
        run(eager, [(PROMPTS[0], {}), (PROMPTS[0], extra)], 4)
    assert run(eager, [(PROMPTS[0], {})], 4)[0].tokens == continue_with_hooks(PROMPTS[0], None, 4).tokens


def test_loading_and_unloading_while_the_engine_runs(eager, tmp_path):
    vector = served()["middle"] * -1.0
    request = (PROMPTS[0], steering("new", scale=1.0))
    with refused(match="'new'"):
        run(eager, [request], 4)
    vector.save(tmp_path / "new.safetensors")
    eager.steering.load("new", tmp_path / "new.safetensors")
    assert run(eager, [request], 8)[0].tokens == continue_with_hooks(PROMPTS[0], vector.add(1.0), 8).tokens
    eager.steering.load("new", vector * 2.0)  # replaced
    assert run(eager, [request], 8)[0].tokens == continue_with_hooks(PROMPTS[0], vector.add(2.0), 8).tokens
    with pytest.raises(fg.HookpointError, match="layer 1"):
        eager.steering.load("elsewhere", fg.SteeringVector(vector.direction, fg.Hookpoint(1)))
    with pytest.raises(fg.SteeringError, match="width 8"):
        eager.steering.load("narrow", fg.SteeringVector(vector.direction[:8], fg.Hookpoint(2)))
    eager.steering.unload("new")
    with refused(match="'new'"):
        run(eager, [request], 4)
    check_mixed_batch(eager)


def test_requests_carry_their_vectors(eager):
    """More than the table has rows, in one batch with others, and again."""
    vectors = [served()["middle"] * scale for scale in (1.0, -1.0, 1.5)]
    asked = [(PROMPTS[0], steering(vector)) for vector in vectors for _ in range(2)] + [(PROMPTS[0], {})]
    items = [vector.add(1.0) for vector in vectors for _ in range(2)] + [None]
    wanted = [continue_with_hooks(PROMPTS[0], item, 8).tokens for item in items]
    for _ in range(2):
        assert [found.tokens for found in run(eager, asked, 8)] == wanted
    for number in range(40):  # the table has 32 rows
        vector = served()["first"] * (1 + number / 10)
        (found,) = run(eager, [(PROMPTS[0], steering(vector))], 1)
    assert found.tokens == continue_with_hooks(PROMPTS[0], vector.add(1.0), 1).tokens
    for extra in ({"steer_vector": "nonsense"}, steering(fg.SteeringVector(vectors[0].direction, fg.Hookpoint(1)))):
        with refused(match="steer_vector|layer 1"):
            run(eager, [(PROMPTS[0], {}), (PROMPTS[0], extra)], 4)
    check_mixed_batch(eager)


def test_rows_are_kept_for_requests_under_way(eager):
    """A vector unloaded, and its rows wanted by others, while a request that uses it is half done."""
    from vllm import SamplingParams

    vector, core = served()["middle"] * 1.5, eager.llm_engine
    eager.steering.load("brief", vector)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, extra_args=steering("brief", scale=1.0))
    core.add_request("half-done", {"prompt_token_ids": list(ids(PROMPTS[0]))}, params)
    for _ in range(6):
        core.step()
    eager.steering.unload("brief")
    eager.steering.load("other", vector * -3.0)
    while core.has_unfinished_requests():
        outputs = core.step()
    assert list(outputs[0].outputs[0].token_ids) == continue_with_hooks(PROMPTS[0], vector.add(1.0), 16).tokens
    eager.steering.unload("other")


def test_a_benchmark_is_written_as_by_hooks(eager):
    """With the likeliest token alone to choose from, every arm's texts are those of the benchmark's own rollouts."""
    network, tokenizer = fg.load_model(DEFAULT, dtype=torch.float32)
    middle, late = served()["middle"], served()["late"]
    arms = [
        None,
        middle.add(1.0),
        late.add(-1.0),
        middle.ablate(),
        late.affine(1.0),
        late.clamp(4.0),
        served()["features"],
        served()["competing"],
        late.add_relative(0.5),
        served()["turn"],
    ]
    how, prompts = Sampling(12, temperature=1.0, top_k=1, top_p=1.0), list(PROMPTS[:3])
    ids, _ = rollout(network, encode_prompts(tokenizer, prompts), arms, how)
    before = eager.steering.names
    texts = VllmWriter(eager, tokenizer)(prompts, arms, how, 0)
    assert texts == tokenizer.batch_decode(ids[:, -12:], skip_special_tokens=True)
    assert len(set(texts)) > 10  # arms differ
    assert eager.steering.names == before


def check_unharmed(llm, folder, monkeypatch):
    """Unsteered requests to the bit as before, after anything that is accepted; without the checks before it too."""
    from vllm.exceptions import VLLMValidationError

    before = [run(llm, [(prompt, {})]) for prompt in PROMPTS]
    rng, outcomes = random.Random(0), set()
    for checks in (True, False):
        with monkeypatch.context() as patch:
            if not checks:
                patch.setattr(TableRows, "check", lambda *_: None)
                patch.setattr(TableRows, "check_amounts", lambda *_: None)
            for path in hostile.files(folder):
                names = tuple(served())
                with suppress(fg.FgsteerError):
                    llm.steering.load("sent", path)
                    names = ("sent",)
                for _ in range(3):
                    extra = hostile.extra(rng, names)
                    if not checks:
                        extra = {"steer": names[0], "steer_scale": rng.choice(hostile.SCALES)}
                    try:
                        run(llm, [(rng.choice(PROMPTS), extra)], 4)
                        outcomes.add("accepted")
                    except VLLMValidationError:
                        outcomes.add("refused")
                if names == ("sent",):
                    llm.steering.unload("sent")
        assert [run(llm, [(prompt, {})]) for prompt in PROMPTS] == before
    assert outcomes == {"accepted", "refused"}


def test_no_request_harms_another(eager, tmp_path, monkeypatch):
    check_unharmed(eager, tmp_path, monkeypatch)
    check_mixed_batch(eager)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_request_harms_another_in_16_bits(dtype, tmp_path, monkeypatch):
    with engine(dtype=dtype) as llm:
        check_unharmed(llm, tmp_path, monkeypatch)


def test_tensor_parallel_compiled_in_chunks(tmp_path):
    """Two ranks, compiled, prompts read 16 tokens at a time."""
    source = four_heads(tmp_path / "model")
    chunks = {"max_num_batched_tokens": 16, "max_num_seqs": 16, "enable_chunked_prefill": True}
    with engine(source, tensor_parallel_size=2, **chunks) as llm:
        check_mixed_batch(llm, source)


def test_pipeline_parallel_compiled():
    with engine(pipeline_parallel_size=2) as llm:
        check_mixed_batch(llm)


def test_drafted_tokens_are_steered():
    """Speculative decoding: the tokens of a draft, taken or not, are steered as they are when generated one by one."""
    draft = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(speculative_config=draft, enforce_eager=True) as llm:
        check_mixed_batch(llm)


def test_second_model_runner(monkeypatch):
    """vLLM's default where Triton runs, which is not on CPUs."""
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        pytest.skip("the second model runner needs Triton")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with engine(enforce_eager=True) as llm:
        check_mixed_batch(llm)


def test_a_worker_without_the_compile_cache_key_is_refused():
    from vllm import LLM

    with pytest.raises(RuntimeError):
        LLM(str(SHIPPED[DEFAULT].model_folder()), worker_cls="fgsteer.serving.worker.SteeringWorker", **SETTINGS)
