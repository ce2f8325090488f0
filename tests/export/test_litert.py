"""LiteRT models: what stands in the file, and what the runtime makes of it, beside the fake-quantized model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from phone_twins import phone

from gemma_qat.checkpoint.source import Reading
from gemma_qat.export.check import compare
from gemma_qat.export.litert import (
    Lengths,
    LiteRTModel,
    as_written,
    export_litert,
    model_bytes,
    open_litert,
    write_model,
)
from gemma_qat.export.litert.convert import converted
from gemma_qat.export.litert.file import write
from gemma_qat.export.litert.quantize import joined
from gemma_qat.export.litert.run import interpreter
from gemma_qat.export.litert.stored import Stored
from gemma_qat.models import Gemma4, declare, fit, size_named, static_scale_paths
from gemma_qat.numerics import PackedArray
from gemma_qat.quant import scale_path

schema = pytest.importorskip(
    "ai_edge_litert.schema_py_generated", reason="LiteRT has no wheel for this machine"
)
pytest.importorskip("litert_converter", reason="LiteRT's converter has no wheel for this machine")

LENGTHS = Lengths(prefill=8, cache=85)
LENGTH = 85
"""Of what both models read: one length, so that ours is compiled once."""
DESIGNS = ("e2b", pytest.param("e4b", marks=pytest.mark.slow), "12b")
"""Of e4b alone is that its per-layer table has 2 bits, as embeddings have everywhere."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A small model, its packed form of ours, its file, and the file in the runtime."""

    artifact: Any
    model: Gemma4
    path: Path
    litert: LiteRTModel
    tokens: np.ndarray


@pytest.fixture(scope="module", params=DESIGNS)
def exported(request: Any, case: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    artifact, model = phone(request.param)
    path = tmp_path_factory.mktemp("litert") / "model.tflite"
    size = export_litert(artifact, path, LENGTHS)
    assert size["bytes"] == path.stat().st_size
    tokens = (
        np.random.default_rng(5).integers(0, artifact.config.vocab_size, LENGTH).astype(np.int32)
    )
    return Exported(artifact, model, path, LiteRTModel(path, threads=2), tokens)


def _graph(path: Path, signature: str) -> tuple[Any, Any]:
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(path.read_bytes(), 0))
    found = next(s for s in model.signatureDefs if s.signatureKey.decode() == signature)
    return model, model.subgraphs[found.subgraphIndex]


