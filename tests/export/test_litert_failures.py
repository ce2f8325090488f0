"""LiteRT: what is refused, in one line, and leaves no file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from phone_twins import phone_codes

from gemma_qat.errors import InputError
from gemma_qat.export import Artifact
from gemma_qat.export.litert import Lengths, LiteRTModel, export_litert, open_litert
from gemma_qat.export.litert import write as writing
from gemma_qat.export.litert.convert import converted
from gemma_qat.models import size_named
from gemma_qat.numerics import QArray

pytest.importorskip("ai_edge_litert", reason="LiteRT has no wheel for this machine")
pytest.importorskip("litert_converter", reason="LiteRT's converter has no wheel for this machine")

SHORT = Lengths(prefill=4, cache=16)


def _without(artifact: Artifact, path: str, scale: float = 0) -> Artifact:
    """The artifact with a static scale of 0, as an imported checkpoint may have it, or another one."""
    floats = artifact.floats | {path: np.full(1, scale, np.float32)}
    return dataclasses.replace(artifact, floats=floats, imported=True)


Make = Callable[[ModuleType], Artifact]
REFUSED: dict[str, tuple[Make, str]] = {
    "float": (lambda case: case.float_artifact(case.smallest()), "for quantized checkpoints; this one is float"),
    "q4_0": (lambda case: case.artifact(case.smallest(), "q4_0"), "recipe q4_0 has no mobile form"),
    "weights alone": (lambda case: case.artifact(case.smallest(), "w4a16"), "recipe w4a16 has no mobile form"),
    "experts": (lambda case: case.artifact(size_named("tiny_26b_a4b"), "mobile_like"), "a matrix of experts"),
    "not rounded in": (
        lambda case: _without(phone_codes(), "layers/0/attn/q/kernel_input_scale"),
        "layers/0/attn/q/kernel_input_scale: no rounding there",
    ),
    "not rounded out": (
        lambda case: _without(phone_codes(), "head/table_output_scale"),
        "head/table_output_scale: no rounding there",
    ),
    "keys": (
        lambda case: _without(phone_codes(), "layers/1/attn/k/kernel_key_cache_scale"),
        "layers/1/attn/k/kernel_key_cache_scale: no rounding there",
    ),
    "negative scale": (
        lambda case: _with_scale(phone_codes(), -0.01),
        "layers/0/ffn/gate/kernel: the scale of row 5 is -0.01",
    ),
    "subnormal scale": (
        lambda case: _with_scale(phone_codes(), 1e-40),
        "layers/0/ffn/gate/kernel: the scale of row 5 is",
    ),
    "a quotient of scales": (
        lambda case: _with_scale(phone_codes(), 1e30),
        "LiteRT's runtime refuses the model",
    ),
    "a static scale that is no number": (
        lambda case: _without(phone_codes(), "layers/0/attn/q/kernel_input_scale", np.nan),
        "layers/0/attn/q/kernel_input_scale: the scale of row 0 is nan",
    ),
    "values": (
        lambda case: _without(phone_codes(), "layers/1/attn/k/kernel_value_cache_scale"),
        "layers/1/attn/k/kernel_value_cache_scale: no rounding there",
    ),
}  # fmt: skip


def _with_scale(artifact: Artifact, scale: float) -> Artifact:
    """The artifact with another scale of one row of a matrix."""
    path = "layers/0/ffn/gate/kernel"
    q = artifact.quantized[path]
    changed = dataclasses.replace(q, scale=jnp.asarray(q.scale).at[0, 5].set(scale))
    return dataclasses.replace(artifact, quantized=artifact.quantized | {path: changed})


def _refused(expected: str, run: Callable[[], Any]) -> None:
    with pytest.raises(InputError) as refusal:
        run()
    assert expected in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_mobile_checkpoint_is_refused(
    name: str, case: ModuleType, tmp_path: Path
) -> None:
    """If it fails, a file appears whose activations are rounded otherwise than in training."""
    make, expected = REFUSED[name]
    artifact = make(case)
    _refused(expected, lambda: export_litert(artifact, tmp_path / "m.tflite", SHORT))
    assert not any(tmp_path.iterdir())


def test_an_uncalibrated_checkpoint_is_no_artifact(case: ModuleType) -> None:
    """If it fails, scales that were never measured are written as if somebody had."""
    artifact = phone_codes()
    path = "layers/0/ffn/up/kernel_output_scale"
    floats = artifact.floats | {path: np.zeros(1, np.float32)}
    _refused("run gemma-qat calibrate first", lambda: dataclasses.replace(artifact, floats=floats))


def test_a_row_of_zeros_has_a_scale(case: ModuleType, tmp_path: Path) -> None:
    """If it fails, one unused row keeps a whole model from running: XNNPACK takes no scale of 0."""
    artifact = _with_scale(phone_codes(), 0)
    export_litert(artifact, tmp_path / "m.tflite", SHORT)
    with open_litert(tmp_path / "m.tflite") as source:
        q = next(x for x in source.leaves if x.path == "layers/0/ffn/gate/kernel").read()
    assert isinstance(q, QArray) and not np.asarray(q.codes)[:, 5].any() and q.scale[0, 5] == 1


@pytest.mark.parametrize("lengths", [(0, 16), (32, 16), (8, 2000)])
def test_lengths_that_do_not_fit_are_refused(
    lengths: tuple[int, int], case: ModuleType, tmp_path: Path
) -> None:
    """If it fails, a file appears whose prefill writes past its cache, or past the model's positions."""
    given = Lengths(prefill=lengths[0], cache=lengths[1])
    artifact = phone_codes()
    _refused("expected", lambda: export_litert(artifact, tmp_path / "m.tflite", given))
    assert not any(tmp_path.iterdir())


