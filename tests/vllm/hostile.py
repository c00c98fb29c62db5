"""What strangers send: amounts, values and files of any kind, some of which may be accepted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

import fgsteer as fg
from fgsteer.serving.converting import rows_of
from fgsteer.storage.files import write_tensors
from tests.vllm.cases import served

SCALES = (1e39, -1e39, 8.6e36, 1e30, 1.7e308, 1e9, 1e7, 1e6, -1e6, 3e5, 1e5, -1e5, 1e4, 1e3, 0.0, 1e-300)
VALUES: tuple[Any, ...] = (["add"], "turn", "", "love", 7, [1], [], 1.5, "é", "a" * 5000, "\x00", "..", "-", 2**62, -1)
KEYS = (
    "steer",
    "steer_vector",
    "steer_op",
    "steer_scale",
    "steer_scope",
    "steer_bos",
    "steer_plan",
    "steer_x",
    "other",
)


def extra(rng: random.Random, names: tuple[str, ...]) -> dict[str, Any]:
    """Steer keys, most of them with values that are not theirs."""
    made: dict[str, Any] = {"steer": rng.choice(names), "steer_scale": rng.choice(SCALES)}
    made["steer_op"] = rng.choice(("add", "clamp", "affine", "ablate"))
    made["steer_scope"] = rng.choice(("all", "prompt", "generated", "reply"))
    if rng.random() < 0.3:
        made = {"steer": _list(rng, names)}
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2))):
        made[rng.choice(KEYS)] = rng.choice(VALUES)
    return made


def _list(rng: random.Random, names: tuple[str, ...]) -> str:
    """Several steerings, of which some are none, in JSON that may be cut off."""
    entries = [{"name": rng.choice(names), "scale": rng.choice(SCALES)} for _ in range(rng.choice((1, 2, 2, 3, 4)))]
    if rng.random() < 0.3:
        entries[0][rng.choice(("op", "scope", "bos", "name", "other"))] = rng.choice(VALUES)
    text = json.dumps(entries)
    return text[: rng.choice((len(text),) * 4 + (9,))]


def files(folder: Path) -> list[Path]:
    """Vectors and clamps of huge entries, at the layers of the cases."""
    folder.mkdir(exist_ok=True)
    made = []
    rng = torch.Generator().manual_seed(0)
    width = served()["middle"].d_model
    for size in (1e4, 1e6, 1e7, 1e15, 1e30, 1e38, 3e38):
        for name, direction in (("one", torch.eye(width)[3]), ("all", torch.randn(width, generator=rng).clamp(-1, 1))):
            path = folder / f"vector-{name}-{size:g}"
            fg.SteeringVector(direction * size, fg.Hookpoint(2), torch.ones(width) * size).save(path)
            made.append(path)
        for part in ("read", "write", "bias", "target"):
            rows = rows_of(served()["features"]).tensors
            rows[part] = torch.full_like(rows[part], size)
            path = folder / f"clamp-{part}-{size:g}"
            write_tensors(path, rows, kind="clamp", header={"hookpoint": str(served()["features"].hookpoint)})
            made.append(path)
    return made
