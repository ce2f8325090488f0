"""Stand-ins for the tools that launchers call: scripts that write down their arguments and answer as they are told.

No cloud, cluster or scheduler is reached in these tests. A launcher finds the stand-ins, and nothing else but a few
everyday tools, on its PATH: whether this machine has a real gcloud or kubectl makes no difference.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma_qat.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
EVERYDAY = (
    "bash", "sed", "tr", "cut", "cat", "mktemp", "rm", "tail", "head", "dirname", "grep", "git", "tar", "gzip", "mkdir",
    "sleep", "setsid", "nohup", "env",
)  # fmt: skip
HOSTILE = (
    "name=a b", "x='single'", 'y="double"', "z=$HOME", "k=$(echo pwned)", "t=`echo pwned`", "back=\\slash\\n", "",
    "two=  spaces", "glob=*", "semi=;exit 3", "uni=Größe 模型", "$$", "$(COORDINATOR)", "line=one\ntwo", "both=\n$(X)$$", "tab=a\tb", "#no", "!x",
    "--", "-e", "~", "{a,b}", "a: b", "yes", "1e3", "0o7", "null",
)  # fmt: skip
"""Words that a shell, YAML or Kubernetes could take for something else."""


class Tools:
    """A directory of stand-ins, and where launchers run with them."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "bin"
        self.path.mkdir(parents=True)
        self._calls = directory / "calls"
        self.home = directory / "home"
        self.home.mkdir()
        for name in EVERYDAY:
            found = shutil.which(name)
            assert found is not None, f"{name} is needed by the launchers"
            (self.path / name).symlink_to(found)
        self.answers = directory / "answers"
        self.answers.mkdir()

    def make(self, name: str, body: str = "") -> Path:
        """Makes a stand-in that writes its arguments down and goes on with `body`, in bash."""
        script = self.path / name
        script.write_text(
            f"#!{self.path}/bash\nprintf '%s\\0' {name} \"$@\" $'\\1' >>'{self._calls}'\n{body}\n",
            encoding="utf-8",
        )
        script.chmod(0o755)
        return script

    def drop(self, name: str) -> None:
        """Takes a tool away."""
        (self.path / name).unlink(missing_ok=True)

    def calls(self, *beginning: str) -> list[list[str]]:
        """Returns the calls so far that begin with these words, each with the tool's name first."""
        if not self._calls.exists():
            return []
        text = self._calls.read_bytes().decode()
        found = [call.split("\0")[:-1] for call in text.split("\1\0")[:-1]]
        return [call for call in found if call[: len(beginning)] == list(beginning)]

    def make_gemma_qat(self, machines: Sequence[str] = ()) -> None:
        """Makes a stand-in for `python -m gemma_qat` that knows what these machines are, as the real one does."""
        for name in machines:
            (self.answers / name).write_text(printed("launch", "machine", name), encoding="utf-8")
        (self.answers / "manifest").write_text("kind: JobSet\n", encoding="utf-8")
        self.make(
            "gemma-python",
            f"""shift 2
            on=$3
            if [ "$2" = render ]; then on=$4; fi
            if [ "$1" = launch ] && [ ! -f '{self.answers}'/"$on" ]; then
              echo "gemma-qat: error: unknown chip '$on'" >&2; exit 2; fi
            case "$1 $2" in
              "launch machine") cat '{self.answers}'/"$on" ;;
              "launch render") cat '{self.answers}/manifest' ;;
              train*) exit "${{CHECK:-0}}" ;;
            esac""",
        )

    def run(
        self, script: Path | str, *words: str, root: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a launcher with the stand-ins, and with nothing of this process's environment."""
        command = [str(self.path / "bash"), str(script), *words]
        return self.call(command, root=root, **environment)

    def call(
        self, command: Sequence[str], root: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in `root` with the stand-ins on PATH."""
        return subprocess.run(
            command, cwd=root, env=self.environment(**environment), text=True, capture_output=True,
            timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def environment(self, **more: str) -> dict[str, str]:
        """Returns what launchers see."""
        base: Mapping[str, str] = {
            "PATH": str(self.path), "HOME": str(self.home), "LC_ALL": os.environ.get("LC_ALL", "C.UTF-8"),
            "GEMMA_QAT_PYTHON": str(self.path / "gemma-python"), "CALLS": str(self._calls),
        }  # fmt: skip
        return {**base, **more}


def printed(*words: str) -> str:
    """Returns what gemma-qat prints when it ends well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(words)) == 0
    return out.getvalue()


def expanded(text: str, known: Mapping[str, str]) -> str:
    """Returns what Kubernetes makes of a word of a command, or of the value of an environment variable.

    A second writing of kubernetes/third_party/forked/golang/expansion/expand.go: $$ is $, $(NAME) the variable where
    there is one, and anything else stays.
    """

    def one(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return known.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", one, text)


def complaint(script: str, done: subprocess.CompletedProcess[str]) -> str:
    """Returns the message of a launcher that found something wrong: one line, and status 2."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{script}: error: ")
    return lines[0].removeprefix(f"{script}: error: ")


def shown_in(page: str) -> list[tuple[str, str]]:
    """Returns the commands that a page of docs/launch shows after `$ `, each with the output that stands under it."""
    text = (ROOT / "docs" / "launch" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```[a-z]*\n\$ (.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    cut = [re.split(r"(?<!\\)\n", block, maxsplit=1) for block in blocks]
    return [(head, rest[0] if rest else "") for head, *rest in cut]
