"""Reading: what collecting costs beside the forward passes it needs, and encoding beside its matrix product."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fgsteer as fg
from fgsteer.activations.batches import batch_texts
from fgsteer.activations.tokens import TokenReader
from fgsteer.models.hookpoints import blocks_of, decoder_of
from timing import peers
from timing.bench import Bench, distance
from timing.clock import Case, Contender, Row
from timing.subjects import Subject, answer_pairs, text_pairs


class _Enough(Exception):  # noqa: N818
    pass


@torch.no_grad()
def truncated_passes(subject: Subject, batches: Sequence[Any]) -> None:
    """The least that reading a layer takes: forward passes that stop after it."""

    def stop(*_: Any) -> None:
        raise _Enough

    handle = blocks_of(subject.model)[subject.layer].register_forward_hook(stop)
    try:
        for batch in batches:
            with suppress(_Enough):
                decoder_of(subject.model)(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
    finally:
        handle.remove()


def collect(bench: Bench) -> Iterator[Row]:
    """Reading both sides of a contrast, in tokens a second."""
    for subject in bench.subjects():
        large = subject.name in ("llama-100m", "smollm2") and bench.on_cpu
        count, asked = (4, 1) if bench.quick else (8, 8) if large else (32, 16)
        yield from _collect(bench, subject, f"{count} pairs", text_pairs(count))
        yield from _collect(bench, subject, f"{asked} A/B pairs", answer_pairs(asked))


def _collect(bench: Bench, subject: Subject, name: str, pairs: Sequence[fg.ContrastPair]) -> Iterator[Row]:
    model, tokenizer, at = subject.model, subject.tokenizer, subject.sae.hookpoint
    joined = [tuple(f"{p.prompt} {side}".lstrip() for side in (p.positive, p.negative)) for p in pairs]
    triples = [("", text, True) for pair in joined for text in pair]
    batches = list(batch_texts(model, TokenReader(tokenizer), triples))
    read = partial(fg.collect, model, tokenizer, pairs, hookpoints=at)

    def difference(**options: Any) -> Tensor:
        return read(**options).at("residual", at)[1].difference

    contenders = [
        Contender("forward passes to the layer", partial(truncated_passes, subject, batches)),
        Contender("collect, last token", partial(difference, tokens="last")),
        Contender("collect, all tokens", difference),
        Contender("collect, all tokens, features", partial(difference, sae=subject.sae), "collect, all tokens"),
    ]
    if pairs[0].prompt and "share_prefixes" in inspect.signature(fg.collect).parameters:
        whole = partial(difference, tokens="last", share_prefixes=False)
        contenders.append(Contender("collect, last token, share_prefixes=False", whole, "collect, last token"))
    contenders += peers.readers(bench.peers, subject, joined, "collect, last token")
    tokens = sum(int(batch.attention.sum()) for batch in batches)
    tolerance = 1e-3 if bench.dtype == torch.float32 else 0.05
    clock = bench.clock if bench.quick else replace(bench.clock, repetitions=max(15, bench.clock.repetitions))
    yield from clock.compare(Case("collect", subject.name, name, tokens, "tokens/s", distance, tolerance), contenders)


def sae_lens_of(sae: fg.SAE) -> Any:
    """The same SAE in sae-lens."""
    import sae_lens

    kind, extra = ("TopK", {"k": sae.k}) if sae.activation == "topk" else ("JumpReLU", {})
    config = getattr(sae_lens, f"{kind}SAEConfig")(
        d_in=sae.d_model, d_sae=sae.d_sae, device=str(sae.W_enc.device), apply_b_dec_to_input=False, **extra
    )
    made = getattr(sae_lens, f"{kind}SAE")(config)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    made.load_state_dict({n: getattr(sae, n) for n in names if getattr(sae, n) is not None})
    return made.requires_grad_(False)


def encode(bench: Bench) -> Iterator[Row]:
    """Encoding, by the matrix product that it cannot do without."""
    saes = [subject.sae for subject in bench.subjects("default", "llama-100m")]
    wide = [replace(sae, activation="topk", k=32, threshold=None) for sae in saes if sae.activation != "topk"]
    for sae in (*saes, *wide):
        rows = 64 if bench.quick else 2048
        x = torch.randn(rows, sae.d_model, generator=torch.Generator().manual_seed(0)).to(bench.clock.device)
        chosen = list(range(0, sae.d_sae, sae.d_sae // 8))
        columns = sae.W_enc[:, chosen].contiguous()

        def difference(a: Tensor, b: Tensor, chosen: list[int] = chosen) -> float:
            return distance(a, b if a.shape == b.shape else b[:, chosen])

        name = f"{rows} x {sae.d_model} x {sae.d_sae}, {sae.activation}"
        case = Case("encode", "", name, rows, "rows/s", difference, 1e-4)
        yield from bench.clock.compare(
            case,
            [
                Contender("x @ W_enc", partial(torch.matmul, x, sae.W_enc)),
                Contender("encode", partial(sae.encode, x)),
                Contender("sae-lens, encode", partial(sae_lens_of(sae).encode, x), "encode"),
                Contender("x @ W_enc, 8 columns", partial(torch.matmul, x, columns)),
                Contender("encode_selected, 8 features", partial(sae.encode_selected, x, chosen), "encode"),
            ],
        )
