"""Tasks of lm-evaluation-harness under steering, against log-probabilities by this package; its ``steered`` model."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import fgsteer as fg
from tests.helpers.cli import app

ROWS = [
    ("The day of the wedding she wore a white", ["dress", "ship", "war of the king", "king"], 0),
    ("The old king and the", ["bread", "queen", "cold"], 1),
    ("He took his hat and went out into the", ["street", "yes", "and"], 0),
    ("The ship sailed over the", ["tea", "book", "sea", "ring"], 2),
]
TASK = """\
task: choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def test_without_lm_eval_the_command_is_told(monkeypatch, llama, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(fg.JudgeError, match=r"pip install 'fgsteer\[lm-eval\]'"):
        fg.run_tasks(llama, tokenizer, ["choices"])


@pytest.fixture(scope="module")
def loaded():
    return fg.load_model("default")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the task and its documents; nothing of it needs the network."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "choices.jsonl"
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choices.yaml").write_text(TASK.format(data=data))
    return tmp_path


def local_tasks(folder):
    """The folder's tasks alone: lm-eval's own are thousands of files to index."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def vectors(model):
    width = model.config.hidden_size

    def made(seed, layer):
        g = torch.Generator().manual_seed(seed)
        direction, reference = torch.randn(2, width, generator=g)
        return fg.SteeringVector(direction, fg.Hookpoint(layer), reference=reference)

    return [made(seed, layer) for seed, layer in ((1, 1), (2, 2), (3, 0))]


def harness_sums(found):
    """Log-probabilities of every choice of every document, in the rows' order."""
    samples = sorted(found["samples"]["choices"], key=lambda sample: sample["doc_id"])
    return [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]


def own_sums(model, tokenizer, steering):
    """The same by ``log_probabilities``: the harness puts a space before each choice."""
    return [
        fg.log_probabilities(model, tokenizer, [(q, f" {c}") for c in choices], [steering], joint="").sums[0].tolist()
        for q, choices, _ in ROWS
    ]


def assert_same(found, expected):
    # float32 logits of other batches: nats, sums of one to three tokens
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_task_equals_log_probabilities_under_the_same_steering(loaded, folder, batch_size):
    model, tokenizer = loaded
    first, second, third = vectors(model)
    sae = fg.load_sae("default")
    clamp = fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={12: 30.0})
    choices = [[], [first.add(20.0)], [second.affine(4.0), first.ablate()], [clamp, third.add(2.0, scope="prompt")]]
    choices += [[first.add(20.0, scope="generated")], [first.add(20.0, scope="reply")]]
    seen, manager = [], local_tasks(folder)
    options = {"task_manager": manager, "batch_size": batch_size, "log_samples": True}
    for steering in choices:
        found = fg.run_tasks(model, tokenizer, ["choices"], steering=steering, **options)
        expected = own_sums(model, tokenizer, steering)
        assert_same(harness_sums(found), expected)
        right = [max(range(len(s)), key=s.__getitem__) == row[2] for s, row in zip(expected, ROWS, strict=True)]
        assert found["results"]["choices"]["acc,none"] == sum(right) / len(right)
        seen.append(expected)
    assert len({json.dumps(sums) for sums in seen}) == len(choices)
    with pytest.raises(fg.DataError, match="no task 'nothing'"):
        fg.run_tasks(model, tokenizer, ["nothing"], task_manager=manager)


@pytest.mark.slow
def test_lm_evals_own_steered_model_gives_the_numbers_of_hooks(loaded, folder):
    pytest.importorskip("peft")
    from lm_eval import simple_evaluate
    from lm_eval.models.hf_steered import SteeredModel

    model, tokenizer = loaded
    first, second, third = vectors(model)
    steering = [first.add(20.0, bos=True), second.affine(4.0, bos=True), third.clamp(6.0, bos=True)]
    for items in (steering, [first.ablate(bos=True), second.add(-9.0, bos=True)]):
        fg.export.lm_eval.write(items, folder / "s.pt", model)
        steered = SteeredModel(pretrained=model, tokenizer=tokenizer, steer_path=str(folder / "s.pt"))
        found = simple_evaluate(model=steered, tasks=["choices"], task_manager=local_tasks(folder), log_samples=True)
        assert_same(harness_sums(found), own_sums(model, tokenizer, items))


@pytest.mark.slow
def test_the_command_line_runs_tasks(loaded, folder):
    model, tokenizer = loaded
    first = vectors(model)[0]
    first.save(folder / "v.safetensors")
    options = ["--tasks", "choices", "--include-path", folder, "--limit", 3, "--device", "cpu"]
    steered = ["--vector", folder / "v.safetensors", "--coefficient", 20]
    result = CliRunner().invoke(app, ["eval", *map(str, [*options, *steered, "--json"])])
    assert result.exit_code == 0, result.exception
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["samples"]["choices"]["effective"] == 3
    pairs = list(zip(own_sums(model, tokenizer, [first.add(20.0)]), ROWS, strict=True))[:3]
    right = [max(range(len(s)), key=s.__getitem__) == row[2] for s, row in pairs]
    assert told["results"]["choices"]["acc,none"] == pytest.approx(sum(right) / 3)
    shown = CliRunner().invoke(app, ["eval", *map(str, options)]).stdout
    assert "choices" in shown
    assert "acc" in shown
