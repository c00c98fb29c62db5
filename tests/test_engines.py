"""Which engine does which operation: every cell of the table in the docs is tried, and says what happened."""

from __future__ import annotations

import re
from collections.abc import Callable
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
from tests.helpers.operations import examples
from tests.helpers.tiny import tiny_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "exports.md"


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
