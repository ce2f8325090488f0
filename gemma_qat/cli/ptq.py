"""Quantizes a float checkpoint after training and writes it packed, a layer at a time."""

from __future__ import annotations

import argparse

from gemma_qat.cli.console import add_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("source", help="a Hugging Face directory or a float checkpoint")
    parser.add_argument("--recipe", required=True, help="such as q4_0 or mobile")
    parser.add_argument(
        "--method", default="mse", help="rtn (absmax), mse (searched scales), percentile or gptq"
    )
    parser.add_argument("--out", required=True, help="directory of the packed checkpoint")
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=None,
        help="text files, for static scales of activations and for methods that look at text",
    )
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
    from gemma_qat.cli.console import progress, tokenizer_for
    from gemma_qat.data.files import calibration_batches
    from gemma_qat.errors import InputError
    from gemma_qat.loading import config_of

    size = max(1, min(arguments.rows, 8))
    config = api.CalibrationConfig(
        method=arguments.static_method,
        batches=max(1, -(-arguments.rows // size)),
        all_experts=not arguments.routed_only,
    )
    model = config_of(api.resolve_checkpoint(arguments.source))
    batches = None
    if arguments.calibration is not None:
        if arguments.rows < 1 or arguments.length < 2:
            raise InputError("--calibration needs --rows of at least 1 and --length of at least 2")
        batches = calibration_batches(
            arguments.calibration,
            tokenizer_for(arguments.tokenizer, arguments.source, model.vocab_size),
            length=arguments.length,
            batch_size=size,
        )
    measured: list[str] = []
    with progress() as report:
        fitted = api.quantize_checkpoint(
            arguments.source, arguments.recipe, arguments.method, arguments.out, batches, report,
            config, lambda found: measured.extend(found.coverage()),
        )  # fmt: skip
    for line in measured:
        print(line)
    rows = api.coverage(model, arguments.recipe)
    total = sum(row["bytes"] for row in rows)
    print(
        f"{arguments.out}: {fitted.recipe} by {arguments.method}, {len(fitted.plans)} sites, {total:,.0f} bytes"
    )
    return 0
