"""A LiteRT file of ours as a source: codes and scales as they stand in it, one array read at a time.

What the model is stands in the file's metadata; where a weight stands, its type and its scales are read from the graph
of `decode`, which uses every one of them, and so are the static scales around each product. A `.litertlm` bundle is
read through: the model in it is the same file.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.source import Leaf, Source
from gemma_qat.errors import InputError
from gemma_qat.export.hub_read import codes_leaf
from gemma_qat.export.hub_rows import from_rows
from gemma_qat.export.litert.bundle import model_within
from gemma_qat.export.litert.convert import operator_names, schema
from gemma_qat.export.litert.graph import DECODE, TABLE, arguments, parameter_of
from gemma_qat.export.litert.quantize import TYPES
from gemma_qat.export.litert.stored import SIGNS
from gemma_qat.models import declare
from gemma_qat.numerics import QArray
from gemma_qat.numerics.tiles import split_axes
from gemma_qat.quant import Parameter, scale_path

MAGIC = b"TFL3"
METADATA = "gemma_qat"
"""Under which name the file says what it is: a manifest, as a checkpoint's, in JSON."""

_MALFORMED = (
    struct.error,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    OverflowError,
)
"""What reading a flatbuffer whose offsets lead nowhere raises."""


def looks_like_litert(path: Path) -> bool:
    """Returns whether a path is a LiteRT model or bundle, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        begins = file.read(8)
    return begins[4:] == MAGIC or begins == b"LITERTLM"


@contextlib.contextmanager
def open_litert(path: Path) -> Iterator[Source]:
    """Gives a LiteRT file that this project wrote as a source; its leaves can be read inside the block.

    Raises: FileNotFoundError; InputError for a file that is none, that another program wrote, or that is not whole.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not looks_like_litert(path):
        raise InputError(f"{path}: no LiteRT model (.tflite or .litertlm)")
    begin, end = model_within(path)
    mapped: Any = np.memmap(path, np.uint8, "r", offset=begin, shape=(end - begin,))
    yield _File(path, memoryview(mapped)).source()


