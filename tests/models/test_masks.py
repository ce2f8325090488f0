"""Who sees whom, by values: if these fail, a row's logits depend on its neighbours or its future."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.models import Gemma4


def test_packed_rows_equal_rows_alone(twin: Any) -> None:
    """Two segments longer than the window in one row, padding before, between and after them."""
    model = Gemma4.from_parameters(twin.config, twin.parameters)
    rows = np.random.default_rng(0).integers(1, 64, (2, 11)).astype(np.int32)
    assert rows.shape[1] > twin.config.window
    alone = np.asarray(model(jnp.asarray(rows)))
    at = [slice(2, 13), slice(14, 25)]
    tokens, positions, segments = (np.zeros((1, 27), np.int32) for _ in range(3))
    for number, where in enumerate(at):
        tokens[0, where] = rows[number]
        positions[0, where] = np.arange(11)
        segments[0, where] = number + 1
    packed = np.asarray(model(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments)))
    assert np.isfinite(packed).all()
    for number, where in enumerate(at):
        # Sums over other lengths round differently; a leak of one token moves logits by 0.1 and more.
        np.testing.assert_allclose(packed[0, where], alone[number], atol=2e-4, rtol=0)


def test_no_gradient_from_the_future(twin: Any) -> None:
    """The hidden state at one position has exactly no gradient to tokens after it, and some to all before."""
    tokens = jnp.arange(1, 13)[None]
    position = 7

    @jax.jit
    def gradient(parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def read(parameters: dict[str, jax.Array]) -> jax.Array:
            model = Gemma4.from_parameters(twin.config, parameters)
            return jnp.sum(jnp.sin(model.hidden(tokens)[0][0, position]))

        return jax.grad(read)(parameters)

    found = gradient(twin.parameters)
    tables = ["embed/table"] + ["per_layer/embed/table"] * bool(twin.config.per_layer_width)
    for name in tables:
        size = np.abs(np.asarray(found[name])).reshape(64, -1).max(axis=1)
        assert (size[1 : position + 2] > 0).all(), name
        assert (size[position + 2 :] == 0).all(), name


@pytest.mark.parametrize(("kind", "reach"), [("sliding", 5), ("full", 12)])
@pytest.mark.parametrize("name", ["tiny_12b", "tiny_e4b"])
def test_a_token_sees_itself_and_window_minus_one_before(
    name: str,
    kind: str,
    reach: int,
    small: Callable[..., Any],
    random_parameters: Callable[..., Any],
) -> None:
    """One layer, window 5: the hidden state at 11 changes with the token at 7, and not with the one at 6."""
    config = small(name, layer_kinds=(kind,), shared_kv_layers=0)
    model = Gemma4.from_parameters(config, random_parameters(config))
    tokens = jnp.arange(1, 13)
    changed = jnp.where(jnp.eye(12, dtype=bool), 40, tokens[None])
    logits = np.asarray(model(jnp.concatenate([tokens[None], changed])))[:, 11]
    differs = [bool((logits[1 + back] != logits[0]).any()) for back in range(12)]
    assert differs == [position > 11 - reach for position in range(12)]
