"""Which engine does which operation: every cell of the table in the docs is tried, and says what happened."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.interventions import apply
from fgsteer.interventions.table import INTERVENTIONS
from fgsteer.serving.request import steering
from fgsteer.serving.writer import servable
from tests.helpers.saes import make_sae
from tests.helpers.steering import direction, vector
from tests.helpers.tiny import tiny_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "exports.md"
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


def engines(folder: Path) -> dict[str, Callable[[Any], Any]]:
    """What steers with an intervention, or writes it for an engine that does."""
    llama = tiny_model("llama")

    def hooks(item: Any) -> None:
        ids = torch.tensor([[0, 5, 6, 7]])
        if isinstance(item, fg.CacheSteering):  # it acts where text is generated
            options: Any = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
            plain = llama.generate(ids, **options).logits[0]
            with fg.steer(llama, item):
                assert not torch.equal(llama.generate(ids, **options).logits[0], plain)
            return
        plain = llama(ids).logits
        with fg.steer(llama, item):
            assert item.scope == "generated" or not torch.equal(llama(ids).logits, plain)

    return {
        "hooks": hooks,
        "file": lambda item: fg.save_steering(folder / "s.safetensors", item),
        "vLLM": lambda item: steering("x", **servable(item)[1]),
        "EasySteer": lambda item: fg.export.easysteer.write(item, folder / "s.json", model_type="llama"),
        "lm-eval": lambda item: fg.export.lm_eval.write(item, folder / "s.pt", llama),
        "llama.cpp": lambda item: fg.export.gguf.write(item, folder / "s.gguf", model_type="llama"),
        "checkpoint": lambda item: fg.fold(llama, item),
    }


def refusal(run: Callable[[Any], Any], item: Any) -> str:
    """Why an engine refuses an intervention; "" where it does not."""
    try:
        run(item)
    except (fg.SteeringError, fg.PairingError, fg.ArgumentError) as error:
        return str(error)
    return ""


def table() -> str:
    """Every operation by engine: ✓ where it is done, or – where it is refused before anything is written."""
    with TemporaryDirectory() as name:
        columns = engines(Path(name))
        lines = [f"| | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
        for what, item in examples().items():
            cells = ["–" if refusal(run, item) else "✓" for run in columns.values()]
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_docs_have_the_table():
    block = re.search(r"<!-- engines -->\n(.*?)\n<!-- /engines -->", PAGE.read_text(encoding="utf-8"), re.S)
    assert block, "docs/reference/exports.md has no engines block"
    assert block[1] == table(), "print the table with: python -m tests.test_engines"


def test_every_operation_has_a_row():
    assert {spec.name for spec in INTERVENTIONS} <= set(examples())
    h = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    for what, item in examples().items():
        if isinstance(item, fg.CacheSteering):
            continue
        assert not torch.equal(apply(h, item.update(), source=h, prompt=torch.ones(1, 1)), h), what


@pytest.mark.parametrize("what", examples())
def test_what_is_refused_says_what_can(what, tmp_path):
    """A refusal names something that can be done instead."""
    item = examples()[what]
    for engine, run in engines(tmp_path).items():
        reason = refusal(run, item)
        assert not reason or re.search(r"steer|[Cc]all|serve|export|pass |build|leave", reason), f"{engine}: {reason}"


if __name__ == "__main__":
    print(table())
