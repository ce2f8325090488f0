"""Quantizes a float checkpoint without training it and writes it packed, a layer at a time."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from gemma_qat.cli.console import add_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("source", help="a Hugging Face directory or a float checkpoint")
    parser.add_argument("--recipe", required=True, help="such as q4_0 or mobile")
    parser.add_argument(
        "--method", default="mse",
        help="rtn (absmax), mse (searched scales) or percentile; gptq and awq look at text: docs/ptq.md",
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="directory of the packed checkpoint")
    parser.add_argument(
        "--importance", action="store_true",
        help="weigh squared errors by the mean square of each weight's input, on text",
    )  # fmt: skip
    parser.add_argument(
        "--act-order", action=argparse.BooleanOptionalAction, default=None,
        help="gptq: inputs in falling order of their mean square (default: yes)",
    )  # fmt: skip
    parser.add_argument(
        "--damping", type=float, default=None, metavar="X",
        help="gptq: added to the Hessian's diagonal, in means of it (default 0.01)",
    )  # fmt: skip
    _add_text(parser)


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration", nargs="+", default=None, metavar="PATH",
        help="text files or folders: for methods that look at text, and static scales of activations",
    )  # fmt: skip
    add_tokenizer(parser)
    parser.add_argument("--rows", type=int, default=64, help="rows of it, taken 8 at a time")
    parser.add_argument(
        "--length", type=int, default=128, help="tokens per row of calibration text"
    )
    parser.add_argument(
        "--static-method", default="mse", help="of static scales: max, ema, percentile or mse"
    )
    parser.add_argument(
        "--routed-only",
        action="store_true",
        help="experts are calibrated on the tokens that chose them",
    )


def run(arguments: argparse.Namespace) -> int:
    """Quantizes, writes, and prints the sizes."""

    from gemma_qat import api
    from gemma_qat.cli.console import progress
    from gemma_qat.errors import InputError
    from gemma_qat.loading import config_of
    from gemma_qat.ptq import method_named

    own: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("act_order", "damping")
        if getattr(arguments, name) is not None
    }
    method = method_named(arguments.method)
    if own and method.name != "gptq":
        raise InputError(
            f"--{next(iter(own)).replace('_', '-')} is of --method gptq, not of {method.name}"
        )
    config = api.PtqConfig(importance=arguments.importance, **own)
    static = api.CalibrationConfig(
        method=arguments.static_method,
        batches=max(1, -(-arguments.rows // _batch_size(arguments))),
        all_experts=not arguments.routed_only,
    )
    if arguments.calibration is None and method.wants_text(config):
        what = "--importance" if config.importance else f"--method {arguments.method}"
        raise InputError(f"{what} looks at text: give some with --calibration FILE...")
    model = config_of(api.resolve_checkpoint(arguments.source))
    told: list[str] = []
    seen: list[int] = []
    with progress() as report:
        fitted = api.quantize_checkpoint(
            arguments.source, arguments.recipe, arguments.method, arguments.out,
            _batches(arguments, model.vocab_size, seen), report, config, static,
            lambda found: told.extend(found.coverage()),
        )  # fmt: skip
    for line in told:
        print(line)
    rows = api.coverage(model, arguments.recipe)
    total = sum(row["bytes"] for row in rows)
    by = f"{arguments.method}{' with importance' if arguments.importance else ''}"
    text = f", {sum(seen):,} tokens of text looked at" if seen else ""
    print(
        f"{arguments.out}: {fitted.recipe} by {by}, {len(fitted.plans)} sites, {total:,.0f} bytes{text}"
    )
    return 0


def _batch_size(arguments: argparse.Namespace) -> int:
    return max(1, min(arguments.rows, 8))


def _batches(arguments: argparse.Namespace, vocab_size: int, seen: list[int]) -> Any:
    """Returns the text, if there is some; the tokens of every batch are put in `seen` when it is taken."""
    from gemma_qat.cli.console import tokenizer_for
    from gemma_qat.data.files import calibration_batches
    from gemma_qat.errors import InputError

    if arguments.calibration is None:
        return None
    if arguments.rows < 1 or arguments.length < 2:
        raise InputError("--calibration needs --rows of at least 1 and --length of at least 2")
    batches = calibration_batches(
        arguments.calibration,
        tokenizer_for(arguments.tokenizer, arguments.source, vocab_size),
        length=arguments.length,
        batch_size=_batch_size(arguments),
    )
    return _counted(batches, seen)


def _counted(batches: Iterator[Any], seen: list[int]) -> Iterator[Any]:
    for batch in batches:
        seen.append(int((batch["segments"] > 0).sum()))
        yield batch
