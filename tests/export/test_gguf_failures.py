"""GGUF exports that must not happen, or must not leave anything behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from gemma_qat.errors import InputError
from gemma_qat.export import EXPORTERS, Artifact, export_gguf, exporter_named, read_gguf, write_gguf
from gemma_qat.export.check import verify_gguf
from gemma_qat.models import size_named
from gemma_qat.nn.rope import Rope


def _refused(artifact: Artifact, directory: Path, **options) -> str:
    """Exports, expecting a one-line refusal and an empty directory; returns the line."""
    with pytest.raises(InputError) as error:
        export_gguf(artifact, directory / "m.gguf", **options)
    assert list(directory.iterdir()) == []
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "kinds",
    [
        ("full", "sliding", "full", "sliding"),
        ("sliding", "sliding", "full", "sliding"),
        ("full", "full", "sliding", "full"),
    ],
)
def test_kv_sources_llama_cpp_would_abort_on(case, kinds, tmp_path: Path):
    """If this fails, the file is written and llama.cpp ends the process, or reads other keys."""
    config = case.smallest(layer_kinds=kinds)
    assert "KV-sharing layers read" in _refused(case.artifact(config), tmp_path)


@pytest.mark.parametrize("kinds", [("full", "full"), ("sliding",)])
def test_layers_llama_cpp_has_no_cache_for(case, kinds, tmp_path: Path):
    """If this fails, llama.cpp ends the process when it makes the cache (is_swa_any, n_layer_kv_from_start >= 2)."""
    config = case.smallest(layer_kinds=kinds, shared_kv_layers=0, shared_ffn_width=0)
    assert "llama.cpp needs at least two" in _refused(case.artifact(config), tmp_path)


def test_sliding_sharers_alone_need_only_their_source(case, tmp_path: Path):
    """If this fails, a layout that llama.cpp does run is refused."""
    config = case.smallest(layer_kinds=("sliding", "full", "sliding", "sliding"))
    export_gguf(case.artifact(config), tmp_path / "m.gguf")
    assert read_gguf(tmp_path / "m.gguf")


def test_grids_without_a_gguf_form(case, tmp_path: Path):
    """If this fails, codes are written as something they are not."""
    line = _refused(case.artifact(size_named("tiny_e2b"), "w2"), tmp_path)
    assert line.startswith("recipe w2 has no GGUF form: layers/0/attn/q/kernel is int2_no_zero")
    odd = case.smallest(per_layer_width=48)  # 32 does not divide its rows
    line = _refused(case.artifact(odd, "w8a8"), tmp_path)
    assert "per_layer/embed/table is int8 per channel" in line
    large = case.artifact(size_named("tiny_12b"), "w8a8")
    site = large.quantized["embed/table"]
    tiny = dataclasses.replace(site, scale=site.scale.at[3, 0].set(1e-6))
    tiny = dataclasses.replace(large, quantized={**large.quantized, "embed/table": tiny})
    line = _refused(tiny, tmp_path)
    assert "embed/table: a scale of 1e-06, which float16 cannot hold (1 of 1024)" in line


def test_a_site_that_was_not_calibrated_is_refused(case):
    """If this fails, a site that saw no data is exported as if it were to stay in float."""
    whole = case.artifact(size_named("tiny_e2b"), "mobile")
    path = "layers/0/attn/k/kernel_key_cache_scale"
    floats = whole.floats | {path: np.zeros(1, np.float32)}
    with pytest.raises(InputError, match=rf"{path}: not calibrated, it saw no data \(1 of 110"):
        dataclasses.replace(whole, floats=floats)
    assert dataclasses.replace(whole, floats=floats, imported=True).imported


def test_other_refusals(case, tmp_path: Path):
    """If this fails, something GGUF cannot say is written as if it could."""
    rope = case.smallest(local_rope=Rope(theta=1e4, fraction=0.5))
    assert "rotate 0.5" in _refused(case.artifact(rope), tmp_path)
    rows = case.artifact(case.smallest(per_layer_vocab=32))
    assert "32 rows" in _refused(rows, tmp_path)
    half = case.half_planned(size_named("tiny_26b_a4b"), "layers/2/experts/up/kernel")
    assert "blk.2.ffn_gate_up_exps.weight" in _refused(half, tmp_path)
    large = case.float_artifact(case.smallest())
    large.floats["layers/0/ffn/up/kernel"] = np.full((64, 32), 7e4, np.float32)
    assert "does not fit float16" in _refused(large, tmp_path, float_type="f16")
    large.floats["layers/0/ffn/up/kernel"] = np.full((64, 32), 3.4e38, np.float32)
    assert "does not fit bfloat16" in _refused(large, tmp_path, float_type="bf16")
    assert "float type" in _refused(large, tmp_path, float_type="f8")


def test_incomplete_artifacts(case):
    """If this fails, an array is left out of a file without anybody noticing."""
    whole = case.artifact(case.smallest())
    floats = {path: x for path, x in whole.floats.items() if path != "layers/1/scalar"}
    with pytest.raises(InputError, match="1 arrays missing, first 'layers/1/scalar'"):
        dataclasses.replace(whole, floats=floats)
    with pytest.raises(InputError, match=r"unknown.*'layers/9/scalar'"):
        dataclasses.replace(whole, floats={**whole.floats, "layers/9/scalar": np.ones(1)})
    with pytest.raises(
        InputError, match=r"final_norm/weight: shape \(3,\) given, \(64,\) expected"
    ):
        dataclasses.replace(whole, floats={**whole.floats, "final_norm/weight": np.ones(3)})


def test_corruption_is_detected(case, tmp_path: Path):
    """If this fails, a flipped bit in scales, codes, floats or keys passes verification."""
    artifact = case.artifact(case.smallest())
    path = tmp_path / "m.gguf"
    export_gguf(artifact, path)
    reader = gguf.GGUFReader(path)
    good = path.read_bytes()
    places = [field.offset for field in reader.fields.values() if field.name.startswith("gemma4.")]
    places = [place + 12 for place in places]  # inside the key's name
    places += [good.index(np.float32(1e4).tobytes()), good.index(np.float32(1e30).tobytes())]
    for tensor in reader.tensors[::5]:  # every kind of tensor is among them
        places += [tensor.data_offset, tensor.data_offset + tensor.n_bytes - 1]
    del reader
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(ValueError):
            verify_gguf(artifact, path)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match="not a readable GGUF file"):
        verify_gguf(artifact, path)


def test_failed_write_leaves_the_previous_file(case, tmp_path: Path):
    """If this fails, an interrupted export destroys the last good file."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF previous")
    artifact = case.artifact(case.smallest())

    def fail(done: int, total: int) -> None:
        if done == total // 2:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_gguf(artifact, path, progress=fail)
    with pytest.raises(ValueError, match="said no"):
        write_gguf(artifact, path, verify=_say_no)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_bytes() == b"GGUF previous"
    write_gguf(artifact, path)
    assert verify_gguf(artifact, path)["differing_codes"] == 0


def _say_no(path: Path) -> None:
    assert path.stat().st_size > 0
    raise ValueError("said no")


_KILLED = """
import os, signal, sys
from pathlib import Path
from gemma_qat.checkpoint.appear import appearing_file
with appearing_file(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_write_leaves_the_previous_file(tmp_path: Path):
    """If this fails, a killed export leaves half a file under the real name."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF previous")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _KILLED, str(path)]
    done = subprocess.run(command, env=environment, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"GGUF previous"


def test_unreadable_files(case, tmp_path: Path):
    """If this fails, a wrong path ends in a traceback from inside a library."""
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("not a model, but long enough to have a header of sorts")
    with pytest.raises(InputError, match="not a readable GGUF file"):
        read_gguf(tmp_path / "text.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="architecture 'llama' given"):
        read_gguf(tmp_path / "other.gguf")
    with pytest.raises(InputError, match="a directory given"):
        write_gguf(case.artifact(case.smallest()), tmp_path)


def test_exporters_by_name():
    """If this fails, a mistyped format does not get the nearest names."""
    assert exporter_named("gguf") is EXPORTERS["gguf"]
    with pytest.raises(InputError, match="nearest: gguf"):
        exporter_named("guff")
