"""Products of rows with the matrices of their groups, and the TPU kernel of their gradient."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_process import needs_compiler, printed

from gemma_qat.kernels import grouped_dot
from gemma_qat.kernels.tpu_grouped_gradient import LARGEST_TILE, outer_products, result_tile

CASES = {
    "odd rows, an empty group": (300, 24, 40, (100, 0, 57, 1, 142)),
    "empty groups first, rows past the last": (256, 16, 8, (0, 0, 200)),
    "groups of whole tiles, empty ones at the end": (1024, 96, 32, (256, 512, 256, 0, 0)),
    "nobody has rows": (64, 8, 8, (0, 0, 0)),
}


def operands(rows: int, width: int, out: int, sizes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Rows, matrices, the gradient of the result, group sizes; what no group has is not a number."""
    keys = jax.random.split(jax.random.key(rows), 3)
    x = jax.random.normal(keys[0], (rows, width))
    d_out = jax.random.normal(keys[1], (rows, out))
    inside = (jnp.arange(rows) < sum(sizes))[:, None]
    matrices = jax.random.normal(keys[2], (len(sizes), width, out))
    return jnp.where(inside, x, jnp.nan), matrices, jnp.where(inside, d_out, jnp.nan), jnp.array(sizes)  # fmt: skip


def in_float64(x: jax.Array, d_out: jax.Array, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The gradient of each matrix, and the sum of magnitudes it is made of."""
    a, b = np.asarray(x, np.float64), np.asarray(d_out, np.float64)
    bounds = list(itertools.pairwise(np.cumsum([0, *sizes])))
    exact = [a[start:end].T @ b[start:end] for start, end in bounds]
    size = [np.abs(a[start:end]).T @ np.abs(b[start:end]) for start, end in bounds]
    return np.stack(exact), np.stack(size)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_sums_each_groups_outer_products(case: tuple) -> None:
    """Against float64, within the bound of a float32 sum in any order: n 2^-24 of the sum of magnitudes."""
    x, matrices, d_out, sizes = operands(*case)
    like = jax.ShapeDtypeStruct(matrices.shape, jnp.float32)
    found = outer_products(x, d_out, sizes, like, interpret=True)
    exact, size = in_float64(x, d_out, case[3])
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= case[0] * 2.0**-24 * size)


def test_it_rounds_once_to_the_dtype_of_the_result() -> None:
    """bfloat16 rows: sums in float32, one rounding at the end, of 2^-8 relative (8 bits of significand)."""
    x, matrices, d_out, sizes = operands(*CASES["odd rows, an empty group"])
    x, d_out = x.astype(jnp.bfloat16), d_out.astype(jnp.bfloat16)
    like = jax.ShapeDtypeStruct(matrices.shape, jnp.bfloat16)
    found = np.asarray(outer_products(x, d_out, sizes, like, interpret=True), np.float64)
    exact, size = in_float64(x, d_out, CASES["odd rows, an empty group"][3])
    assert np.all(np.abs(found - exact) <= 2.0**-8 * np.abs(exact) + 300 * 2.0**-24 * size)


def test_the_gradient_is_that_of_the_ragged_product() -> None:
    """Elsewhere than on TPU the very same bits, under jit and where the gradient of the rows is asked for too."""
    x, matrices, _, sizes = operands(300, 24, 40, (100, 0, 57, 1, 142))

    def ragged(x: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, matrices, sizes, preferred_element_type=jnp.float32)

    def loss(product):
        return jax.jit(jax.grad(lambda x, m: jnp.sum(jnp.sin(product(x, m))), argnums=(0, 1)))

    ours = loss(lambda x, m: grouped_dot(x, m, sizes))(x, matrices)
    theirs = loss(ragged)(x, matrices)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("sides", [(2816, 704), (704, 2816), (96, 32), (1000, 1000), (4096, 4096), (5000, 130)])  # fmt: skip
def test_tiles_of_the_result_fit_and_suit_the_chip(sides: tuple[int, int]) -> None:
    """A side is whole, or a multiple of 128 lanes; their product stays within the memory the sums get."""
    tile = result_tile(*sides)
    assert tile[0] * tile[1] <= LARGEST_TILE
    for cut, whole in zip(tile, sides, strict=True):
        assert cut == whole or (cut % 128 == 0 and cut < whole)


PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from gemma_qat.kernels import grouped_dot

def flops(chips, width, out, experts=128, rows=32768):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=chips).devices
    mesh = Mesh(np.array(devices), ("x",))
    def loss(x, w, sizes):
        def each(x, w, sizes):
            y = grouped_dot(x, jax.lax.pcast(w, "x", to="varying"), sizes[0]).astype(x.dtype)
            return jax.lax.psum(jnp.sum(jnp.sin(y).astype(jnp.float32)), "x")
        return jax.shard_map(each, mesh=mesh, in_specs=(P("x"), P(), P("x")), out_specs=P())(x, w, sizes)
    def array(shape, dtype, cut):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, cut))
    n = len(devices)
    args = (array((n * rows, width), jnp.bfloat16, P("x")), array((experts, width, out), jnp.bfloat16, P()),
            array((n, experts), jnp.int32, P("x")))
    compiled = jax.jit(jax.grad(loss, argnums=1)).lower(*args).compile()
    assert "grouped_outer_products" in compiled.as_text()
    return compiled.cost_analysis()["flops"] / (2 * rows * width * out)

print(json.dumps([flops(chips, *shape) for chips, shape in
                  (("v5e:2x2", (2816, 704)), ("v5p:2x2x1", (704, 2816)), ("v6e:2x2", (2816, 704)))]))
"""


@needs_compiler
def test_it_compiles_for_chips_at_the_shapes_of_26b() -> None:
    """Inside `shard_map`, by the real compiler, with the FLOPs of one product each way and not of one an expert."""
    assert printed(PROGRAM) == pytest.approx([2.0] * 3, rel=0.01)
