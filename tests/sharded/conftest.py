"""One process with eight devices for each file of cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
Cases = Callable[[str, list[str]], dict[str, Any]]


@pytest.fixture(scope="session")
def eight() -> Cases:
    """Runs named cases of a file in a process with eight devices and returns what each found."""

    def run(file: str, names: list[str]) -> dict[str, Any]:
        root = str(HERE.parents[1])
        done = subprocess.run(
            [sys.executable, str(HERE / "eight.py"), file, *names],
            capture_output=True, text=True, check=False, cwd=root,
            env=os.environ | {"PYTHONPATH": root},
        )  # fmt: skip
        lines = [line[8:] for line in done.stdout.splitlines() if line.startswith("result: ")]
        found = {one["case"]: one for one in map(json.loads, lines)}
        missing = sorted(set(names) - set(found))
        assert not missing, f"{missing} not run:\n{done.stderr[-3000:]}"
        return found

    return run


@pytest.fixture(scope="session")
def figures() -> Callable[[dict[str, Any]], Any]:
    """Returns what a case found, or fails as it failed."""

    def of(result: dict[str, Any]) -> Any:
        assert "error" not in result, result["error"]
        return result["found"]

    return of
