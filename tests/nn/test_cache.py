"""The ring of keys and values: if these fail, decoding past the window reads the wrong tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.nn.cache import KeyValues, visible


def _tokens(positions: list[list[int]], segments: list[list[int]] | None = None) -> KeyValues:
    """Keys and values that say where they are from: 100 * row + position."""
    at = jnp.asarray(positions, jnp.int32)
    value = (jnp.arange(at.shape[0])[:, None] * 100.0 + at)[..., None, None]
    given = jnp.ones_like(at) if segments is None else jnp.asarray(segments, jnp.int32)
    return KeyValues(value, -value, at, given)


def _slots(cache: KeyValues) -> list[list[int]]:
    """Position held in each slot, -1 for an empty one; checks that keys and values belong to it."""
    held = np.where(cache.segments > 0, cache.positions, -1)
    for row, positions in enumerate(held):
        for slot, position in enumerate(positions):
            want = 100 * row + position if position >= 0 else 0
            assert float(cache.keys[row, slot, 0, 0]) == want
            assert float(cache.values[row, slot, 0, 0]) == -want
    return held.tolist()


def test_several_tokens_at_once_wrap_around() -> None:
    cache = KeyValues.empty(1, 4, 1, 1, "float32").write(_tokens([[0, 1, 2]]))
    assert _slots(cache) == [[0, 1, 2, -1]]
    cache = cache.write(_tokens([[3, 4, 5]]))
    assert _slots(cache) == [[4, 5, 2, 3]]


def test_more_tokens_than_slots_keep_the_last() -> None:
    cache = KeyValues.empty(1, 4, 1, 1, "float32").write(_tokens([list(range(11))]))
    assert _slots(cache) == [[8, 9, 10, 7]]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 13])
def test_the_ring_does_not_depend_on_the_chunks(chunk: int) -> None:
    cache = KeyValues.empty(1, 4, 1, 1, "float32")
    for start in range(0, 13, chunk):
        cache = cache.write(_tokens([list(range(start, min(start + chunk, 13)))]))
    assert _slots(cache) == [[12, 9, 10, 11]]


def test_padding_is_not_written_and_rows_are_apart() -> None:
    """Left padding of two rows of different lengths; padding carries position 0, as the first token does."""
    positions = [[0, 0, 0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0, 0, 1]]
    segments = [[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]]
    cache = KeyValues.empty(2, 4, 1, 1, "float32").write(_tokens(positions, segments))
    assert _slots(cache) == [[4, 5, 2, 3], [0, 1, -1, -1]]
    cache = cache.write(_tokens([[6], [2]])).write(_tokens([[7], [9]], [[1], [0]]))
    assert _slots(cache) == [[4, 5, 6, 7], [0, 1, 2, -1]]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_a_layer_of_a_stack_is_as_by_itself(kind: str, tokens: int) -> None:
    """If it fails, a layer's tokens go to another layer, or differ by the way they are written."""
    rng = np.random.default_rng(2)
    at = jnp.asarray([[5, 6, 7], [0, 1, 2]], jnp.int32)[:, :tokens]
    keys, values = (jnp.asarray(rng.standard_normal((2, tokens, 3, 4)), jnp.float32) for _ in "kv")
    other = KeyValues(keys, values, at, jnp.ones_like(at))
    alone = KeyValues.empty(2, 5, 3, 4, kind)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), alone)
    want, one = alone.write(other), stack.of_layer(jnp.asarray(1))
    ways = [one.write(other)] + ([one.write(other, in_turn=True)] if tokens == 1 else [])
    for found in ways:
        jax.tree.map(np.testing.assert_array_equal, found.own(), want)
        for layer in (0, 2):
            jax.tree.map(np.testing.assert_array_equal, found.of_layer(layer).own(), alone)


def test_visible_by_hand() -> None:
    """Two segments and a pad: own segment, not the future, not further back than the window, never padding."""
    kv = _tokens([[0, 1, 2, 0, 1, 0]], [[1, 1, 1, 2, 2, 0]])
    see = visible(kv.positions, kv.segments, kv, window=2)[0].astype(int)
    assert see.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert visible(kv.positions, kv.segments, kv, window=None)[0, 2].astype(int).tolist() == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]
