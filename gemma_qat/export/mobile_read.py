"""Reading the mobile schema (`quant_method: gemma`), released files and ours; `mobile.py` has the table of names."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.beside import beside
from gemma_qat.checkpoint.hf_config import read_config
from gemma_qat.checkpoint.huggingface import TensorFiles
from gemma_qat.checkpoint.source import Leaf, Source
from gemma_qat.errors import InputError
from gemma_qat.export.hub_read import HubTensors, codes_leaf, quantization_config, recipe_of
from gemma_qat.export.hub_rows import from_rows, is_table, module_of, row_shape, word_bytes
from gemma_qat.models import ModelConfig, declare
from gemma_qat.numerics import Grid, QArray
from gemma_qat.quant import Activation, Plan, Plans, scale_path
from gemma_qat.quant.sites import Parameter

_SIGN = np.uint8(128)
_STATIC = {"input": "input_activation_scale", "output": "output_activation_scale"}
_CACHE = {"key_cache_scale": "k_cache_scale", "value_cache_scale": "v_cache_scale"}


@contextlib.contextmanager
def open_mobile(directory: Path) -> Iterator[Source]:
    """Opens a checkpoint of the mobile schema; codes stay codes, and nothing is read before it is asked for.

    Raises: FileNotFoundError; InputError naming what is missing, extra, misshaped or contradictory.
    """
    raw = quantization_config(directory, "gemma")
    config = read_config(directory / "config.json")
    with TensorFiles(directory) as files:
        yield _source(HubTensors(files), config, Bits.of(raw, directory))


@dataclasses.dataclass(frozen=True)
class Bits:
    """How many bits a module has, by ordered regular expressions; the first that matches counts."""

    default: int
    patterns: tuple[tuple[re.Pattern[str], int], ...]

    @classmethod
    def of(cls, raw: Mapping[str, Any], directory: Path) -> Bits:
        """Returns the bits that a `quantization_config` gives.

        Raises: InputError when it is malformed.
        """
        try:
            found = tuple(
                (re.compile(pattern), int(how.get("num_bits", raw.get("num_bits", 8))))
                for pattern, how in (raw.get("module_quant_configs") or {}).items()
            )
            return cls(int(raw.get("num_bits", 8)), found)
        except (re.error, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{directory / 'config.json'}: malformed quantization_config ({error})"
            ) from None

    def __call__(self, module: str) -> int:
        """Returns the bits of a module by its full name."""
        return next(
            (bits for pattern, bits in self.patterns if pattern.search(module)), self.default
        )


def _source(tensors: HubTensors, config: ModelConfig, bits: Bits) -> Source:
    if "lm_head.weight_scale" in tensors and config.ties_head:
        config = dataclasses.replace(config, ties_head=False)
    leaves: list[Leaf] = []
    plans: Plans = {}
    for parameter in declare(config).values():
        module = module_of(parameter, "")
        parts = ("weight", "weight_scale")
        if is_table(parameter):
            parts = ("embedding_quantized", "embedding_scale")
        if not parameter.is_site or f"{module}.{parts[1]}" not in tensors:
            leaves.append(tensors.floats(parameter))
            continue
        full = module if module == "lm_head" else tensors.prefix + module
        leaf, grid = _codes(tensors, parameter, module, parts, bits(full))
        activations = _activations(tensors, parameter, module)
        plans[parameter.path] = _plan(grid, activations)
        leaves += [leaf, *activations.values()]
    return Source(
        format="gemma", config=config, leaves=tuple(leaves), plans=plans,
        recipe=recipe_of(config, plans, "gemma"),
        left=tensors.rest(config), carried=tensors.carried(),
        beside=beside(tensors.files.directory),
    )  # fmt: skip


def _codes(
    tensors: HubTensors, parameter: Parameter, module: str, parts: tuple[str, str], bits: int
) -> tuple[Leaf, Grid]:
    if bits not in (2, 4, 8):
        raise InputError(f"{tensors.files.directory}: {module} of {bits} bits, 2, 4 or 8 expected")
    rows, width = row_shape(parameter), word_bytes(parameter, bits)
    grid = Grid(format=f"int{bits}", divisor=2.0 ** (bits - 1))
    kind = "I8" if bits == 8 else "U8"
    words = tensors.use(f"{module}.{parts[0]}", (*rows, width), (kind,))
    columns = parameter.shape[1] if parameter.role == "per_layer_embed" else 1
    stored = tensors.shape(f"{module}.{parts[1]}")
    shared = stored == (*rows, 1)
    scales = tensors.use(f"{module}.{parts[1]}", (*rows, 1 if shared else columns), ("F32",))
    files = tensors.files

    def read() -> QArray:
        found = files.read(words)
        packed = found.view(np.uint8) ^ _SIGN if bits == 8 else found
        scale = np.broadcast_to(files.read(scales), (*rows, columns))
        return from_rows(packed, np.ascontiguousarray(scale), grid, parameter)

    size = rows[0] * (width + 4 * stored[-1])
    return codes_leaf(parameter, grid, size, read), grid


def _activations(tensors: HubTensors, parameter: Parameter, module: str) -> dict[str, Leaf]:
    """Returns the static scales of a site by what they are called after its own path."""
    found: dict[str, Leaf] = {}
    if not is_table(parameter):
        for name, foreign_name in _STATIC.items():
            if f"{module}.{foreign_name}" in tensors:
                path = scale_path(parameter.path, f"{name}_scale")
                found[f"{name}_scale"] = tensors.scalar(f"{module}.{foreign_name}", path)
    if parameter.role == "attn_k":
        attention = module.removesuffix(".k_proj")
        present = {n: f for n, f in _CACHE.items() if f"{attention}.{f}" in tensors}
        if len(present) == 1:
            raise InputError(
                f"{tensors.files.directory}: {attention} has a scale for one of keys and values only"
            )
        for name, foreign_name in present.items():
            path = scale_path(parameter.path, name)
            found[name] = tensors.scalar(f"{attention}.{foreign_name}", path)
    return found


def _plan(grid: Grid, activations: Mapping[str, Leaf]) -> Plan:
    def one(name: str) -> Activation | None:
        return Activation() if name in activations else None

    return Plan(
        weight=grid, input=one("input_scale"), output=one("output_scale"),
        cache=one("key_cache_scale"),
    )  # fmt: skip
