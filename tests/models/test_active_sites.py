"""Every planned site of every recipe is on its grid and takes part: if these fail, a weight is skipped in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from gemma_qat.models import Gemma4, declare, quantize_parameters
from gemma_qat.numerics import QArray
from gemma_qat.numerics.tiles import tiled_shape

Forward = Callable[[dict[str, Any]], tuple[np.ndarray, dict[str, Any]]]


@pytest.fixture(scope="module")
def forward(any_fitted_twin: Any) -> Forward:
    """Logits and the experts chosen, compiled once for the tests of a twin."""
    case = any_fitted_twin

    @jax.jit
    def run(parameters: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        taps: dict[str, Any] = {}
        model = Gemma4.from_parameters(case.fitted.config, parameters, case.fitted.plans)
        hidden, _ = model.hidden(case.tokens, taps=taps)
        chosen = {k: v for k, v in taps.items() if k.endswith("router/experts")}
        return model.logits(hidden), chosen

    def call(parameters: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        logits, chosen = run(parameters)
        return np.asarray(logits), chosen

    return call


def _wide_scale(q: QArray) -> np.ndarray:
    """The stored scale of each element, by hand."""
    view = tiled_shape(q.codes.shape, q.reduced, q.grid)
    scale = np.expand_dims(np.asarray(q.scale, np.float32), q.reduced[0] + 1)
    return np.broadcast_to(scale, view).reshape(q.codes.shape)


def _at_codes(q: QArray, shift: np.ndarray | float) -> np.ndarray:
    """Masters that stand `shift` steps beside the values of their codes."""
    codes = np.asarray(q.codes, np.float32) - q.grid.number.zero
    return ((codes + shift) * _wide_scale(q)).astype(np.float32)


def test_masters_anywhere_in_their_cells_give_the_same_logits(
    any_fitted_twin: Any, forward: Forward
) -> None:
    """All weights move at once, up to 0.4 steps off their codes; a site that sees its masters would show."""
    codes = quantize_parameters(any_fitted_twin.parameters, any_fitted_twin.fitted)
    rng = np.random.default_rng(3)
    moved = dict(any_fitted_twin.parameters)
    for path, q in codes.items():
        moved[path] = _at_codes(q, rng.uniform(-0.4, 0.4, q.codes.shape))
        assert (moved[path] != any_fitted_twin.parameters[path]).mean() > 0.9
    before, _ = forward(any_fitted_twin.parameters)
    after, _ = forward(moved)
    np.testing.assert_array_equal(before, after)


def _crossing(q: QArray, index: tuple[int, ...], *, far: int) -> tuple[np.floating, np.floating]:
    """Two values for one weight: 0.4 steps off its code, and over the boundary, 0.6 + `far` steps off."""
    middle = (q.grid.number.code_min + q.grid.number.code_max) / 2
    inwards = 1.0 if int(q.codes[index]) <= middle else -1.0
    inside = _at_codes(q, 0.4 * inwards)[index]
    return inside, inside + (0.2 + far) * inwards * _wide_scale(q)[index]


def _places(q: QArray, first: int | None, count: int) -> list[tuple[int, ...]]:
    """The middle of a site and `count - 1` places drawn from it; `first` fixes the leading index."""
    rng = np.random.default_rng(7)
    shape = q.codes.shape
    places = [tuple(n // 2 for n in shape)]
    places += [tuple(int(rng.integers(n)) for n in shape) for _ in range(count - 1)]
    return places if first is None else [(first, *place[1:]) for place in places]


def test_one_weight_shows_at_every_site(any_fitted_twin: Any, forward: Forward) -> None:
    """A weight moved in its cell changes nothing, moved out of it it shows. Experts: of the one most tokens choose.

    Where activations are rounded too, what one weight does may end inside one of their cells on its way to the logits.
    There a weight goes on for a quarter of the codes, and one of eight has to show; at a site that is not in use none
    could.
    """
    before, chosen = forward(any_fitted_twin.parameters)
    codes = quantize_parameters(any_fitted_twin.parameters, any_fitted_twin.fitted)
    declared = declare(any_fitted_twin.fitted.config)
    rounds = any(plan.activations for plan in any_fitted_twin.fitted.plans.values())

    def moves(path: str, index: tuple[int, ...], value: np.floating) -> bool:
        moved = any_fitted_twin.parameters[path].copy()
        moved[index] = value
        return not np.array_equal(forward(any_fitted_twin.parameters | {path: moved})[0], before)

    loose, silent = [], []
    for path, q in codes.items():
        fmt, parameter, busiest = q.grid.number, declared[path], None
        if parameter.role.startswith("expert_"):
            used = np.bincount(np.ravel(chosen[f"layers/{parameter.layer}/router/experts"]))
            busiest = int(used.argmax())
        far = (fmt.code_max - fmt.code_min) // 4 if rounds else 0
        pairs = [(i, *_crossing(q, i, far=far)) for i in _places(q, busiest, 8 if rounds else 1)]
        if moves(path, *pairs[0][:2]):
            loose.append(path)
        if not any(moves(path, index, across) for index, _, across in pairs):
            silent.append(path)
    assert len(codes) > 5 * any_fitted_twin.fitted.config.layers
    assert (loose, silent) == ([], [])
