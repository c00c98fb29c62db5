"""The peers, steering-vectors and repeng, doing the same work with their own public functions.

They are no dependency: rows of those that cannot be imported are left out. peers.sh makes an
environment that has them.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timing.clock import Contender
from timing.subjects import Subject

NAMES = ("steering_vectors", "repeng")
Peers = Mapping[str, Any]


def find() -> tuple[Peers, dict[str, str]]:
    """(peers by name, why others are missing)."""
    if find_spec("repeng") and not hasattr(np, "float_"):
        np.float_ = np.float64  # repeng 0.4.0 names it in an annotation, numpy 2 has dropped it
    found, missing = {}, {}
    for name in NAMES:
        try:
            found[name] = import_module(name)
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def readers(peers: Peers, subject: Subject, pairs: Sequence[tuple[str, str]], like: str) -> list[Contender]:
    """Mean difference of the last token's activations, (d_model,), as each peer reads them."""
    tokenizer = copy.deepcopy(subject.tokenizer)
    tokenizer.padding_side = "right"  # learned positions would count padding on the left
    found = []
    if "steering_vectors" in peers:
        train = peers["steering_vectors"].train_steering_vector

        def vector(**options: int) -> Tensor:
            trained = train(subject.model, tokenizer, pairs, layers=[subject.layer], **options)
            return trained.layer_activations[subject.layer]

        found.append(Contender("steering-vectors", vector, like))
        found.append(Contender("steering-vectors, batch 32", lambda: vector(batch_size=32), like))
    if "repeng" in peers:
        read = peers["repeng"].extract.batched_get_hiddens
        strings = [text for pair in pairs for text in pair]

        def difference() -> Tensor:
            with redirect_stderr(io.StringIO()):  # a progress bar
                rows = read(subject.model, tokenizer, strings, [subject.layer], 32)[subject.layer]
            return torch.from_numpy(rows[::2].mean(0) - rows[1::2].mean(0))

        found.append(Contender("repeng, batch 32", difference, like))
    return found


def steerers(
    peers: Peers, subject: Subject, generate: Callable[[], Tensor], vectors: Mapping[int, Tensor], label: str, like: str
) -> list[Contender]:
    """Generation with a vector (d_model,) added after each of the layers, set up and taken down each time."""
    found = []
    if "steering_vectors" in peers:
        made = peers["steering_vectors"].SteeringVector(dict(vectors))

        def hooked() -> Tensor:
            with made.apply(subject.model):
                return generate()

        found.append(Contender(f"steering-vectors, {label}", hooked, like))
    if "repeng" in peers:
        control = peers["repeng"].ControlVector("", {layer: v.cpu().numpy() for layer, v in vectors.items()})

        def wrapped() -> Tensor:
            model = peers["repeng"].ControlModel(subject.model, list(vectors))
            try:
                model.set_control(control)
                return generate()
            finally:
                model.unwrap()

        found.append(Contender(f"repeng, {label}", wrapped, like))
    return found
