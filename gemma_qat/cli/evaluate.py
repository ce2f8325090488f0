"""Measures checkpoints against a reference on text files: loss, bits per byte, KL, top-1 agreement, with intervals."""

from __future__ import annotations

import argparse

from gemma_qat.cli.console import add_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("models", nargs="+", help="checkpoints to measure")
    parser.add_argument(
        "--reference", required=True, help="the float checkpoint they are compared with"
    )
    parser.add_argument(
        "--text", nargs="+", required=True, help="text files (at least two) or a folder"
    )
    add_tokenizer(parser)
    parser.add_argument("--length", type=int, default=128, help="tokens per row")


def run(arguments: argparse.Namespace) -> int:
    """Prints a row per model."""
    from rich.console import Console
    from rich.table import Table

    from gemma_qat import api
    from gemma_qat.cli.console import progress, tokenizer_for

    models = {name: api.load(name, packed=True) for name in arguments.models}
    reference = api.load(arguments.reference, packed=True)
    vocab = reference.config.vocab_size
    tokenizer = tokenizer_for(arguments.tokenizer, arguments.reference, vocab)
    with progress() as report:
        result = api.evaluate(
            models, reference, arguments.text, tokenizer, length=arguments.length, progress=report
        )
    table = Table()
    columns = (
        "nll",
        "bits_per_byte",
        "perplexity",
        "kl_mean",
        "kl_median",
        "kl_p99",
        "top1_agreement",
    )
    for name in ("model", *columns):
        table.add_column(name)
    for name, summary in {"reference": result["reference"], **result["models"]}.items():
        cells = [
            f"{summary[c]['value']:.4f}\n[{summary[c]['low']:.4f}, {summary[c]['high']:.4f}]"
            for c in columns
        ]
        table.add_row(name, *cells)
    Console(width=None if Console().is_terminal else 160).print(table)
    return 0
