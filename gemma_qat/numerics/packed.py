"""A weight as it is stored: packed words and scales, nothing else.

The packed axis is the merged reduced axis, moved to the end, so that a row of words is what one output needs:

    weight [lead..., reduced..., trail...]  ->  words uint8 [lead..., trail..., W],  scale [lead..., trail..., Q]

Stored codes are unsigned (code - code_min): offset binary for the signed formats, 0..15 as they are for q4_0.
Leading axes may be added in front of both arrays (a stack of layers) and sliced off again: `shape` describes
one weight. Or one axis stays there, and `layer` says which of the stack is meant: a kernel reads it where it lies.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.numerics import tiles
from gemma_qat.numerics.formats import Grid
from gemma_qat.numerics.layouts import layout_named
from gemma_qat.numerics.qarray import QArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedArray:
    """Packed codes and scales of one weight of shape `shape`.

    Shapes: words uint8 [lead..., trail..., W]; scale [lead..., trail..., Q].
    """

    # Untyped on purpose: transforms rebuild pytrees around tracers, shapes and placeholders.
    words: Any
    scale: Any
    grid: Grid = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    reduced: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    cut: Any = dataclasses.field(default=None, metadata={"static": True})
    """How the words lie over devices (`sharding.Cut`), where they do and kernels have to know."""
    layer: Any = None
    """Number, int32, of the weight that is meant of a stack [L, ...]; None: words and scale are one weight's."""

    @property
    def nbytes(self) -> int:
        """Bytes of words and scales."""
        return int(self.words.nbytes) + int(self.scale.nbytes)

    def alone(self) -> PackedArray:
        """Returns the weight with words and scale of its own: those of its layer, copied, if it is one of a stack."""
        if self.layer is None:
            return self
        words = jax.lax.dynamic_index_in_dim(self.words, self.layer, keepdims=False)
        return dataclasses.replace(self, words=words, scale=self.own_scale(), layer=None)

    def own_scale(self) -> jax.Array:
        """Returns the weight's own scale, that of its layer if it is one of a stack."""
        if self.layer is None:
            return self.scale
        return jax.lax.dynamic_index_in_dim(self.scale, self.layer, keepdims=False)

    def unpack(self) -> QArray:
        """Returns the codes and scales in the weight's own order of axes."""
        if self.layer is not None:
            return self.alone().unpack()
        fmt = self.grid.number
        lead, length, _ = tiles.split_axes(self.shape, self.reduced)
        layout = layout_named(fmt.layout, fmt.bits)
        unsigned = layout.unpack(self.words, fmt.bits, length)
        codes = (unsigned.astype(jnp.int16) + fmt.code_min).astype(jnp.int8)
        codes = jnp.moveaxis(codes, -1, len(lead)).reshape(self.shape)
        scale = jnp.moveaxis(self.scale, -1, len(lead))
        return QArray(codes=codes, scale=scale, grid=self.grid, reduced=self.reduced)

    def dequantize(self) -> jax.Array:
        """Returns the weight, float32; equal to what training's fake quantization gave."""
        return self.unpack().dequantize()

    def rows(self, ids: jax.Array) -> PackedArray:
        """Returns the rows `ids` of a table whose reduced axis is the last one.

        Raises: ValueError when the reduced axis is not the last.
        """
        if self.reduced != (len(self.shape) - 1,):
            raise ValueError(f"rows of shape {self.shape}: the last axis must be the reduced one")
        if self.layer is not None:
            return self.alone().rows(ids)
        return dataclasses.replace(
            self,
            words=jnp.take(self.words, ids, axis=0),
            scale=jnp.take(self.scale, ids, axis=0),
            shape=(*ids.shape, *self.shape[1:]),
            reduced=(ids.ndim + len(self.shape) - 2,),
            cut=None,
        )


def is_packed(leaf: Any) -> bool:
    """Returns whether a leaf is a packed weight: where maps over trees stop."""
    return isinstance(leaf, PackedArray)


def pack(q: QArray) -> PackedArray:
    """Returns the packed form of `q`; unpacking it gives the same codes and scales.

    Exactness: bit for bit, every format, layout and length.
    """
    fmt = q.grid.number
    axis = q.reduced[0]
    merged = jnp.moveaxis(tiles.merged(q.codes, q.reduced), axis, -1)
    unsigned = (merged.astype(jnp.int16) - fmt.code_min).astype(jnp.uint8)
    words = layout_named(fmt.layout, fmt.bits).pack(unsigned, fmt.bits)
    scale = jnp.moveaxis(q.scale, axis, -1)
    return PackedArray(words=words, scale=scale, grid=q.grid, shape=q.shape, reduced=q.reduced)
