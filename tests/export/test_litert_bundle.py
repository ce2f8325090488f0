"""Bundles for LiteRT-LM: what stands in them, and the way through the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from phone_twins import phone_codes

from gemma_qat.checkpoint.source import Reading
from gemma_qat.cli.main import main
from gemma_qat.data import Tokenizer, train_tokenizer
from gemma_qat.errors import InputError
from gemma_qat.export import artifact_of, export_native
from gemma_qat.export.check import compare
from gemma_qat.export.litert import (
    Lengths,
    LiteRTModel,
    as_written,
    export_litert,
    open_litert,
)
from gemma_qat.export.litert.bundle import model_within

pytest.importorskip("litert_converter", reason="LiteRT's converter has no wheel for this machine")
builder = pytest.importorskip(
    "litert_lm_builder.litertlm_builder", reason="litert-lm-builder has no wheel for this machine"
)

SHORT = Lengths(prefill=4, cache=16)
VOCAB = 330


@pytest.fixture(scope="module")
def wide(case: ModuleType) -> Any:
    """An artifact with room for a tokenizer's pieces."""
    return phone_codes("e2b", VOCAB)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    lines = [f"value_{i} = add({i}, {i * 7})\n" for i in range(200)]
    words = "def add(left, right):\n    return left + right\n\n\nclass Point:\n    x, y = 0, 10\n"
    return train_tokenizer([words * 8, "".join(lines)], VOCAB, tmp_path_factory.mktemp("t") / "t.model", ("<|turn>", "<turn|>"))  # fmt: skip


def _sections(path: Path, folder: Path) -> dict[str, bytes]:
    """What the builder's own unpacking finds in a bundle, by kind of section."""
    builder.unpack(str(path), str(folder))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_bundle_holds_model_tokenizer_and_metadata(
    wide: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """If it fails, LiteRT-LM begins with another token, never stops, or reads text with another tokenizer."""
    from google.protobuf import text_format
    from litert_lm_builder.runtime.proto.llm_metadata_pb2 import LlmMetadata

    artifact = dataclasses.replace(wide, tokenizer=tokenizer, chat_template="{{ messages }}")
    bundle, alone = tmp_path / "m.litertlm", tmp_path / "m.tflite"
    size = export_litert(artifact, bundle, SHORT)
    export_litert(artifact, alone, SHORT)
    assert size["bytes"] == bundle.stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.litertlm", "m.tflite"]
    begin, end = model_within(bundle)
    assert bundle.read_bytes()[begin:end] == alone.read_bytes()
    found = _sections(bundle, tmp_path / "unpacked")
    assert tokenizer.model in found.values() and alone.read_bytes() in found.values()
    said = LlmMetadata()
    text_format.Parse(found["LlmMetadataProto.pbtext"].decode(), said)
    assert [*said.start_token.token_ids.ids] == [tokenizer.bos_id]
    stops = [[*stop.token_ids.ids] for stop in said.stop_tokens]
    assert stops == [[tokenizer.eos_id], [tokenizer.id_of("<turn|>")]]
    assert said.max_num_tokens == 16 and said.jinja_prompt_template == "{{ messages }}"
    assert said.llm_model_type.WhichOneof("model_type") == "gemma4"
    assert said.prompt_templates.user.prefix == "<|turn>user\n"


def test_a_bundle_reads_back_as_what_was_written(
    wide: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """If it fails, `--verify` of a bundle looks at something else than its model."""
    bundle = tmp_path / "m.litertlm"
    export_litert(dataclasses.replace(wide, tokenizer=tokenizer), bundle, SHORT)
    with open_litert(bundle) as source:
        counts = compare(as_written(wide), Reading(source))
    assert {n for name, n in counts.items() if name != "tensors"} == {0}
    cut = tmp_path / "cut.litertlm"
    cut.write_bytes(bundle.read_bytes()[:20_000])
    with pytest.raises(InputError, match=r"cut\.litertlm"), open_litert(cut):
        pass


def test_a_bundle_needs_the_models_tokenizer(
    wide: Any, tokenizer: Tokenizer, case: ModuleType, tmp_path: Path
) -> None:
    """If it fails, a bundle appears that no text can be given to."""
    with pytest.raises(InputError, match="--tokenizer FILE"):
        export_litert(wide, tmp_path / "m.litertlm", SHORT)
    small = dataclasses.replace(phone_codes(), tokenizer=tokenizer)
    with pytest.raises(InputError, match="another model's"):
        export_litert(small, tmp_path / "m.litertlm", SHORT)
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def packed(wide: Any, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint with its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("packed")
    export_native(wide, folder / "checkpoint")
    (folder / "t.model").write_bytes(tokenizer.model)
    return folder


def test_through_the_command_line(packed: Path, tmp_path: Path, capsys) -> None:
    """If it fails, what a user types does not make the file that the library makes, or does not come back."""
    out, lengths = tmp_path / "m.litertlm", ["--prefill", "4", "--cache", "16"]
    export = ["export", str(packed / "checkpoint"), "--format", "litert"]
    tokenizer = ["--tokenizer", str(packed / "t.model")]
    report = ["--verify", "--json", str(tmp_path / "export.json")]
    assert main([*export, "--out", str(out), *lengths, *tokenizer, *report]) == 0
    assert "differing codes 0, differing scales 0, differing floats 0" in capsys.readouterr().out
    assert json.loads((tmp_path / "export.json").read_text())["format"] == "litert"
    assert main(["convert", str(out), "--out", str(tmp_path / "again")]) == 0
    before, after = artifact_of(packed / "checkpoint"), artifact_of(tmp_path / "again")
    for path, q in as_written(before).quantized.items():
        np.testing.assert_array_equal(q.codes, after.quantized[path].codes, err_msg=path)
    capsys.readouterr()
    assert main([*export[:3], "native", "--out", str(tmp_path / "n"), "--cache", "16"]) == 2
    assert "litert has one" in capsys.readouterr().err
    assert main([*export, "--out", str(tmp_path / "x.litertlm")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.litertlm").exists() and not (tmp_path / "n").exists()


def test_decode_runs_a_model_with_the_phones_runtime(packed: Path, tmp_path: Path, capsys) -> None:
    """If it fails, a user cannot look at what was exported, or sees what another arithmetic says."""
    out, tokenizer = tmp_path / "m.tflite", ["--tokenizer", str(packed / "t.model")]
    lengths = ["--prefill", "4", "--cache", "32"]
    assert main(["export", str(packed / "checkpoint"), "--format", "litert", "--out", str(out), *lengths]) == 0  # fmt: skip
    capsys.readouterr()
    decode = ["decode", "--ckpt", str(out), "--prompt", "value_1 = add(", "--max-new-tokens", "8"]
    assert main([*decode, *tokenizer]) == 0
    said = capsys.readouterr().out
    model, read = LiteRTModel(out), Tokenizer.load(packed / "t.model")
    found = model.generate(read.encode("value_1 = add(", bos=True), 8).tolist()
    found = found[: found.index(read.eos_id)] if read.eos_id in found else found
    assert said == "value_1 = add(" + read.decode(found) + "\n"
    refused = ([], ["--cache", "int8", *tokenizer], ["--max-new-tokens", "99", *tokenizer])
    for more, what in zip(refused, ("no tokenizer", "--cache is not for", "32 slots"), strict=True):
        assert main([*decode, *more]) == 2
        shown = capsys.readouterr()
        assert what in shown.err and shown.err.count("gemma-qat") == 1 and shown.out == ""
