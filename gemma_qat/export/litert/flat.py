"""A LiteRT model while it is put together: operators, buffers and quantization parameters, each written once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_qat.export.litert.convert import code_of, schema


class Flat:
    """The parts of a model that its graphs share; `model` is a `ModelT`."""

    def __init__(self) -> None:
        """Begins with nothing; buffer 0 stays empty, for what is made on the way."""
        self._classes = schema()
        self.model = self._classes.ModelT()
        self.model.version, self.model.description = 3, b"gemma_qat"
        self.model.operatorCodes, self.model.subgraphs, self.model.signatureDefs = [], [], []
        self.model.buffers, self.model.metadata = [self._classes.BufferT()], []
        self._constants: dict[bytes, int] = {}

    def buffer(self, data: np.ndarray | None) -> int:
        """Returns the number of a new buffer, with bytes, or with none yet."""
        made = self._classes.BufferT()
        made.data = data
        self.model.buffers.append(made)
        return len(self.model.buffers) - 1

    def constant(self, data: bytes) -> int:
        """Returns the number of the buffer with these bytes."""
        if data not in self._constants:
            self._constants[data] = self.buffer(np.frombuffer(data, np.uint8))
        return self._constants[data]

    def operator(self, code: int, version: int) -> int:
        """Returns the number of an operator and version."""
        for index, known in enumerate(self.model.operatorCodes):
            if (code_of(known), known.version) == (code, version):
                return index
        made = self._classes.OperatorCodeT()
        made.builtinCode, made.version = code, version
        made.deprecatedBuiltinCode = min(code, 127)
        self.model.operatorCodes.append(made)
        return len(self.model.operatorCodes) - 1

    def describe(self, metadata: Mapping[str, bytes]) -> None:
        """Adds what the file says of itself, by name."""
        for name, value in metadata.items():
            entry = self._classes.MetadataT()
            entry.name, entry.buffer = name, self.buffer(np.frombuffer(value, np.uint8))
            self.model.metadata.append(entry)


def parameters(scale: np.ndarray) -> Any:
    """Returns quantization parameters of one scale a row and zero points of 0.

    They are written once, whoever refers to them, and so are the zero points of all that have as many: LiteRT wants
    eight bytes for each scale, which would be twice what the scales take.
    """
    classes = schema()

    class Once(classes.QuantizationParametersT):
        def Pack(self, builder: Any) -> int:
            return builder.once((id(self),), lambda: self._pack(builder))

        def _pack(self, builder: Any) -> int:
            scale = builder.CreateNumpyVector(self.scale)
            zeros = np.zeros(len(self.scale), np.int64)
            points = builder.once(("zeros", len(zeros)), lambda: builder.CreateNumpyVector(zeros))
            classes.QuantizationParametersStart(builder)
            classes.QuantizationParametersAddScale(builder, scale)
            classes.QuantizationParametersAddZeroPoint(builder, points)
            return classes.QuantizationParametersEnd(builder)

    made = Once()
    made.scale = np.ascontiguousarray(scale, np.float32)
    return made


def packed(model: Any) -> bytes:
    """Returns the flatbuffer of a `ModelT`."""
    import flatbuffers

    class Builder(flatbuffers.Builder):
        def once(self, key: tuple[Any, ...], make: Any) -> int:
            """Returns where something is in the flatbuffer; it is made the first time."""
            if key not in places:
                places[key] = make()
            return places[key]

    places: dict[tuple[Any, ...], int] = {}
    builder = Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
