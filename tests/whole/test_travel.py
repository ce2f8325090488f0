"""What belongs to a model goes with it: from the hub and back, through post-training quantization and a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hf_directory import Directory
from safetensors.numpy import load_file

from gemma_qat import api
from gemma_qat.checkpoint.beside import Beside, native_beside
from gemma_qat.cli.main import main
from gemma_qat.config import DataConfig, ExperimentConfig
from gemma_qat.convert import convert
from gemma_qat.data import train_tokenizer
from gemma_qat.errors import InputError
from gemma_qat.models import SIZES
from gemma_qat.train import TrainConfig

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
TEXT = "def add(left, right):\n    return left + right\n"
TOWERS = {
    "model.vision_tower.patch.weight": np.arange(9, dtype=np.float16).reshape(3, 3),
    "model.audio_tower.conv.weight": np.float32([[-0.0, np.inf]]),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal directory of the hub, with 330 pieces and all that lies beside one."""
    made = Directory(
        tmp_path_factory.mktemp("hub") / "hf", "tiny_31b", np.float32, "model.language_model."
    )
    rng = np.random.default_rng(1)
    made.json |= {"vocab_size": 330, "vocab_size_per_layer_input": 330}
    table = "model.language_model.embed_tokens.weight"
    made.tensors[table] = rng.standard_normal((330, made.config.width)).astype(np.float32)
    made.tensors |= TOWERS
    made.json = {
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4",
        "text_config": made.json | {"model_type": "gemma4_text"}, "vision_config": {"hidden_size": 3},
        "quantization_config": {"bits": 4}, "image_token_id": 258880,
    }  # fmt: skip
    directory = made.write(2)
    train_tokenizer(
        [TEXT, "".join(f"value_{i} = add({i})\n" for i in range(200))],
        330,
        directory / "tokenizer.model",
    )
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text('{"top_k": 64}')
    (directory / "processor_config.json").write_text("{}")
    return directory


