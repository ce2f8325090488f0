"""Measures checkpoints against a reference on held-out text: perplexity, KL, same top, tasks, with intervals.

A checkpoint is anything that is read (a Hugging Face directory, ours, a packed export, a GGUF file), or PATH+RECIPE: a
float checkpoint on that recipe's grid. A text is a file, a folder, JSON lines, Parquet, a TFDS dataset, or NAME=PATH to
give its category a name. What each statistic is: gemma_qat/evals/summary.py.
"""

from __future__ import annotations

import argparse
from typing import Any

from gemma_qat.cli.console import add_tokenizer
from gemma_qat.cli.sensitivity import add_sensitivity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help="[NAME=]PATH[+RECIPE]")
    parser.add_argument(
        "--reference", required=True, metavar="PATH", help="the float checkpoint to compare with"
    )
    parser.add_argument(
        "--text", nargs="+", metavar="[NAME=]PATH", required=True, help="at least two documents"
    )
    parser.add_argument(
        "--format", choices=("text", "chat"), default="text",
        help="chat: conversations, rendered by Gemma 4's template, of which the answers are scored",
    )  # fmt: skip
    parser.add_argument("--field", default="", help="where a record holds its text, or messages")
    parser.add_argument("--split", default="test", help="of a TFDS dataset (default: test)")
    parser.add_argument("--category", default="", metavar="FIELD",
                        help="where a record holds its category (default: the folders below --text)")  # fmt: skip
    parser.add_argument("--empty-thought", action="store_true",
                        help="an empty thought before every answer, as 12B, 26B A4B and 31B expect")  # fmt: skip
    add_tokenizer(parser)
    parser.add_argument("--length", type=int, default=512, help="tokens a row (default: 512)")
    parser.add_argument("--batch", type=int, default=16, help="rows at a time (default: 16)")
    parser.add_argument("--draws", type=int, default=2000, help="resamples (default: 2000)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--own", action="append", default=[], metavar="NAME=PATH[+RECIPE]",
        help="what a model is also compared with (default: a QAT checkpoint's fake-quantized masters)",
    )  # fmt: skip
    parser.add_argument(
        "--cache", default="", metavar="DIR",
        help="keep the hidden states that the reference's log probabilities come from, for the next time",
    )  # fmt: skip
    parser.add_argument("--mesh", nargs="+", default=[], metavar="AXIS=N",
                        help="lay models over devices, such as fsdp=8 preset=fsdp")  # fmt: skip
    parser.add_argument("--tasks", default="", metavar="NAME[,NAME]",
                        help="also run tasks of lm-eval (pip install 'gemma_qat[eval]')")  # fmt: skip
    parser.add_argument("--task-folder", default="", metavar="DIR", help="tasks of your own")
    parser.add_argument("--limit", type=int, default=0, help="only so many documents of each task")
    parser.add_argument(
        "--shots", type=int, default=-1, help="examples before each question (default: the task's)"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    add_sensitivity(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of all models, and tables of parts of the text."""
    from gemma_qat import api
    from gemma_qat.cli.console import keep_json, progress, writable
    from gemma_qat.cli.sensitivity import refuse_alone
    from gemma_qat.cli.sensitivity import run as run_sensitivity
    from gemma_qat.errors import InputError
    from gemma_qat.evals.tables import print_evaluation

    if arguments.sensitivity:
        return run_sensitivity(arguments, _config(arguments))
    refuse_alone(arguments)
    if not arguments.models:
        raise InputError("no model to evaluate: give MODEL ..., or --sensitivity")
    writable(arguments.json)
    models = _named(arguments.models, "model")
    own: dict[str, Any] = dict(_named(arguments.own, "--own"))
    _refuse_strangers(own, models)
    config = _config(arguments)
    text, tokenizer = text_and_tokenizer(arguments)
    with progress() as report:
        found = api.evaluate(
            dict(models),
            arguments.reference,
            text,
            tokenizer,
            config,
            own,
            report,
            _tasks(arguments),
        )
    keep_json(arguments.json, found)
    print_evaluation(found)
    return 0


def _named(texts: list[str], what: str) -> dict[str, str]:
    """Returns paths by name: what stands before a `=`, or the path itself."""
    from pathlib import Path

    from gemma_qat.errors import InputError

    found: dict[str, str] = {}
    for text in texts:
        name, is_named, path = text.partition("=")
        if not is_named or Path(text).exists() or _is_path(text, path):
            name = path = text
        if name in found:
            raise InputError(f"{what} {name}: given twice; give each a name, NAME=PATH")
        found[name] = path
    return found


def _is_path(text: str, path: str) -> bool:
    """Whether `text`, maybe with a recipe behind it, is there with its `=`, and `path` behind that `=` is not."""
    from pathlib import Path

    from gemma_qat.loading import named

    return Path(named(text).path).exists() and not Path(named(path).path).exists()


def _refuse_strangers(own: dict[str, Any], models: dict[str, str]) -> None:
    from gemma_qat.errors import unknown

    for name in own:
        if name not in models:
            raise unknown("model of --own", name, models)


def _config(arguments: argparse.Namespace) -> Any:
    from gemma_qat.config import apply
    from gemma_qat.errors import InputError
    from gemma_qat.evaluation import EvaluationConfig
    from gemma_qat.sharding import MeshConfig

    for name in ("length", "batch", "draws"):
        least = 2 if name == "length" else 1
        if getattr(arguments, name) < least:
            raise InputError(
                f"--{name} {getattr(arguments, name)}: a number of at least {least} expected"
            )
    mesh = apply(MeshConfig(), arguments.mesh) if arguments.mesh else None
    return EvaluationConfig(
        length=arguments.length, batch_size=arguments.batch, draws=arguments.draws,
        dtype=arguments.dtype, cache=arguments.cache, mesh=mesh,
    )  # fmt: skip


def _tasks(arguments: argparse.Namespace) -> Any:
    from gemma_qat.errors import InputError
    from gemma_qat.tasks import TaskConfig

    names = tuple(name.strip() for name in arguments.tasks.split(",") if name.strip())
    given = {
        "task-folder": arguments.task_folder,
        "limit": arguments.limit,
        "shots": arguments.shots + 1,
    }
    for name, value in given.items():
        if value and not names:
            raise InputError(f"--{name} goes with --tasks")
    if arguments.limit < 0:
        raise InputError(f"--limit {arguments.limit}: a number of documents expected")
    return TaskConfig(
        names=names, folder=arguments.task_folder, limit=arguments.limit, shots=arguments.shots,
        chat=arguments.format == "chat",
    )  # fmt: skip


def text_and_tokenizer(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the held-out rows, and the tokenizer that made them."""
    from gemma_qat.cli.console import tokenizer_for
    from gemma_qat.data.held_out import Corpus, held_out
    from gemma_qat.loading import config_of, named

    reference = named(arguments.reference)
    vocab = config_of(reference.directory).vocab_size
    tokenizer = tokenizer_for(arguments.tokenizer, reference.path, vocab)
    corpora = [
        Corpus(
            path=path, name="" if name == path else name, format=arguments.format,
            field=arguments.field, split=arguments.split, category=arguments.category,
        )
        for name, path in _named(arguments.text, "--text").items()
    ]  # fmt: skip
    text = held_out(corpora, tokenizer, arguments.length, empty_thought=arguments.empty_thought)
    return text, tokenizer
