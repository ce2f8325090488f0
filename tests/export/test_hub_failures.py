"""Directories of the hub that must not be written, must not be read, or must leave what was there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_qat.checkpoint import safetensors_file
from gemma_qat.errors import InputError
from gemma_qat.export import (
    EXPORTERS,
    HUB_EXPORTERS,
    Artifact,
    HubOptions,
    export_huggingface,
    export_mobile,
    export_native,
    open_compressed_tensors,
    open_mobile,
)
from gemma_qat.export.hub_config import config_json
from gemma_qat.models import FULL_SIZES, size_named
from gemma_qat.nn.rope import Rope

RECIPES = {"mobile": "mobile", "compressed-tensors": "w4a16", "huggingface": "w4a16"}


def _one_line(error: Any) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("format", HUB_EXPORTERS)
def test_a_flipped_bit_leaves_what_was_there(case, format: str, tmp_path: Path, monkeypatch):
    """If it fails, a damaged export appears, or takes the place of a good one."""
    artifact = case.artifact(case.smallest(), RECIPES[format])
    out = tmp_path / "out"
    EXPORTERS[format](artifact, out)
    before = (out / "model.safetensors").read_bytes()
    pieces = safetensors_file._pieces

    def flipping(tensors: Any) -> Iterator[bytes]:
        # The first byte of the last tensor; the header is left alone.
        *first, last = pieces(tensors)
        yield from first
        yield bytes([bytes(last)[0] ^ 1]) + bytes(last)[1:]

    monkeypatch.setattr(safetensors_file, "_pieces", flipping)
    with pytest.raises(ValueError, match="differing"):
        EXPORTERS[format](artifact, out)
    assert (out / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]


def test_kill_leaves_what_was_there(tmp_path: Path):
    """If it fails, an export that is killed leaves half a directory under its name."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("gemma_qat.json", "model.safetensors"):
        (out / name).write_text("before")
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from gemma_qat.checkpoint.appear import appearing\n"
        "with appearing(Path(sys.argv[1]), 'gemma_qat.json') as directory:\n"
        "    (directory / 'model.safetensors').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(out)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (out / "model.safetensors").read_text() == "before"


