"""Tasks of lm-evaluation-harness under any intervention.

    run_tasks(model, tokenizer, ["hellaswag"], steering=vec.add(8.0), limit=100)["results"]

The harness runs as it is, on the caller's model, which hooks steer meanwhile. Answers are scored here and not there,
because scopes depend on where a prompt ends, and only here that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.prompt_ends import note_prompt_ends
from fgsteer.activations.tokens import pad
from fgsteer.errors import DataError, JudgeError
from fgsteer.errors.checks import checked
from fgsteer.interventions import Intervention
from fgsteer.models.properties import input_device
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checked
def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    steering: Intervention | Sequence[Intervention] | None = None,
    include_path: str | Path | None = None,
    limit: float | None = None,
    batch_size: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness under one intervention, or several together.

    Scopes hold as in ``generate``: the harness's context is the prompt, and the answer that it scores is what is
    generated.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, such as ["hellaswag"].
        steering: What steers; None for the unsteered model.
        include_path: A folder of task files besides lm-eval's own.
        limit: Documents of each task; a share of them where below 1.
        batch_size: Requests of a forward pass.
        **options: Further arguments of ``lm_eval.simple_evaluate``, such as ``num_fewshot``, ``log_samples`` and
            ``task_manager``.

    Returns:
        What ``lm_eval.simple_evaluate`` returns.

    Raises:
        JudgeError: lm-eval is not installed.
        DataError: lm-eval does not know a task, a number is out of range, or an answer is longer than the model's
            window.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise JudgeError(
            f"lm-eval cannot be imported: {error}.", change="install it with pip install 'fgsteer[lm-eval]'"
        ) from error
    if isinstance(tasks, str) or not tasks:
        raise DataError(f"tasks = {tasks!r}", 'a list of names of tasks, such as ["hellaswag"]')
    if batch_size < 1 or (limit is not None and not limit > 0):
        raise DataError(
            f"batch_size = {batch_size} and limit = {limit}", "batch_size of at least 1 and, if any, limit above 0"
        )
    folder = None if include_path is None else str(include_path)
    manager = options.pop("task_manager", None) or TaskManager(include_path=folder)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise DataError(
                f"lm-eval has no task {task!r}.",
                "one of the tasks that lm-eval ls tasks lists",
                "for a task of your own, name its folder with include_path",
            )
    language_model = _language_model(model, tokenizer, batch_size)
    composed = [] if steering is None else [steering] if isinstance(steering, Intervention) else list(steering)
    with steer(model, composed, per_row=False):
        results: dict[str, Any] = simple_evaluate(
            model=language_model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            **{"log_samples": False, **options},
        )
    return results


def _language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The harness's own wrapper of a Hugging Face model, in which ``_score`` scores the answers."""
    from lm_eval.models.huggingface import HFLM

    class SteeredModel(HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], *_: Any, **__: Any
        ) -> list[tuple[float, bool]]:
            """For every (name, context, answer) in ids: Σ log p, and whether greedy decoding gives the answer.

            As in the harness, at most ``max_length`` tokens are run: the last ones of a longer context.
            """
            same: dict[tuple[tuple[int, ...], int], list[int]] = {}  # answers of one token share a forward pass
            for place, (_, context, answer) in enumerate(requests):
                if len(answer) > self.max_length:
                    raise DataError(
                        f"an answer of {len(answer)} tokens (number {place} of a task)",
                        f"at most {self.max_length} tokens, the model's window",
                        "leave the task out, or pass a model of a longer window",
                    )
                row = tuple((context + answer)[-(self.max_length + 1) : -1])
                same.setdefault((row, len(answer)), []).append(place)
            scores_of: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            passes = sorted(same.items(), key=lambda one: -len(one[0][0]))
            for start in range(0, len(passes), batch_size):
                batch = passes[start : start + batch_size]
                scores = _score(model, [row for (row, _), _ in batch], [count for (_, count), _ in batch])
                for (_, places), scored in zip(batch, scores, strict=True):
                    for place in places:
                        name, answer = requests[place][0], requests[place][2]
                        ids = torch.tensor(answer, device=scored.device)
                        total = float(scored.gather(1, ids[:, None]).sum())
                        scores_of[place] = total, torch.equal(scored.argmax(1), ids)
                        if name is not None:  # windows of a long text are no requests of their own
                            self.cache_hook.add_partial("loglikelihood", name, scores_of[place])
            return scores_of

    return SteeredModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@torch.no_grad()
def _score(
    model: PreTrainedModel, inputs: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[Float[Tensor, "answer vocabulary"]]:
    """Log-probabilities of the last ``counts`` tokens of each row; the rows lack the very last token of the answer."""
    ids, mask = pad(inputs, 0)
    device = input_device(model)
    with note_prompt_ends(model, [len(row) + 1 - count for row, count in zip(inputs, counts, strict=True)]):
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    logits = logits[:, -ids.shape[1] :]  # without those of virtual tokens
    return [
        logits[number, len(row) - count : len(row)].float().log_softmax(-1)
        for number, (row, count) in enumerate(zip(inputs, counts, strict=True))
    ]
