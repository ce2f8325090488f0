"""Keys and values as codes: what is read back is within half a step, or bit for bit where it was on the grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.nn.attention import attend
from gemma_qat.nn.cache import KeyValues
from gemma_qat.numerics.cache_codes import Coded, encode

X = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32) * 3


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_within_half_a_step(bits: int) -> None:
    """A scale per head and token; the extremum keeps its place, zeros stay zeros."""
    x = jnp.asarray(X).at[0, 0, 0].set(0.0)
    coded = encode(x, bits)
    assert coded.scale.shape == (2, 5, 3) and coded.integers().shape == x.shape
    assert coded.codes.nbytes == x.size * bits // 8
    step = np.asarray(coded.scale)[..., None]
    assert np.all(np.abs(np.asarray(coded.dequantize()) - np.asarray(x)) <= step * (0.5 + 1e-5))
    assert not np.asarray(coded.dequantize())[0, 0, 0].any()
    highest = 2 ** (bits - 1) - 1
    largest = np.abs(np.asarray(coded.integers())).max(axis=-1)
    np.testing.assert_array_equal(largest[1], highest)


def test_int4_bytes_by_hand() -> None:
    """Element h in the low half, h + H/2 in the high one, signs included."""
    x = jnp.asarray([[[[7.0, -7.0, 1.0, -1.0]]]])
    coded = encode(x, 4)
    np.testing.assert_array_equal(np.asarray(coded.codes)[0, 0, 0], [0x17, 0xF9])
    np.testing.assert_array_equal(coded.integers(), [[[[7, -7, 1, -1]]]])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_static_grid_is_kept_bit_for_bit(bits: int) -> None:
    """Values that a site has rounded with its static scale: the codes are those, nothing is lost. 0 means none."""
    highest = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(1).integers(-highest - 1, highest + 1, X.shape)
    step = jnp.asarray([0.0371], jnp.float32)
    x = jnp.asarray(codes, jnp.float32) * step.reshape(1, 1, 1, 1)
    kept = encode(x, bits, step)
    np.testing.assert_array_equal(kept.integers(), codes)
    np.testing.assert_array_equal(kept.dequantize(), x)
    own, none = encode(x, bits), encode(x, bits, jnp.zeros(1))
    np.testing.assert_array_equal(own.codes, none.codes)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_cache_of_codes_is_written_and_read_like_floats(kind: str) -> None:
    """Into the same slots; attention over codes is attention over the values they stand for, up to float32 sums."""
    at = jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
    fresh = KeyValues(jnp.asarray(X), jnp.asarray(-X), at, jnp.ones_like(at))
    cache = KeyValues.empty(2, 7, 3, 8, kind).write(fresh)
    assert isinstance(cache.keys, Coded) and cache.positions.shape == (2, 7)
    plain = KeyValues(
        cache.keys.dequantize(), cache.values.dequantize(), cache.positions, cache.segments
    )
    floats = KeyValues.empty(2, 7, 3, 8, "float32").write(
        KeyValues(encode(jnp.asarray(X), cache.keys.bits).dequantize(),
                  encode(jnp.asarray(-X), cache.keys.bits).dequantize(), at, jnp.ones_like(at))
    )  # fmt: skip
    np.testing.assert_array_equal(plain.keys[:, :5], floats.keys[:, :5])
    np.testing.assert_array_equal(plain.segments, floats.segments)
    q = jnp.asarray(np.random.default_rng(2).standard_normal((2, 1, 6, 8)), jnp.float32)
    places, ones = jnp.full((2, 1), 5), jnp.ones((2, 1), jnp.int32)
    got, want = (
        jax.jit(attend, static_argnums=4)(q, kv, places, ones, None) for kv in (cache, plain)
    )
    np.testing.assert_allclose(got, want, atol=2e-5)
    after = cache.followed_by(fresh)
    assert after.keys.shape == (2, 12, 3, 8) and after.keys.dtype == jnp.float32
