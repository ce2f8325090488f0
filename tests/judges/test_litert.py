"""LiteRT-LM, the runtime of phones, on bundles of ours; ai-edge-quantizer's recovery of grids beside our codes.

Run with both installed:  .venv-test/bin/pip install litert-lm==0.18.1 ai-edge-quantizer==0.10.0
                          bash launch/test.sh -n 0 -s -m judges tests/judges/test_litert.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import judge_twins
import numpy as np
import pytest

from gemma_qat.data import Tokenizer, train_tokenizer
from gemma_qat.data.chat import SYMBOLS
from gemma_qat.export import Artifact
from gemma_qat.export.litert import Lengths, LiteRTModel, export_litert
from gemma_qat.models import (
    fit,
    float_parameters,
    initialize,
    quantize_parameters,
    size_named,
    static_scale_paths,
)

pytestmark = pytest.mark.judges
LENGTHS = Lengths(prefill=32, cache=256)
PROMPTS = ("def main(", "import os\nimport sys\n\nclass Reader:\n    def __init__(self", "# ")
NEW = 64


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> judge_twins.Twin:
    folder = tmp_path_factory.mktemp("litert")
    return judge_twins.trained("e2b", folder / "run", folder / "data", "mobile")


def test_litert_lm_goes_on_as_the_interpreter_does(twin: judge_twins.Twin, tmp_path: Path) -> None:
    """If it fails, a bundle is not what LiteRT-LM takes, or it reads prompts otherwise than we do.

    The greedy text of three prompts, up to 64 tokens each, must be equal, character by character.
    """
    lm = pytest.importorskip("litert_lm", reason="needs litert-lm, see above")
    export_litert(twin.artifact, tmp_path / "m.tflite", LENGTHS)
    export_litert(twin.artifact, tmp_path / "m.litertlm", LENGTHS)
    ours, tokenizer = LiteRTModel(tmp_path / "m.tflite", threads=2), twin.tokenizer
    with lm.Engine(
        str(tmp_path / "m.litertlm"), backend=lm.Backend.CPU(), max_num_tokens=LENGTHS.cache, cache_dir=str(tmp_path)
    ) as engine:  # fmt: skip
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt, bos=True)
            assert [tokenizer.bos_id, *engine.tokenize(prompt)] == ids
            found = ours.generate(ids, NEW).tolist()
            if tokenizer.eos_id in found:
                found = found[: found.index(tokenizer.eos_id)]
            session = engine.create_session(
                apply_prompt_template=False, sampler_config=lm.SamplerConfig(top_k=1), max_output_tokens=NEW
            )  # fmt: skip
            session.run_prefill([prompt])
            (theirs,) = session.run_decode().texts
            print(f"{prompt!r}: {len(found)} tokens, {theirs[:60]!r}")
            assert theirs == tokenizer.decode(found)


def test_a_conversation_is_laid_out_as_in_training(tmp_path: Path) -> None:
    """If it fails, a chat on the phone has other marks around its turns than the conversations that were trained on."""
    lm = pytest.importorskip("litert_lm", reason="needs litert-lm, see above")
    lines = [f"value_{i} = add({i}, {i * 7})\n" for i in range(900)]
    tokenizer = train_tokenizer(["".join(lines)], 300, tmp_path / "t.model", SYMBOLS)
    artifact = _drawn(300, tokenizer)
    export_litert(artifact, tmp_path / "m.tflite", LENGTHS)
    export_litert(artifact, tmp_path / "m.litertlm", LENGTHS)
    begin, end = tokenizer.id_of("<|turn>"), tokenizer.id_of("<turn|>")
    user, model = tokenizer.encode("user\nadd(1, 2)"), tokenizer.encode("model\n")
    prompt = [tokenizer.bos_id, begin, *user, end, *tokenizer.encode("\n"), begin, *model]
    found = LiteRTModel(tmp_path / "m.tflite", threads=2).generate(prompt, NEW).tolist()
    with lm.Engine(
        str(tmp_path / "m.litertlm"), backend=lm.Backend.CPU(), max_num_tokens=LENGTHS.cache, cache_dir=str(tmp_path)
    ) as engine:  # fmt: skip
        assert engine.eos_token_ids == [[tokenizer.eos_id], [end]]
        conversation = engine.create_conversation(sampler_config=lm.SamplerConfig(top_k=1))
        rendered = conversation.render_message_to_string("add(1, 2)")
        assert rendered == "<|turn>user\nadd(1, 2)<turn|>\n<|turn>model\n"
        reply = str(conversation.send_message("add(1, 2)"))
    length = next((n for n, token in enumerate(found) if token in (tokenizer.eos_id, end)), NEW)
    assert length > 3 and reply.startswith(tokenizer.decode(found[:length])[:20])


def _drawn(vocab: int, tokenizer: Tokenizer) -> Artifact:
    """A tiny E2B of random codes, with scales that keep numbers in the range of its static ones."""
    config = dataclasses.replace(size_named("tiny_e2b"), name="drawn", vocab_size=vocab, per_layer_vocab=vocab)  # fmt: skip
    fitted = fit(config, "mobile")
    parameters = fitted.adopt(initialize(fitted.config, 3))
    floats = float_parameters(parameters, fitted)
    floats |= {path: np.full(1, 0.04, np.float32) for path in static_scale_paths(fitted.plans)}
    return Artifact(
        config=fitted.config, recipe="mobile", plans=fitted.plans, tokenizer=tokenizer,
        quantized=quantize_parameters(parameters, fitted), floats={p: np.asarray(x) for p, x in floats.items()},
    )  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4])
def test_recovery_finds_our_codes_where_a_row_has_neighbouring_levels(
    bits: int, twin: judge_twins.Twin, tmp_path: Path
) -> None:
    """If it fails, the public quantizer sees another grid in the values of our codes than we write.

    It takes the smallest gap between a row's values for the scale, so that a row whose levels are no neighbours has a
    multiple of it there, and its codes are divided; that is why our files do not go through it.
    """
    quantizer = pytest.importorskip("ai_edge_quantizer.quantizer", reason="needs ai-edge-quantizer")
    from ai_edge_quantizer import qtyping, recipe_manager
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    q = next(
        q for path, q in twin.artifact.quantized.items()
        if q.grid.number.bits == bits and path.endswith("up/kernel")
    )  # fmt: skip
    codes, scale = np.asarray(q.codes).T.copy(), np.asarray(q.scale).reshape(-1)
    codes[0, ::2], codes[0, 1::2] = -2, 0  # no neighbours
    values = codes * scale[:, None]
    _float_model(values, tmp_path / "float.tflite")
    manager = recipe_manager.RecipeManager()
    weight = qtyping.TensorQuantizationConfig(
        num_bits=bits, symmetric=True, granularity=qtyping.QuantGranularity.CHANNELWISE
    )
    how = qtyping.OpQuantizationConfig(
        weight_tensor_config=weight, compute_precision=qtyping.ComputePrecision.INTEGER,
        explicit_dequantize=False, skip_checks=True,
    )  # fmt: skip
    manager.add_quantization_config(
        regex=".*", operation_name=qtyping.TFLOperationName.FULLY_CONNECTED, op_config=how,
        algorithm_key=AlgorithmName.DEQUANTIZED_WEIGHT_RECOVERY,
    )  # fmt: skip
    run = quantizer.Quantizer(str(tmp_path / "float.tflite"))
    run.load_quantization_recipe(manager.get_quantization_recipe())
    found_codes, found_scale = _weight(run.quantize().quantized_model, bits, codes.shape)
    neighbours = np.array([1 in np.diff(np.unique(row)) for row in codes])
    assert not neighbours[0] and neighbours.mean() > 0.9
    np.testing.assert_array_equal(found_codes[neighbours], codes[neighbours])
    np.testing.assert_allclose(found_scale[neighbours], scale[neighbours], rtol=1e-5)
    np.testing.assert_allclose(found_scale[0], 2 * scale[0], rtol=1e-5)
    np.testing.assert_array_equal(found_codes[0], codes[0] // 2)
    exact = int((found_scale[neighbours] == scale[neighbours]).sum())
    print(f"{bits} bits: {neighbours.sum()} rows, {exact} scales equal to the last bit")


def _float_model(values: np.ndarray, path: Path) -> None:
    from litert_converter import converter_api_ext as api
    from litert_converter.mlir import ir, passmanager

    x = jax.ShapeDtypeStruct((1, values.shape[1]), jnp.float32)
    text = jax.jit(lambda x: jnp.einsum("bi,oi->bo", x, values)).lower(x).as_text("stablehlo")
    context = ir.Context()
    api.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        module = ir.Module.parse(text, context)
        api.set_signature(module.operation, "f", ["x"], ["y"])
        passes = passmanager.PassManager(context=context)
        api.run_convert_to_tfl_passes(module, passes, api.ConvertToTFLConfig())
        path.write_bytes(api.export_flatbuffer_to_bytes(module.operation))


def _weight(model: Any, bits: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    from ai_edge_litert import schema_py_generated as schema

    whole = bytes(model)
    found = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(whole, 0))
    kind = {2: schema.TensorType.INT2, 4: schema.TensorType.INT4}[bits]
    (tensor,) = [t for t in found.subgraphs[0].tensors if t.type == kind]
    buffer = found.buffers[tensor.buffer]
    data = buffer.data
    if data is None or not len(data):
        data = np.frombuffer(whole, np.uint8, buffer.size, buffer.offset)
    parts = [(np.asarray(data, np.uint8) >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    codes = np.stack(parts, -1).reshape(shape).astype(np.int8)
    return np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes), np.asarray(
        tensor.quantization.scale
    )