def tensors(directory: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_from_the_hub_and_back_not_a_bit_changes(hub: Path, tmp_path: Path) -> None:
    """If it fails, a fine-tune that came with vision and audio goes back without them, or with others."""
    assert api.convert(hub, out=tmp_path / "native").origin.carried
    api.export(tmp_path / "native", format="huggingface", out=tmp_path / "back")
    before, after = tensors(hub), tensors(tmp_path / "back")
    assert after.keys() == before.keys()
    for name, array in before.items():
        assert (after[name].dtype, after[name].shape) == (array.dtype, array.shape), name
        assert after[name].tobytes() == array.tobytes(), name
    said = json.loads((tmp_path / "back/config.json").read_text())
    assert said["architectures"] == ["Gemma4ForConditionalGeneration"]
    assert said["vision_config"] == {"hidden_size": 3} and said["image_token_id"] == 258880
    assert "quantization_config" not in said and said["text_config"]["vocab_size"] == 330
    for name in (
        "tokenizer.model",
        "chat_template.jinja",
        "generation_config.json",
        "processor_config.json",
    ):
        assert (tmp_path / "back" / name).read_bytes() == (hub / name).read_bytes()
    assert "2 tensors of vision and audio" in (tmp_path / "back/README.md").read_text()
    # What was written is a checkpoint of the hub again, towers and all.
    assert api.companions_of(tmp_path / "back").towers is not None
    api.export(tmp_path / "native", format="huggingface", out=tmp_path / "text", carry=False)
    assert all(
        name.startswith("model.layers") or "tower" not in name
        for name in tensors(tmp_path / "text")
    )
    assert json.loads((tmp_path / "text/config.json").read_text())["model_type"] == "gemma4_text"


def test_carried_or_not_is_said(hub: Path, tmp_path: Path, capsys: Any) -> None:
    """If it fails, what was left out is left out in silence, or --no-carry is not heard."""
    assert main(["convert", str(hub), "--out", str(tmp_path / "a"), "--no-carry"]) == 0
    assert "left out: 1 tensors (audio)" in capsys.readouterr().out
    assert main(["convert", str(hub), "--out", str(tmp_path / "b")]) == 0
    assert "carried: 1 tensors (vision)" in capsys.readouterr().out
    assert native_beside(tmp_path / "a").towers is None
    export = ["export", str(tmp_path / "a"), "--format", "huggingface", "--out"]
    assert main([*export, str(tmp_path / "plain")]) == 0
    assert not [name for name in tensors(tmp_path / "plain") if "tower" in name]


def test_through_ptq_to_gguf(hub: Path, tmp_path: Path, capsys: Any) -> None:
    """If it fails, a quantized checkpoint has lost its tokenizer or template on the way to llama.cpp."""
    packed = str(tmp_path / "packed")
    assert main(["ptq", str(hub), "--recipe", "q4_0", "--method", "rtn", "--out", packed]) == 0
    found = native_beside(Path(packed))
    assert found.towers is not None and found.towers.path == str(hub.resolve())
    assert main(["export", packed, "--format", "gguf", "--out", str(tmp_path / "m.gguf")]) == 0
    keys = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert keys["tokenizer.ggml.model"] == "gemma4" and len(keys["tokenizer.ggml.tokens"]) == 330
    assert keys["tokenizer.chat_template"] == TEMPLATE
    decode = ["decode", "--prompt", "def add(", "--max-new-tokens", "2", "--ckpt", packed]
    assert main(decode) == 0
    assert "def add(" in capsys.readouterr().out


def test_formats_without_towers_say_so(hub: Path, tmp_path: Path, capsys: Any) -> None:
    """If it fails, vision and audio are lost on the way to a runtime, and nobody is told."""
    packed = str(tmp_path / "packed")
    assert main(["ptq", str(hub), "--recipe", "w4a16", "--method", "rtn", "--out", packed]) == 0
    line = "left out: 2 tensors (vision, audio); --format huggingface writes them\n"
    for format in ("compressed-tensors", "native", "huggingface"):
        capsys.readouterr()
        out = tmp_path / format
        assert main(["export", packed, "--format", format, "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert (line in said) == (format != "huggingface"), said
        assert ("are left out" in (out / "README.md").read_text()) == (line in said)


def test_a_run_keeps_them_and_its_tokenizer(hub: Path, tmp_path: Path) -> None:
    """If it fails, what was trained cannot be exported without hunting for the files of its start."""
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / "text" / f"{i}.txt").write_text(TEXT * (i + 2))
    moved = shutil.copytree(hub, tmp_path / "start")
    config = ExperimentConfig(
        name="run", model="tiny_31b", recipe="float", start=str(moved), directory=str(tmp_path),
        data=DataConfig(
            kind="text", path=str(tmp_path / "text"), tokenizer=str(moved), length=16
        ),
        train=TrainConfig(steps=1, batch_size=2, save_every=1),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        sized = dataclasses.replace(SIZES["tiny_31b"], vocab_size=330)
        patch.setitem(SIZES, "tiny_31b", sized)
        api.train(config)
    run = tmp_path / "run"
    names = {path.name for path in (run / "beside").iterdir()}
    assert {"tokenizer.model", "chat_template.jinja", "config.json", "towers.json"} <= names
    api.export(run, format="huggingface", out=tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert all(written[name].tobytes() == array.tobytes() for name, array in TOWERS.items())
    shutil.rmtree(moved)
    with pytest.raises(InputError, match=r"start: 2 tensors of other models .* --no-carry"):
        api.export(run, format="huggingface", out=tmp_path / "again")
    api.export(run, format="huggingface", out=tmp_path / "again", carry=False)
    assert not [name for name in tensors(tmp_path / "again") if "tower" in name]


def test_towers_without_the_config_of_a_whole_model(hub: Path, tmp_path: Path) -> None:
    """If it fails, towers are written beside a config that does not know of them."""
    native = tmp_path / "native"
    convert(hub, native)
    said = json.loads((native / "beside/config.json").read_text())
    (native / "beside/config.json").write_text(json.dumps(said["text_config"]))
    with pytest.raises(InputError, match=r"beside/config.json: a text_config expected"):
        api.export(native, format="huggingface", out=tmp_path / "out")
    (native / "beside/towers.json").write_text("{")
    (native / "carried.safetensors").unlink()
    with pytest.raises(InputError, match=r"towers.json: not a note of where towers are"):
        api.export(native, format="huggingface", out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and Beside().files == ()
