"""Small random decoders of every design, plain and with each recipe fitted; built once for all tests here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.models import (
    SIZES,
    Fitted,
    Gemma4,
    ModelConfig,
    declare,
    fit,
    static_scale_paths,
)
from gemma_qat.models.sizes import pattern
from gemma_qat.numerics import tiled_shape
from gemma_qat.ptq import calibrate
from gemma_qat.quant import RECIPE_NAMES, families_of, scale_path

TWINS = tuple(name for name in SIZES if name.startswith("tiny_"))
ALL_FITS = tuple(
    (name, recipe)
    for recipe in RECIPE_NAMES
    for name in TWINS
    if SIZES[name].family in families_of(recipe)
)
FITS = tuple(pair for pair in ALL_FITS if pair[1] in ("q4_0", "mobile"))
VOCAB = 64
SIBLINGS = ("tiny_e4b", "tiny_12b")
"""Of the family of another twin: with these every test here runs too, but where time is no matter (-m slow)."""


ALIKE = "tiny_31b"
"""Its sites are the dense ones of 26B A4B: beside those it is shown with the recipes that 26B does not have, and two."""


def params(rows: tuple[Any, ...]) -> list[Any]:
    """The parameters of a fixture; those of siblings, and of what another twin shows as well, marked slow."""
    return [pytest.param(row, marks=pytest.mark.slow) if _is_shown(row) else row for row in rows]


def _is_shown(row: Any) -> bool:
    if isinstance(row, str):
        return row in SIBLINGS
    name, recipe = row
    elsewhere = ("tiny_26b_a4b", recipe) in ALL_FITS and recipe not in ("q4_0", "mobile_like")
    return name in SIBLINGS or (name == ALIKE and elsewhere)


def shrunk(name: str, **changes: Any) -> ModelConfig:
    """A tiny twin with few layers (one group of each kind is scanned), a window and vocabulary that a row exceeds."""
    config = SIZES[name]
    small: dict[str, Any] = {"vocab_size": VOCAB, "window": 5, "layer_kinds": pattern(4, 2)}
    if config.per_layer_width:
        small |= {"per_layer_vocab": VOCAB, "layer_kinds": pattern(6, 2), "shared_kv_layers": 4}
    return dataclasses.replace(config, **(small | changes))


def randomized(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters in which no norm weight or scalar is 1, so that leaving one out shows."""
    rng = np.random.default_rng(seed)
    out = {}
    for path, p in declare(config).items():
        if p.init == "constant":
            out[path] = p.init_scale * rng.uniform(0.8, 1.25, p.shape).astype(np.float32)
        else:
            out[path] = p.init_scale * rng.standard_normal(p.shape, np.float32)
    return {path: leaf.astype(np.float32) for path, leaf in out.items()}


def scales_of(parameters: dict[str, np.ndarray], fitted: Fitted) -> dict[str, np.ndarray]:
    """A scale leaf for every planned site: 0.9 of the extremum's, so that some weights clip."""
    declared, out = declare(fitted.config), {}
    for path, plan in fitted.plans.items():
        reduced = declared[path].reduced
        view = parameters[path].reshape(
            tiled_shape(declared[path].shape, reduced, plan.weight, path)
        )
        extremum = np.abs(view).max(axis=reduced[0] + 1)
        out[scale_path(path)] = (0.9 * extremum / abs(plan.weight.divisor)).astype(np.float32)
    return out


@dataclasses.dataclass(frozen=True)
class Twin:
    """A small model without a recipe."""

    config: ModelConfig
    parameters: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FittedTwin:
    """A small model with a recipe and learned scales; `tokens` [2, VOCAB] has every token in each row."""

    fitted: Fitted
    parameters: dict[str, np.ndarray]
    tokens: jax.Array


@pytest.fixture(scope="session")
def small() -> Callable[..., ModelConfig]:
    return shrunk


@pytest.fixture(scope="session")
def random_parameters() -> Callable[..., dict[str, np.ndarray]]:
    return randomized


@pytest.fixture(scope="session", params=params(TWINS))
def twin(request: Any) -> Twin:
    config = shrunk(request.param)
    return Twin(config, randomized(config))


def fitted_to(name: str, recipe: str) -> FittedTwin:
    """A small model with a recipe, learned scales, and static scales that are 0: not calibrated."""
    fitted = fit(shrunk(name), recipe, scales="learned")
    base = randomized(fitted.config, seed=1)
    rng = np.random.default_rng(2)
    rows = np.stack([rng.permutation(VOCAB), rng.permutation(VOCAB)]).astype(np.int32)
    zeros = {path: np.zeros(1, np.float32) for path in static_scale_paths(fitted.plans)}
    return FittedTwin(fitted, base | scales_of(base, fitted) | zeros, jnp.asarray(rows))


@pytest.fixture(scope="session", params=params(FITS), ids="-".join)
def fitted_twin(request: Any) -> FittedTwin:
    return fitted_to(*request.param)


@pytest.fixture(scope="session", params=params(ALL_FITS), ids="-".join)
def any_fitted_twin(request: Any) -> FittedTwin:
    return fitted_to(*request.param)


def calibrated(twin: FittedTwin) -> FittedTwin:
    """The same with static scales measured on its own tokens."""
    shape = twin.tokens.shape
    batch = {
        "tokens": twin.tokens,
        "positions": jnp.broadcast_to(jnp.arange(shape[1])[None], shape),
        "segments": jnp.ones(shape, jnp.int32),
    }
    model = Gemma4.from_parameters(twin.fitted.config, twin.parameters, twin.fitted.plans)
    scales = calibrate(model, [batch]).scales
    return dataclasses.replace(twin, parameters=twin.parameters | scales)


@pytest.fixture(scope="session")
def calibrated_to() -> Callable[[str, str], FittedTwin]:
    """Of a twin and a recipe: the small model, its static scales measured if it has any."""
    return lambda name, recipe: calibrated(fitted_to(name, recipe))


STATIC = (("tiny_e2b", "mobile"), ("tiny_e4b", "mobile"), ("tiny_26b_a4b", "mobile_like"))


@pytest.fixture(scope="session", params=params(STATIC), ids="-".join)
def static_twin(request: Any) -> FittedTwin:
    return calibrated(fitted_to(*request.param))
