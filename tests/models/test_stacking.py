"""Layers one by one, by group, scanned, unrolled, recomputed: if these fail, how it is run changes what is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.models import (
    SIZES,
    Gemma4,
    RunOptions,
    abstract_parameters,
    declare,
    fit,
    initialize,
    stack_layers,
    unstack_layers,
)
from gemma_qat.models.leaves import groups_of


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("tiny_")])
def test_stacking_is_undone_exactly_on_the_twins(name: str) -> None:
    config = SIZES[name]
    host = {
        path: np.full(p.shape, number, np.int16)
        for number, (path, p) in enumerate(declare(config).items())
    }
    again = unstack_layers(stack_layers(host, config, {}), config, {})
    assert again.keys() == host.keys()
    assert all(
        (again[path] == leaf).all() and again[path].shape == leaf.shape
        for path, leaf in host.items()
    )


def test_stacking_is_undone_exactly(twin: Any) -> None:
    stacked = stack_layers(twin.parameters, twin.config, {})
    assert any(leaf.shape[0] > 1 for path, leaf in stacked.items() if path.startswith("groups/"))
    again = unstack_layers(stacked, twin.config, {})
    assert again.keys() == twin.parameters.keys() == declare(twin.config).keys()
    for path, leaf in twin.parameters.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    model = Gemma4.from_parameters(twin.config, twin.parameters)
    assert model.leaves().keys() == stacked.keys()
    assert model.parameters().keys() == twin.parameters.keys()


def test_stacking_of_shapes_and_host_arrays(twin: Any) -> None:
    abstract = abstract_parameters(twin.config, {})
    assert unstack_layers(stack_layers(abstract, twin.config, {}), twin.config, {}) == abstract
    host = {path: np.asarray(leaf) for path, leaf in twin.parameters.items()}
    stacked = stack_layers(host, twin.config, {})
    assert all(isinstance(leaf, np.ndarray) for leaf in stacked.values())


def test_stacking_with_packed_leaves_and_scales(fitted_twin: Any) -> None:
    """Learned scales travel beside their weights, and the codes of a layer stay the layer's."""
    fitted, parameters = fitted_twin.fitted, fitted_twin.parameters
    stacked = stack_layers(parameters, fitted.config, fitted.plans)
    again = unstack_layers(stacked, fitted.config, fitted.plans)
    assert (
        again.keys() == parameters.keys() == abstract_parameters(fitted.config, fitted.plans).keys()
    )
    for path, leaf in parameters.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("e2b", [(0, 2, 5), (10, 1, 5), (15, 4, 5)]),
        ("e4b", [(0, 3, 6), (18, 1, 6), (24, 3, 6)]),
        ("12b", [(0, 8, 6)]),
        ("26b_a4b", [(0, 5, 6)]),
        ("31b", [(0, 10, 6)]),
    ],
)
def test_periods_of_the_full_sizes(name: str, groups: list[tuple[int, int, int]]) -> None:
    """(first layer, repeats, length): the period whose keys and values later layers read stands alone."""
    found = groups_of(SIZES[name], {})
    assert [(g.first, g.repeats, len(g.period)) for g in found] == groups
    assert [bool(g.sources) for g in found] == [
        g == (groups[-2] if len(groups) > 1 else ()) for g in groups
    ]


def test_a_layer_with_a_plan_of_its_own_leaves_the_group() -> None:
    plans = fit(SIZES["12b"], "q4_0").plans
    del plans["layers/13/ffn/up/kernel"]
    assert [(g.first, g.repeats) for g in groups_of(SIZES["12b"], plans)] == [
        (0, 2),
        (12, 1),
        (18, 5),
    ]


@pytest.mark.parametrize(
    "twin",
    [
        "tiny_e2b",
        *(
            pytest.param(f"tiny_{size}", marks=pytest.mark.slow)
            for size in ("26b_a4b", "e4b", "12b", "31b")
        ),
    ],
    indirect=True,
)
def test_scan_loop_and_remat_agree(twin: Any) -> None:
    """Values and gradients of one loss, scanned, unrolled, and with periods recomputed in the backward pass."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 64, (2, 9)))

    def run(options: RunOptions) -> tuple[jax.Array, dict[str, jax.Array]]:
        def loss(parameters: dict[str, jax.Array]) -> jax.Array:
            model = Gemma4.from_parameters(twin.config, parameters, None, options)
            return jnp.mean(jnp.sin(model.logits(model.hidden(tokens)[0])))

        return jax.jit(jax.value_and_grad(loss))(twin.parameters)

    value, gradient = run(RunOptions())
    # The last layer's scalar has no gradient but rounding (a norm follows it): measured against the largest of all.
    floor = 1e-6 * max(float(np.abs(want).max()) for want in gradient.values())
    for options in (
        RunOptions(scan=False),
        *(RunOptions(remat=name) for name in ("full", "dots", "offload")),
    ):
        other, theirs = run(options)
        # A mean of sines, each rounded to 2^-24 of at most 1: that much is left where they cancel.
        np.testing.assert_allclose(other, value, rtol=1e-5, atol=2.0**-23)
        for path, want in gradient.items():
            # The compiler orders sums differently in a loop body than in line: float32 rounding, nothing else.
            atol = 1e-4 * float(np.abs(want).max()) + floor
            np.testing.assert_allclose(theirs[path], want, atol=atol, rtol=0, err_msg=path)


def test_initialization_is_a_function_of_seed_and_path() -> None:
    """Two seeds differ, one seed repeats, and an array does not depend on which others the model has."""
    first, again = initialize(SIZES["tiny_12b"], 3), initialize(SIZES["tiny_12b"], 3)
    other, moe = initialize(SIZES["tiny_12b"], 4), initialize(SIZES["tiny_26b_a4b"], 3)
    path = "layers/2/attn/q/kernel"
    np.testing.assert_array_equal(first[path], again[path])
    np.testing.assert_array_equal(first[path], moe[path])
    assert (np.asarray(first[path]) != np.asarray(other[path])).mean() > 0.99
    assert abs(float(jnp.std(first[path])) * 96**0.5 - 1) < 0.05
