"""Conversions: if these fail, a checkpoint changes on its way in, or one that was killed starts from nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from gemma_qat.checkpoint.huggingface import read_parameters
from gemma_qat.checkpoint.native import load_parameters, load_quantized
from gemma_qat.checkpoint.source import TIED, UNUSED, Leaf, Source
from gemma_qat.cli.main import main
from gemma_qat.convert import native, parts
from gemma_qat.convert.native import convert
from gemma_qat.convert.parts import digest
from gemma_qat.errors import InputError
from gemma_qat.models import fit, float_parameters, quantize_parameters
from gemma_qat.start import read_float

Make = Callable[..., Any]
SMALL = 40_000
"""Bytes of a part, so that a twin has many."""


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PART", SMALL)


def equal(found: dict[str, Any], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for path, want in wanted.items():
        np.testing.assert_array_equal(
            np.asarray(found[path]), want.astype(np.float32), err_msg=path
        )


@pytest.mark.parametrize("name", ["tiny_e2b", "tiny_26b_a4b"])
def test_floats_stay_bit_for_bit(
    name: str, hugging_face: Make, bfloat16: Any, tmp_path: Path, small_parts: None
) -> None:
    """In their own number type, in many parts; the model reads them as it reads the source."""
    made = hugging_face(name, dtype=bfloat16)
    seen: list[tuple[int, int]] = []
    found = convert(
        made.write(3), tmp_path / "out", report=lambda _, done, total: seen.append((done, total))
    )
    manifest, read = load_parameters(tmp_path / "out")
    equal(read, made.parameters)
    assert manifest == found.manifest and manifest.kind == "float" and found.resumed == 0
    assert dataclasses.replace(manifest.config, name=made.config.name) == made.config
    first, *others = sorted((tmp_path / "out" / "parameters").iterdir())
    assert len(others) > 5
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(first.absolute()).item_metadata.tree
    assert {leaf.dtype for leaf in _leaves(stored)} == {np.dtype(bfloat16)}
    assert found.origin.digests == {path: digest(x) for path, x in made.parameters.items()}
    total = sum(x.nbytes for x in made.parameters.values())
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def _leaves(tree: Any) -> list[Any]:
    if not isinstance(tree, dict):
        return [tree]
    return [leaf for below in tree.values() for leaf in _leaves(below)]


def test_what_is_left_out_is_said_and_can_be_carried(hugging_face: Make, tmp_path: Path) -> None:
    made = hugging_face("tiny_e2b", prefix="model.language_model.")
    made.json["quantization_config"] = {"bits": 4}  # of an -unquantized release: no method
    extra = {
        "model.vision_tower.patch.weight": np.arange(9, dtype=np.float16).reshape(3, 3),
        "model.audio_tower.conv.weight": np.arange(2, dtype=np.float32),
        "model.language_model.layers.5.self_attn.k_proj.weight": np.zeros((128, 128), np.float32),
        "lm_head.weight": np.zeros((64, 128), np.float32),
    }
    made.tensors |= extra
    directory = made.write()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (directory / name).write_text(name)
    plain = convert(directory, tmp_path / "plain", carry=False)
    assert plain.origin.left == dict(zip(extra, ("vision", "audio", UNUSED, TIED), strict=True))
    assert not plain.origin.carried and not (tmp_path / "plain" / native.CARRIED).exists()
    beside = sorted(path.name for path in (tmp_path / "plain" / "beside").iterdir())
    assert beside == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    ]
    carried = convert(directory, tmp_path / "carried")
    assert carried.origin.carried
    read = load_file(tmp_path / "carried" / native.CARRIED)
    assert read.keys() == {name for name in extra if "tower" in name}
    for name, array in read.items():
        assert array.dtype == extra[name].dtype
        np.testing.assert_array_equal(array, extra[name])


def coded(source: Source, recipe: str = "mobile") -> Source:
    """The source with the codes that the training quantizer gives, as a reader of a quantized file would have them."""
    fitted = fit(source.config, recipe)
    read = fitted.adopt({leaf.path: np.asarray(leaf.read()) for leaf in source.leaves})
    values = quantize_parameters(read, fitted) | {
        path: np.asarray(x) for path, x in float_parameters(read, fitted).items()
    }
    leaves = [
        Leaf(path=path, shape=tuple(x.shape), dtype="int8", bytes=1000, read=lambda x=x: x)
        for path, x in values.items()
    ]
    return dataclasses.replace(
        source, format="gemma", config=fitted.config, plans=fitted.plans, recipe=fitted.recipe,
        leaves=tuple(leaves),
    )  # fmt: skip


def test_codes_stay_codes(
    hugging_face: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed by rows or whole, read back the same; static scales of 0 are identity, as imported."""
    monkeypatch.setattr("gemma_qat.checkpoint.packing._ROWS", 2000)
    monkeypatch.setattr(parts, "_PART", 5000)
    made = hugging_face("tiny_e2b")
    kept: list[Source] = []

    def change(source: Source) -> Source:
        kept.append(coded(source))
        return kept[-1]

    found = convert(made.write(), tmp_path / "out", change=change)
    assert found.manifest.kind == "packed" and found.manifest.imported
    assert found.manifest.recipe == "mobile" and found.manifest.plans == kept[0].plans
    _, floats = load_parameters(tmp_path / "out")
    _, codes = load_quantized(tmp_path / "out")
    assert codes.keys() == kept[0].plans.keys()
    for leaf in kept[0].leaves:
        want = leaf.read()
        if leaf.path in codes:
            assert codes[leaf.path].grid == want.grid and codes[leaf.path].reduced == want.reduced
            for name in ("codes", "scale"):
                one, other = (np.asarray(getattr(x, name)) for x in (codes[leaf.path], want))
                np.testing.assert_array_equal(one, other, err_msg=leaf.path)
                assert found.origin.digests[f"{leaf.path}/{name}"] == digest(other)
        else:
            np.testing.assert_array_equal(np.asarray(floats[leaf.path]), want, err_msg=leaf.path)


