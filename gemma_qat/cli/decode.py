"""Generates from a checkpoint: Hugging Face, native, packed, or a LiteRT model. Tokens are printed as they come."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from gemma_qat.cli.console import add_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "--ckpt", required=True, help="checkpoint directory, or a .tflite file, which LiteRT runs"
    )
    parser.add_argument("--prompt", required=True, help="text to continue")
    add_tokenizer(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest (0: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest of this mass"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache", default="float", help="keys and values in float, bfloat16, int8 or int4"
    )
    parser.add_argument(
        "--chunk", type=int, default=0, help="tokens of the prompt at a time (0: all at once)"
    )
    parser.add_argument("--dtype", default="float32", help="of activations: float32 or bfloat16")
    parser.add_argument(
        "--sums", default="float",
        help="integer: int32 sums of codes where inputs have static scales (mobile); float: as trained",
    )  # fmt: skip
    parser.add_argument(
        "--stats", action="store_true",
        help="then print tokens/s, bytes a token, and the share of the memory roofline",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Prints the prompt and what follows it."""
    import time

    import jax

    from gemma_qat import api
    from gemma_qat.cli import memory
    from gemma_qat.cli.console import tokenizer_for
    from gemma_qat.decode import Sampling, stream
    from gemma_qat.errors import InputError

    if arguments.max_new_tokens < 1:
        raise InputError("--max-new-tokens has to be at least 1")
    sampling = Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
        seed=arguments.seed,
    )  # fmt: skip
    if arguments.ckpt.endswith(".tflite"):
        return _litert(arguments, sampling)
    memory.keep_little()
    jax.config.update("jax_traceback_in_locations_limit", 0)  # or a program keeps them, 30 MB
    model = api.load(arguments.ckpt, dtype=arguments.dtype, packed=True, sums=arguments.sums)
    tokenizer = tokenizer_for(arguments.tokenizer, arguments.ckpt, model.config.vocab_size)
    prompt = tokenizer.encode(arguments.prompt, bos=True)
    begun = time.perf_counter()
    steps = stream(
        model, [prompt], max_new_tokens=arguments.max_new_tokens, sampling=sampling,
        stop_tokens=[tokenizer.eos_id], cache=arguments.cache, chunk=arguments.chunk,
    )  # fmt: skip
    times: list[float] = []
    print(arguments.prompt, end="", flush=True)
    steps = _forgetting_prefill(steps)
    for text in _pieces(tokenizer, steps, times):
        print(text, end="", flush=True)
    print()
    if arguments.stats:
        _print_stats(model, len(prompt), arguments.cache, begun, times)
    return 0


def _litert(arguments: argparse.Namespace, sampling: Any) -> int:
    """The same by the runtime of phones; its cache and its arithmetic are in the file."""
    import itertools
    from pathlib import Path

    import jax
    import jax.numpy as jnp
    import numpy as np

    from gemma_qat.cli.console import tokenizer_for
    from gemma_qat.decode.sampling import sample
    from gemma_qat.errors import InputError
    from gemma_qat.export.litert import LiteRTModel

    fixed = {"cache": "float", "chunk": 0, "dtype": "float32", "sums": "float"}
    for name, value in fixed.items():
        if getattr(arguments, name) != value:
            raise InputError(f"--{name} is not for {arguments.ckpt}: the file says how it is run")
    path = Path(arguments.ckpt)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if arguments.tokenizer is None:
        raise InputError(f"{path}: no tokenizer lies in it; give --tokenizer FILE")
    model = LiteRTModel(path)
    tokenizer = tokenizer_for(arguments.tokenizer, arguments.ckpt, model.vocab_size)
    keys = (jax.random.fold_in(jax.random.key(sampling.seed), i) for i in itertools.count())
    found = model.steps(
        tokenizer.encode(arguments.prompt, bos=True), arguments.max_new_tokens,
        lambda logits: int(sample(jnp.asarray(logits[None]), sampling, next(keys))[0]),
    )  # fmt: skip
    before_end = itertools.takewhile(lambda token: token != tokenizer.eos_id, found)
    times: list[float] = []
    print(arguments.prompt, end="", flush=True)
    for text in _pieces(tokenizer, ([token] for token in before_end), times):
        print(text, end="", flush=True)
    print()
    if arguments.stats and len(times) > 2:
        print(f"{1 / np.median(np.diff(times)):.2f} tokens/s (median of {len(times) - 1} steps)")
    return 0


def _forgetting_prefill(steps: Iterator[Any]) -> Iterator[Any]:
    """The same steps; after the first the program that read the prompt makes room for that of the others."""
    import jax

    from gemma_qat.cli import memory

    yield next(steps)
    jax.clear_caches()
    memory.give_back()
    yield from steps
    memory.give_back()


def _pieces(tokenizer: Any, steps: Iterator[Any], times: list[float]) -> Iterator[str]:
    """The text that each token adds; a character of several tokens comes with the last of them."""
    import time

    tokens: list[int] = []
    shown = ""
    for step in steps:
        times.append(time.perf_counter())
        tokens.append(int(step[0]))
        text = tokenizer.decode(tokens)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(tokens)
    if text.startswith(shown):
        yield text[len(shown) :]


def _print_stats(model: Any, prompt: int, cache: str, begun: float, times: list[float]) -> None:
    import numpy as np

    from gemma_qat.decode.roofline import copy_bandwidth, figures

    print(f"{times[0] - begun:.2f} s to the first of {len(times)} tokens, with compiling")
    gaps = np.diff(times)[1:]  # the first step is compiled in its time
    if not len(gaps):
        print("too few tokens to say how fast: at least 3 expected")
        return
    found = figures(
        model, 1, prompt + len(times), cache, float(np.median(gaps)), copy_bandwidth(64)
    )
    read = found["bytes"]
    print(
        f"{found['tokens_per_second']:.2f} tokens/s (median of {len(gaps)} steps), "
        f"{found['bytes_per_token'] / 1e6:,.1f} MB a token (weights {read.weights / 1e6:,.1f}, "
        f"experts {read.experts / 1e6:,.1f}, keys and values {read.cache / 1e6:,.1f})"
    )
    share, bandwidth = found["roofline_share"], found["copy_bandwidth"] / 1e9
    print(f"{share:.1%} of what the measured copy bandwidth of {bandwidth:.1f} GB/s allows")
