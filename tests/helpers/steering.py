"""Steered generation of three prompts, and its naive recompute one row and one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fgsteer as fg
from fgsteer.models.hookpoints import resolve
from tests.helpers.tiny import D_MODEL
from tests.reference import apply as reference

PROMPTS = ["the man", "a dog sat on the bread", "she took the ring of the king"]
NEW = 6


def direction(seed=1):
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed)) * 3


def vector(seed=1, layer=1, site="resid_post"):
    return fg.SteeringVector(direction(seed), fg.Hookpoint(layer, site), reference=direction(seed + 50))


def naive_change(h, item, where):
    """One row (T, d) through the loop version of one intervention, at these tokens."""
    rows = h.double().numpy()
    new = rows.copy()
    new[where] = naive_everywhere(rows, item)[where]
    return torch.as_tensor(new).float()


def naive_everywhere(rows, item):
    """Rows (T, d) in float64 through the loop version of one intervention."""
    if isinstance(item, fg.ClampFeature):
        return _naive_edits(rows, item)
    if isinstance(item, fg.ClampSubspace):
        return reference.clamp_subspace(
            rows, item.directions.double().numpy(), item.targets or [0] * len(item.directions)
        )
    if isinstance(item, fg.Remap):
        given = (item.weight, item.bias, item.hidden_weight, item.hidden_bias)
        weight, bias, hidden_weight, hidden_bias = (None if p is None else p.double().numpy() for p in given)
        return reference.remap(rows, weight, bias, hidden_weight, hidden_bias, item.strength)
    if isinstance(item, fg.Scale):
        return reference.scale(rows, item.coefficient, None if item.read is None else item.read.double().numpy())
    v = item.direction.double().numpy()
    if isinstance(item, fg.Clamp) and item.target is None:
        bounds = {name: b for name in ("at_least", "at_most") if (b := getattr(item, name)) is not None}
        return reference.bound(rows, v, **bounds)
    if isinstance(item, fg.Rotate):
        return reference.rotate(rows, v, item.other.double().numpy(), item.by, item.to)
    loops: dict[type, Callable[[], Any]] = {
        fg.Add: lambda: reference.add(rows, v, item.coefficient),
        fg.AddRelative: lambda: reference.add_relative(rows, v, item.coefficient),
        fg.AddKeepingNorm: lambda: reference.add_keeping_norm(rows, v, item.coefficient),
        fg.AdaptiveAdd: lambda: reference.adaptive_add(
            rows, v, item.read.double().numpy(), item.bias, item.coefficient
        ),
        fg.Ablate: lambda: reference.ablate(rows, v),
        fg.Clamp: lambda: reference.clamp(rows, v, item.target),
        fg.Affine: lambda: reference.affine(rows, v, item.reference.double().numpy(), item.alpha),
    }
    return loops[type(item)]()


def _naive_edits(rows, item):
    sae = item.sae

    def encode(x):
        return sae.encode(torch.as_tensor(x).float()[None])[0].double().numpy()

    rows_of = {j: sae.W_dec[j].double().numpy() for j in item.features}
    rules = {"targets": "set"}
    edits = {j: (rules.get(name, name), x) for name, given in item.edits.items() for j, x in given.items()}
    return reference.edit_features(rows, encode, rows_of, edits)


def naive_greedy(model, ids, items, new=NEW):
    """Greedy tokens of one unpadded row, all of it recomputed without a cache at every step."""
    prompt_length = len(ids)
    ids = list(ids)
    for _ in range(new):
        handles = []
        for item in items:
            where = reference.positions(item.scope, len(ids), prompt_length, 0, bos=item.bos)
            module, is_input = resolve(model, item.hookpoint)
            assert not is_input

            def hook(_, __, out, item=item, where=where):
                h = out[0] if isinstance(out, tuple) else out
                changed = naive_change(h.reshape(-1, D_MODEL), item, where).view_as(h).to(h.dtype)
                return (changed, *out[1:]) if isinstance(out, tuple) else changed

            handles.append(module.register_forward_hook(hook))
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        ids.append(int(logits.argmax()))
    return ids[prompt_length:]


def batch(tokenizer, side="left"):
    return tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side, return_token_type_ids=False)


def rows_of(model, tokenizer, entries):
    return [naive_greedy(model, tokenizer(p)["input_ids"], items) for p, items in zip(PROMPTS, entries, strict=True)]


def run(model, inputs, steering, per_row=None, **options):
    with fg.steer(model, steering, per_row=per_row):
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()
