"""Reading compressed-tensors directories of integers, released files and ours; `compressed_tensors.py` has names."""

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
from gemma_qat.export.compressed_groups import group_size
from gemma_qat.export.hub_read import HubTensors, codes_leaf, quantization_config, recipe_of
from gemma_qat.export.hub_rows import (
    columns,
    from_rows,
    is_table,
    module_of,
    reduced_size,
    row_shape,
    word_bytes,
)
from gemma_qat.models import ModelConfig, declare
from gemma_qat.numerics import Grid, QArray
from gemma_qat.quant import Activation, Parameter, Plan, Plans, scale_path
from gemma_qat.quant.sites import EXPERTS

_SIGN = np.uint8(128)
_CACHE = {"key_cache_scale": "k_scale", "value_cache_scale": "v_scale"}
_SCALES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@contextlib.contextmanager
def open_compressed_tensors(directory: Path) -> Iterator[Source]:
    """Opens a compressed-tensors checkpoint; codes stay codes, and nothing is read before it is asked for.

    Raises: FileNotFoundError; InputError naming what is missing, extra, misshaped, or no symmetric integer scheme.
    """
    raw = quantization_config(directory, "compressed-tensors")
    config = read_config(directory / "config.json")
    with TensorFiles(directory) as files:
        yield _Reader(HubTensors(files), Schemes.of(raw, directory)).source(config)


@dataclasses.dataclass(frozen=True)
class Schemes:
    """Which group a module belongs to, by the targets of each."""

    groups: tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...]
    where: Path

    @classmethod
    def of(cls, raw: Mapping[str, Any], directory: Path) -> Schemes:
        """Returns the schemes of a `quantization_config`.

        Raises: InputError when it is malformed.
        """
        try:
            groups = tuple(
                (tuple(map(str, group["targets"])), dict(group))
                for group in raw["config_groups"].values()
            )
            for targets, _ in groups:
                for target in targets:
                    re.compile(target.removeprefix("re:"))
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise InputError(
                f"{directory / 'config.json'}: malformed quantization_config ({error})"
            ) from None
        return cls(groups, directory)

    def __call__(self, module: str, kind: str) -> Mapping[str, Any]:
        """Returns the scheme of a module by its full name and torch class: name first, then pattern, then class.

        Raises: InputError when no group targets it.
        """
        rank = (
            lambda target: target == module,
            lambda target: target[:3] == "re:" and re.match(target[3:], module) is not None,
            lambda target: target == kind,
        )
        for matches in rank:
            for targets, group in self.groups:
                if any(matches(target) for target in targets):
                    return group
        raise InputError(f"{self.where}: {module} is quantized, but no group targets it")


