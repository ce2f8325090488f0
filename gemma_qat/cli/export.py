"""Writes a quantized checkpoint as GGUF or packed, from its stored codes, read back before it appears."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("source", help="a QAT or packed checkpoint, or a run directory")
    parser.add_argument("--format", required=True, help="gguf or native")
    parser.add_argument("--out", required=True, help="file (gguf) or directory (native) to write")
    parser.add_argument(
        "--recipe", default=None, help="refuse the checkpoint if its recipe is another one"
    )
    parser.add_argument(
        "--tokenizer", default=None, help="SentencePiece model to put into the file"
    )


def run(arguments: argparse.Namespace) -> int:
    """Exports and prints what was written."""
    from pathlib import Path

    from gemma_qat import api
    from gemma_qat.checkpoint.store import read_manifest
    from gemma_qat.data.tokenizer import Tokenizer
    from gemma_qat.errors import InputError
    from gemma_qat.quant import name_of

    if arguments.recipe is not None:
        found = read_manifest(api.resolve_checkpoint(arguments.source))
        if found.recipe != name_of(arguments.recipe, found.config.family):
            raise InputError(
                f"{arguments.source}: recipe {arguments.recipe} asked for, the checkpoint is {found.recipe or 'float'}"
            )
    tokenizer = Tokenizer.load(Path(arguments.tokenizer)) if arguments.tokenizer else None
    size = api.export(
        arguments.source, format=arguments.format, out=arguments.out, tokenizer=tokenizer
    )
    print(f"{arguments.out}: {size['tensors']} tensors, {size['bytes']:,} bytes, read back equal")
    rounded = size.get("rounded_scales", 0)
    if rounded:
        print(f"{rounded:,} scales were no float16 and were rounded to one, codes are exact")
    return 0
