"""What is quantized, written into converted graphs.

    weight argument w                             constant w: INT2, INT4 or INT8 with a scale a row, bytes in the file
    y = FULLY_CONNECTED(x, w)                     q = QUANTIZE(x);  z = FULLY_CONNECTED(q, w);  y = DEQUANTIZE(z)
                                                  q, z: INT8, scales: the site's static scales of input and output
    y = EMBEDDING_LOOKUP(ids, w)                  as it is; y stays float

A runtime computes an integer product of the codes then, and has no way to choose another scale. Several signatures are
put into one file, where they share what they hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gemma_qat.errors import InputError
from gemma_qat.export.litert.convert import code_of, operator_names, schema
from gemma_qat.export.litert.flat import Flat, packed, parameters
from gemma_qat.export.litert.stored import Stored

TYPES = {None: "FLOAT32", 2: "INT2", 4: "INT4", 8: "INT8"}
"""What a tensor is called, by the bits of its codes."""

_VERSIONS = {"FULLY_CONNECTED": 12, "EMBEDDING_LOOKUP": 4, "DEQUANTIZE": 2}
"""Of operators on codes: the first versions that have them."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """A model of several signatures; `weights` are the names of the weight arguments by number of their buffer."""

    model: Any
    weights: dict[int, str]

    def packed(self) -> bytes:
        """Returns the flatbuffer."""
        return packed(self.model)


def joined(
    models: Iterable[Any],
    sites: Mapping[str, Stored],
    metadata: Mapping[str, bytes] = {},
    *,
    taps: bool = False,
) -> Whole:
    """Returns converted models of one signature each as one, weights constant and sites quantized.

    `taps`: signatures also return the codes of every quantized product, `NAME/input` and `NAME/output`, int8.
    Raises: InputError when a quantized weight became something else than a FULLY_CONNECTED or an EMBEDDING_LOOKUP.
    """
    into = _Joined(sites, taps)
    for model in models:
        into.add(model)
    into.flat.describe(metadata)
    return Whole(into.flat.model, {number: name for name, number in into.weights.items()})


class _Joined:
    """Graphs in one model, and where their weights are in it."""

    def __init__(self, sites: Mapping[str, Stored], taps: bool) -> None:
        self.flat, self.sites, self.taps = Flat(), sites, taps
        self.weights: dict[str, int] = {}
        self.scales: dict[str, Any] = {}

    def add(self, model: Any) -> None:
        """Takes in the one graph of a model."""
        graph, signature = model.subgraphs[0], model.signatureDefs[0]
        arguments = {entry.name.decode(): int(entry.tensorIndex) for entry in signature.inputs}
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            is_constant = data is not None and len(data)
            tensor.buffer = self.flat.constant(bytes(data)) if is_constant else 0
        for operator in graph.operators:
            operator.inputs, operator.outputs = (
                [*map(int, operator.inputs)],
                [*map(int, operator.outputs)],
            )
            code = model.operatorCodes[operator.opcodeIndex]
            operator.opcodeIndex = self.flat.operator(code_of(code), code.version)
        named = {arguments[name]: name for name in self.sites if name in arguments}
        for index, name in named.items():
            self._store(graph.tensors[index], name)
        products = _Products(self.flat, graph, named, self.sites)
        if self.taps:
            products.tap(signature)
        graph.inputs = [index for index in graph.inputs if index not in named]
        signature.inputs = [entry for entry in signature.inputs if entry.tensorIndex not in named]
        _drop_unused(graph, signature)
        graph.name = signature.signatureKey
        signature.subgraphIndex = len(self.flat.model.subgraphs)
        self.flat.model.subgraphs.append(graph)
        self.flat.model.signatureDefs.append(signature)

    def _store(self, tensor: Any, name: str) -> None:
        site = self.sites[name]
        if name not in self.weights:
            self.weights[name] = self.flat.buffer(None)
            if site.scale is not None:
                self.scales[name] = parameters(site.scale)
        tensor.buffer, tensor.name = self.weights[name], name.encode()
        tensor.type = getattr(schema().TensorType, TYPES[site.bits])
        if name in self.scales:
            tensor.quantization = self.scales[name]


class _Products:
    """The operators of a graph, with the operands of quantized products turned into codes and back."""

    def __init__(
        self, flat: Flat, graph: Any, named: Mapping[int, str], sites: Mapping[str, Stored]
    ) -> None:
        self.flat, self.graph, self.classes = flat, graph, schema()
        self.codes: dict[tuple[int, bytes], int] = {}
        """Tensors of codes, by the float tensor and the scale they were made with."""
        self.seen: dict[str, int] = {}
        """Those around each product, by what `tap` calls them."""
        names, self.operators = operator_names(), []
        for operator in graph.operators:
            quantized = [i for i in operator.inputs if i in named and sites[named[i]].bits]
            if not quantized:
                self.operators.append(operator)
                continue
            name, site = named[quantized[0]], sites[named[quantized[0]]]
            kind = names[code_of(flat.model.operatorCodes[operator.opcodeIndex])]
            looked_up = site.input_step is None or site.output_step is None
            expected = "EMBEDDING_LOOKUP" if looked_up else "FULLY_CONNECTED"
            if kind != expected or operator.inputs[1] != quantized[0]:
                raise InputError(f"{name}: the converter made {kind} of it, {expected} expected")
            operator.opcodeIndex = self._operator(kind)
            if looked_up:
                self.operators.append(operator)
            else:
                self._product(operator, name, site)
        graph.operators = self.operators

    def _product(self, operator: Any, name: str, site: Stored) -> None:
        assert site.input_step is not None and site.output_step is not None
        source, out = operator.inputs[0], operator.outputs[0]
        key = (source, site.input_step.tobytes())
        if key not in self.codes:
            self.codes[key] = self._codes_of(source, site.input_step)
            self._convert("QUANTIZE", source, self.codes[key])
        coded = self._codes_of(out, site.output_step)
        operator.inputs, operator.outputs = [self.codes[key], *operator.inputs[1:]], [coded]
        self.operators.append(operator)
        self._convert("DEQUANTIZE", coded, out)
        self.seen |= {f"{name}/input": self.codes[key], f"{name}/output": coded}

    def _codes_of(self, index: int, step: np.ndarray) -> int:
        like, made = self.graph.tensors[index], self.classes.TensorT()
        made.shape, made.shapeSignature, made.hasRank = like.shape, like.shapeSignature, True
        made.type, made.name = self.classes.TensorType.INT8, like.name + b"/codes"
        made.quantization = parameters(step)
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def _convert(self, kind: str, source: int, out: int) -> None:
        made = self.classes.OperatorT()
        made.opcodeIndex = self._operator(kind)
        made.inputs, made.outputs = [source], [out]
        options = f"{kind.capitalize()}Options"
        made.builtinOptionsType = getattr(self.classes.BuiltinOptions, options)
        made.builtinOptions = getattr(self.classes, f"{options}T")()
        self.operators.append(made)

    def _operator(self, kind: str) -> int:
        code = getattr(self.classes.BuiltinOperator, kind)
        return self.flat.operator(code, _VERSIONS.get(kind, 1))

    def tap(self, signature: Any) -> None:
        """Makes the codes around every product outputs of a signature."""
        for name, index in self.seen.items():
            entry = self.classes.TensorMapT()
            entry.name, entry.tensorIndex = name.encode(), index
            signature.outputs.append(entry)
        self.graph.outputs = list(dict.fromkeys([*self.graph.outputs, *self.seen.values()]))


def _drop_unused(graph: Any, signature: Any) -> None:
    used = {i for op in graph.operators for i in (*op.inputs, *op.outputs) if i >= 0}
    kept = sorted(used | set(graph.inputs) | set(graph.outputs))
    number = {old: new for new, old in enumerate(kept)} | {-1: -1}
    graph.tensors = [graph.tensors[old] for old in kept]
    graph.inputs = [number[i] for i in graph.inputs]
    graph.outputs = [number[i] for i in graph.outputs]
    for operator in graph.operators:
        operator.inputs = [number[i] for i in operator.inputs]
        operator.outputs = [number[i] for i in operator.outputs]
    for entry in (*signature.inputs, *signature.outputs):
        entry.tensorIndex = number[entry.tensorIndex]
