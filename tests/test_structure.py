"""The shape of the package: layers, exports, docstrings, a light --help, shapes as annotated, GPU twins."""

from __future__ import annotations

import ast
import inspect
import operator
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import fgsteer as fg

PACKAGE = Path(fg.__file__).parent
# Folders and modules of the package root. Each imports only those before it and itself, inside functions too.
FLOORS = (
    "errors",
    "storage",
    "display",
    "data",
    "models",
    "saes",
    "activations",
    "statistics",
    "interventions",
    "vector",
    "steering",
    "likelihood",
    "effects",
    "methods",
    "directions",
    "transfer",
    "features",
    "selection",
    "training",
    "learning",
    "evaluation",
    "authoring",
    "conditional",
    "mechanisms",
    "traces",
    "receipts",
    "export",
    "hub",
    "serving",
    "play",
    "__init__",
    "cli",
    "__main__",
)
# methods of a vector load the hub when they are called, and one of a trace its page
ON_CALL = {("vector", "hub"), ("vector.steering_vector", "hub")}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports(path):
    """(module, name) of everything that a file imports from the package, also for type checkers and in functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fgsteer":
            home = node.module.removeprefix("fgsteer").lstrip(".")
            for alias in node.names:
                inner = f"{home}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES else home or "__init__", alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fgsteer":
                    yield alias.name.removeprefix("fgsteer").lstrip(".") or "__init__", ""


def test_imports_go_up_only():
    assert {name.split(".")[0] for name in MODULES} == set(FLOORS)
    for name, path in MODULES.items():
        home = name.split(".")[0]
        for other, what in imports(path):
            target = other.split(".")[0]
            if (home, target) not in ON_CALL:
                assert FLOORS.index(target) <= FLOORS.index(home), f"{name} imports {other}"
            assert not what.startswith("_") or what == "__version__", f"{name} imports {other}.{what}"


def test_there_is_no_import_cycle():
    graph = {
        name: {other for other, _ in imports(path) if (name, other) not in ON_CALL} - {name}
        for name, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names it


def test_no_public_name_is_a_module():
    assert not {name for name in vars(fg)["__all__"] if name in FLOORS}


def test_exports_exist_and_are_documented():
    for name in vars(fg)["__all__"]:
        value = getattr(fg, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
            assert len(inspect.getdoc(value)) > 20, name
    with pytest.raises(AttributeError):
        operator.attrgetter("nothing")(fg)


def test_help_is_light():
    code = "import sys; sys.argv = ['fgsteer', '--help']\nfrom fgsteer.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    heavy = {"torch", "transformers", "sae_lens", "numpy", "matplotlib", "huggingface_hub", "safetensors", "jinja2"}
    code += f"assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


MAIN_JOB = """
from jaxtyping import install_import_hook
install_import_hook("fgsteer", "beartype.beartype")
import torch, warnings
import fgsteer as fg
from tests.helpers.tiny import tiny_model, word_tokenizer
from tests.helpers.saes import make_sae
from tests.helpers.judges import BagOfWords
warnings.simplefilter("ignore")
model, tokenizer = tiny_model("llama"), word_tokenizer()
data = fg.ContrastSet("x", positives=["the bride wore a ring", "the groom"], negatives=["a dog sat"])
for activation in ("relu", "jumprelu", "topk", "gated"):
    sae = make_sae(activation)
    fg.collect(model, tokenizer, [fg.ContrastPair("yes", "no", prompt="the man said it")], sae=sae)
    stats = fg.collect(model, tokenizer, data, sae=sae)
    effects = fg.EffectApproximator(torch.randn(32, 24), torch.randn(24), sae.hookpoint, sae.sha256)
    density = fg.measure_density(model, tokenizer, sae, ["the man sat", "a cat ran"])
    examples = fg.measure_examples(model, tokenizer, sae, ["the man sat", "a cat ran"])
    fg.describe_features(model, tokenizer, sae, [1], examples=examples)
    fg.find_features(model, tokenizer, sae, "cat", examples=examples)
    vectors = [fg.caa(stats), fg.ace(stats), fg.sta(stats, sae), fg.fgaa(stats, sae, density=density, max_density=1.0),
               fg.fgaa(stats, sae, effects, score="pearson"), fg.from_features(sae, [1]), fg.sae_ts(sae, [1], effects)]
    clamp = fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={1: 2.0})
    entries = [v.add(1.0) for v in vectors] + [vectors[1].affine(1.0), clamp, None]
    fg.generate(model, tokenizer, ["the man"] * len(entries), steering=entries, max_new_tokens=3)
    fg.cross_entropy(model, tokenizer, ["the man sat"], steering=vectors[0].add(1.0))
    out = fg.output_scores(model, tokenizer, sae, [1, 2], prompt="the man")
    fg.select_features(stats.at("feature")[1], sae, score=1 + out, density=density, max_density=1.0)
    fg.diagnose(fg.collect(model, tokenizer, data, sae=sae, keep_pooled=True), vectors[1])
