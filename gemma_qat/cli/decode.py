"""Generates from a checkpoint: Hugging Face, native or packed."""

from __future__ import annotations

import argparse

from gemma_qat.cli.console import add_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("--ckpt", required=True, help="checkpoint directory")
    parser.add_argument("--prompt", required=True, help="text to continue")
    add_tokenizer(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    """Prints the prompt and what follows it."""
    from gemma_qat import api
    from gemma_qat.cli.console import tokenizer_for
    from gemma_qat.errors import InputError

    if arguments.max_new_tokens < 1 or arguments.temperature < 0:
        raise InputError("--max-new-tokens has to be at least 1 and --temperature at least 0")
    model = api.load(arguments.ckpt, packed=True)
    tokenizer = tokenizer_for(arguments.tokenizer, arguments.ckpt, model.config.vocab_size)
    prompt = tokenizer.encode(arguments.prompt, bos=True)
    tokens = api.generate(
        model, [prompt], max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
        seed=arguments.seed, stop_tokens=[tokenizer.eos_id],
    )  # fmt: skip
    print(arguments.prompt + tokenizer.decode(tokens[0].tolist()))
    return 0
