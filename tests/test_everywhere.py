"""Every operation in every way that a model runs: mixed batches, static caches, bfloat16, split, compiled; any family.

Texts are forced, so that logits of the same tokens are compared, those of a prompt and of some steps of decoding.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig, LogitsProcessor

import fgsteer as fg
from fgsteer.interventions import apply
from tests.helpers.operations import examples
from tests.helpers.steering import batch
from tests.helpers.tiny import (
    FAMILIES,
    HYBRIDS,
    LAYERS,
    MORE_FAMILIES,
    OTHER_FAMILIES,
    model_of,
    tiny_model,
    word_tokenizer,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "exports.md"
FORCED = (7, 21, 12)  # the new tokens
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32: products of other shapes round otherwise; logits are of size 1
BFLOAT16_SHARE = 0.05  # of the largest logit: eight bits in every product of three blocks
SLOW = ("compiled",)


class Forced(LogitsProcessor):
    """Leaves one token possible at each step."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, FORCED[input_ids.shape[1] - self.prompt]] = 0.0
        return only


def logits(model: Any, inputs: Any, steering: Any, **options: Any) -> torch.Tensor:
    """Those of the prompt's last token and of all forced ones but the last, (rows, steps, vocabulary)."""
    options |= {"max_new_tokens": len(FORCED), "do_sample": False, "output_logits": True}
    forced = [Forced(inputs["input_ids"].shape[1])]
    with fg.steer(model, steering):
        out = model.generate(**inputs, logits_processor=forced, return_dict_in_generate=True, **options)
    return torch.stack(out.logits, 1)


def split(model: Any, folder: Path) -> Any:
    """A copy whose middle block stays on disk, which accelerate's hooks bring in for each pass."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate splits models")
    model = copy.deepcopy(model)
    places = {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(LAYERS)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    return model


def compiled(backend: Any) -> dict[str, Any]:
    """Options of ``generate`` that compile each step of decoding, on a CPU too."""
    config = CompileConfig(backend=backend, mode="default")
    config._compile_all_devices = True  # transformers compiles on accelerators only
    return {"cache_implementation": "static", "compile_config": config}


class Ways:
    """The ways in which a model runs, each as a check of one steering; it raises fgsteer's errors where refused."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_model("llama")
        self.inputs = batch(word_tokenizer())
        self.rows = len(self.inputs["input_ids"])
        self.split, self.half = split(self.model, folder), copy.deepcopy(self.model).bfloat16()
        self.plain = logits(self.model, self.inputs, None)

    def expected(self, item: Any) -> torch.Tensor:
        """What the model says with an ordinary cache, every row steered."""
        found = logits(self.model, self.inputs, item)
        assert not torch.allclose(found, self.plain, **CLOSE)
        return found

    def one_row(self, item: Any) -> None:
        """Rows that are steered beside rows that are not."""
        found = logits(self.model, self.inputs, [item, None, item])
        # where a cache is changed, the prompt is read in two passes
        tolerance = 1e-6 if isinstance(item, fg.CacheSteering) else 0.0
        torch.testing.assert_close(found[1], self.plain[1], atol=tolerance, rtol=0.0)
        torch.testing.assert_close(found[::2], self.expected(item)[::2], **CLOSE)

    def static_cache(self, item: Any) -> None:
        """A cache that is as long from the start as it will be."""
        found = logits(self.model, self.inputs, item, cache_implementation="static")
        torch.testing.assert_close(found, self.expected(item), **CLOSE)

    def bfloat16(self, item: Any) -> None:
        """A model in bfloat16."""
        expected, found = self.expected(item), logits(self.half, self.inputs, item)
        assert found.dtype in (torch.bfloat16, torch.float32)
        far = (found.float() - expected).norm() / (expected - self.plain).norm()
        assert far < 0.5  # far nearer to the steered model than that is to the unsteered one
        assert (found.float() - expected).abs().median() < BFLOAT16_SHARE * expected.abs().max()

    def split_model(self, item: Any) -> None:
        """A model in several places, here on disk and in memory."""
        torch.testing.assert_close(logits(self.split, self.inputs, item), self.expected(item), **CLOSE)

    def compiled(self, item: Any) -> None:
        """Steps of decoding inside one graph."""
        torch._dynamo.reset()
        graphs = []

        def backend(graph: Any, _: Any, **__: Any) -> Any:
            graphs.append(graph)
            return graph

        found = logits(self.model, self.inputs, item, **compiled(backend))
        torch.testing.assert_close(found, self.expected(item), **CLOSE)
        assert graphs


WAYS = {
    "rows of a batch": Ways.one_row,
    "static cache": Ways.static_cache,
    "bfloat16": Ways.bfloat16,
    "split model": Ways.split_model,
    "compiled": Ways.compiled,
}


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    return Ways(tmp_path_factory.mktemp("split"))


def cell(ways: Ways, way: str, item: Any) -> str:
    """✓ where steering is the same that way, – where it is refused."""
    try:
        WAYS[way](ways, item)
    except (fg.SteeringError, fg.PairingError, fg.ArgumentError):
        return "–"
    return "✓"


def rows_of_docs() -> dict[str, dict[str, str]]:
    """{operation: {way: cell}} of the table in the docs."""
    block = re.search(r"<!-- ways -->\n(.*?)\n<!-- /ways -->", PAGE.read_text(encoding="utf-8"), re.S)
    assert block, "docs/reference/exports.md has no ways block"
    head, _, *lines = [[part.strip() for part in line.strip("|").split("|")] for line in block[1].split("\n")]
    return {line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines}


def test_the_docs_name_every_operation_and_way():
    held = rows_of_docs()
    assert list(held) == list(examples()), "print the table with: python -m tests.test_everywhere"
    assert all(list(row) == list(WAYS) for row in held.values())


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
@pytest.mark.parametrize("way", [way if way not in SLOW else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
@pytest.mark.parametrize("what", examples())
def test_an_operation_is_the_same_in_every_way(ways, what, way):
    assert cell(ways, way, examples()[what]) == rows_of_docs()[what][way]


ACTS_ON_ALL = [
    what
    for what, item in examples().items()
    if not isinstance(item, fg.CacheSteering | fg.AddByPrompt) and item.scope == "all" and item.when is None
]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *HYBRIDS, *OTHER_FAMILIES])
def test_every_family_takes_every_operation(family):
    """What blocks pass on is what the kernel makes of it, bit for bit, at the tokens of the prompt."""
    model, inputs = model_of(family), batch(word_tokenizer())
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    for what in ACTS_ON_ALL:
        item = examples()[what]
        source = fg.Hookpoint(1, "mlp_in") if what == "a transcoder's features" else item.hookpoint
        try:
            plain = fg.record(model, ids, real, [item.hookpoint, source])
            with fg.steer(model, item):
                steered = fg.record(model, ids, real, [item.hookpoint])[item.hookpoint]
        except fg.HookpointError:
            assert item.hookpoint.site != "resid_post", what
            continue
        expected = apply(plain[item.hookpoint], item.update(), source=plain[source])
        chosen = real.bool() & (torch.ones_like(real).bool() if item.bos else real.cumsum(1) > 1)
        assert torch.equal(steered[chosen], expected[chosen]), what
        assert torch.equal(steered[~chosen], plain[item.hookpoint][~chosen]), what


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        every = Ways(Path(name))
        print(f"| | {' | '.join(WAYS)} |\n|---{'|---' * len(WAYS)}|")
        for operation, example in examples().items():
            print(f"| {operation} | {' | '.join(cell(every, way, example) for way in WAYS)} |", flush=True)