def _unpacked(data: bytes, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Two's complement, the first code in the lowest bits: written out a second time."""
    number = int.from_bytes(data, "little")
    codes = [(number >> (bits * i)) & (2**bits - 1) for i in range(len(data) * 8 // bits)]
    signed = [code - 2**bits if code >= 2 ** (bits - 1) else code for code in codes]
    return np.asarray(signed).reshape(shape)


def test_codes_and_scales_stand_in_the_file(exported: Exported, case: ModuleType) -> None:
    """If it fails, the grid of the phone is not the grid that was trained: few-level rows above all."""
    written = as_written(exported.artifact)
    whole = exported.path.read_bytes()
    model, graph = _graph(exported.path, "decode")
    tensors = {tensor.name.decode(): tensor for tensor in graph.tensors}
    kinds = {2: schema.TensorType.INT2, 4: schema.TensorType.INT4, 8: schema.TensorType.INT8}
    seen = set()
    for path, q in written.quantized.items():
        rows = case.by_hand(path, np.asarray(q.codes))
        scales = np.moveaxis(np.asarray(q.scale), q.reduced[0], -1).reshape(len(rows), -1)
        layers = declare(written.config)[path].shape[1] if path.startswith("per_layer/embed") else 0
        parts = {path: (rows, scales)}
        if layers:
            cut, by_layer = np.split(rows, layers, axis=1), np.split(scales, layers, axis=1)
            parts = {f"{path}/{i}": part for i, part in enumerate(zip(cut, by_layer, strict=True))}
        bits = q.grid.number.bits
        for name, (codes, scale) in parts.items():
            tensor = tensors[name]
            buffer = model.buffers[tensor.buffer]
            data = whole[buffer.offset : buffer.offset + buffer.size]
            assert tensor.type == kinds[bits], name
            np.testing.assert_array_equal(_unpacked(data, bits, codes.shape), codes, err_msg=name)
            np.testing.assert_array_equal(
                tensor.quantization.scale, scale.reshape(-1), err_msg=name
            )
            assert not tensor.quantization.zeroPoint.any()
            seen.add(bits)
    assert seen == {2, 4} | ({8} if written.config.per_layer_width else set())


def test_static_scales_stand_around_every_product(exported: Exported) -> None:
    """If it fails, the runtime rounds an activation by another scale than the one that was trained."""
    written = as_written(exported.artifact)
    model, graph = _graph(exported.path, "decode")
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if k[0] != "_"}
    found = {}
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        if names[max(code.builtinCode, code.deprecatedBuiltinCode)] == "FULLY_CONNECTED":
            x, w, y = operator.inputs[0], operator.inputs[1], operator.outputs[0]
            name = graph.tensors[w].name.decode()
            for suffix, tensor in (
                ("input_scale", graph.tensors[x]),
                ("output_scale", graph.tensors[y]),
            ):
                if name in written.plans:
                    assert tensor.type == schema.TensorType.INT8
                    found[scale_path(name, suffix)] = tensor.quantization.scale
    caches = {p for p in static_scale_paths(written.plans) if "cache" in p}
    assert {*found} | caches == {*static_scale_paths(written.plans)}
    for path, scale in found.items():
        np.testing.assert_array_equal(scale, np.asarray(written.floats[path]), err_msg=path)


def test_a_file_reads_back_as_what_was_written(exported: Exported) -> None:
    """If it fails, `--verify` and `convert` see something else than what is there."""
    with open_litert(exported.path) as source:
        counts = compare(as_written(exported.artifact), Reading(source))
        assert source.recipe == exported.artifact.recipe
    del counts["tensors"]
    assert set(counts.values()) == {0}


def test_one_changed_code_is_found(exported: Exported, tmp_path: Path) -> None:
    """If it fails, reading back compares with nothing."""
    model, graph = _graph(exported.path, "decode")
    tensor = next(t for t in graph.tensors if t.name == b"layers/0/attn/q/kernel")
    changed = bytearray(exported.path.read_bytes())
    changed[model.buffers[tensor.buffer].offset] ^= 1
    other = tmp_path / "other.tflite"
    other.write_bytes(changed)
    with open_litert(other) as source:
        assert compare(as_written(exported.artifact), Reading(source))["differing_codes"] == 1


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_product_is_bit_equal(bits: int, tokens: int, tmp_path: Path) -> None:
    """If it fails, the runtime's integer product is not the fake-quantized one: every output of every layer moves."""
    rng, half = np.random.default_rng(bits), 2 ** (bits - 1)
    codes = rng.integers(-half, half, (96, 256)).astype(np.int8)
    scale = rng.uniform(0.5, 1, 96).astype(np.float32) / np.float32(16 * half)
    steps = np.float32([0.03]), np.float32([0.05])
    text = jax.jit(lambda x, w: jnp.einsum("bti,oi->bto", x, w)).lower(
        jax.ShapeDtypeStruct((1, tokens, 256), jnp.float32), jax.ShapeDtypeStruct((96, 256), jnp.float32)
    ).as_text(dialect="stablehlo")  # fmt: skip
    packed = sum(
        (codes.reshape(-1, 8 // bits)[:, i].astype(np.int32) % 2**bits) << (bits * i)
        for i in range(8 // bits)
    )
    site = Stored(
        shape=codes.shape, bits=bits, data=lambda: np.asarray(packed, np.uint8), nbytes=codes.size * bits // 8,
        scale=scale, input_step=steps[0], output_step=steps[1],
    )  # fmt: skip
    whole = joined([converted(text, "f", ["x", "w"], ["y"])], {"w": site})
    write(tmp_path / "f.tflite", whole, {"w": site})
    run = interpreter(tmp_path / "f.tflite").get_signature_runner("f")
    x = rng.standard_normal((1, tokens, 256)).astype(np.float32)

    def rounded(x: np.ndarray, step: np.ndarray) -> np.ndarray:
        return np.clip(np.round(x * (1 / step)), -128, 127).astype(np.float32) * step

    expected = rounded(rounded(x, steps[0]) @ (codes * scale[:, None]).T, steps[1])
    assert np.ptp(expected / steps[1]) > 20
    np.testing.assert_array_equal(run(x=x)["y"], expected)


def test_the_runtime_says_what_the_model_says(exported: Exported) -> None:
    """If it fails, a layer of the graph is another one than the model's.

    Products are exact; softmax, norms and activation functions differ in their last bits, and where such a number lies
    between two codes the runtime takes the other one. That moves single logits by a step or two of the head's output.
    """
    ours = np.asarray(exported.model(jnp.asarray(exported.tokens[None])))[0]
    theirs = exported.litert.logits(exported.tokens)
    p = np.asarray(jax.nn.log_softmax(ours)), np.asarray(jax.nn.log_softmax(theirs))
    divergence = (np.exp(p[0]) * (p[0] - p[1])).sum(-1)
    uniform = (np.exp(p[0]) * (p[0] + np.log(len(p[0][0])))).sum(-1)
    assert np.mean(np.abs(theirs - ours) < 1e-5) > 0.5
    assert divergence.mean() < 0.02 * uniform.mean()
    assert np.mean(theirs.argmax(-1) == ours.argmax(-1)) > 0.9


def test_prefill_in_chunks_writes_what_decode_writes(exported: Exported) -> None:
    """If it fails, a prompt is seen otherwise by the one signature than by the other: padding or positions are wrong."""
    tokens = exported.tokens  # to the last slot, past the window; 8 does not divide them
    caches = exported.litert.prefill(tokens, exported.litert.empty())
    single = exported.litert.empty()
    for position, token in enumerate(tokens):
        _, single = exported.litert.decode(int(token), position, single)
    for name in single:
        ours, theirs = (found[name].astype(int) for found in (caches, single))
        assert np.abs(theirs).max() > 50 or np.count_nonzero(theirs) > theirs.size // 2
        assert np.mean(ours != theirs) < 0.01 and np.abs(ours - theirs).max() <= 2


def test_a_prefill_that_goes_over_the_end_keeps_what_was_there(exported: Exported) -> None:
    """If it fails, the last part of a long conversation overwrites the codes of tokens before it: they move to fit."""
    before, slots = exported.litert.empty(), exported.litert.slots
    for name in before:
        before[name][:] = np.arange(1, slots + 1, dtype=np.int8)[:, None]
    run = interpreter(exported.path).get_signature_runner("prefill")
    positions = np.arange(slots - 4, slots + 4, dtype=np.int32)
    after = run(tokens=exported.tokens[None, :8], input_pos=positions, **before)
    for name, kept in before.items():
        np.testing.assert_array_equal(after[name][:, :, :-4], kept[:, :, :-4])
        assert (after[name][:, :, -4:] != kept[:, :, -4:]).mean() > 0.9


def test_sixty_four_tokens_through_both_signatures(exported: Exported) -> None:
    """If it fails, the phone goes on otherwise than the model that was trained.

    Both choose the likeliest token. Where two are as good as equal one flipped code decides, so what the runtime chose
    is asked of our model, with the runtime's own tokens before it.
    """
    prompt = exported.tokens[: LENGTH - 64]
    found = exported.litert.generate(prompt, 64)
    assert len({*found.tolist()}) > 5
    ours = np.asarray(exported.model(jnp.asarray([*prompt, *found])[None]))[0]
    ours = ours[len(prompt) - 1 : -1]
    short = ours.max(-1) - ours[np.arange(64), found]
    assert np.mean(short == 0) > 0.9 and short.max() < 0.1 * np.ptp(ours)
    assert not short[:4].any()


def test_sizes_from_shapes_are_the_files(exported: Exported) -> None:
    """If it fails, the size that is told before an export is not the size of the file."""
    written = as_written(exported.artifact)
    expected = model_bytes(written.config, written.plans, written.recipe, LENGTHS)
    shared = (
        1 if exported.artifact.recipe == "mobile_like" else 0
    )  # products of one input and scale
    assert shared * 64 <= expected - exported.path.stat().st_size <= shared * 512


@pytest.mark.parametrize(
    ("size", "published", "digits"),
    [("e2b", 0.84, 2), pytest.param("e4b", 2.2, 1, marks=pytest.mark.slow)],
)
def test_a_real_size_is_the_published_one(size: str, published: float, digits: int) -> None:
    """If it fails, a file of a real size holds more than the schema does.

    Google's figure is of the text decoder without the per-layer table, float arrays in two bytes; here they have four.
    """
    fitted = fit(size_named(size), "mobile")
    declared = declare(fitted.config)
    table = declared["per_layer/embed/table"]
    bits = fitted.plans["per_layer/embed/table"].weight.number.bits
    tables = table.size * bits // 8 + 4 * table.size // table.shape[2]
    floats = sum(p.size for path, p in declared.items() if path not in fitted.plans)
    found = model_bytes(fitted.config, fitted.plans, "mobile") - tables - 2 * floats
    assert round(found / 2**30, digits) == published


class _Counting(Mapping[str, PackedArray]):
    """Packed arrays copied when they are asked for; remembers how many bytes of them were alive at once."""

    def __init__(self, packed: dict[str, PackedArray]) -> None:
        self.packed = packed
        self.alive, self.most = 0, 0

    def __getitem__(self, path: str) -> PackedArray:
        import weakref

        packed = self.packed[path]
        words = np.array(packed.words)
        self.alive += words.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(words, self._let_go, words.nbytes)
        return dataclasses.replace(packed, words=words, scale=np.asarray(packed.scale))

    def _let_go(self, size: int) -> None:
        self.alive -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)


def test_weights_are_held_one_at_a_time(exported: Exported, tmp_path: Path) -> None:
    """If it fails, the memory of an export grows with the model, or packed words make another file than codes."""
    written, leaves = as_written(exported.artifact), exported.model.parameters()
    packed = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, PackedArray)}
    weights = _Counting(packed)
    write_model(
        tmp_path / "m.tflite", written.config, written.plans, weights, written.floats, recipe=written.recipe,
        lengths=LENGTHS,
    )  # fmt: skip
    assert (tmp_path / "m.tflite").read_bytes() == exported.path.read_bytes()
    largest = max(leaf.words.nbytes for leaf in packed.values())
    assert largest <= weights.most <= 2 * largest and weights.alive == 0
