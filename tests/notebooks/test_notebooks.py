"""The notebooks of experiments/colab: tidy in git, and they run.

The numerics explorer runs in the default suite at its smallest size, its cells as a plain script. All of them run, as
Jupyter runs them, with

    pip install '.[notebooks]'
    bash launch/test.sh -n 0 -m notebooks tests/notebooks

in some ten minutes; with GEMMA_QAT_NOTEBOOK_FAST=1 at the smallest size.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gemma_qat

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
REPOSITORY = "gemma-qat/gemma_qat"
"""The public repository that badges and install cells name; experiments/colab/README.md says so too."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str = "") -> list[dict[str, Any]]:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if kind in ("", cell["cell_type"])]


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
        **more,
    }


def test_there_are_five() -> None:
    """If it fails, a notebook is gone, or one came without a line in the table of the folder's README."""
    assert len(NOTEBOOKS) == 5
    said = (FOLDER / "README.md").read_text("utf-8")
    assert [path.name for path in NOTEBOOKS if f"({path.name})" not in said] == []
    assert REPOSITORY in said


@each_notebook
def test_it_is_tidy(path: Path) -> None:
    """If it fails, outputs or counts of a run were committed, or cells cannot be told apart in a diff.

    To clear: jupyter nbconvert --clear-output --inplace NOTEBOOK
    """
    whole = json.loads(path.read_text("utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    assert set(whole["metadata"]) == {"kernelspec", "language_info"}
    names = [cell["id"] for cell in whole["cells"]]
    assert len(set(names)) == len(names)
    for cell in whole["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert cell["metadata"] == {}, cell["id"]
        assert source_of(cell).strip(), f"{cell['id']}: empty"
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]


@each_notebook
def test_it_opens_in_colab(path: Path) -> None:
    """If it fails, the badge opens another notebook, or one that cannot import what it needs."""
    header, install = cells_of(path)[:2]
    where = f"github/{REPOSITORY}/blob/main/experiments/colab/{path.name}"
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    assert f"[![Open in Colab]({badge})](https://colab.research.google.com/{where})" in source_of(
        header
    )
    assert source_of(install) == source_of(cells_of(NOTEBOOKS[0])[1])
    assert f"git+https://github.com/{REPOSITORY}" in source_of(install)


def uses_of(path: Path) -> Iterator[tuple[str, str]]:
    """Names of the package that a notebook takes, as (module, name)."""
    for cell in cells_of(path, "code"):
        for node in ast.walk(ast.parse(source_of(cell))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gemma_qat"):
                yield from ((str(node.module), alias.name) for alias in node.names)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "gemma_qat":
                assert node.attr in gemma_qat.__all__, node.attr
                yield "gemma_qat", node.attr


@each_notebook
def test_what_it_takes_from_the_package_is_there(path: Path) -> None:
    """If it fails, a cell is no plain Python, or dies of a name that was moved."""
    uses = set(uses_of(path))
    assert uses
    missing = [
        (module, name)
        for module, name in uses
        if not hasattr(importlib.import_module(module), name)
    ]
    assert missing == []


@each_notebook
def test_its_links_lead_somewhere(path: Path) -> None:
    """If it fails, a notebook sends its reader to one that is not there."""
    text = "\n".join(source_of(cell) for cell in cells_of(path, "markdown"))
    links = re.findall(r"\]\(([\w-]+\.ipynb)\)", text)
    assert [link for link in links if not (FOLDER / link).is_file()] == []


def test_the_numerics_explorer_runs(tmp_path: Path) -> None:
    """If it fails, the first notebook a person opens ends in a traceback."""
    path = FOLDER / "numerics.ipynb"
    program = [sys.executable, Path(__file__).with_name("run_plainly.py"), path]
    done = subprocess.run(
        program, cwd=tmp_path, env=environment(GEMMA_QAT_NOTEBOOK_FAST="1"),
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    code = cells_of(path, "code")
    shown = sum("plt.show()" in source_of(cell) for cell in code)
    assert found == {"cells": len(code), "figures": shown}


@pytest.mark.notebooks
@each_notebook
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """If it fails, a reader's run of the notebook ends in a traceback, or without a picture."""
    nbformat = pytest.importorskip("nbformat", reason="needs pip install '.[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="needs pip install '.[notebooks]'")
    pytest.importorskip("ipykernel", reason="needs pip install '.[notebooks]'")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, timeout=900, resources=resources)
    client.execute(env=environment(TMPDIR=str(tmp_path)))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
