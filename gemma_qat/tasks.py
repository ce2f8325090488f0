"""Tasks of lm-eval, one model in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_qat.checkpoint.beside import chat_template
from gemma_qat.companions import companions_of
from gemma_qat.data.tokenizer import Tokenizer
from gemma_qat.errors import InputError
from gemma_qat.evals.score import Progress
from gemma_qat.evaluation import EvaluationConfig, Model, opened, tokenizer_of
from gemma_qat.loading import named
from gemma_qat.models import Gemma4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which of lm-eval's tasks, as `evals/harness.py` takes them; `chat` renders questions as conversations."""

    names: tuple[str, ...] = ()
    folder: str = ""
    limit: int = 0
    shots: int = -1
    chat: bool = False


def check_tasks(tasks: TaskConfig, models: Mapping[str, Model]) -> None:
    """Refuses tasks that cannot be run, before anything is read.

    Raises: InputError; also for a model that is called what the reference is among the results.
    """
    if not tasks.names:
        return
    from gemma_qat.evals import harness

    if "reference" in models:
        raise InputError(
            "model reference: tasks have the reference under that name; give it another"
        )
    harness.manager_of(tasks.names, tasks.folder or None)


def run_tasks(
    models: Mapping[str, Model], tokenizer: Tokenizer | None, tasks: TaskConfig, config: EvaluationConfig,
    progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """Returns results on lm-eval's tasks, {"lm_eval", "tasks", "models": {NAME: {TASK: {"documents", "metrics"}}}}.

    Without a tokenizer the first model's own is taken.
    Raises: InputError when lm-eval is not installed, there is no such task, or `chat` where no template travels along.
    """
    from gemma_qat.evals import harness

    tokenizer = tokenizer or tokenizer_of(next(iter(models.values())))
    found: dict[str, Any] = {"models": {}}
    for name, what in models.items():
        template = None
        if tasks.chat:
            files = () if isinstance(what, Gemma4) else companions_of(named(what).directory).files
            template = chat_template(files)
            if template is None:
                raise InputError(f"{name}: no chat template travels with it")
        with opened(what, config) as (model, _):
            one = harness.run_tasks(
                {name: model}, tokenizer, tasks.names, task_folder=tasks.folder or None,
                limit=tasks.limit or None, batch_size=config.batch_size, chat_template=template,
                shots=None if tasks.shots < 0 else tasks.shots, progress=progress,
            )  # fmt: skip
        found = one | {"models": found["models"] | one["models"]}
    return found
