"""Every planned site of every recipe is on its grid and takes part: if these fail, a weight is skipped in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gemma_qat.models import Gemma4, declare, quantize_parameters
from gemma_qat.numerics import QArray
from gemma_qat.numerics.tiles import tiled_shape


def _forward(case: Any) -> Callable[[dict[str, Any]], tuple[np.ndarray, dict[str, Any]]]:
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


def test_masters_anywhere_in_their_cells_give_the_same_logits(any_fitted_twin: Any) -> None:
    """All weights move at once, up to 0.4 steps off their codes; a site that sees its masters would show."""
    forward = _forward(any_fitted_twin)
    codes = quantize_parameters(any_fitted_twin.parameters, any_fitted_twin.fitted)
    rng = np.random.default_rng(3)
    moved = dict(any_fitted_twin.parameters)
    for path, q in codes.items():
        moved[path] = _at_codes(q, rng.uniform(-0.4, 0.4, q.codes.shape))
        assert (moved[path] != any_fitted_twin.parameters[path]).mean() > 0.9
    before, _ = forward(any_fitted_twin.parameters)
    after, _ = forward(moved)
    np.testing.assert_array_equal(before, after)


def test_one_step_of_one_weight_shows_at_every_site(any_fitted_twin: Any) -> None:
    """One weight a site crosses into another cell. Experts: a weight of the one most tokens choose."""
    forward = _forward(any_fitted_twin)
    before, chosen = forward(any_fitted_twin.parameters)
    codes = quantize_parameters(any_fitted_twin.parameters, any_fitted_twin.fitted)
    declared = declare(any_fitted_twin.fitted.config)
    wide = {path: _wide_scale(q) for path, q in codes.items()}
    silent = []
    rounds = any(plan.activations for plan in any_fitted_twin.fitted.plans.values())
    for path, q in codes.items():
        parameter = declared[path]
        index = tuple(n // 2 for n in parameter.shape)
        if parameter.role.startswith("expert_"):
            used = np.bincount(np.ravel(chosen[f"layers/{parameter.layer}/router/experts"]))
            index = (int(used.argmax()), *index[1:])
        fmt = q.grid.number
        towards_middle = 1.0 if int(q.codes[index]) <= (fmt.code_min + fmt.code_max) / 2 else -1.0
        value = _at_codes(q, 0.4 * towards_middle)[index]
        # 0.4 -> 0.6: over the boundary. Where activations are rounded too, a step of one weight may end inside one of
        # their cells on its way to the logits, so it goes on for a quarter of the codes.
        far = (fmt.code_max - fmt.code_min) // 4 if rounds else 0
        step = (0.2 + far) * towards_middle * wide[path][index]
        inside, across = (any_fitted_twin.parameters[path].copy() for _ in range(2))
        inside[index], across[index] = value, value + step
        np.testing.assert_array_equal(
            forward(any_fitted_twin.parameters | {path: inside})[0], before, err_msg=path
        )
        if np.array_equal(forward(any_fitted_twin.parameters | {path: across})[0], before):
            silent.append(path)
    assert len(codes) > 5 * any_fitted_twin.fitted.config.layers
    assert silent == []
