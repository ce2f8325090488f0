"""Damaged Orbax files: if these fail, one flipped bit ends in a traceback, a hang, an eaten machine, or other weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
FORMS = ("ocdbt", "files", "zarr3", "packed")


def sweep(folder: Path, seed: int, count: int, *forms: str) -> list[dict[str, Any]]:
    """What became of `count` damaged copies of each form."""
    paths = os.pathsep.join((str(HERE.parents[1]), str(HERE.parent)))
    done = subprocess.run(
        [sys.executable, str(HERE / "damage.py"), str(folder), str(seed), str(count), *forms],
        capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended in {lines[-1:]}: {done.stderr[-2000:]}"
    return [json.loads(line[8:]) for line in lines if line.startswith("result: ")]


def holds_arrays(file: str) -> bool:
    """Whether a file's bytes may be those of an array, which carry no check: chunks, and the database's data."""
    path = Path(file)
    return path.parent.name == "d" or path.name[0].isdigit()


def check(found: list[dict[str, Any]], count: int) -> None:
    """Read and the same, or refused in one line that says where; other values only where arrays themselves are."""
    assert len(found) == count
    for one in found:
        assert "error" not in one, one
        assert one["megabytes"] < 256, one
        if "refused" in one:
            assert "\n" not in one["refused"] and one["path"] in one["refused"], one
        elif not holds_arrays(one["file"]):
            assert one["differ"] == [], one
        else:
            assert len(one["differ"]) <= 2, one  # damage at the edge of two arrays
    refused = sum("refused" in one for one in found)
    print(f"{refused} of {count} refused")
    assert 0 < refused < count


def test_damaged_orbax_checkpoints(tmp_path: Path) -> None:
    """If it fails, a download that was cut short, or a tree that somebody made for the purpose, does more than not open."""
    found = sweep(tmp_path, 0, 12, *FORMS)
    check(found, 12 * len(FORMS))
    assert {one["form"] for one in found} == set(FORMS)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [1, 2])
def test_many_damaged_orbax_checkpoints(form: str, seed: int, tmp_path: Path) -> None:
    """As above, 400 times: about a minute each."""
    check(sweep(tmp_path, seed, 400, form), 400)
