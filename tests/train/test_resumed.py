"""A run that failed, was moved and is resumed by its folder's name equals one that never stopped.

Its texts lie under a path that a secret variable of the environment names, so the same starts show that secrets are
kept out of everything that is written.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_qat.checkpoint.native import load_parameters
from gemma_qat.cli import report
from gemma_qat.cli.main import main
from gemma_qat.errors import InputError
from gemma_qat.resume import resumed, run_named
from gemma_qat.runs import read_run
from gemma_qat.train.speed import MetricsFile

SECRET = "correct-horse-battery"
OVERLAYS = ("recipe=float", "train.steps=6", "train.log_every=1", "train.save_every=2")


def said_by(*command: object, status: int = 0) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            assert main([str(word) for word in command]) == status, err.getvalue()
        except OSError as error:
            err.write(str(error))
    return out.getvalue() + err.getvalue()


@pytest.fixture(scope="module")
def starts(project: Any, compiled_once: None) -> tuple[Path, dict[str, str], Any]:
    """Three starts: whole, one that fails on the report of step 3 when step 4 is saved, that one moved and resumed; what they said and how it had failed."""
    where, texts = project.folder / "resumed", project.folder / f"mount-{SECRET}"
    texts.symlink_to(project.folder / "text", target_is_directory=True)
    write = MetricsFile.write
    said: dict[str, str] = {}

    def failing(self: MetricsFile, step: int, metrics: Any) -> None:
        if step == 3:
            raise OSError(28, f"No space left on {SECRET}")
        write(self, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOUNT_PASSWORD", SECRET)
        patch.chdir(where.parent)
        command = ["train", project.folder / "config.py", *OVERLAYS, f"data.path={texts}"]
        with (
            patch.context() as one
        ):  # Its page is one of the resumed run's kind, and takes a second.
            one.setattr(report, "page_of", str)
            said["whole"] = said_by(*command, f"directory={where / 'whole'}")
        patch.setattr(MetricsFile, "write", failing)
        said["failed"] = said_by(*command, f"directory={where / 'first'}", status=2)
        patch.setattr(MetricsFile, "write", write)
        failed = read_run(where / "first" / "run")
        (where / "runs").mkdir()
        (where / "first" / "run").rename(where / "runs" / "moved")
        patch.chdir(where)
        said["refused"] = said_by("train", "--resume", "moved", status=2)
        said["resumed"] = said_by("train", "--resume", "moved", f"data.path={texts}")
    return where, said, failed


def test_the_resumed_run_equals_the_one_that_never_stopped(starts: Any) -> None:
    """If it fails, `--resume` trains something else than the command the run was started with."""
    ours, other = starts[0] / "runs" / "moved", starts[0] / "whole" / "run"
    _, expected = load_parameters(other / "checkpoints" / "6")
    _, found = load_parameters(ours / "checkpoints" / "6")
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(leaf), err_msg=path)
    data = [json.loads((one / "checkpoints" / "6" / "data.json").read_text()) for one in (ours, other)]  # fmt: skip
    assert data[0] == data[1]
    configs = [json.loads((one / "config.json").read_text()) for one in (ours, other)]
    assert (configs[0]["directory"], configs[0]["name"]) == ("runs", "moved")
    assert configs[0] == configs[1] | {"directory": "runs", "name": "moved"}
    assert starts[1]["resumed"].startswith("config runs/moved/config.json\n")
    steps = [line.split()[1] for line in starts[1]["resumed"].splitlines() if "tokens/s" in line]
    assert steps == ["5/6", "6/6"], "it did not go on from where the run failed"


def test_a_run_that_failed_says_so(starts: Any) -> None:
    """If it fails, a run that ran into an error looks as if its machine had died, or nobody learns why."""
    failed = starts[2]
    assert (failed.state, failed.saved, failed.step) == ("failed", 4, 4)
    assert failed.note == "OSError: [Errno 28] No space left on <redacted: MOUNT_PASSWORD>"
    found = read_run(starts[0] / "runs" / "moved")
    assert (found.state, found.step, found.note) == ("done", 6, "")
    about = json.loads((starts[0] / "runs" / "moved" / "run.json").read_text())
    assert [(one["steps"], "error" in one) for one in about["sessions"]] == [(4, True), (6, False)]
    assert not list(starts[0].rglob(".running"))


def test_secrets_of_the_environment_are_not_written(starts: Any) -> None:
    """If it fails, a password stands in config.json, in a log, in a report, or in a save."""
    where, said, _ = starts
    for file in where.rglob("*"):
        assert SECRET not in file.name
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
    assert [line for text in said.values() for line in text.splitlines() if SECRET in line] == []
    config = json.loads((where / "whole" / "run" / "config.json").read_text())
    assert config["data"]["path"].endswith("/mount-<redacted: MOUNT_PASSWORD>")
    assert "mount-<redacted: MOUNT_PASSWORD>" in said["whole"]


def test_a_redacted_value_is_asked_for(starts: Any) -> None:
    """If it fails, a resumed run looks for its texts under a path that never was."""
    line = starts[1]["refused"]
    assert line.count("\n") == 1
    assert line.startswith("gemma-qat: error: runs/moved/config.json: data.path was redacted (")
    assert line.endswith("; give data.path=...\n")


def test_a_run_ends_in_its_page(starts: Any) -> None:
    """If it fails, a run leaves no page, or one that cannot be made ends a run that trained well."""
    folder = starts[0] / "runs" / "moved"
    assert starts[1]["resumed"].endswith("runs/moved/report.html: the page of this run\n")
    assert "</html>" in (folder / "report.html").read_text()
    broken = shutil.copytree(folder, starts[0] / "broken")
    (broken / "coverage.json").write_text("{")
    line = report.page_of(broken)
    assert line.startswith(f"{broken}/report.html: not written (InputError: ") and "\n" not in line


def test_how_a_run_is_named(starts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it fails, a run's name does not find it, or finds another."""
    monkeypatch.chdir(starts[0])
    assert run_named("moved") == run_named("runs/moved") == Path("runs/moved")
    assert run_named("whole/run") == Path("whole/run")
    for name, said in (
        ("move", r"unknown run in runs/ 'move': expected one of moved \(nearest: moved\)"),
        ("whole", "whole: no run lies there; runs in it: whole/run"),
    ):
        with pytest.raises(InputError, match=said):
            run_named(name)
    with pytest.raises(InputError, match="no such run, and there are none in elsewhere/"):
        run_named("moved?", Path("elsewhere"))


