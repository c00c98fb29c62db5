"""Tasks of lm-evaluation-harness under any intervention.

    run_tasks(model, tokenizer, ["hellaswag"], steering=vec.add(8.0), limit=100)["results"]

The harness runs as it is, on the model that the caller holds; hooks steer it meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.checks import checked
from fgsteer.errors import DataError, JudgeError
from fgsteer.interventions import Intervention
from fgsteer.steering import steer

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
    """What ``lm_eval.simple_evaluate`` returns for the tasks, run under one intervention or several composed.

    ``include_path`` is a folder of task files besides lm-eval's own; ``limit`` the documents of each task, a
    share if below 1; other keywords (``num_fewshot``, ``log_samples``, ``task_manager``) go to ``simple_evaluate``.
    Raises JudgeError without lm-eval, DataError for a task that it does not know.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise JudgeError(
            f"lm-eval cannot be imported: {error}", "it, to run its tasks", "pip install 'fgsteer[lm-eval]'"
        ) from error
    folder = None if include_path is None else str(include_path)
    manager = options.pop("task_manager", None) or TaskManager(include_path=folder)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise DataError(
                f"no task {task!r}", "one of lm-eval's: lm-eval ls tasks", "or name its folder: include_path"
            )
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    composed = [] if steering is None else [steering] if isinstance(steering, Intervention) else list(steering)
    with steer(model, composed, per_row=False):
        found: dict[str, Any] = simple_evaluate(
            model=language_model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            **{"log_samples": False, **options},
        )
    return found
