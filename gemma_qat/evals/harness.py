"""EleutherAI's lm-evaluation-harness on our models: the published benchmarks, as others run them.

    pip install 'gemma_qat[eval]'
    results = run_tasks({"qat": model}, tokenizer, ["arc_easy", "wikitext"])

lm-eval has the tasks, makes the requests and the statistics; `GemmaLM` answers the requests. Where this adapter differs
from lm-eval's own for Hugging Face models it is for Gemma, which is lost without `<bos>`: every input begins with it,
once, also one that was cut from the left and each window of a rolling perplexity.

Source: EleutherAI/lm-evaluation-harness `lm_eval/api/model.py` (the interface) and `lm_eval/models/huggingface.py` (how
requests are cut, stop strings, generation arguments).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_qat.data.tokenizer import Tokenizer
from gemma_qat.decode import Sampling
from gemma_qat.errors import InputError, unknown
from gemma_qat.evals.continuations import (
    Pair,
    Progress,
    complete,
    cut_left,
    score_continuations,
    windows,
)
from gemma_qat.evals.prompting import PromptText
from gemma_qat.models import Gemma4

try:
    from lm_eval import simple_evaluate
    from lm_eval.api import metrics as lm_eval_metrics
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise InputError(
        f"tasks are lm-eval's: pip install 'gemma_qat[eval]' ({error.name} is missing)"
    ) from None

LENGTH = 8192
"""Input tokens that are looked at, where the model has more positions."""

DRAWS = 1000
"""Resamples behind the errors of metrics that are no mean (lm-eval's own default is 100000, in a pool of processes)."""

_UNDERSTOOD = {
    "until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "seed",
}  # fmt: skip

_logger = logging.getLogger(__name__)


class GemmaLM(TemplateLM):
    """One model as lm-eval asks for it: texts in, log probabilities and texts out."""

    def __init__(
        self,
        model: Gemma4,
        tokenizer: Tokenizer,
        *,
        chat_template: str | None = None,
        batch_size: int = 16,
        length: int = LENGTH,
        progress: Progress | None = None,
    ) -> None:
        """`length`: the most input tokens of a request, at most the model's positions."""
        super().__init__()
        self.model, self.text = model, PromptText(tokenizer, chat_template)
        self.batch_size, self.progress = batch_size, progress
        self.max_length = min(length, model.config.max_positions)
        self._cut = 0

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.text.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text: what the first token is predicted from."""
        return self.text.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """What requests are cached under, with their template."""
        return f"gemma_qat-{self.text.tokenizer.vocab_size}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template, which there is one of."""
        return self.text.template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as the checkpoint's template writes it."""
        return self.text.render(chat_history, add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the ids of a text, behind `<bos>` unless `add_special_tokens` is False."""
        return self.text.encode(string, bos=add_special_tokens is not False)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Returns (log probability, whether greedy decoding writes it) of each request's continuation."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [
            self._fitting(context, continuation, texts) for texts, context, continuation in requests
        ]
        self._tell_cut()
        scored = score_continuations(
            self.model, pairs, batch_size=self.batch_size, progress=self.progress
        )
        for (texts, _, _), found in zip(requests, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(found))
        return [(found.log_probability, found.is_greedy) for found in scored]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Returns the log probability of each request's whole text, in windows that predict every token once."""
        texts = [request.args[0] for request in requests]
        parts = [
            list(windows(self.tok_encode(t, False), self.prefix_token_id, self.max_length))
            for t in texts
        ]
        scored = score_continuations(
            self.model,
            [pair for pairs in parts for pair in pairs],
            batch_size=self.batch_size,
            progress=self.progress,
        )
        rest = iter(scored)
        totals = [
            float(sum(one.log_probability for one in itertools.islice(rest, len(pairs))))
            for pairs in parts
        ]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Returns what the model writes after each request's text, greedily unless the task says otherwise."""
        found = [""] * len(requests)
        by_arguments: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            by_arguments.setdefault(key, []).append(i)
        for chosen in by_arguments.values():
            texts = [requests[i].args[0] for i in chosen]
            for i, answer in zip(
                chosen, self._answers(texts, requests[chosen[0]].args[1]), strict=True
            ):
                found[i] = answer
                self.cache_hook.add_partial("generate_until", requests[i].args, answer)
        return found

    def _answers(self, texts: Sequence[str], arguments: Mapping[str, Any]) -> list[str]:
        said = normalize_gen_kwargs(dict(arguments))
        left_out = sorted(set(said) - _UNDERSTOOD)
        if left_out:
            _logger.warning("generation arguments without effect here: %s", ", ".join(left_out))
        new = int(said["max_gen_toks"])
        room = self.max_length - new
        if room < 1:
            raise InputError(
                f"max_gen_toks {new} leaves no room for a prompt in {self.max_length} positions"
            )
        prompts = [self._cut_to(self.tok_encode(text), room) for text in texts]
        self._tell_cut()
        sampling = Sampling(
            temperature=float(said.get("temperature") or 0.0), top_k=int(said.get("top_k") or 0),
            top_p=float(said.get("top_p") or 1.0), seed=int(said.get("seed") or 0),
        )  # fmt: skip
        return complete(
            self.model, prompts, decode=self.text.decode, max_new_tokens=new, sampling=sampling,
            stop_strings=[*said["until"], self.text.eos], stop_tokens=self.text.stop_tokens,
            batch_size=self.batch_size, progress=self.progress,
        )  # fmt: skip

    def _fitting(self, context: list[int], continuation: list[int], texts: Any) -> Pair:
        """A pair of at most `max_length` input tokens, its context cut from the left behind `<bos>`."""
        if not continuation:
            raise InputError(f"nothing to score: {texts[1]!r} after {texts[0][-40:]!r} is no token")
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise InputError(
                f"a continuation of {len(continuation)} tokens, inputs are of at most {self.max_length}"
            )
        return self._cut_to(context, room), continuation

    def _cut_to(self, context: Sequence[int], room: int) -> Sequence[int]:
        self._cut += len(context) > room
        return cut_left(context, room)

    def _tell_cut(self) -> None:
        if self._cut:
            _logger.warning(
                "%d contexts did not fit into %d tokens and lost some after <bos>",
                self._cut, self.max_length,
            )  # fmt: skip
        self._cut = 0


def manager_of(tasks: Sequence[str], task_folder: str | Path | None) -> TaskManager:
    """Returns lm-eval's list of tasks, those of a folder with it.

    Raises: InputError for a task that is not in it, or a folder that is not there.
    """
    if task_folder is not None and not Path(task_folder).is_dir():
        raise InputError(f"{task_folder}: no such folder of tasks")
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    for name in tasks:
        if name not in manager.all_tasks:
            raise unknown("task", name, manager.all_tasks)
    return manager


def run_tasks(
    models: Mapping[str, Gemma4],
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    length: int = LENGTH,
    chat_template: str | None = None,
    shots: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns every model's results on lm-eval's tasks (and groups), by name.

    {"lm_eval": version, "tasks": {TASK: {"shots", "version"}}, "models": {NAME: {TASK: {"documents",
    "metrics": {METRIC: {"value", "stderr", "higher_is_better"}}}}}}. METRIC is lm-eval's name, with its filter behind a
    comma where there is one; `stderr` is None where lm-eval has none.

    `task_folder`: task files (*.yaml) beside lm-eval's own. `limit`: only so many documents of each task. `length`:
    input tokens that are looked at. `chat_template`: contexts are conversations that it renders
    (`checkpoint.beside.chat_template`); without one they are plain text. `shots`: examples before a question, else the
    task's own number.
    Raises: InputError for a task that there is none of, or whose documents cannot be read.
    """
    import lm_eval

    manager = manager_of(tasks, task_folder)
    results: dict[str, Any] = {"lm_eval": lm_eval.__version__, "tasks": {}, "models": {}}
    for name, model in models.items():
        adapter = GemmaLM(
            model, tokenizer, chat_template=chat_template, batch_size=batch_size, length=length,
            progress=progress,
        )  # fmt: skip
        try:
            with _in_this_process():
                found = simple_evaluate(
                    adapter, tasks=list(tasks), task_manager=manager, limit=limit,
                    num_fewshot=shots, bootstrap_iters=DRAWS, log_samples=False,
                    apply_chat_template=chat_template is not None,
                )  # fmt: skip
        except OSError as error:  # documents that are neither here nor to be had
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"tasks {', '.join(tasks)}: {reason}") from None
        assert found is not None
        results["models"][name] = {
            task: _plain(row, found["higher_is_better"].get(task, {}))
            for task, row in found["results"].items()
        }
        results["tasks"] = {
            task: {"shots": found["n-shot"].get(task), "version": found["versions"].get(task)}
            for task in found["results"]
        }
    return results


def _plain(row: Mapping[str, Any], directions: Mapping[str, Any]) -> dict[str, Any]:
    """One task's line, {"acc,none": 0.5, "acc_stderr,none": 0.1, ...}, as metrics with their errors."""
    measured: dict[str, Any] = {}
    for key, value in row.items():
        metric, comma, which = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = row.get(f"{metric}_stderr,{which}")
        measured[metric if which == "none" else key] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, (int, float)) else None,
            "higher_is_better": directions.get(metric),
        }
    return {"documents": row.get("sample_len"), "metrics": measured}


@contextlib.contextmanager
def _in_this_process() -> Iterator[None]:
    """Has lm-eval resample here: its pool of forked processes may never return once jax has threads."""
    theirs = lm_eval_metrics.bootstrap_stderr
    lm_eval_metrics.bootstrap_stderr = _resampled
    try:
        yield
    finally:
        lm_eval_metrics.bootstrap_stderr = theirs


def _resampled(
    statistic: Callable[[Sequence[Any]], float], values: Sequence[Any], iters: int
) -> float:
    """The deviation of a statistic over resamples of its values, as lm-eval computes it."""
    draws = random.Random(0)
    found = [statistic(draws.choices(values, k=len(values))) for _ in range(iters)]
    return float(lm_eval_metrics.sample_stddev(found))
