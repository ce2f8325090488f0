"""What a run shows and leaves behind: one small run in three starts, looked at from all sides."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemma_qat.train as train
from gemma_qat.checkpoint.native import load_parameters, load_quantized
from gemma_qat.cli.main import main
from gemma_qat.cli.told import line_of
from gemma_qat.config import ExperimentConfig, from_json
from gemma_qat.errors import RETRY
from gemma_qat.numerics.formats import FORMATS
from gemma_qat.train import Point, code_report
from gemma_qat.train.optimizer import schedule

OVERLAYS = (
    "train.steps=4", "train.log_every=1", "train.tensorboard=true", "optimizer.decay=cosine",
)  # fmt: skip


@pytest.fixture(scope="module")
def left(project: Any, compiled_once: None) -> tuple[Path, list[list[str]]]:
    """The folder of a run of four steps that lost its last save, went on, was stopped after step 3, and went on again.

    Also what the three starts printed.
    """
    where, said = project.folder / "told", []

    @contextlib.contextmanager
    def after_three(_: Any) -> Iterator[Any]:
        yield lambda step: step == 3

    for status, stop in ((0, train.stop_on_signals), (RETRY, after_three), (0, after_three)):
        shutil.rmtree(where / "run" / "checkpoints" / "4", ignore_errors=True)
        more = ["--show-config"] if said else []
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "stop_on_signals", stop)
            command = ["train", f"{project.folder}/config.py", f"directory={where}"]
            assert main([*command, *OVERLAYS, *more]) == status
        said.append(out.getvalue().splitlines())
    return where / "run", said


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events_of(folder: Path) -> list[Any]:
    """Every event of the files in order, as a reader keeps them: a START drops its step and later ones."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    kept: list[Any] = []
    for file in sorted((folder / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == SessionLog.START:
                kept = [other for other in kept if other.step < event.step]
            kept.append(event)
    return [event for event in kept if event.summary.value]


def test_it_says_who_asked_for_what_and_where_it_runs(left: Any) -> None:
    """If it fails, a person cannot see what was set by the file and what by the command, or on what it runs."""
    first, again, _ = left[1]
    values = {line.split()[0]: line.split()[1:] for line in first if line.startswith("  ")}
    assert values["train.steps"] == ["4", "overlay"]
    assert values["recipe"] == ["q4_0", "file"]
    assert "train.seed" not in values
    shown = {line.split()[0]: line.split()[-1] for line in again if line.startswith("  ")}
    assert shown["train.seed"] == "default" and len(shown) > 50
    for line in ("devices 1 x cpu, no mesh", "model small as q4_0: 29.4k parameters, 4 rows of 16"):
        assert any(said.startswith(line) for said in first)
    assert any(re.match(r"memory about [\d.]+ MiB a device \(estimated; ", s) for s in first)


def test_a_line_a_report_and_nothing_else_where_nobody_watches(left: Any) -> None:
    """If it fails, a log has bars or colours in it, says steps twice, or lacks a figure that there is."""
    number = r"[\d.]+(e[-+]\d+)?"
    form = (
        rf"step \d/4  {number} s  {number} TFLOP/s/device  {number}k? tokens/s/device"
        rf"  loss {number}  flipped {number} %"
    )
    for said, steps in zip(left[1], ([1, 2, 3, 4], [3], [4]), strict=True):
        lines = [line for line in said if re.match(r"step +\d+/", line)]
        assert [int(line.split()[1].split("/")[0]) for line in lines] == steps
        assert all(re.fullmatch(form, line) for line in lines), lines
        assert not any("\x1b" in line or line.startswith("train run") for line in said)


def test_all_figures_have_their_form() -> None:
    """By hand: 8 devices, a float teacher, a chip whose peak is known."""
    metrics = {
        "loss": 1.2344, "kl": 0.0123, "agree": 0.912, "flipped": 0.0012, "seconds": 0.41, "mfu": 0.381,
        "tokens_per_second": 8 * 41234.0, "model_flops_per_second": 8 * 2.1e12, "learning_rate": 1e-5,
    }  # fmt: skip
    assert line_of(Point(step=120, steps=400, metrics=metrics), 8) == (
        "step 120/400  0.41 s  2.1 TFLOP/s/device  41.2k tokens/s/device  MFU 38.1 %  loss 1.234  KL 0.0123"
        "  same-top 91.2 %  flipped 0.12 %"
    )


def test_every_report_is_told_once_with_its_seconds_and_rate(left: Any) -> None:
    """If it fails, reports that a save read together are lost, or the rate is another step's."""
    rows = metrics_of(left[0])
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["seconds"] > 0 for row in rows)
    config = from_json(ExperimentConfig, (left[0] / "config.json").read_text())
    rate = schedule(config.optimizer, config.optimizer.learning_rate, 4)
    wanted = [float(rate(step)) for step in range(4)]
    np.testing.assert_allclose([row["learning_rate"] for row in rows], wanted, rtol=1e-6)
    assert len(set(wanted)) > 2


def test_tensorboard_shows_the_metrics_once(left: Any) -> None:
    """If it fails, TensorBoard shows other numbers than metrics.jsonl, or a resumed run's points twice."""
    events = events_of(left[0])
    for event, row in zip(events, metrics_of(left[0]), strict=True):
        found = {
            v.tag: v.simple_value for v in event.summary.value if not v.tag.startswith("codes/")
        }
        assert {"step": event.step, **found} == {
            name: value if name == "step" else float(np.float32(value))
            for name, value in row.items()
        }
    files = list((left[0] / "tensorboard").iterdir())
    assert len(files) == 3 and not any(socket.gethostname() in file.name for file in files)


def test_histograms_count_the_codes_of_the_step(left: Any) -> None:
    """If it fails, a histogram shows codes that no save has, or bars that stand beside their code."""
    _, quantized = load_quantized(left[0] / "checkpoints" / "4")
    last = events_of(left[0])[-1].summary.value
    shown = {value.tag.removeprefix("codes/"): value.histo for value in last if value.histo.num}
    assert shown.keys() == {q.grid.format for q in quantized.values()}
    for name, histogram in shown.items():
        first, counts = counted(name, [q for q in quantized.values() if q.grid.format == name])
        np.testing.assert_array_equal(histogram.bucket, counts)
        np.testing.assert_array_equal(histogram.bucket_limit, np.arange(len(counts)) + first + 0.5)
        assert histogram.num == counts.sum() and histogram.min == first - 0.5


def counted(name: str, parts: list[Any]) -> tuple[int, np.ndarray]:
    first, size = FORMATS[name].code_min, FORMATS[name].code_max - FORMATS[name].code_min + 1
    codes = np.concatenate([np.ravel(q.codes) for q in parts]).astype(int) - first
    return first, np.bincount(codes, minlength=size)


def test_codes_json_is_the_error_and_use_of_every_site(left: Any) -> None:
    """Against numpy on the last save: if it fails, the report's per-layer figures are not those of the checkpoint."""
    found = json.loads((left[0] / "codes.json").read_text())
    manifest, parameters = load_parameters(left[0] / "checkpoints" / "4")
    _, quantized = load_quantized(left[0] / "checkpoints" / "4")
    assert (found["kind"], found["recipe"], found["step"]) == ("codes", "q4_0", 4)
    assert found["sites"].keys() == manifest.plans.keys()
    for path, row in found["sites"].items():
        w, q = np.asarray(parameters[path], np.float64), quantized[path]
        error = np.linalg.norm(w - np.asarray(q.dequantize())) / np.linalg.norm(w)
        assert row["relative_error"] == pytest.approx(error, rel=1e-5)
        assert 0 <= row["clipped"] < 0.1
        np.testing.assert_array_equal(row["counts"], counted(row["format"], [q])[1])
        assert (row["layer"] is not None) == path.startswith("layers/")
    for name, use in found["code_use"].items():
        parts = [q for q in quantized.values() if q.grid.format == name]
        first, counts = counted(name, parts)
        assert use["codes"] == list(range(first, first + len(counts)))
        np.testing.assert_array_equal(use["counts"], counts)
    for given in (None, quantized):
        report = code_report(parameters, manifest.fitted, given)
        assert report["code_use"] == found["code_use"]
        for path, row in report["sites"].items():
            error = found["sites"][path]["relative_error"]
            assert row == found["sites"][path] | {"relative_error": pytest.approx(error)}
    alone = code_report({}, manifest.fitted, quantized)
    assert alone["code_use"] == found["code_use"]
    assert not any("relative_error" in row for row in alone["sites"].values())


def test_run_json_says_what_was_trained_and_nothing_of_the_machine(left: Any, project: Any) -> None:
    """If it fails, a run cannot be told from another of the same name, or says where it ran."""
    text = (left[0] / "run.json").read_text()
    found = json.loads(text)
    assert found["versions"].keys() >= {"python", "jax", "flax", "optax", "gemma_qat"}
    assert (found["devices"], found["processes"], found["parameters"]) == ({"cpu": 1}, 1, 29410)
    assert re.fullmatch("[0-9a-f]{64}", found["data"]["tokenizer"]["tokenizer.model"])
    assert len(found["data"]["digest"]) == len(found["data"]["rows"]) == 1
    assert [one["steps"] for one in found["sessions"]] == [4, 3, 4]
    stamps = [one[key] for one in found["sessions"] for key in ("started", "ended")]
    assert stamps == sorted(stamps) and all(stamp.endswith("+00:00") for stamp in stamps)
    assert socket.gethostname() not in text and str(project.folder) not in text
    rows = json.loads((left[0] / "coverage.json").read_text())
    lines = (left[0] / "coverage.txt").read_text().splitlines()
    assert [row["site"] for row in rows] == [line.split()[0] for line in lines]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
