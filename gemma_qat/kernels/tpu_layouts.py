"""How packed weights are best laid in a TPU's memory, for whoever puts them there.

Without a word from outside the compiler lays each argument so that least is lost to filling up 128 lanes, which the
kernels follow where they can (`tpu_blocks`). Where output axes are two (heads), or experts fill lanes better than any
other axis, that is not the order a kernel reads in, and each call makes a copy: of the scales of experts, and of words
a row of which is no multiple of 128 bytes. An array that is put with these layouts is read as it lies; the scales of
heads alone are turned at each call still.

`load` and `quantize` put weights so where they are on TPUs (`laid_out`); a program takes its arguments as they lie.
"""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.experimental.layout import Format, Layout

from gemma_qat.kernels.problem import axes_of
from gemma_qat.kernels.tpu_blocks import scale_lies_turned, words_lie_turned
from gemma_qat.numerics import PackedArray


def laid_out(packed: PackedArray) -> PackedArray:
    """Returns the weight with words and scale laid as kernels for TPU read them, on the devices they are on."""
    words, scale = (
        jax.device_put(array, Format(layout, array.sharding))
        for array, layout in zip((packed.words, packed.scale), layouts(packed), strict=True)
    )
    return dataclasses.replace(packed, words=words, scale=scale)


def layouts(packed: PackedArray) -> tuple[Layout, Layout]:
    """Returns the layouts of words and scale with which no kernel copies words, nor scales of experts."""
    _, outputs, _ = axes_of(packed)
    last, first = packed.words.ndim - 1, packed.words.ndim - 1
    while math.prod(packed.words.shape[first:last]) < outputs:  # layers and experts stay in front
        first -= 1
    straight = Layout(tuple(range(last + 1)))
    turned = Layout((*range(first), last, *range(first, last)))
    scale = scale_lies_turned(packed.grid, packed.scale.shape[-1])
    return turned if words_lie_turned(packed) else straight, turned if scale else straight
