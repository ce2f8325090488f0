"""Given continuations scored, prompts completed: many requests at once, through few compiled shapes.

A request to score is a context and a continuation, both ids; context first, the continuation's last token is only
predicted:

    input      <bos>  c   c   c   k   k   k            requests of one batch, padded on the right to a power of two
    predicted                 k   k   k   k            these positions alone go through the head, some at a time

so that logits [B, T, V] are never held: hidden states are computed once, those in front of a continuation are picked
[B, K, D], and the head is applied to a few positions of K. T and K are powers of two and a batch always has the same
number of rows, so a whole benchmark compiles a dozen programs. On a mesh a batch is split over the devices as in
training.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemma_qat.decode import Sampling, stream
from gemma_qat.errors import InputError
from gemma_qat.evals.reference import batch_of, rows_at_once
from gemma_qat.evals.score import positions_at_once
from gemma_qat.models import Gemma4
from gemma_qat.nn.module import merge, split
from gemma_qat.train.losses import chunked, cross_entropy

Progress = Callable[[str, int, int], None]
Pair = tuple[Sequence[int], Sequence[int]]
"""The ids of a context and of its continuation, at least one each."""

SHORTEST_INPUT, SHORTEST_CONTINUATION = 32, 8


class Scored(NamedTuple):
    """What a model says of one continuation: its log probability in nats, and whether greedy decoding writes it."""

    log_probability: float
    is_greedy: bool


def score_continuations(
    model: Gemma4,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Scored]:
    """Returns log p(continuation | context) of every pair, in their order.

    Exactness: a pair's score depends on what it is batched with by float rounding only.
    Raises: InputError for an empty context or continuation, a token outside the vocabulary, or more tokens than the
        model has positions.
    """
    for context, continuation in pairs:
        _check(model, context, continuation)
    graph, state = split(model)
    rows = _rows(model, batch_size)
    found: list[Scored | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        arrays = _arrays([pairs[i] for i in chosen], rows)
        batch = batch_of(arrays, 0, rows, model.placement)
        hidden = _hidden(graph, state, batch["tokens"], batch["positions"], batch["segments"])
        chunk = positions_at_once(rows, batch["targets"].shape[1], model.config.vocab_size)
        scores = _scores(graph, state, _picked(hidden, batch["where"]), batch["targets"], chunk)
        nll, greedy = (np.asarray(scores[name]) for name in ("nll", "greedy"))
        for row, i in enumerate(chosen):
            count = len(pairs[i][1])
            total = -float(nll[row, :count].sum(dtype=np.float64))
            found[i] = Scored(total, bool((greedy[row, :count] > 0.5).all()))
        if progress:
            progress("score", min(start + rows, len(order)), len(order))
    return [one for one in found if one is not None]


def windows(ids: Sequence[int], bos: int, length: int) -> Iterator[Pair]:
    """Yields a text as (context, continuation) pairs of at most `length` input tokens; every token is predicted once.

    Every context starts with `bos`. The first pair predicts `length` tokens; a later one `length` - 1, from `bos` and
    the token before; the last is given all the context that fits.
    Source: lm-evaluation-harness, `get_rolling_token_windows` with one token of context, whose later windows start in
    the middle of the text without `bos`, which Gemma never saw.
    Raises: InputError for a length below 2.
    """
    if length < 2:
        raise InputError(f"windows of {length} tokens, at least 2 expected")
    if ids:
        yield [bos], ids[:length]
    for start in range(length, len(ids), length - 1):
        end = min(start + length - 1, len(ids))
        yield [bos, *ids[end - length : start]], ids[start:end]


def cut_left(context: Sequence[int], room: int) -> Sequence[int]:
    """Returns the first token of a context (`bos`) and the last room - 1; all of it if it fits."""
    if len(context) <= room:
        return context
    return [context[0], *context[len(context) - room + 1 :]]


def complete(
    model: Gemma4,
    prompts: Sequence[Sequence[int]],
    *,
    decode: Callable[[Sequence[int]], str],
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    sampling: Sampling = Sampling(),
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[str]:
    """Returns what the model writes after each prompt, up to a stop token or in front of a stop string.

    A batch ends when all its rows have. Every batch draws with a seed of its own, counted from the sampling's.
    Raises: InputError as `decode.stream` does.
    """
    rows = _rows(model, batch_size)
    found: list[str] = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        batch = [prompts[i] for i in chosen]
        filler = [batch[-1][:1]] * (rows - len(batch))
        steps = stream(
            model, [*batch, *filler], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens,
            sampling=_seeded(sampling, start), length=_power_of_two(len(batch[0]), SHORTEST_INPUT),
        )  # fmt: skip
        written: list[list[int]] = [[] for _ in chosen]
        open_rows = set(range(len(chosen)))
        for step in steps:
            for row in sorted(open_rows):
                token = int(step[row])
                if token in stop_tokens:
                    open_rows.discard(row)
                    continue
                written[row].append(token)
                if stop_strings and _first_stop(decode(written[row]), stop_strings) is not None:
                    open_rows.discard(row)
            if not open_rows:
                break
        for row, i in enumerate(chosen):
            text = decode(written[row])
            found[i] = text[: _first_stop(text, stop_strings)]
        if progress:
            progress("complete", min(start + rows, len(order)), len(order))
    return found


def _check(model: Gemma4, context: Sequence[int], continuation: Sequence[int]) -> None:
    if not len(context) or not len(continuation):
        raise InputError("a context and a continuation of at least one token each expected")
    length, most = len(context) + len(continuation) - 1, model.config.max_positions
    if length > most:
        raise InputError(f"{length} tokens of context and continuation, the model has {most}")
    largest = max(max(context), max(continuation))
    if largest >= model.config.vocab_size:
        raise InputError(f"token {largest} is outside the vocabulary of {model.config.vocab_size}")


def _rows(model: Gemma4, batch_size: int) -> int:
    """Rows of a batch: a multiple of what the mesh splits it into."""
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} given, at least 1 expected")
    return rows_at_once(batch_size, model.placement)


def _arrays(batch: Sequence[Pair], rows: int) -> dict[str, np.ndarray]:
    """Returns tokens, positions, segments [B, T] and `where` a token is predicted, `targets` which [B, K]."""
    width = _power_of_two(max(len(c) + len(k) - 1 for c, k in batch), SHORTEST_INPUT)
    count = _power_of_two(max(len(k) for _, k in batch), SHORTEST_CONTINUATION)
    tokens, segments = (np.zeros((rows, width), np.int32) for _ in range(2))
    where, targets = (np.zeros((rows, count), np.int32) for _ in range(2))
    for row, (context, continuation) in enumerate(batch):
        whole = [*context, *continuation][:-1]
        tokens[row, : len(whole)] = whole
        segments[row, : len(whole)] = 1
        where[row, : len(continuation)] = np.arange(len(context) - 1, len(whole))
        targets[row, : len(continuation)] = continuation
    positions = np.where(segments, np.arange(width, dtype=np.int32)[None], 0)
    return {
        "tokens": tokens, "positions": positions, "segments": segments, "where": where,
        "targets": targets,
    }  # fmt: skip


def _power_of_two(length: int, least: int) -> int:
    return max(least, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph: Any, state: Any, tokens: Any, positions: Any, segments: Any) -> jax.Array:
    return merge(graph, state).hidden(tokens, positions, segments)[0]


@jax.jit
def _picked(hidden: Float[Array, "B T D"], where: Int[Array, "B K"]) -> Float[Array, "B K D"]:
    return jnp.take_along_axis(hidden, where[..., None], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _scores(
    graph: Any, state: Any, hidden: jax.Array, targets: jax.Array, chunk: int
) -> dict[str, jax.Array]:
    model = merge(graph, state)

    def score(hidden: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        logits = model.logits(hidden)
        greedy = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        return {"nll": cross_entropy(logits, targets), "greedy": greedy}

    return chunked(score, [hidden, targets], chunk)


def _seeded(sampling: Sampling, step: int) -> Sampling:
    return dataclasses.replace(sampling, seed=(sampling.seed + step) % 2**32)


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string in a text begins; None when there is none."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return min(places, default=None)