class _Reader:
    """Goes through the declared parameters and finds each in the files."""

    def __init__(self, tensors: HubTensors, schemes: Schemes) -> None:
        self.tensors, self.schemes, self.where = tensors, schemes, tensors.files.directory

    def source(self, config: ModelConfig) -> Source:
        if "lm_head.weight_scale" in self.tensors and config.ties_head:
            config = dataclasses.replace(config, ties_head=False)
        leaves: list[Leaf] = []
        plans: Plans = {}
        for parameter in declare(config).values():
            module = module_of(parameter, "")
            if not parameter.is_site or f"{module.format(0)}.weight_scale" not in self.tensors:
                leaves.append(self.tensors.floats(parameter))
                continue
            modules = [module]
            if parameter.role in EXPERTS:
                modules = [module.format(i) for i in range(parameter.shape[0])]
            leaf, plan, static = self.site(parameter, modules)
            plans[parameter.path] = plan
            leaves += [leaf, *static]
        return Source(
            format="compressed-tensors", config=config, leaves=tuple(leaves), plans=plans,
            recipe=recipe_of(config, plans, "compressed-tensors"),
            left=self.tensors.rest(config), carried=self.tensors.carried(),
            beside=beside(self.where),
        )  # fmt: skip

    def site(self, parameter: Parameter, modules: list[str]) -> tuple[Leaf, Plan, list[Leaf]]:
        module = modules[0]
        kind = "Embedding" if is_table(parameter) else "Linear"
        full = module if module == "lm_head" else self.tensors.prefix + module
        scheme = self.schemes(full, kind)
        grid = self.grid(parameter, module, scheme)
        static: dict[str, Leaf] = {}
        for name in ("input_scale", "output_scale"):
            if f"{module}.{name}" in self.tensors:
                static[name] = self.one_scalar(parameter, modules, name)
        if parameter.role == "attn_k":
            static |= self.caches(parameter, module.removesuffix(".k_proj"))
        plan = Plan(
            weight=grid,
            input=self.activation(module, scheme, "input", static),
            output=self.activation(module, scheme, "output", static),
            cache=Activation() if "key_cache_scale" in static else None,
        )
        return self.codes(parameter, modules, grid), plan, list(static.values())

    def grid(self, parameter: Parameter, module: str, scheme: Mapping[str, Any]) -> Grid:
        weights = scheme.get("weights") or {}
        bits, strategy = weights.get("num_bits"), weights.get("strategy")
        if weights.get("type") != "int" or not weights.get("symmetric") or bits not in (2, 4, 8):
            raise InputError(
                f"{self.where}: {module} is {weights}, symmetric integers of 2, 4 or 8 bits expected"
            )
        if strategy not in ("channel", "group"):
            raise InputError(
                f"{self.where}: {module}: strategy {strategy}, channel or group expected"
            )
        tile = int(weights["group_size"]) if strategy == "group" else None
        if parameter.role == "per_layer_embed" and tile == reduced_size(parameter):
            tile = None
        dtype = _SCALES.get(self.tensors.dtype(f"{module}.weight_scale"), "")
        return Grid(
            format=f"int{bits}", tile=tile, scale_dtype=dtype, divisor=2.0 ** (int(bits) - 1)
        )

    def activation(
        self, module: str, scheme: Mapping[str, Any], which: str, static: Mapping[str, Leaf]
    ) -> Activation | None:
        how = scheme.get(f"{which}_activations")
        stored = f"{which}_scale" in static
        if how is None and not stored:
            return None
        dynamic = bool(how and how.get("dynamic"))
        if how is None or how.get("type") != "int" or not how.get("symmetric") or dynamic == stored:
            raise InputError(
                f"{self.where}: {module}: {which}_activations {how} do not go with "
                f"{'a' if stored else 'no'} stored scale"
            )
        return Activation(bits=int(how["num_bits"]), per="token" if dynamic else "tensor")

    def codes(self, parameter: Parameter, modules: list[str], grid: Grid) -> Leaf:
        bits, rows = grid.number.bits, row_shape(parameter)[-1]
        width = word_bytes(parameter, bits)
        size = group_size(grid, parameter)
        tiles = 1 if size is None else columns(parameter) // size
        plain = f"{modules[0]}.weight" in self.tensors
        name, shape, kinds = "weight_packed", (rows, -(-width // 4)), ("I32",)
        if plain:
            name, shape, kinds = "weight", (rows, width), ("I8",)
        words = [self.tensors.use(f"{m}.{name}", shape, kinds) for m in modules]
        scales = [
            self.tensors.use(f"{m}.weight_scale", (rows, tiles), tuple(_SCALES)) for m in modules
        ]
        files = self.tensors.files
        for m in modules if not plain else ():
            announced = files.read(self.tensors.use(f"{m}.weight_shape", (2,), ("I64", "I32")))
            if announced.tolist() != [rows, columns(parameter)]:
                raise InputError(
                    f"{self.where}: {m}.weight_shape is {announced.tolist()}, {[rows, columns(parameter)]} expected"
                )

        def read() -> QArray:
            stored = np.stack([files.read(full) for full in words])
            found = stored.view(np.uint8) ^ _SIGN if plain else stored.view(np.uint8)[..., :width]
            scale = np.stack([files.read(full) for full in scales])
            return from_rows(found, scale, grid, parameter)

        total = len(modules) * rows * (shape[1] * (1 if plain else 4) + tiles * 4)
        return codes_leaf(parameter, grid, total, read)

    def one_scalar(self, parameter: Parameter, modules: list[str], name: str) -> Leaf:
        """A static scale that all experts share."""
        leaves = [
            self.tensors.scalar(f"{m}.{name}", scale_path(parameter.path, name)) for m in modules
        ]
        if len(leaves) > 1 and len({bytes(np.asarray(leaf.read())) for leaf in leaves}) > 1:
            raise InputError(f"{self.where}: experts of {parameter.path} differ in their {name}")
        return leaves[0]

    def caches(self, parameter: Parameter, attention: str) -> dict[str, Leaf]:
        there = {n: f for n, f in _CACHE.items() if f"{attention}.{f}" in self.tensors}
        if len(there) == 1:
            raise InputError(
                f"{self.where}: {attention} has a scale for one of keys and values only"
            )
        return {
            name: self.tensors.scalar(f"{attention}.{f}", scale_path(parameter.path, name))
            for name, f in there.items()
        }