class _File:
    """The graph of `decode`: tensors by name, and around each weight that is multiplied two static scales."""

    def __init__(self, path: Path, whole: memoryview) -> None:
        self.path, self.whole = path, whole
        with self._guarded():
            self.model = schema().Model.GetRootAsModel(whole, 0)
            self.manifest = self._manifest()
            self.graph = self._graph()
            self.tensors = {
                self.graph.Tensors(i).Name().decode(): i for i in range(self.graph.TensorsLength())
            }
            self.around = self._products()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except _MALFORMED as error:
            raise InputError(f"{self.path}: not a LiteRT model that is whole ({error})") from None

    def _manifest(self) -> Manifest:
        for index in range(self.model.MetadataLength()):
            entry = self.model.Metadata(index)
            if entry.Name() == METADATA.encode():
                raw = self.model.Buffers(entry.Buffer()).DataAsNumpy().tobytes()
                return Manifest.from_json(json.loads(raw))
        raise InputError(f"{self.path}: written by another program; its arrays have no known names")

    def _graph(self) -> Any:
        for index in range(self.model.SignatureDefsLength()):
            signature = self.model.SignatureDefs(index)
            if signature.SignatureKey() == DECODE.encode():
                return self.model.Subgraphs(signature.SubgraphIndex())
        raise InputError(f"{self.path}: no signature {DECODE}")

    def _products(self) -> dict[int, tuple[int, int]]:
        """Returns (input, output) of every FULLY_CONNECTED by the tensor of its weight."""
        names, found = operator_names(), {}
        for index in range(self.graph.OperatorsLength()):
            operator = self.graph.Operators(index)
            code = self.model.OperatorCodes(operator.OpcodeIndex())
            kind = names.get(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()))
            if kind == "FULLY_CONNECTED":
                found[operator.Inputs(1)] = (operator.Inputs(0), operator.Outputs(0))
        return found

    def source(self) -> Source:
        """Returns the source, after names, types, shapes and places of all arrays have been looked at."""
        with self._guarded():
            return self._source()

    def _source(self) -> Source:
        plans, leaves = self.manifest.plans, []
        shapes = arguments(self.manifest.config)
        for path, parameter in declare(self.manifest.config).items():
            names = [name for name in shapes if parameter_of(name)[0] == path]
            plan = plans.get(path)
            bits = None if plan is None else plan.weight.number.bits
            data = [self._data(name, shapes[name], bits) for name in names]
            size = sum(part.nbytes for part in data)
            if plan is None:
                leaves.append(self._floats(parameter, data, size))
                continue
            scales = [self._scale(self.tensors[name], shapes[name][0]) for name in names]
            read = self._codes(parameter, data, scales, plan.weight)
            leaves.append(codes_leaf(parameter, plan.weight, size, read))
            leaves += self._static(path, plan.static_scales, shapes)
        return Source(
            format="litert", config=self.manifest.config, leaves=tuple(leaves),
            recipe=self.manifest.recipe, plans=plans,
        )  # fmt: skip

    def _data(self, name: str, shape: tuple[int, ...], bits: int | None) -> np.ndarray:
        """Returns the bytes of a weight where they are in the file."""
        if name not in self.tensors:
            raise InputError(f"{self.path}: tensor {name} is missing")
        tensor = self.graph.Tensors(self.tensors[name])
        kind = getattr(schema().TensorType, TYPES[bits])
        found = tuple(int(n) for n in tensor.ShapeAsNumpy())
        if (tensor.Type(), found) != (kind, shape):
            raise InputError(f"{self.path}: {name} is not {TYPES[bits]} of shape {list(shape)}")
        buffer = self.model.Buffers(tensor.Buffer())
        begin, size = buffer.Offset(), buffer.Size()
        expected = int(np.prod(shape, dtype=np.int64)) * (bits or 32) // 8
        if size != expected or begin + size > len(self.whole):
            raise InputError(
                f"{self.path}: {name} has {size} bytes at {begin}, {expected} expected"
            )
        return np.frombuffer(self.whole, np.uint8, size, begin)

    def _scale(self, tensor: int, rows: int) -> np.ndarray:
        quantization = self.graph.Tensors(tensor).Quantization()
        name = self.graph.Tensors(tensor).Name().decode()
        scale = None if quantization is None else quantization.ScaleAsNumpy()
        if not isinstance(scale, np.ndarray) or scale.shape != (rows,):
            raise InputError(f"{self.path}: {name} has not {rows} scales")
        if quantization.ZeroPointAsNumpy().any():
            raise InputError(f"{self.path}: {name} has zero points that are not 0")
        return scale

    def _codes(
        self, parameter: Parameter, data: list[np.ndarray], scales: list[np.ndarray], grid: Any
    ) -> Callable[[], QArray]:
        lead, _, trail = split_axes(parameter.shape, parameter.reduced)
        rows, sign = (*lead, *trail), SIGNS[grid.number.bits]

        def read() -> QArray:
            if len(data) == 1 and parameter.path != TABLE:
                words, scale = data[0], scales[0]
            else:  # a table of each layer, side by side again
                words = np.stack([part.reshape(rows[0], -1) for part in data], axis=1)
                scale = np.stack(scales, axis=1)
            return from_rows(
                words.reshape(*rows, -1) ^ sign, scale.reshape(*rows, 1), grid, parameter
            )

        return read

    def _floats(self, parameter: Parameter, data: list[np.ndarray], size: int) -> Leaf:
        def read() -> np.ndarray:
            whole = np.stack([part.view(np.float32) for part in data])
            if not parameter.is_site:
                return whole.reshape(parameter.shape).copy()
            lead, _, trail = split_axes(parameter.shape, parameter.reduced)
            inner = [parameter.shape[axis] for axis in parameter.reduced]
            if parameter.path == TABLE:
                whole = np.moveaxis(whole.reshape(len(data), *lead[:1], -1), 0, 1)
            rows = whole.reshape(*lead, *trail, *inner)
            return np.ascontiguousarray(np.moveaxis(rows, range(-len(inner), 0), parameter.reduced))

        return Leaf(
            path=parameter.path, shape=parameter.shape, dtype="float32", bytes=size, read=read
        )

    def _static(self, path: str, names: tuple[str, ...], shapes: dict[str, Any]) -> Iterator[Leaf]:
        for name in names:
            full = scale_path(path, name)
            if full in shapes:
                value = self._data(full, (1,), None).view(np.float32)
            else:
                product = self.around.get(self.tensors[path])
                if product is None:
                    raise InputError(f"{self.path}: nothing is multiplied by {path}")
                value = self._scale(product[name != "input_scale"], 1)
            yield Leaf(path=full, shape=(1,), dtype="float32", bytes=4, read=value.copy)
