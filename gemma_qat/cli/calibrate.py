"""Measures the static scales of a quantized checkpoint on text and writes them into it."""

from __future__ import annotations

import argparse

from gemma_qat.cli.console import add_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("checkpoint", help="a QAT or packed checkpoint, or a run directory")
    parser.add_argument(
        "--text", nargs="+", required=True, help="text files or folders to measure on"
    )
    add_tokenizer(parser)
    parser.add_argument("--method", default="mse", help="max, ema, percentile or mse")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8, help="rows per batch")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument(
        "--out", default=None, help="write a copy there, and leave the checkpoint as it is"
    )
    parser.add_argument(
        "--routed-only", action="store_true", help="experts see only the tokens that chose them"
    )


def run(arguments: argparse.Namespace) -> int:
    """Calibrates, writes, and prints what was found."""
    from gemma_qat import api
    from gemma_qat.checkpoint.store import read_manifest
    from gemma_qat.cli.console import progress, tokenizer_for
    from gemma_qat.data.files import calibration_batches
    from gemma_qat.errors import InputError

    for name in ("batches", "batch_size", "length"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} has to be at least 1")
    config = api.CalibrationConfig(
        method=arguments.method, batches=arguments.batches, all_experts=not arguments.routed_only
    )
    manifest = read_manifest(api.resolve_checkpoint(arguments.checkpoint))
    tokenizer = tokenizer_for(arguments.tokenizer, arguments.checkpoint, manifest.config.vocab_size)
    batches = calibration_batches(
        arguments.text, tokenizer, length=arguments.length, batch_size=arguments.batch_size
    )
    with progress() as report:
        found = api.calibrate(arguments.checkpoint, batches, config, arguments.out, report)
    for line in found.coverage():
        print(line)
    where = arguments.out or api.resolve_checkpoint(arguments.checkpoint)
    print(f"{where}: {len(found.scales)} static scales by {config.method}")
    return 0
