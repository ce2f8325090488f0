"""What `bench decode` measures of a model, kernel by kernel: every operation on every shape, packed and plain.

| kind | packed | beside it, in a float dtype |
|---|---|---|
| `product` | `kernels.matmul` | a product of the same shape |
| `integer` | `kernels.integer_matmul`: int8 codes, one scale an output | the same product |
| `experts` | `kernels.grouped_matmul`: rows sorted by expert | `kernels.grouped_dot` over as many experts |
| `integer_experts` | `kernels.integer_grouped_matmul` | the same |
| `head` | `kernels.top`: the likeliest token after the soft cap | product, then argmax |
| `attention` | `kernels.attend`: int8 and int4 codes, a local ring and a global cache | attention over floats |

Bytes are those of words and scales, of experts those that are chosen, of attention codes and scales of all slots.
Rows of experts are those of a batch whose tokens choose as many different experts as there can be; the next call
chooses others.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import kernels
from gemma_qat.evals.bench_device import platform
from gemma_qat.kernels.reference import attention
from gemma_qat.models import ModelConfig, declare
from gemma_qat.nn.cache import slots_for
from gemma_qat.nn.shapes import LayerShape
from gemma_qat.numerics import Grid, PackedArray
from gemma_qat.numerics.cache_codes import BITS, Coded
from gemma_qat.quant import Plan
from gemma_qat.quant.sites import EXPERTS

KINDS = ("product", "integer", "experts", "integer_experts", "head", "attention")

GRIDS: dict[str, Grid] = {
    "q4_0": Grid(format="q4_0"),
    "int4_tile32": Grid(format="int4", tile=32),
    "int4": Grid(format="int4"),
    "int2": Grid(format="int2"),
    "int8": Grid(format="int8"),
}
"""Formats that are measured, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix of a model: what it is called, output and reduced elements, and how many experts share its name."""

    name: str
    outputs: int
    reduced: int
    experts: int = 0

    @property
    def elements(self) -> int:
        """Of all experts."""
        return max(self.experts, 1) * self.outputs * self.reduced


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two that are compared: an operation, and weights for it.

    `make(key, count)` gives weights, as a list or as one stack; `call(weight, number, *inputs)` is the operation, the
    first input being what every call hands on to the next. Units: bytes of one weight.
    """

    call: Callable[..., jax.Array]
    make: Callable[[jax.Array, int], Any]
    bytes: int
    most: int
    """Weights that there can be in one program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    `bytes` are what one packed call reads; `turns` is how many calls read different parts of a weight.
    """

    kind: str
    name: str
    dims: dict[str, int]
    format: str
    rows: int
    bytes: int
    choice: kernels.Choice
    inputs: tuple[jax.Array, ...]
    plain_inputs: tuple[jax.Array, ...]
    packed: Side
    plain: Side
    turns: int = 1


