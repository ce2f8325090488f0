"""Runs are found and told apart by their files: folders are written here as training leaves them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gemma_qat.runs
from gemma_qat.errors import InputError
from gemma_qat.runs import (
    FIRST,
    LEAST,
    PATIENCE,
    STATES,
    marked_as_running,
    read_run,
    run_folders,
    runs_in,
    wait_until_left,
)

STEPS = 10
OPEN = {"started": "2026-01-01T00:00:00+00:00", "ended": None, "steps": None}
ENDED = OPEN | {"ended": "2026-01-01T01:00:00+00:00", "steps": STEPS}
ELSEWHERE = "another kernel"


def write_run(
    folder: Path,
    *,
    session: dict[str, Any] | None = None,
    reports: int = 0,
    saved: int | None = None,
    mark: str | None = None,
    old: float = 0.0,
    seconds: float = 0.1,
) -> Path:
    """A run of `STEPS` steps that moved `old` seconds ago, with a report a step."""
    folder.mkdir(parents=True)
    train = {"steps": STEPS, "log_every": 1, "loss": "kl"}
    write(folder / "config.json", {"model": "small", "recipe": "q4_0", "train": train})
    if session is not None:
        write(folder / "run.json", {"kind": "run", "sessions": [session]})
    if reports:
        lines = [{"step": n + 1, "loss": 3 - n / 10, "seconds": seconds, "tokens_per_second": 1234.0} for n in range(reports)]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if saved is not None:
        write(folder / "checkpoints" / str(saved) / "manifest.json", {})
    if mark is not None:
        (folder / ".running").write_text(mark)
    then = time.time() - old
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))
    return folder


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a config alone": ("new", {}),
    "saved at its last step and ended": ("done", {"session": ENDED, "reports": 10, "saved": 10, "old": 1e6}),
    "ended by a signal": ("stopped", {"session": ENDED | {"steps": 4}, "reports": 4, "saved": 4}),
    "ended in an error": ("failed", {"session": ENDED | {"error": "OSError: no space"}, "reports": 4, "saved": 4}),
    "ended, and its saves deleted": ("lost", {"session": ENDED, "reports": 10}),
    "saved by an older version, without run.json": ("done", {"reports": 10, "saved": 10, "old": 1e6}),
    "rounded without training": ("quantized", {"saved": 0}),
    "elsewhere, moved just now": ("running", {"session": OPEN, "reports": 2, "mark": ELSEWHERE}),
    "elsewhere, silent": ("lost", {"session": OPEN, "reports": 2, "mark": ELSEWHERE, "old": LEAST + 9}),
    "elsewhere, slow": (
        "running", {"session": OPEN, "reports": 2, "mark": ELSEWHERE, "old": LEAST + 9, "seconds": LEAST / PATIENCE + 2},
    ),
    "elsewhere, compiling": ("running", {"session": OPEN, "mark": ELSEWHERE, "old": FIRST - 60}),
    "elsewhere, never began": ("lost", {"session": OPEN, "mark": ELSEWHERE, "old": FIRST + 60}),
    "killed after its last save": ("lost", {"session": OPEN, "reports": 10, "saved": 10, "old": 1e6}),
}  # fmt: skip


@pytest.mark.parametrize(("state", "files"), CASES.values(), ids=CASES)
def test_the_state_of_a_run(state: str, files: dict[str, Any], tmp_path: Path) -> None:
    """If it fails, a person waits for a run that is dead, or starts one again that lives."""
    found = read_run(write_run(tmp_path / "run", **files))
    assert (found.state, state in STATES) == (state, True)
    assert (found.note == "OSError: no space") == (state == "failed")


def test_figures_are_those_of_the_last_whole_line(tmp_path: Path) -> None:
    """If it fails, the table shows another step's loss, or a line cut off by a kill ends it."""
    folder = write_run(tmp_path / "run", session=OPEN, reports=6, saved=4, old=100)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    found = read_run(folder, now=time.time() + 60)
    assert (found.step, found.planned, found.saved) == (6, STEPS, 4)
    assert found.loss == pytest.approx(2.5) and found.tokens_per_second == 1234
    assert found.age is not None and 60 <= found.age < 100
    assert (found.model, found.recipe, found.loss_kind) == ("small", "q4_0", "kl")


