"""What no file of the project does: unpickle, run text as code, build shells from strings, download, hold a secret.

Code comes in by one door that is meant to be one: a config is a Python file, and `gemma-qat train CONFIG` runs it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("gemma_qat", "configs", "experiments", "launch")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
BINARY = (".npz", ".png", ".safetensors")


def texts() -> list[Path]:
    """The project's files, but binary ones and the locks, whose every line tests/launch/test_lock.py reads."""
    folders = (*FOLDERS, "docs", "tests", ".ci")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    found += ROOT.glob("*")
    skipped = {"__pycache__", "lock"}
    return sorted(
        path
        for path in found
        if path.is_file()
        and path.suffix not in BINARY
        and not skipped & set(path.relative_to(ROOT).parts)
    )


FORBIDDEN_IMPORTS = {
    **dict.fromkeys(
        ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
        "reading such a file runs code",
    ),
    **dict.fromkeys(
        ("urllib.request", "http.client", "requests", "httpx", "aiohttp", "urllib3", "ftplib"),
        "nothing is downloaded: a person brings the files",
    ),
    **dict.fromkeys(("pty", "commands", "pexpect"), "a shell built from strings"),
}
"""Modules, with what is wrong with them here."""

FORBIDDEN_CALLS = {
    **dict.fromkeys(("eval", "exec", "compile", "__import__"), "text run as code"),
    **dict.fromkeys(
        (
            "os.system",
            "os.popen",
            "subprocess.getoutput",
            "subprocess.getstatusoutput",
            "asyncio.create_subprocess_shell",
        ),
        "a shell built from strings",
    ),
    **dict.fromkeys(
        ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
        "yaml.safe_load makes no objects",
    ),
    **dict.fromkeys(
        ("torch.load", "pandas.read_pickle", "numpy.core.multiarray._reconstruct"),
        "reading such a file runs code",
    ),
    "tempfile.mktemp": "another process may take the name first",
}
"""Functions by their full name, with what is wrong with calling them here."""

STARTS = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
DOORS = {"runpy.run_path": {"gemma_qat/config/files.py"}}
"""Ways to run a file by its path, and where alone each is used."""


def full_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `np` for numpy, `run` for subprocess.run."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def called(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of what is called, or '' where it is no dotted name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        of = called(node.value, names)
        return f"{of}.{node.attr}" if of else ""
    return ""


def wrongs(source: str) -> Iterator[str]:
    """What a file does that it may not, with its line."""
    tree = ast.parse(source)
    names = full_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = [f"{node.module}"] if isinstance(node, ast.ImportFrom) else []
            whole = base + [".".join([*base, alias.name]) for alias in node.names]
            for bad, reason in FORBIDDEN_IMPORTS.items():
                if any(name == bad or name.startswith(f"{bad}.") for name in whole):
                    yield f"line {node.lineno}: {bad}: {reason}"
        elif isinstance(node, ast.Call):
            name = called(node.func, names)
            if name in FORBIDDEN_CALLS:
                yield f"line {node.lineno}: {name}: {FORBIDDEN_CALLS[name]}"
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and not is_false:
                    yield f"line {node.lineno}: {keyword.arg}: only False"
            text = ast.Constant | ast.JoinedStr | ast.BinOp
            if name in STARTS and node.args and isinstance(node.args[0], text):
                yield f"line {node.lineno}: {name}: a list of arguments expected"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "def f():\n    import joblib as j",
        "from urllib import request",
        "import urllib.request as r",
        "import requests",
        "eval('1')",
        "import os\nos.system('ls')",
        "from os import popen as p\np('ls')",
        "import subprocess as s\ns.getoutput('ls')",
        "import subprocess\nsubprocess.run(['ls'], shell=True)",
        "import subprocess\nsubprocess.run(['ls'], shell=x)",
        "from subprocess import Popen\nPopen(f'ls {x}')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import torch\ntorch.load('x')",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_the_reader_sees_what_is_forbidden(source: str) -> None:
    """If it fails, the files below are checked with a blind eye."""
    assert list(wrongs(source))


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "jitted.lower().compile()",
        "from urllib.parse import quote",
        "import subprocess\nsubprocess.run(['ls', x], shell=False)",
        "import yaml\nyaml.safe_load(text)",
        "import numpy as np\nnp.load('x', mmap_mode='r')",
        "model.eval()",
    ],
)
def test_the_reader_lets_the_rest_pass(source: str) -> None:
    """If it fails, plain code is refused."""
    assert list(wrongs(source)) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_runs_nothing_it_was_given(path: Path) -> None:
    """If it fails, a checkpoint, a dataset or a name on the command line can run code, or a file is fetched."""
    assert list(wrongs(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("name", sorted(DOORS))
def test_code_comes_in_by_its_door(name: str) -> None:
    """If it fails, a second place runs Python files by their path; configs are the one kind that is meant to be run."""
    found = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = full_names(tree)
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        if any(called(node.func, names) == name for node in calls):
            found.add(str(path.relative_to(ROOT)))
    assert found == DOORS[name]


SECRETS = {
    "a cloud key": r"AKIA[0-9A-Z]{16}\b",
    "a Google key": r"AIza[0-9A-Za-z_-]{35}\b",
    "a Google token": r"ya29\.[0-9A-Za-z_-]{30,}",
    "a GitHub token": r"gh[pousr]_[0-9A-Za-z]{36}|github_pat_[0-9A-Za-z_]{60,}",
    "a GitLab token": r"glpat-[0-9A-Za-z_-]{20,}",
    "a Hugging Face token": r"hf_[0-9A-Za-z]{30,}",
    "a package index's token": r"pypi-[0-9A-Za-z_-]{50,}",
    "a Slack token": r"xox[abprs]-[0-9A-Za-z-]{20,}",
    "an API key": r"\bsk-[0-9A-Za-z_-]{32,}",
    "a JSON web token": r"eyJ[0-9A-Za-z_-]{20,}\.eyJ[0-9A-Za-z_-]{20,}\.",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----\s*[0-9A-Za-z+/]{16}",
    "a password in an address": r"\b[a-z]+://[^\s/:@{}$<>]+:[^\s/:@{}$<>]+@",
}
"""What a secret looks like. A test that needs one joins it from two strings."""

HOSTS = (
    r"\b(pypi\.org|pythonhosted\.org|registry\.npmjs|deb\.debian|docker\.io|ghcr\.io|quay\.io)\b"
)
"""Where packages come from is the installer's to know: a lock, a script or an image that names a host cannot move."""


@pytest.mark.parametrize(
    "text",
    ["AKIA" + 16 * "A", "hf_" + 34 * "a", "https://me:" + "word@host/x", "ghp_" + 36 * "0"],
)
def test_the_patterns_know_a_secret(text: str) -> None:
    """If it fails, no secret would be found below."""
    assert any(re.search(pattern, f"token = '{text}'") for pattern in SECRETS.values())


def test_no_file_holds_a_secret_or_a_registry() -> None:
    """If it fails, a key has been committed (revoke it: history keeps it), or a file depends on one registry's address."""
    files = texts()
    assert len(files) > 300
    patterns = {**SECRETS, "a registry's host": HOSTS}
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [
            f"{path.relative_to(ROOT)}: {what}"
            for what, pattern in patterns.items()
            if re.search(pattern, text)
        ]
    assert found == []