def matrices_of(config: ModelConfig) -> list[Matrix]:
    """Returns the distinct matrices of a model that a decode step multiplies with, largest first."""
    found: dict[tuple[int, int, int], Matrix] = {}
    for parameter in declare(config).values():
        if not parameter.is_site or parameter.role == "per_layer_embed":
            continue
        reduced = math.prod(parameter.shape[axis] for axis in parameter.reduced)
        lead = math.prod(parameter.shape[: parameter.reduced[0]])
        experts = lead if parameter.role in EXPERTS else 0
        outputs = parameter.size // reduced // max(experts, 1)
        key = (outputs, reduced, experts)
        name = "head" if parameter.role == "embed" else parameter.role
        found.setdefault(key, Matrix(name=name, outputs=outputs, reduced=reduced, experts=experts))
    return sorted(found.values(), key=lambda m: -m.outputs * m.reduced)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A case that is to be measured; `make` makes its inputs."""

    kind: str
    name: str
    format: str
    rows: int
    make: Callable[[], Case]


def cases_of(
    config: ModelConfig,
    kinds: Sequence[str],
    formats: Sequence[str],
    batches: Sequence[int],
    dtype: str,
    cache_length: int,
) -> list[Planned]:
    """Returns what is to be measured; a format that a matrix cannot have is left out."""
    out: list[Planned] = []
    for kind in kinds:
        if kind == "attention":
            out += _attentions(config, batches, dtype, cache_length)
            continue
        for matrix, name, rows in itertools.product(matrices_of(config), formats, batches):
            if _is_one(kind, matrix, GRIDS[name]):
                make = functools.partial(_contraction, config, kind, matrix, name, rows, dtype)
                out.append(Planned(kind=kind, name=matrix.name, format=name, rows=rows, make=make))
    return out


def _is_one(kind: str, matrix: Matrix, grid: Grid) -> bool:
    """Whether a kind of operation multiplies with a matrix of that format."""
    if bool(matrix.experts) != kind.endswith("experts") or matrix.reduced % (grid.tile or 1):
        return False
    if kind.startswith("integer"):
        return Plan(weight=grid).has_channel_codes
    return kind != "head" or matrix.name == "head"


def _contraction(
    config: ModelConfig, kind: str, matrix: Matrix, format: str, rows: int, dtype: str
) -> Case:
    grid = GRIDS[format]
    size = math.ceil(matrix.elements * grid.bits_per_weight(matrix.reduced) / 8)
    dims = {"outputs": matrix.outputs, "reduced": matrix.reduced}
    sizes: tuple[jax.Array, ...] = ()
    chosen, count = 1, rows
    if matrix.experts:
        assert config.experts is not None
        count = rows * config.experts.per_token
        chosen = min(matrix.experts, count)
        dims = {"experts": matrix.experts, "chosen": chosen, **dims}
        sizes = (group_sizes(matrix.experts, count),)
    x = jax.random.normal(jax.random.key(0), (count, matrix.reduced), dtype)
    given = jnp.round(x * 40).astype(jnp.int8) if kind.startswith("integer") else x
    operation, call, plain = _CALLS[kind]
    one = jax.eval_shape(lambda: _packed(matrix, grid, jax.random.key(0), 1))
    return Case(
        kind=kind, name=matrix.name, dims=dims, format=format, rows=rows,
        bytes=size * chosen // max(matrix.experts, 1), turns=max(matrix.experts, 1) // chosen,
        choice=kernels.choose(operation, kernels.problem_of(given, one), platform()),
        inputs=(given, *sizes), plain_inputs=(x, *sizes),
        packed=Side(
            call=call, bytes=size, most=MOST_LISTED if kind == "head" else MOST_STACKED,
            make=lambda key, copies: _packed_weights(kind, matrix, grid, key, copies),
        ),
        plain=Side(
            call=plain, bytes=matrix.elements * jnp.dtype(dtype).itemsize, most=MOST_LISTED,
            make=lambda key, copies: _several(key, copies, _plain_shape(matrix), dtype),
        ),
    )  # fmt: skip


MOST_STACKED = 1024
MOST_LISTED = 8
"""Weights that lie apart are operands each, and each call on one is compiled."""


def group_sizes(experts: int, rows: int) -> jax.Array:
    """Returns how many of `rows` rows each expert gets: as many experts as can be, evenly apart; int32 [E]."""
    chosen = min(experts, rows)
    places = (np.arange(rows) % chosen) * experts // chosen
    return jnp.asarray(np.bincount(places, minlength=experts), jnp.int32)


def _plain_shape(matrix: Matrix) -> tuple[int, ...]:
    if matrix.experts:
        return matrix.experts, matrix.reduced, matrix.outputs
    return matrix.outputs, matrix.reduced


def _several(key: jax.Array, copies: int, shape: tuple[int, ...], dtype: str) -> list[jax.Array]:
    """Returns float weights that lie apart: sliced out of a stack they would be copied before every product."""
    one = jax.random.normal(key, shape, dtype)
    return [one, *(jnp.copy(one) for _ in range(copies - 1))]


def _packed_weights(kind: str, matrix: Matrix, grid: Grid, key: jax.Array, copies: int) -> Any:
    if kind == "head":
        keys = jax.random.split(key, copies)
        return [dataclasses.replace(_packed(matrix, grid, k, 0), layer=None) for k in keys]
    return _packed(matrix, grid, key, copies)


def _packed(matrix: Matrix, grid: Grid, key: jax.Array, copies: int) -> PackedArray:
    """Returns a stack of random weights, the first of them meant; one by itself where `copies` is 0."""
    lead = ((copies,) if copies else ()) + ((matrix.experts,) if matrix.experts else ())
    lead = (*lead, matrix.outputs)
    words = jax.random.bits(key, (*lead, matrix.reduced * grid.number.bits // 8), jnp.uint8)
    scale = jnp.full((*lead, grid.tiles(matrix.reduced)), 0.01, grid.scale_dtype)
    return PackedArray(
        words=words, scale=scale, grid=grid, shape=_plain_shape(matrix),
        reduced=(1,), layer=jnp.int32(0),
    )  # fmt: skip


def _product(weight: PackedArray, number: Any, x: jax.Array) -> jax.Array:
    return kernels.matmul("MR,OR->MO", x, weight)


def _integer(weight: PackedArray, number: Any, x: jax.Array) -> jax.Array:
    return kernels.integer_matmul("MR,OR->MO", x, weight)


def _experts(weight: PackedArray, number: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
    return kernels.grouped_matmul(x, weight, jnp.roll(sizes, number))


def _integer_experts(weight: PackedArray, number: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
    return kernels.integer_grouped_matmul(x, weight, jnp.roll(sizes, number))


def _top(weight: PackedArray, number: Any, x: jax.Array) -> jax.Array:
    return kernels.top(x, weight, 1, 30.0)[1]


def _plain_product(weight: jax.Array, number: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("MR,OR->MO", x, weight)


def _plain_experts(weight: jax.Array, number: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
    return kernels.grouped_dot(x, weight, jnp.roll(sizes, number))


def _plain_top(weight: jax.Array, number: Any, x: jax.Array) -> jax.Array:
    return jnp.argmax(_plain_product(weight, number, x), axis=-1)


_CALLS: dict[str, tuple[str, Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "product": ("matmul", _product, _plain_product),
    "integer": ("integer_matmul", _integer, _plain_product),
    "experts": ("grouped_matmul", _experts, _plain_experts),
    "integer_experts": ("integer_grouped_matmul", _integer_experts, _plain_experts),
    "head": ("top", _top, _plain_top),
}
"""Operation, packed call and plain call of each kind of contraction."""


def _attentions(
    config: ModelConfig, batches: Sequence[int], dtype: str, length: int
) -> Iterator[Planned]:
    shapes = {shape.kind: shape for shape in config.layer_shapes()}
    for (kind, shape), name, rows in itertools.product(shapes.items(), BITS, batches):
        title = "local" if kind == "sliding" else "global"
        make = functools.partial(_attention, title, shape, name, rows, dtype, length)
        yield Planned(kind="attention", name=title, format=name, rows=rows, make=make)


def _attention(
    name: str, layer: LayerShape, format: str, batch: int, dtype: str, length: int
) -> Case:
    slots, heads, width = slots_for(length, layer.window, format), layer.kv_heads, layer.head_width
    group, bits = layer.query_heads // heads, BITS[format]
    shape = (batch, slots, heads, width)
    q = jax.random.normal(jax.random.key(0), (batch, heads, group, width), dtype) / width
    inputs = (q, jnp.ones((batch, slots), bool))

    def coded(key: jax.Array) -> tuple[Coded, Coded]:
        empty = Coded.empty(shape, bits)
        codes = jax.random.bits(key, empty.codes.shape, jnp.uint8)
        codes = jax.lax.bitcast_convert_type(codes, empty.codes.dtype)
        one = dataclasses.replace(empty, codes=codes, scale=jnp.full(shape[:-1], 0.01))
        return one, jax.tree.map(jnp.copy, one)

    def plain(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.normal(key, shape, dtype)
        return keys, jnp.copy(keys)

    def several(make: Any) -> Callable[[jax.Array, int], Any]:
        return lambda key, copies: [make(k) for k in jax.random.split(key, copies)]

    size = 2 * batch * slots * heads * (width * bits // 8 + 4)
    problem = kernels.cached_of(q, jax.eval_shape(coded, jax.random.key(0))[0])
    return Case(
        kind="attention", name=name, format=format, rows=batch, bytes=size,
        dims={"slots": slots, "heads": heads, "group": group, "width": width},
        choice=kernels.choose("attend", problem, platform()), inputs=inputs, plain_inputs=inputs,
        packed=Side(call=_attend, make=several(coded), bytes=size, most=MOST_LISTED),
        plain=Side(
            call=_plain_attend, make=several(plain), most=MOST_LISTED,
            bytes=2 * math.prod(shape) * jnp.dtype(dtype).itemsize,
        ),
    )  # fmt: skip


def _attend(cache: tuple[Coded, Coded], number: Any, q: jax.Array, visible: jax.Array) -> jax.Array:
    return kernels.attend(q, *cache, visible)


def _plain_attend(cache: Any, number: Any, q: jax.Array, visible: jax.Array) -> jax.Array:
    keys, values = cache
    return attention(q[:, None], keys, values, visible[:, None])[:, 0].astype(q.dtype)