texts, pair = ["the man sat", "a cat"], fg.ContrastPair("yes", "no", prompt="the man said")
fg.calibrate_many(model, tokenizer, [vectors[1].unit().add], texts, target_kl=0.001)
fg.Coherence.fit(model, tokenizer, texts).measure(["the dog", ""])
fg.perplexities(model, tokenizer, texts, prompts=["the", ""])
fg.measure_steerability(model, tokenizer, vectors[1].add, [pair], [-1.0, 0.0, 1.0])
fg.answer_probabilities(model, tokenizer, [pair], [None, [vectors[1].add(1.0)]]).share
sides = fg.ContrastSet("y", positives=["the bride", "a ring"], negatives=["a dog sat", "a cat"])
fg.sweep(model, tokenizer, sides, layers=[0, 1], ce_rises=[0.01, 0.02], neutral=texts)
single = fg.collect(model, tokenizer, sides, hookpoints=[1], keep_pooled=True)
fg.resampled_vectors(single, 2), fg.expected_cosine(single, 2, to="full")
fg.perplexity_curve(model, tokenizer, vectors[1], [0.1], texts=texts, relative=True)
fg.signed_slopes(model, tokenizer, vectors[1:2], sides, multipliers=[1.0])
pairs = fg.ContrastSet("z", [pair, fg.ContrastPair("tea", "bread", prompt="a cat took")])
open_style = fg.OpenStyle(texts, fg.KeywordJudge({"z": ["tea"]}), "z", 2)
fg.measure_styles(model, tokenizer, vectors[1].add(1.0), {"own": pairs, "open": open_style})
fg.find_suffix(model, tokenizer, vectors[1], texts, length=2, steps=1, threshold=-1e3).flips
fg.own_text_kl(model, tokenizer, texts, vectors[0].add(1.0), max_new_tokens=3).kl
asked = [("the man", ["sat", "ran"], 0), ("a cat", ["ran", "is"], 1)]
fg.receipt(model, tokenizer, vectors[0], 1.0, contrast=sides, prompts=texts, choices=asked, context=32)
for judge in (fg.KeywordJudge(), fg.EmbeddingJudge(BagOfWords())):
    judge.validate("wedding")
from fgsteer.evaluation.metrics.intervals import mean_interval
mean_interval([{1: 0.5, 2: 1.0}, {1: 0.5, 3: 1.0}], hash)
"""


def test_shapes_are_as_annotated():
    """The main job with every tensor annotation checked at run time."""
    result = subprocess.run(
        [sys.executable, "-c", MAIN_JOB], check=False, capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_twin_of_collect_and_steer(dtype, tokenizer):
    from tests.helpers.saes import make_sae
    from tests.helpers.tiny import tiny_model

    data = fg.ContrastSet("x", positives=["the bride wore a ring"], negatives=["a dog sat", "a cat"])
    sae = make_sae("jumprelu")
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama", dtype=dtype).to(device)
        stats = fg.collect(model, tokenizer, data, sae=sae)
        items = [fg.ace(stats).affine(1.0), fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={1: 2.0})]
        ids = tokenizer("the man sat", return_tensors="pt")["input_ids"].to(device)
        with fg.steer(model, items):
            logits = model(ids).logits.float().cpu()
            model.generate(ids, max_new_tokens=3, cache_implementation="static")
        results.append((stats.at("residual")[1].difference, logits))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1  # bfloat16 keeps 8 bits
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * float(a.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_twin_of_effects_and_reading(dtype, tokenizer):
    """Strengths and excerpts agree with the CPU; effects are measured, fitted and kept on the host."""
    from tests.helpers.saes import make_sae
    from tests.helpers.tiny import tiny_model

    sae = make_sae("topk", d_sae=24)
    prompts = ["the man sat", "a queen", "the old king took the ship"]
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama", dtype=dtype).to(device)
        texts = fg.generate(tiny_model("llama"), tokenizer, prompts, max_new_tokens=12)
        effects = fg.EffectApproximator.measure(
            model, tokenizer, sae, prompts=prompts, texts=texts, rollouts=2, rows=24, target_ce_rise=0.2
        )
        assert effects.M.device.type == "cpu"
        makes = [fg.SteeringVector(sae.direction(j), sae.hookpoint).add for j in range(4)]
        strengths = fg.calibrate_many(model, tokenizer, makes, texts, target_ce_rise=0.2)
        examples = fg.measure_examples(model, tokenizer, sae, texts, top=2)
        scores = fg.output_scores(model, tokenizer, sae, prompt="the old king")
        found.append((torch.tensor(strengths), examples.activations.amax((1, 2)), scores))
    tolerance = 0.05 if dtype == torch.float32 else 0.3  # the strengths' own tolerance is 2 %; bfloat16 keeps 8 bits
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
