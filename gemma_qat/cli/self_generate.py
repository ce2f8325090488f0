"""Writes rows of token ids that a float model says by itself, to distil from without a corpus.

The same seed writes the same rows; a command that was stopped goes on.
"""

from __future__ import annotations

import argparse

from gemma_qat.cli.console import add_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("ckpt", help="the float checkpoint that will teach")
    parser.add_argument("--out", required=True, help="folder, for data.path=FOLDER when training")
    parser.add_argument("--rows", type=int, required=True, help="how many")
    parser.add_argument("--length", type=int, default=128, help="tokens a row: data.length (128)")
    add_tokenizer(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0, help="1 draws as the model says")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest (0: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest of this mass"
    )
    parser.add_argument(
        "--start", default="model",
        help="what follows bos: drawn from the model, or any token of the vocabulary (LLM-QAT)",
    )  # fmt: skip
    parser.add_argument(
        "--greedy", type=int, default=0, help="tokens behind that which are the likeliest (0)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="rows at a time (32)")
    parser.add_argument("--dtype", default="float32", help="of activations: float32 or bfloat16")


def run(arguments: argparse.Namespace) -> int:
    """Writes the rows and prints how many, and how to train on them."""
    from pathlib import Path

    from gemma_qat import api
    from gemma_qat.cli.console import progress, tokenizer_for
    from gemma_qat.loading import named

    model = api.load(arguments.ckpt, dtype=arguments.dtype)
    tokenizer = tokenizer_for(arguments.tokenizer, arguments.ckpt, model.config.vocab_size)
    config = api.SelfConfig(
        rows=arguments.rows, length=arguments.length, bos=tokenizer.bos_id, eos=tokenizer.eos_id,
        seed=arguments.seed, temperature=arguments.temperature, top_k=arguments.top_k,
        top_p=arguments.top_p, start=arguments.start, greedy=arguments.greedy,
        batch_size=arguments.batch_size,
    )  # fmt: skip
    source = f"{named(arguments.ckpt).identity} {arguments.dtype}"
    with progress() as report:
        made = api.self_generate(model, Path(arguments.out), config, source, report)
    print(
        f"{arguments.out}: {made['rows']} rows, {made['tokens']} tokens, {made['ended']} ended by themselves; "
        f"train with data.kind=jsonl data.format=ids data.path={arguments.out}"
    )
    return 0
