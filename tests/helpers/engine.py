"""An engine without vLLM: workers with one table a layer, and requests that are live for as long as a test says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load

import fgsteer as fg
from fgsteer.serving.encoders import topk_encoders
from fgsteer.serving.request import PLAN
from fgsteer.serving.tables import Batch, Table
from tests.helpers.saes import make_sae

WIDTH = 32


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vector(seed=0, layer=1):
    return fg.SteeringVector(normal(seed, WIDTH) * 3, fg.Hookpoint(layer), reference=normal(seed + 1, WIDTH))


def clamp(activation, layer=1):
    sae = make_sae(activation, layer=layer)
    return fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={3: 2.0, 7: 0.5, 11: -1.0})


class FakeEngine:
    """Workers with one table a layer, and requests that are live for as long as a test says."""

    calls_while_admitting = True

    def __init__(self, layers, steers=True, rows=4, slots=1, saes=()):
        self.batch = Batch(255, torch.device("cpu"), slots)
        encoders = {at: [(d, k) for a, d, k in (e.settings for e in topk_encoders(saes)) if a == at] for at in layers}
        self.tables = {layer: Table(rows, WIDTH, self.batch.tokens, encoders[layer]) for layer in layers}
        self.live, self.steers = [], steers
        config = SimpleNamespace(bos_token_id=0, eos_token_id=[2])
        self.config = SimpleNamespace(
            model_config=SimpleNamespace(
                dtype=torch.float32,
                get_hidden_size=lambda: WIDTH,
                hf_config=config,
                hf_text_config=config,
                try_get_generation_config=lambda: {"eos_token_id": [2, 9]},
            )
        )

    def call(self, method, *args):
        if method == "steering_clear":
            return [table.clear(float(args[0])) for table in self.tables.values()]
        try:
            if method == "steering_encoder":
                layer, number, start, tensors = args
                return [None, self.tables[layer].fill_encoder(number, start, load(tensors))]
            tag, layer, tensors = args
            return [None, self.tables[layer].fill(float(tag), load(tensors))]
        except fg.FgsteerError as error:
            return [None, str(error)]

    def live_requests(self):
        return self.live

    def continuations(self, extras, tokens):
        plain = [(1, -1.0), (2, -1.0)]
        changed = {"all": [(1, -2.0), (3, -1.0)], "generated": [(1, -1.0), (2, -1.5)]}
        return [plain if not extra or not self.steers else changed[extra.get("steer_scope", "all")] for extra in extras]


def request(extra, salt=None, ids=(5, 6, 7), embeds=None):
    params = SimpleNamespace(extra_args=extra)
    places = {"prompt_token_ids": ids, "prompt_embeds": embeds, "pooling_params": None}
    return SimpleNamespace(sampling_params=params, request_id="r", cache_salt=salt, resumable=False, **places)


def steer_batch(control, extras, hidden, prompt=3):
    """What the tables, each layer's after the former's, make of a batch: ``hidden`` (requests, tokens, WIDTH)."""
    batch, plans = control.engine.batch, {}
    for number, extra in enumerate(extras):
        made = request(extra, ids=(0, *range(5, 4 + prompt)))
        control.admit(made)
        plans[str(number)] = (extra or {}) and made.sampling_params.extra_args[PLAN]
    batch.plans = plans
    count, tokens = hidden.shape[:2]
    batch.write_plan(list(plans), np.arange(count + 1) * tokens, torch.arange(tokens).repeat(count))
    flat = hidden.flatten(0, 1)
    for _, table in sorted(control.engine.tables.items()):
        flat = table(flat, None)
    return flat.view_as(hidden)
