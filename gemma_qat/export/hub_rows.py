"""Codes and scales as rows: what the formats of the hub have in common.

Torch keeps a linear layer as [out, in] and so do these formats, codes packed along `in`. That is also the order of a
`PackedArray`, so nothing is transposed: its outer axes are merged to rows, and taken apart again on reading.

    q kernel D N H     words [N, H, W]  <->  rows [N * H, W]        scale [N, H, Q]  <->  [N * H, Q]
    per-layer table    words [V, L, W]  <->  rows [V, L * W]        scale [V, L, Q]  <->  [V, L * Q]
    experts E D F      words [E, F, W]  <->  E times [F, W]
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped, UInt8

from gemma_qat.checkpoint.maps import foreign
from gemma_qat.numerics import Grid, PackedArray, QArray, pack
from gemma_qat.numerics.tiles import split_axes
from gemma_qat.quant.sites import EXPERTS, Parameter

PREFIX = "model."
"""Of the decoder's tensors in a text-only directory; the head has none."""


def module_of(parameter: Parameter, prefix: str = PREFIX) -> str:
    """Returns the name of the torch module whose weight a parameter is.

    Experts' matrices are modules of their own once they are quantized: `layers.3.experts.{}.gate_proj`, as modelopt,
    llm-compressor and the loaders of SGLang and vLLM have them.
    """
    if parameter.role in EXPERTS:
        which = parameter.role.removeprefix("expert_")
        return f"{prefix}layers.{parameter.layer}.experts.{{}}.{which}_proj"
    name = foreign(parameter).name.removesuffix(".weight")
    return name if name == "lm_head" else prefix + name


def is_table(parameter: Parameter) -> bool:
    """Whether torch looks it up (`Embedding`) rather than multiplying by it (`Linear`)."""
    return parameter.role in ("embed", "per_layer_embed")


def reduced_size(parameter: Parameter) -> int:
    """Returns the number of elements that one output sums over."""
    return math.prod(parameter.shape[axis] for axis in parameter.reduced)


def row_shape(parameter: Parameter) -> tuple[int, ...]:
    """Returns the outer axes of the torch tensor: (out,), or (experts, out)."""
    lead, _, trail = split_axes(parameter.shape, parameter.reduced)
    if parameter.role in EXPERTS:
        return (*lead, math.prod(trail))
    if parameter.role == "per_layer_embed":
        return lead[:1]
    return (math.prod((*lead, *trail)),)


def columns(parameter: Parameter) -> int:
    """Returns the number of codes in a row; the per-layer table has those of all layers in one."""
    layers = parameter.shape[1] if parameter.role == "per_layer_embed" else 1
    return layers * reduced_size(parameter)


def word_rows(q: QArray, rows: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    """Returns the packed words of a site as rows, bits unchanged. Shapes: [*rows, W']."""
    packed = _pack(dataclasses.replace(q, codes=on_host(q.codes), scale=on_host(q.scale)))
    return np.asarray(packed.words).reshape(*rows, -1)


def scale_rows(q: QArray, rows: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
    """Returns the scales of a site as rows, bits unchanged. Shapes: [*rows, Q']."""
    return np.moveaxis(np.asarray(q.scale), q.reduced[0], -1).reshape(*rows, -1)


def expert(q: QArray, index: int) -> QArray:
    """Returns the codes and scales of one expert: a matrix [in, out]."""
    return dataclasses.replace(q, codes=q.codes[index], scale=q.scale[index], reduced=(0,))


def from_rows(
    words: UInt8[np.ndarray, "..."],
    scale: Shaped[np.ndarray, "..."],
    grid: Grid,
    parameter: Parameter,
) -> QArray:
    """Returns the codes and scales that `word_rows` and `scale_rows` gave as rows."""
    lead, _, trail = split_axes(parameter.shape, parameter.reduced)
    packed = PackedArray(
        words=on_host(words.reshape(*lead, *trail, -1)),
        scale=on_host(scale.reshape(*lead, *trail, -1)),
        grid=grid,
        shape=parameter.shape,
        reduced=parameter.reduced,
    )
    return _unpack(packed)


def word_bytes(parameter: Parameter, bits: int) -> int:
    """Returns the bytes of one row: each run of the reduced axes fills whole bytes."""
    runs = 1 if parameter.role != "per_layer_embed" else parameter.shape[1]
    return runs * -(-reduced_size(parameter) * bits // 8)


def patterns(names: set[str], everything: set[str]) -> list[str]:
    """Returns regular expressions, anchored at the end, that match exactly `names` among `everything`.

    Names with the same layers share one expression; all layers that have a module are `\\d+`. `{}` in a name stands
    for the number of an expert.
    """
    wanted, all_of = _by_ending(names), _by_ending(everything)
    out = [rf"{end}$" for end, layers in wanted.items() if not layers]
    shared: dict[str, list[str]] = {}
    for end, layers in wanted.items():
        if layers:
            some = f"(?:{'|'.join(map(str, sorted(layers)))})"
            shared.setdefault(r"\d+" if layers == all_of[end] else some, []).append(end)
    for which, ends in shared.items():
        joined = ends[0] if len(ends) == 1 else f"(?:{'|'.join(ends)})"
        out.append(rf"layers\.{which}\.{joined}$")
    return out


def _by_ending(names: set[str]) -> dict[str, set[int]]:
    """Returns {end of a name as a pattern: the layers that have it}; none for modules outside of layers."""
    found: dict[str, set[int]] = {}
    for name in sorted(names):
        inside = re.search(r"layers\.(\d+)\.(.+)", name)
        end = inside[2] if inside else name.rpartition(".")[2]
        layers = found.setdefault(re.escape(end).replace(r"\{\}", r"\d+"), set())
        if inside:
            layers.add(int(inside[1]))
    return found


def on_host(x: Any) -> jax.Array:
    """Returns an array in host memory: moving bits needs no accelerator, and may not fit beside what is there."""
    return jax.device_put(np.asarray(x), jax.devices("cpu")[0])


_pack = jax.jit(pack)
_unpack = jax.jit(PackedArray.unpack)