def test_a_living_process_holds_the_mark_and_a_killed_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, a run killed a second ago is called running, one in a long compilation lost, or two train one run."""
    monkeypatch.setattr(gemma_qat.runs, "ENDING", 0.0)
    folder = write_run(tmp_path / "run", session=OPEN, reports=2, saved=2, old=1e6)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom gemma_qat.runs import marked_as_running\n"
        "with marked_as_running(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "held\n"
        assert [read_run(folder).state for _ in range(3)] == ["running"] * 3
        with pytest.raises(InputError, match="run: another process trains this run"):
            wait_until_left(folder)
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until_left(folder)
    (folder / "metrics.jsonl").touch()  # As if it had reported just now.
    assert (folder / ".running").exists() and read_run(folder).state == "lost"
    with marked_as_running(folder):
        assert read_run(folder).state == "running"
    assert not (folder / ".running").exists()


def test_a_mark_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    """If it fails, a folder without locks, or without the right to write, ends a run."""
    with marked_as_running(tmp_path / "not there"):
        pass


def test_runs_are_found_and_nothing_else(tmp_path: Path) -> None:
    """If it fails, a cell of a sweep is missed, or a checkpoint is taken for a run."""
    for name in ("b", "sweep/cell", "a/b/c/deep"):
        write_run(tmp_path / name, session=ENDED, reports=10, saved=10)
    write_run(tmp_path / "a/b/c/d/too-deep", session=ENDED)
    write_run(tmp_path / ".hidden", session=ENDED)
    write(tmp_path / "hub" / "config.json", {"model_type": "gemma4"})
    write(tmp_path / "hub" / "checkpoints" / "1" / "x.json", {})
    write(tmp_path / "converted" / "manifest.json", {})
    write_run(tmp_path / "converted" / "inside")
    (tmp_path / "rows").mkdir()
    (tmp_path / "sweep" / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = [str(path.relative_to(tmp_path)) for path in run_folders(tmp_path)]
    assert found == ["a/b/c/deep", "b", "sweep/cell"]
    assert [one.name for one in runs_in(tmp_path / "b")] == ["b"]
    assert runs_in(tmp_path / "b", sizes=True)[0].bytes == sum(
        path.stat().st_size for path in (tmp_path / "b").rglob("*") if path.is_file()
    )


DAMAGE = {
    "cut off": ("config.json", '{"model": "sm', "config.json: not JSON"),
    "a list": ("config.json", "[]", "config.json: no object"),
    "deeply nested": ("config.json", "[" * 100_000, "config.json: not JSON"),
    "of another kind": ("config.json", '{"train": 3}', "config.json: no 'train' and 'model' in it"),
    "no number of steps": (
        "config.json", '{"model": "m", "train": {"steps": "x"}}', "config.json: train.steps and train.log_every are no numbers",
    ),
    "run.json cut off": ("run.json", "{", "run.json: not JSON"),
    "no sessions": ("run.json", '{"kind": "run", "sessions": [3]}', "run.json: 'sessions' is no list of objects"),
    "binary": ("config.json", "\udcff\udcfe", "config.json: not JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "note"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_a_row(name: str, text: str, note: str, tmp_path: Path) -> None:
    """If it fails, one damaged file hides all other runs, or itself."""
    folder = write_run(tmp_path / "run", session=ENDED, reports=10, saved=10)
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    (found,) = runs_in(tmp_path)
    assert (found.state, found.note) == ("damaged", note)


def test_a_run_without_its_config_is_a_row(tmp_path: Path) -> None:
    """If it fails, a run whose config was deleted is not shown at all."""
    folder = write_run(tmp_path / "run", session=ENDED, reports=10, saved=10)
    (folder / "config.json").unlink()
    (found,) = runs_in(tmp_path)
    assert (found.state, found.note) == ("damaged", "config.json: No such file or directory")


@pytest.mark.parametrize("line", ["", "nonsense", '{"step": "x"}', '{"step": 3, "loss": NaN}', "[1]"])  # fmt: skip
def test_metrics_that_say_nothing_do_not_matter(line: str, tmp_path: Path) -> None:
    """If it fails, a strange line of metrics hides the run."""
    folder = write_run(tmp_path / "run", session=OPEN | ENDED, saved=10)
    (folder / "metrics.jsonl").write_text(f"{line}\n")
    found = read_run(folder)
    assert (found.state, found.loss) == ("done", None)