KILLED = """
import os, signal, sys
from pathlib import Path
from gemma_qat.convert import native, parts
parts._PART = int(sys.argv[3])
saved, save = [], native.save_part
def save_part(directory, arrays):
    if len(saved) == int(sys.argv[4]):
        directory.parent.joinpath(directory.name + ".orbax-checkpoint-tmp").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    save(directory, arrays)
    saved.append(directory)
native.save_part = save_part
native.convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_conversion_goes_on(
    hugging_face: Make, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is seen under its name before, and what was finished is not read again."""
    made = hugging_face("tiny_12b")
    directory, out = made.write(2), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(directory), str(out), str(SMALL), "4"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, env=environment, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not out.exists()
    done = sorted((tmp_path / ".out.converting" / "parameters").glob("0000?"))
    assert len(done) == 4
    read: list[str] = []
    whole = native.read_part

    def read_part(part: Any, *rest: Any) -> Any:
        read.append(part.name)
        return whole(part, *rest)

    monkeypatch.setattr(native, "read_part", read_part)
    found = convert(directory, out)
    assert found.resumed > 0 and not {f"parameters/{path.name}" for path in done} & set(read)
    _, parameters = load_parameters(out)
    equal(parameters, made.parameters)
    assert found.origin.digests == {path: digest(x) for path, x in made.parameters.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_another_source_starts_anew(
    hugging_face: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was left of another version of the files is not mixed with this one."""
    made = hugging_face("tiny_12b")
    directory, out = made.write(), tmp_path / "out"
    monkeypatch.setattr(native, "_write_rest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(directory, out)
    monkeypatch.undo()
    assert (tmp_path / ".out.converting").is_dir() and not out.exists()
    os.utime(directory / "model.safetensors", ns=(1, 1))
    assert convert(directory, out).resumed == 0


def test_a_checkpoint_there_is_replaced_and_nothing_else(
    hugging_face: Make, tmp_path: Path
) -> None:
    directory, out = hugging_face("tiny_12b").write(), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match="not replaced"):
        convert(directory, out)
    (out / "thesis.tex").rename(out / "manifest.json")
    convert(directory, out)
    assert json.loads((out / "manifest.json").read_text())["kind"] == "float"


def test_a_disk_that_is_too_small_is_said_first(
    hugging_face: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = hugging_face("tiny_12b").write()
    usage = native.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(native.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    monkeypatch.setattr(native, "read_part", lambda *_: 1 / 0)
    with pytest.raises(InputError, match=r"0.00 GB free, 0.00 GB needed"):
        convert(directory, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_fails_leaves_only_what_can_be_gone_on_from(
    hugging_face: Make, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, refused conversions fill a disk, or a stopped one starts from nothing."""
    directory, out = hugging_face("tiny_12b").write(), tmp_path / "out"
    whole, wanted = native.read_part, ["parameters/00000", "parameters/00002"]

    def read_part(part: Any, *rest: Any) -> Any:
        if part.name == wanted[0]:
            raise InputError("no lattice")
        return whole(part, *rest)

    monkeypatch.setattr(native, "read_part", read_part)
    for left in (["hf"], [".out.converting", "hf"]):
        with pytest.raises(InputError, match="no lattice"):
            convert(directory, out)
        assert sorted(path.name for path in tmp_path.iterdir()) == left
        wanted.pop(0)
        wanted.append("none")
    assert convert(directory, out).resumed > 0


def test_numbers_that_are_not_finite_are_said(
    hugging_face: Make, bfloat16: Any, tmp_path: Path, small_parts: None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """If it fails, a poisoned checkpoint comes in unseen; its bits are kept, and a resumed conversion knows of them."""
    monkeypatch.setattr(parts, "_PIECE", 1000)
    made = hugging_face("tiny_12b", dtype=bfloat16)
    made.tensors["model.embed_tokens.weight"][-1, -1] = np.nan
    made.tensors["model.layers.5.mlp.down_proj.weight"][3, 2] = -np.inf
    directory, out = made.write(), tmp_path / "out"
    rest = native._write_rest
    monkeypatch.setattr(native, "_write_rest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(directory, out)
    monkeypatch.setattr(native, "_write_rest", rest)
    assert main(["convert", str(directory), "--out", str(out)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert said == ["not finite: 2 arrays hold inf or nan, first embed/table"]
    assert np.isnan(load_parameters(out)[1]["embed/table"][-1, -1])


def test_a_disk_that_becomes_full_is_one_line(
    hugging_face: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gemma_qat.checkpoint.store as store

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(InputError, match=r"00000: cannot be written \(.*No space left"):
        store.save_part(tmp_path / "00000", {"a": np.zeros(3)})


def test_two_conversions_do_not_meet(hugging_face: Make, tmp_path: Path) -> None:
    directory, out = hugging_face("tiny_12b").write(), tmp_path / "out"
    with native._working(out, {}), pytest.raises(InputError, match="another conversion"):
        convert(directory, out)
    convert(directory, out)


def test_a_source_that_is_not_what_it_says(hugging_face: Make, tmp_path: Path) -> None:
    """A reader that forgets an array, or gives floats for codes, is found out before anything appears."""
    directory = hugging_face("tiny_12b").write()

    def without(source: Source) -> Source:
        return dataclasses.replace(source, leaves=source.leaves[1:])

    with pytest.raises(InputError, match="is missing"):
        convert(directory, tmp_path / "out", change=without)

    def uncoded(source: Source) -> Source:
        plans = coded(source, "q4_0")
        floats = {leaf.path: leaf for leaf in source.leaves}
        leaves = [floats.get(leaf.path, leaf) for leaf in plans.leaves]
        return dataclasses.replace(plans, leaves=tuple(leaves))

    made = tmp_path / "hf"
    with pytest.raises(InputError, match="codes for sites"):
        convert(made, tmp_path / "out", change=uncoded)
    assert not (tmp_path / "out").exists()


def test_a_foreign_directory_is_read_as_its_conversion_is(
    hugging_face: Make, tmp_path: Path
) -> None:
    """`load` and training read either."""
    directory = hugging_face("tiny_e4b").write()
    convert(directory, tmp_path / "out")
    (_, one), (_, other) = read_float(directory), read_float(tmp_path / "out")
    equal(one, {path: np.asarray(x) for path, x in other.items()})
    equal(one, read_parameters(directory)[1])
