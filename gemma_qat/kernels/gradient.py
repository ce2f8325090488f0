"""The gradient of a kernel that has none: that of the definition, at the same place.

A kernel of Pallas cannot be differentiated, and a program that is differentiated traces the kernels of every platform,
its own or not. Codes have no gradient; activations and scales do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gemma_qat.numerics import PackedArray


def with_gradient_of(
    definition: Callable[..., jax.Array], kernel: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """Returns `kernel`(x, packed, ...) with the gradient of `definition`, which is called alike."""

    @functools.wraps(kernel)
    def run(x: jax.Array, packed: PackedArray, *rest: jax.Array) -> jax.Array:
        return product(x, packed, rest)

    @jax.custom_vjp
    def product(x: jax.Array, packed: PackedArray, rest: tuple[jax.Array, ...]) -> jax.Array:
        return kernel(x, packed, *rest)

    def forward(x: jax.Array, packed: PackedArray, rest: tuple[jax.Array, ...]):
        return product(x, packed, rest), (x, packed, rest)

    def backward(saved: tuple[jax.Array, PackedArray, Any], d_out: jax.Array):
        x, packed, rest = saved

        def defined(x: jax.Array, scale: jax.Array) -> jax.Array:
            return definition(x, dataclasses.replace(packed, scale=scale), *rest)

        _, to_both = jax.vjp(defined, x, packed.scale)
        d_x, d_scale = to_both(d_out)
        words, layer = jax.tree.map(
            lambda integers: np.zeros(integers.shape, jax.dtypes.float0),
            (packed.words, packed.layer),
        )
        return d_x, dataclasses.replace(packed, words=words, scale=d_scale, layer=layer), None

    product.defvjp(forward, backward)
    return run
