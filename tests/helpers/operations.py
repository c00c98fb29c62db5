"""One intervention of every kind, as the tables of the docs name them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import fgsteer as fg
from tests.helpers.saes import make_sae
from tests.helpers.steering import direction, vector

AT = fg.Hookpoint(1)


def examples() -> dict[str, Any]:
    """One intervention of every row of the table of interventions, and what else may be asked of one."""
    v, other, sae = vector(1), direction(2), make_sae("relu")
    transcoder = replace(sae, hookpoint=fg.Hookpoint(1, "mlp_out"), reads=fg.Hookpoint(1, "mlp_in"))
    where = {"bos": True}
    made = {
        "add": v.add(2.0, **where),
        "add_relative": v.add_relative(0.3, **where),
        "add_keeping_norm": v.add_keeping_norm(2.0, **where),
        "affine": v.affine(0.5, **where),
        "ablate": v.ablate(**where),
        "clamp": v.clamp(2.0, **where),
        "at_least": v.clamp(at_least=1.0, **where),
        "at_most": v.clamp(at_most=-1.0, **where),
        "at_least and at_most": v.clamp(at_least=1.0, at_most=1.5, **where),
        "clamp_subspace": fg.ClampSubspace(hookpoint=AT, directions=torch.stack([v.direction, other]), **where),
        "rotate": fg.Rotate(hookpoint=AT, direction=v.direction, other=other, by=30.0, **where),
        "rotate, to an angle": fg.Rotate(hookpoint=AT, direction=v.direction, other=other, to=30.0, **where),
        "adaptive_add": fg.SteeringVector(v.direction, AT, read=other).adaptive_add(**where),
        "add_by_prompt": fg.AddByPrompt(
            hookpoint=AT, direction=v.direction, reading=fg.Projection(other, 0).last(), **where
        ),
        "remap": fg.Remap(hookpoint=AT, weight=torch.randn(32, 32) / 8, bias=other, **where),
        "scale": fg.Scale(hookpoint=AT, width=32, coefficient=0.3, **where),
        "clamp_feature": fg.edit(sae, {3: 2.0, 4: "off"}, **where),
        "a TopK SAE's features": fg.edit(make_sae("topk"), {3: 2.0}, **where),
        "a transcoder's features": fg.edit(transcoder, {3: 2.0}, **where),
        "cached keys and values": fg.CacheSteering(
            layers=[1], keys=torch.zeros(1, 2, 8), values=torch.ones(1, 2, 8), d_model=32
        ),
        "a gate": v.add(2.0, when=fg.Projection(v) > 0.0, **where),
        "a gate of the prompt": v.add(2.0, when=fg.Projection(v).max() > -100.0, **where),
        "a gate that reads ahead": v.add(2.0, when=fg.Preview(fg.Projection(other, 2)) > -100.0, **where),
        "all but BOS": v.add(2.0),
    }
    scopes = ("prompt", "generated", "reply", "last_prompt", "first:2", "last:2", "ends:1,1", "at:0,2")
    return made | {f"scope {scope}": v.add(2.0, scope=scope, **where) for scope in scopes}