def test_another_directory_is_not_replaced(case, tmp_path: Path):
    """If it fails, an export deletes somebody's files."""
    (tmp_path / "notes.txt").write_text("mine")
    artifact = case.float_artifact(case.smallest())
    with pytest.raises(InputError, match=r"without a gemma_qat.json, which is not replaced"):
        export_huggingface(artifact, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def _refusals(case) -> dict[str, tuple[str, Artifact, str]]:
    moe = size_named("tiny_26b_a4b")
    small = case.smallest()
    return {
        "experts": ("mobile", case.artifact(moe, "mobile_like"), "matrix of experts"),
        "tiles": ("mobile", case.artifact(small, "q4_0"), "is q4_0 in tiles of 32"),
        "tokens": ("mobile", case.artifact(small, "w8a8"), "int8 per token"),
        "two levels": ("compressed-tensors", case.artifact(small, "w2"), "int2_no_zero"),
        "float": ("mobile", case.float_artifact(small), "this one is float"),
        "float too": ("compressed-tensors", case.float_artifact(small), "this one is float"),
        "float as native": ("native", case.float_artifact(small), "this checkpoint is float"),
    }


@pytest.mark.parametrize(
    "name",
    ["experts", "tiles", "tokens", "two levels", "float", "float too", "float as native"],
)
def test_what_a_format_cannot_say(case, name: str, tmp_path: Path):
    """If it fails, a file says something else than what was trained."""
    format, artifact, said = _refusals(case)[name]
    with pytest.raises(InputError) as error:
        EXPORTERS[format](artifact, tmp_path / "out")
    assert said in _one_line(error)
    assert not (tmp_path / "out").exists()
    assert export_native is EXPORTERS["native"]


@pytest.mark.parametrize("size", FULL_SIZES)
def test_full_sizes_have_a_config(size: str):
    """If it fails, a released size cannot be exported."""
    assert config_json(size_named(size))["num_hidden_layers"] == size_named(size).layers


def test_a_config_without_a_place(case):
    """If it fails, config.json describes another model, and the difference is silent."""
    strange = case.smallest(local_rope=Rope(theta=1e4, fraction=0.5))
    with pytest.raises(InputError, match="local_rope"):
        config_json(strange)


def test_options():
    """If it fails, a wrong word is taken for a default."""
    with pytest.raises(InputError, match="bfloat16"):
        HubOptions(dtype="float16").stored  # noqa: B018 (asked for its check)
    with pytest.raises(InputError, match="packed"):
        HubOptions(tables="codes")


@pytest.fixture(scope="module")
def written(case, tmp_path_factory) -> Path:
    """A directory of each quantized format."""
    root = tmp_path_factory.mktemp("written")
    for format in ("mobile", "compressed-tensors"):
        EXPORTERS[format](case.artifact(case.smallest(), RECIPES[format]), root / format)
    return root


OPENERS = {"mobile": open_mobile, "compressed-tensors": open_compressed_tensors}


def _changed(source: Path, out: Path, change: Any) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


def _narrow(tensors: dict[str, np.ndarray]) -> None:
    name = next(n for n in tensors if "q_proj.weight" in n and tensors[n].ndim == 2)
    tensors[name] = np.ascontiguousarray(tensors[name][:, 1:])


@pytest.mark.parametrize("format", OPENERS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "norm.weight is missing"),
        (lambda t: t.update({"model.layers.0.strange": np.zeros(2)}), "unexpected tensor"),
        (_narrow, "has shape"),
        (lambda t: t.update({"model.norm.weight": np.zeros(64, np.int8)}), "is I8"),
    ],
    ids=["missing", "extra", "misshaped", "dtype"],
)
def test_damaged_tensors(written: Path, format: str, change: Any, said: str, tmp_path: Path):
    """If it fails, a damaged checkpoint is read as if it were whole."""
    directory = _changed(written / format, tmp_path / "bad", change)
    with pytest.raises(InputError) as error, OPENERS[format](directory):
        pass
    assert said in _one_line(error)


@pytest.mark.parametrize("format", OPENERS)
def test_damaged_files_and_configs(written: Path, format: str, tmp_path: Path):
    """If it fails, truncation or nonsense ends in a traceback, or in a model."""
    data = (written / format / "model.safetensors").read_bytes()
    for name, cut in (("half", data[: len(data) // 2]), ("head", data[:9]), ("none", b"")):
        shutil.copytree(written / format, tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(cut)
        with pytest.raises(InputError) as error, OPENERS[format](tmp_path / name):
            pass
        assert _one_line(error)
    raw = json.loads((written / format / "config.json").read_text())
    quantization = raw["quantization_config"]
    for number, wrong in enumerate(
        (None, 3, {}, {**quantization, "quant_method": "gptq"},
         {**quantization, "module_quant_configs": {"(": {"num_bits": 2}}, "config_groups": 7},
         {**quantization, "module_quant_configs": {".": {"num_bits": 2}}, "config_groups": {}})
    ):  # fmt: skip
        bad = tmp_path / f"config{number}"
        shutil.copytree(written / format, bad)
        (bad / "config.json").write_text(json.dumps(raw | {"quantization_config": wrong}))
        with pytest.raises(InputError) as error, OPENERS[format](bad):
            pass
        assert _one_line(error)


def test_keys_without_values(case, tmp_path: Path):
    """If it fails, a layer's keys are rounded and its values are not, or the other way round."""
    artifact = case.artifact(case.smallest(), "mobile")
    export_mobile(artifact, tmp_path / "good")
    bad = _changed(
        tmp_path / "good", tmp_path / "bad",
        lambda t: t.pop("model.layers.0.self_attn.v_cache_scale"),
    )  # fmt: skip
    with pytest.raises(InputError, match="keys and values"), open_mobile(bad):
        pass
    path = "layers/0/attn/k/kernel_value_cache_scale"
    floats = artifact.floats | {path: np.zeros(1, np.float32)}
    half = dataclasses.replace(artifact, floats=floats, imported=True)
    with pytest.raises(InputError, match="keys and values"):
        EXPORTERS["compressed-tensors"](half, tmp_path / "out")