def test_several_runs_of_a_name_are_told_apart(tmp_path: Path) -> None:
    """If it fails, a cell of one sweep is resumed for that of another."""
    for sweep in ("one", "two"):
        (tmp_path / sweep / "cell").mkdir(parents=True)
        (tmp_path / sweep / "cell" / "config.json").write_text('{"model": "", "train": {}}')
    assert run_named("two/cell", tmp_path) == tmp_path / "two" / "cell"
    with pytest.raises(InputError, match="run 'cell': there are several: one/cell, two/cell"):
        run_named("cell", tmp_path)


def test_overlays_go_onto_the_runs_own_config(starts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it fails, a run cannot be trained longer, or turns into another one unseen."""
    monkeypatch.chdir(starts[0])
    _, base, config = resumed("moved", ["train.steps=9", "data.path=texts"])
    assert (base.train.steps, config.train.steps, config.name) == (6, 9, "moved")
    for overlay in ("name=other", "directory=elsewhere"):
        with pytest.raises(InputError, match="they cannot be given"):
            resumed("moved", ["data.path=texts", overlay])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["config.py", "--resume", "moved"], "config.py and --resume: a run goes on by its own config.json, give one"),
        (["--resume", "moved", "--variant", "tiny"], "--variant tiny and --resume: a run has one config only"),
        (["--resume", "moved", "train.stepz=3"], "nearest: steps"),
        (["--resume", "nowhere"], "unknown run in runs/ 'nowhere'"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_resume_is_one_line(
    words: list[str], said: str, starts: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """If it fails, one of two configs is silently left aside."""
    monkeypatch.chdir(starts[0])
    assert main(["train", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": "{", "run.json": "{}"}, "config.json: not JSON"),
        ({"config.json": '{"model": "m", "train": {"steps": 3}, "x": 1}'}, "config.json: unknown key"),
        ({"config.json": '{"model": "m", "train": {"steps": 3}}', "checkpoints/0/manifest.json": "{}"},
         "quantized without training, nothing to go on with"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_go_on_is_one_line(
    files: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a damaged run ends in a traceback, or trains from scratch."""
    for name, text in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


def test_a_folder_is_not_named_after_a_secret(
    project: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, the name of a folder, which everything prints, gives a secret away."""
    monkeypatch.setenv("RUN_TOKEN", SECRET)
    assert main(["train", str(project.folder / "config.py"), f"name=x-{SECRET}"]) == 2
    err = capsys.readouterr().err
    assert "name: it holds the value of RUN_TOKEN" in err and SECRET not in err
