"""The frame around the verbs: what a person sees for good input, bad input and a bug."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gemma_qat.cli
from gemma_qat.cli import console
from gemma_qat.cli.console import progress
from gemma_qat.cli.launch import ACTIONS
from gemma_qat.cli.main import VERBS, main
from gemma_qat.errors import InputError, nearest, unknown

Verb = Callable[..., None]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Verb:
    """Puts a verb `try` in the table that does what it is given."""

    def put(run: Callable[[argparse.Namespace], int]) -> None:
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("config")
            parser.add_argument("overlays", nargs="*", default=[])
            parser.add_argument("--variant", default="default")

        module = types.ModuleType("gemma_qat.cli.try")
        vars(module).update(add_arguments=add_arguments, run=run)
        monkeypatch.setitem(sys.modules, "gemma_qat.cli.try", module)
        monkeypatch.setitem(VERBS, "try", "for tests")

    return put


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("number", "status"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.ENOSPC, 2), (errno.EACCES, 2)]
)
def test_a_file_system_that_went_away_is_no_bad_input(
    verb: Verb, number: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a moment without storage ends a run for good: nothing starts status 2 again."""
    verb(raising(OSError(number, "of the system", "/runs/x")))
    assert main(["try", "c"]) == status
    assert capsys.readouterr().err == "gemma-qat: error: /runs/x: of the system\n"


def test_the_table_is_the_directory() -> None:
    """If it fails, a verb is listed that nobody wrote, or written and never listed."""
    directory = Path(gemma_qat.cli.__file__ or "").parent
    actions = {f"launch_{name.replace('-', '_')}" for name in ACTIONS}
    stems = (
        {path.stem for path in directory.glob("*.py")}
        - actions
        - {
            "__init__",
            "main",
            "console",
            "memory",
            "bench_decode",
            "told",
            "asked",
            "secrets",
            "checked",
            "sensitivity",
            "starting",
        }
    )
    written = {stem.replace("_", "-") for stem in stems}
    assert written == set(VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, a verb cannot even be asked what it does."""
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: gemma-qat {name}")


@pytest.mark.parametrize("name", ACTIONS)
def test_every_action_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, a part of a verb cannot even be asked what it does."""
    assert main(["launch", name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: gemma-qat launch {name}")


@pytest.mark.parametrize(
    ("given", "said"),
    [([], "an action is expected"), (["machin"], "unknown action 'machin', nearest: machine")],
)
def test_a_wrong_action_is_one_line(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a mistyped action ends in a traceback or in silence."""
    assert main(["launch", *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_help_lists_the_verbs_and_loads_no_jax() -> None:
    """If it fails, asking for help takes seconds, or leaves a verb out."""
    code = (
        "import sys; from gemma_qat.cli.main import main; status = main(['--help']); "
        "sys.exit(status or sorted({'jax', 'numpy', 'flax', 'rich'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name, summary in VERBS.items():
        assert f"  {name:<15}{summary}\n" in done.stdout


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_python_m_is_the_command(flag: str) -> None:
    """If it fails, `python -m gemma_qat` is another program than `gemma-qat`, or loses its status."""
    command = [sys.executable, "-m", "gemma_qat"]
    done = subprocess.run([*command, flag], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gemma-qat" in done.stdout
    wrong = subprocess.run([*command, "trian"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "gemma-qat: error: a verb is expected: quickstart, "),
        (["trian"], "gemma-qat: error: unknown verb 'trian', nearest: train"),
        (["--verson"], "gemma-qat: error: unrecognized arguments: --verson"),
        (["train"], "gemma-qat: error: a config file is expected, or --resume RUN"),
        (["train", "nowhere.py"], "gemma-qat: error: nowhere.py: no such config file"),
        (["train", "x.py", "--varient", "y"], "gemma-qat train: error: unrecognized arguments"),
        (["quickstart", "sede=1"], "gemma-qat: error: unknown key 'sede'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a typing mistake ends in a traceback or in status 0."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [InputError("a\nb"), FileNotFoundError("a  b")])
def test_errors_of_ours_become_one_line(
    error: Exception, verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, an error with several lines hides what it says, or has a traceback."""
    verb(raising(error))
    assert main(["try", "c.py"]) == 2
    assert capsys.readouterr().err == "gemma-qat: error: a b\n"


def test_a_bug_keeps_its_traceback(verb: Verb) -> None:
    """If it fails, a bug is shown as if the person had made a mistake."""
    verb(raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        main(["try", "c.py"])


def test_an_interrupt_is_130(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, a script cannot tell an interrupted run from a finished one."""
    verb(raising(KeyboardInterrupt()))
    assert main(["try", "c.py"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_verbs_status_is_the_commands(verb: Verb) -> None:
    """If it fails, a verb that found something wrong is taken to have succeeded."""
    verb(lambda arguments: 3)
    assert main(["try", "c.py"]) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["c.py", "a=1", "b=2", "--variant", "tiny"],
        ["c.py", "--variant", "tiny", "a=1", "b=2"],
        ["--variant", "tiny", "c.py", "a=1", "b=2"],
        ["c.py", "a=1", "--variant=tiny", "b=2"],
    ],
)
def test_overlays_stand_anywhere(arguments: list[str], verb: Verb) -> None:
    """If it fails, overlays after an option are refused as unrecognized."""
    seen: list[argparse.Namespace] = []

    def run(given: argparse.Namespace) -> int:
        seen.append(given)
        return 0

    verb(run)
    assert main(["try", *arguments]) == 0
    assert vars(seen[0]) == {"config": "c.py", "overlays": ["a=1", "b=2"], "variant": "tiny"}


@pytest.mark.parametrize(("pace", "expected"), [(0.0, 11), (3600.0, 2)])
def test_progress_prints_tenths_where_nobody_watches(
    pace: float, expected: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, a log fills with a line per step, short work with ten lines, or it says nothing for hours."""
    monkeypatch.setattr("gemma_qat.cli.console.PACE", pace)
    with progress() as report:
        for done in range(1, 41):
            report("train", done, 40)
        report("score", 0, 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["train: 40 of 40", "score: 0 of 0"]
    assert len(lines) == expected


@pytest.mark.parametrize(("file", "is_told"), [("orbax", False), ("gemma_qat", True)])
def test_only_what_a_library_left_behind_goes_unsaid(
    file: str, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, a damaged checkpoint is told of with pages of tracebacks, or an error of ours is hidden."""
    scope: dict[str, Any] = {}
    exec(compile("async def read():\n    pass", f"/lib/{file}/store.py", "exec"), scope)
    left, told = scope["read"](), []
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    console._unless_left_behind(types.SimpleNamespace(exc_value=ValueError("late"), object=left))
    left.close()
    assert bool(told) == is_told


def test_names_are_suggested() -> None:
    """If it fails, an unknown name is refused without a way out."""
    assert str(unknown("recipe", "q40", ["q4_0", "mobile"])) == (
        "unknown recipe 'q40': expected one of q4_0, mobile (nearest: q4_0)"
    )
    assert str(unknown("recipe", "zzz", ["a"])) == "unknown recipe 'zzz': expected one of a"
    assert nearest("trian", ["train", "ptq"], n=1) == "train"
