"""`gemma-qat runs`: the table, what is chosen of it, and figures for programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_qat.cli.main import main

TRAIN = {"steps": 10, "log_every": 1, "loss": "ce"}


def write_run(folder: Path, loss: float, steps: int) -> None:
    save = folder / "checkpoints" / str(steps)
    save.mkdir(parents=True)
    (save / "manifest.json").write_text("{}")
    config = {"model": "tiny_e2b", "recipe": "q4_0", "train": TRAIN}
    (folder / "config.json").write_text(json.dumps(config))
    session = {"started": "x", "ended": "y", "steps": steps}
    (folder / "run.json").write_text(json.dumps({"kind": "run", "sessions": [session]}))
    report = {"step": steps, "loss": loss, "tokens_per_second": 12345.0}
    (folder / "metrics.jsonl").write_text(json.dumps(report) + "\n")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a", 2.5, 10)
    write_run(tmp_path / "runs" / "sweep" / "b", 1.25, 4)
    return tmp_path


def names(said: str) -> list[str]:
    return [line.split()[0] for line in said.splitlines()[1:]]


def test_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, a person does not see which runs there are and how far they are."""
    assert main(["runs"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "run",
        "model",
        "recipe",
        "trains",
        "on",
        "state",
        "step",
        "loss",
        "speed",
        "reported",
        "saved",
    ]
    assert first.split() == [
        "a",
        "tiny_e2b",
        "q4_0",
        "ce",
        "done",
        "10/10",
        "2.5",
        "12.3k",
        "tokens/s",
        "0",
        "s",
        "ago",
        "10",
    ]
    assert second.split()[:6] == ["sweep/b", "tiny_e2b", "q4_0", "ce", "stopped", "4/10"]
    assert main(["runs", "--sizes"]) == 0
    assert " B" in capsys.readouterr().out


def test_some_of_them_in_an_order(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, the runs that are asked for are not those that are shown."""
    for options, expected in (
        (["--sort", "loss"], ["sweep/b", "a"]),
        (["--state", "done"], ["a"]),
        (["--state", "done", "--state", "stopped"], ["a", "sweep/b"]),
        (["runs/sweep", "runs/a"], ["runs/sweep/b", "runs/a"]),
    ):
        assert main(["runs", *options]) == 0
        assert names(capsys.readouterr().out) == expected, options
    assert main(["runs", "--state", "lost"]) == 0
    assert capsys.readouterr().out == "runs: 2 runs, none of them lost\n"


def test_figures_for_programs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, a program has to read the table."""
    assert main(["runs", "--json", "-"]) == 0
    said = capsys.readouterr().out
    assert main(["runs", "--json", "found.json"]) == 0
    assert names(capsys.readouterr().out) == ["a", "sweep/b"]
    for text in (said, (runs / "found.json").read_text()):
        found: dict[str, Any] = json.loads(text)
        assert found["kind"] == "runs"
        assert [(one["name"], one["state"], one["loss"]) for one in found["runs"]] == [
            ("a", "done", 2.5), ("sweep/b", "stopped", 1.25),
        ]  # fmt: skip


def test_a_long_error_is_cut_in_the_table_only(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, one error makes the table unreadable, or is nowhere to be read whole."""
    error = "OSError: " + 30 * "no space "
    session = {"started": "x", "ended": "y", "steps": 10, "error": error}
    (runs / "runs" / "a" / "run.json").write_text(json.dumps({"kind": "run", "sessions": [session]}))  # fmt: skip
    assert main(["runs", "--state", "failed", "--json", "f.json"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.endswith("no spa ...") and error not in line
    assert json.loads((runs / "f.json").read_text())["runs"][0]["note"] == error


def test_a_name_stays_in_its_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, the name of a folder writes over the table, or colours what follows."""
    write_run(runs / "runs" / "c\n\x1b[31m", 1.0, 4)
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 4 and "\x1b" not in out


def test_who_has_read_enough_is_told_nothing(runs: Path) -> None:
    """If it fails, `gemma-qat runs | head` ends in an error, or in a traceback."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "gemma_qat", "runs"]
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=unbuffered, check=False)  # fmt: skip
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_where_there_are_none(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, an empty directory looks like an error, or a mistyped one like an empty one."""
    (runs / "empty").mkdir()
    assert main(["runs", "empty"]) == 0
    assert capsys.readouterr().out == "empty: no runs\n"
    for wrong, said in (("nowhere", "no such directory"), ("runs/a/run.json", "no such directory")):
        assert main(["runs", wrong]) == 2
        assert capsys.readouterr().err == f"gemma-qat: error: {wrong}: {said}\n"


def test_listing_loads_no_array_library(runs: Path) -> None:
    """If it fails, the list takes seconds where it took a tenth."""
    code = (
        "import sys; from gemma_qat.cli.main import main; status = main(['runs', '--json', 'f']); "
        "sys.exit(status or sorted({'jax', 'numpy', 'rich', 'orbax'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