def test_another_file_is_not_replaced(case: ModuleType, tmp_path: Path) -> None:
    """If it fails, a slip of the finger overwrites somebody's notes."""
    out = tmp_path / "notes.tflite"
    out.write_text("mine")
    _refused("not replaced", lambda: export_litert(phone_codes(), out, SHORT))
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", ["m.LITERTLM", "m.bin", "m"])
def test_another_ending_is_refused(name: str, case: ModuleType, tmp_path: Path) -> None:
    """If it fails, a slip in the name of a bundle makes a model without a tokenizer."""
    artifact = phone_codes()
    _refused("ends in .tflite", lambda: export_litert(artifact, tmp_path / name, SHORT))
    assert not any(tmp_path.iterdir())


UNKNOWN: dict[str, tuple[Callable[[jax.Array], jax.Array], str]] = {
    "an operation of StableHLO alone": (jnp.sort, "needs STABLEHLO_SORT, which LiteRT's runtime lacks"),
    "one that TensorFlow has": (lambda x: jax.lax.population_count(x.astype(jnp.int32)), "refuses the f graph"),
    "a call out of it": (lambda x: jnp.linalg.qr(x.reshape(4, 4))[0], "refuses the f graph"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_operation_the_runtime_lacks_is_named(name: str) -> None:
    """If it fails, the file is written and the phone finds out."""
    function, expected = UNKNOWN[name]
    text = jax.jit(function).lower(jax.ShapeDtypeStruct((16,), jnp.float32)).as_text("stablehlo")
    _refused(expected, lambda: converted(text, "f", ["x"], ["y"]))


def test_a_failed_check_leaves_what_was_there(
    case: ModuleType, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, a file that the runtime does not take stands where one was that it takes."""
    out, before = tmp_path / "m.tflite", file.read_bytes()
    out.write_bytes(before)

    def refuse(path: Path) -> None:
        raise InputError(f"{path.name}: the runtime refuses")

    monkeypatch.setattr(writing, "LiteRTModel", refuse)
    _refused("the runtime refuses", lambda: export_litert(phone_codes(), out, SHORT))
    assert out.read_bytes() == before and [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("missing", ["ai_edge_litert", "litert_converter"])
def test_without_the_extra_it_says_how_to_get_it(
    missing: str, case: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, whoever has not installed the extra sees a traceback."""
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    _refused(
        "pip install 'gemma_qat[litert]'",
        lambda: export_litert(phone_codes(), tmp_path / "m.tflite", SHORT),
    )
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def file(case: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("litert") / "m.tflite"
    export_litert(phone_codes(), path, SHORT)
    return path


def _opened(path: Path) -> None:
    with open_litert(path) as source:
        for leaf in source.leaves:
            leaf.read()


def _said(path: Path) -> str | None:
    """What reading refuses with, if it does."""
    try:
        _opened(path)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kept", [9, 200, 0.3, 0.9])
def test_a_file_that_was_cut_off_is_refused(kept: float, file: Path, tmp_path: Path) -> None:
    """If it fails, half a download is read as a model, or as a traceback."""
    whole = file.read_bytes()
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(whole[: kept if kept > 1 else int(kept * len(whole))])
    _refused("cut.tflite", lambda: _opened(cut))


def test_a_file_that_was_damaged_is_refused_or_read(file: Path, tmp_path: Path) -> None:
    """If it fails, bytes that lead nowhere end in a traceback, or in reading without an end."""
    whole, rng = bytearray(file.read_bytes()), np.random.default_rng(0)
    refused = 0
    for number in range(60):
        other = bytearray(whole)
        for place in rng.integers(8, len(whole) // 2, 20):  # where the graph is
            other[place] = rng.integers(256)
        damaged = tmp_path / f"{number}.tflite"  # one that is mapped is not written into
        damaged.write_bytes(other)
        said = _said(damaged)
        refused += said is not None
        assert "\n" not in (said or "")
    assert refused > 30


def test_a_tensor_that_leads_nowhere_is_refused(file: Path, tmp_path: Path) -> None:
    """If it fails, one damaged number, that of a weight's buffer, ends in a traceback."""
    from ai_edge_litert.schema_py_generated import Model

    whole = bytearray(file.read_bytes())
    model = Model.GetRootAsModel(whole, 0)
    for graph in (model.Subgraphs(0), model.Subgraphs(1)):
        table = next(
            tensor._tab for tensor in map(graph.Tensors, range(graph.TensorsLength()))
            if tensor.Name() == b"layers/0/attn/q/kernel"
        )  # fmt: skip
        place = table.Pos + table.Offset(8)  # the third field, `buffer`
        whole[place : place + 4] = (99_999).to_bytes(4, "little")
    damaged = tmp_path / "damaged.tflite"
    damaged.write_bytes(whole)
    _refused("damaged.tflite: not a LiteRT model that is whole", lambda: _opened(damaged))


def test_a_file_of_another_program_is_refused(file: Path, tmp_path: Path) -> None:
    """If it fails, tensors are taken for ours by their names alone."""
    other = tmp_path / "other.tflite"
    other.write_bytes(file.read_bytes().replace(b"gemma_qat\0", b"somebody_\0"))
    said = _said(other) or ""
    assert said.startswith(f"{other}: written by another program") and said.count(str(other)) == 1
    other.write_bytes(b"TFL3 or what is called so")
    _refused("no LiteRT model", lambda: _opened(other))
    with pytest.raises(FileNotFoundError):
        _opened(tmp_path / "missing.tflite")


def test_prompts_that_do_not_fit_are_refused(file: Path) -> None:
    """If it fails, a long prompt is written over its own beginning."""
    model = LiteRTModel(file)
    _refused("16 slots", lambda: model.generate([1, 2, 3], 15))
    _refused("16 slots", lambda: model.prefill(np.ones(17, np.int32), model.empty()))
    _refused("slots 0 to 15", lambda: model.decode(1, 16, model.empty()))
    _refused("token 64", lambda: model.decode(64, 0, model.empty()))
    _refused("token -1", lambda: model.prefill(np.int32([3, -1]), model.empty()))
    _refused("empty prompt", lambda: model.generate([], 1))
    assert len(model.generate([1, 2, 3], 14)) == 14
