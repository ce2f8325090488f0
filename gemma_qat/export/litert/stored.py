"""What stands behind each weight argument of the graph: codes in LiteRT's order of bits, scales, or floats.

    codes     two's complement, the first code in the lowest bits, rows one after the other
    scales    one float32 a row

Our words are the same codes offset by half the range, so the sign bit of each is turned and nothing else. Bytes are
made when they are written, one argument at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemma_qat.errors import InputError
from gemma_qat.export.hub_rows import reduced_size, word_rows
from gemma_qat.export.litert.graph import arguments, parameter_of
from gemma_qat.models import ModelConfig, declare, static_scale_paths
from gemma_qat.numerics import PackedArray, QArray
from gemma_qat.numerics.tiles import split_axes
from gemma_qat.quant import Parameter, Plans, scale_path

SIGNS = {2: np.uint8(0xAA), 4: np.uint8(0x88), 8: np.uint8(0x80)}
"""The sign bits of all codes of a byte, by the bits of one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """One argument as it is stored.

    Shapes: `shape` as the graph has it; scale float32 [rows], for codes; `data` returns bytes, as uint8 [nbytes].
    """

    shape: tuple[int, ...]
    bits: int | None
    """Of a code; None: float32."""
    data: Callable[[], np.ndarray]
    nbytes: int
    scale: np.ndarray | None = None
    input_step: np.ndarray | None = None
    """Static scale [1] of what is multiplied by it; None: it is looked up, or float."""
    output_step: np.ndarray | None = None


def stored(
    config: ModelConfig,
    plans: Plans,
    quantized: Mapping[str, QArray | PackedArray],
    floats: Mapping[str, Any],
) -> dict[str, Stored]:
    """Returns every weight argument by name; of what is quantized only scales are read now, of floats nothing.

    Raises: InputError for rows that fill no whole bytes.
    """
    found = {}
    declared = declare(config)
    for name, shape in arguments(config).items():
        path, layer = parameter_of(name)
        if path in plans:
            found[name] = _codes(declared[path], plans, quantized, floats, shape, layer)
        else:
            found[name] = _floats(floats, path, shape, declared.get(path), layer)
    return found


def _codes(
    parameter: Parameter, plans: Plans, quantized: Mapping[str, QArray | PackedArray],
    floats: Mapping[str, Any], shape: tuple[int, ...], layer: int | None,
) -> Stored:  # fmt: skip
    path, plan = parameter.path, plans[parameter.path]
    bits = plan.weight.number.bits
    if reduced_size(parameter) * bits % 8:
        raise InputError(
            f"{path}: {reduced_size(parameter)} codes of {bits} bits fill no whole bytes"
        )
    steps = [
        np.asarray(floats[scale_path(path, name)], np.float32)
        if name in plan.static_scales
        else None
        for name in ("input_scale", "output_scale")
    ]

    def data() -> np.ndarray:
        return (_words(quantized[path], parameter, layer) ^ SIGNS[bits]).reshape(-1)

    scale = _scale(quantized[path], parameter, layer)
    if steps[0] is not None:
        refuse_scales(path, scale)
    return Stored(
        shape=shape, bits=bits, data=data, nbytes=math.prod(shape) * bits // 8, scale=scale,
        input_step=steps[0], output_step=steps[1],
    )  # fmt: skip


def refuse_scales(path: str, scale: np.ndarray) -> None:
    """Raises InputError for scales [rows] that XNNPACK refuses, or takes and then crashes (not a number)."""
    wrong = ~(np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"{path}: the scale of row {row} is {scale[row]:.6g}; XNNPACK takes positive, normal numbers only"
        )


def _words(site: QArray | PackedArray, parameter: Parameter, layer: int | None) -> np.ndarray:
    """The words of a site, or of one layer of the per-layer table: nothing else of it is read, packed or copied."""
    if isinstance(site, PackedArray):
        words = site.words if layer is None else site.words[:, layer]
        return np.ascontiguousarray(words)
    if layer is not None:
        one = slice(layer, layer + 1)
        site = dataclasses.replace(site, codes=site.codes[:, one], scale=site.scale[:, one])
    lead, _, trail = split_axes(site.codes.shape, site.reduced)
    return word_rows(site, (*lead, *trail))


def _scale(site: QArray | PackedArray, parameter: Parameter, layer: int | None) -> np.ndarray:
    scale = site.scale if layer is None else site.scale[:, layer : layer + 1]
    scale = np.asarray(scale, np.float32)
    if isinstance(site, QArray):
        scale = np.moveaxis(scale, site.reduced[0], -1)
    return scale.reshape(-1)


def _floats(
    floats: Mapping[str, Any], path: str, shape: tuple[int, ...], parameter: Parameter | None,
    layer: int | None,
) -> Stored:  # fmt: skip
    def data() -> np.ndarray:
        whole = np.asarray(floats[path], np.float32)
        if parameter is not None and parameter.is_site:
            reduced = parameter.reduced
            whole = np.moveaxis(whole, reduced, range(-len(reduced), 0))
            whole = whole if layer is None else whole[:, layer]
        return np.ascontiguousarray(whole).reshape(-1).view(np.uint8)

    return Stored(shape=shape, bits=None, data=data, nbytes=4 * math.prod(shape))


def stored_shapes(config: ModelConfig, plans: Plans) -> dict[str, Stored]:
    """Returns what `stored` does of a model that is not there: the same sizes, made-up scales, no bytes to ask for.

    No two matrices have the same scale of their input.
    """
    declared, quantized = declare(config), {}
    for path, plan in plans.items():
        shape, reduced = declared[path].shape, declared[path].reduced
        lead, _, trail = split_axes(shape, reduced)
        ones = np.ones((*lead, *trail, 1), np.float32)
        quantized[path] = PackedArray(
            words=None, scale=ones, grid=plan.weight, shape=shape, reduced=reduced
        )
    statics = enumerate(static_scale_paths(plans), start=1)
    return stored(
        config, plans, quantized, {path: np.full(1, n, np.float32) for n, path in statics}
    )
