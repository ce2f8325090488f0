"""The shape of the package: imports point downwards, and each outside dependency has one door."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gemma_qat"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 350

DIRECT: dict[str, set[str]] = {
    "errors": set(),
    "runs": set(),
    "redaction": set(),
    "numerics": set(),
    "sharding": set(),
    "compiled": set(),
    "data": set(),
    "kernels": {"numerics", "sharding"},
    "quant": {"numerics", "kernels"},
    "nn": {"quant", "kernels", "sharding"},
    "models": {"nn"},
    "checkpoint": {"models"},
    "decode": {"models"},
    "export": {"checkpoint", "quant"},
    "convert": {"export"},
    "ptq": {"models", "data", "checkpoint", "sharding", "quant"},
    # train stands on ptq, not beside it: learned scales start where rounding to nearest puts them.
    "train": {"models", "data", "checkpoint", "sharding", "quant", "ptq", "runs"},
    "plan": {"train", "compiled"},
    "evals": {"decode", "export", "data", "ptq", "train", "redaction"},
    "config": {"evals", "plan"},
    "quickstart": {"config"},
    "start": {"config", "convert"},
    "companions": {"start"},
    "loading": {"companions"},
    "evaluation": {"loading"},
    "self_generated": {"decode", "checkpoint"},
    "quantizing": {"companions"},
    "run_folder": {"companions"},
    "training": {"run_folder"},
    "preflight": {"training", "launch"},
    "resume": {"config", "runs"},
    "launch": {"plan", "redaction"},
    "sweep": {"training", "evaluation"},
    "mixing": {"evaluation"},
    "tasks": {"evaluation"},
    "api": {"sweep", "mixing", "tasks", "self_generated", "quantizing"},
    "cli": {"api", "quickstart", "preflight", "resume", "launch"},
    "__init__": {"api"},
    "__main__": {"cli"},
}
"""What each part may import directly; it may also import what those may, and `errors`."""


def reach(part: str) -> set[str]:
    """Every part that `part` may import, itself left out unless the table has a cycle."""
    found: set[str] = set()
    todo = list(DIRECT[part])
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo.extend(DIRECT[name])
    return found


def part_of(path: Path) -> str:
    """The part of the package a file belongs to: a directory's name, or a top-level file's."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def modules_imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a file of `package` imports, inside functions too, `a.b.c` for `from a.b import c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            near = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (near, node.module) if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def parts_imported(tree: ast.AST, package: str) -> set[str]:
    """The parts of gemma_qat that a file imports; names on the package itself are `api`'s."""
    found = set()
    for name in modules_imported(tree, package):
        root, _, rest = name.partition(".")
        if root != "gemma_qat":
            continue
        head = rest.split(".")[0]
        if not head.startswith("__"):
            found.add(head if head in DIRECT else "api")
    return found


def names_used(tree: ast.AST) -> set[str]:
    """Every identifier that code reads, imports or reaches as an attribute; text in strings is left out."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.update(node.name.split("."))
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import gemma_qat.nn.rope", {"nn"}),
        ("from gemma_qat.models import size_named", {"models"}),
        ("from gemma_qat import data, load, __version__", {"data", "api"}),
        ("def f():\n    from gemma_qat.train.step import step", {"train"}),
        ("from ..quant import fake", {"quant"}),
        ("from . import rounding", {"numerics"}),
        ("from .. import errors", {"errors"}),
        ("if TYPE_CHECKING:\n    import jax, gemma_qat.cli.main", {"cli"}),
        ("x = 'import gemma_qat.train'", set()),
    ],
)
def test_the_reader_sees_every_way_to_import(source: str, expected: set[str]) -> None:
    """If it fails, the order below is checked with a blind eye."""
    assert parts_imported(ast.parse(source), "gemma_qat.numerics") == expected


def test_the_order_has_no_cycle_and_places_everything() -> None:
    """If it fails, a part of the package is outside the order, or the order is none."""
    present = {part_of(path) for path in FILES}
    assert present <= set(DIRECT), f"not in the order: {sorted(present - set(DIRECT))}"
    assert [part for part in DIRECT if part in reach(part)] == []


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_downwards(path: Path) -> None:
    """If it fails, a lower part has come to need a higher one."""
    part = part_of(path)
    allowed = reach(part) | {part, "errors"}
    found = parts_imported(parse(path), package_of(path))
    assert found <= allowed, f"{part} may not import {sorted(found - allowed)}"


def imports(prefix: str) -> Callable[[Path], bool]:
    def check(path: Path) -> bool:
        found = modules_imported(parse(path), package_of(path))
        return any(name == prefix or name.startswith(f"{prefix}.") for name in found)

    return check


def uses(*names: str) -> Callable[[Path], bool]:
    return lambda path: bool(names_used(parse(path)) & set(names))


@pytest.mark.parametrize(
    ("has_it", "doors"),
    [
        pytest.param(imports("jax.experimental.pallas"), ("kernels/",), id="pallas"),
        pytest.param(imports("aqt"), ("quant/aqt.py",), id="aqt"),
        pytest.param(imports("ai_edge_litert"), ("export/litert/",), id="litert"),
        pytest.param(imports("litert_converter"), ("export/litert/",), id="litert converter"),
        pytest.param(imports("litert_lm_builder"), ("export/litert/",), id="litert bundles"),
        pytest.param(imports("yaml"), ("launch/",), id="yaml"),
        pytest.param(imports("argparse"), ("cli/", "__main__.py"), id="argparse"),
        pytest.param(uses("argv"), ("cli/", "__main__.py"), id="argv"),
        pytest.param(uses("environ", "getenv"), ("cli/",), id="environment"),
        pytest.param(uses("PartitionSpec", "Mesh", "NamedSharding"), ("sharding/",), id="mesh"),
    ],
)
def test_each_dependency_has_one_door(
    has_it: Callable[[Path], bool], doors: tuple[str, ...]
) -> None:
    """If it fails, what one place was to know is known in two."""
    inside = [named(path) for path in FILES if has_it(path)]
    assert [name for name in inside if not name.startswith(doors)] == []


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_says_what_it_is_and_stays_short(path: Path) -> None:
    """If it fails, a reader opens a file that does not introduce itself, or cannot be read in one go."""
    docstring = ast.get_docstring(parse(path))
    assert docstring, f"{named(path)}: no docstring"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{named(path)}: {lines} lines, at most {LONGEST} expected"


def test_every_name_is_defined() -> None:
    """If it fails, a line dies when it is reached. The linter itself cannot be asked: it takes axes of shapes for names."""
    ruff = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "F821",
        "--output-format",
        "json",
    ]
    found = subprocess.run([*ruff, PACKAGE], capture_output=True, text=True, check=False)
    said = [f"{entry['filename']}: {entry['message']}" for entry in json.loads(found.stdout)]
    axis = re.compile(r"Undefined name `[A-Z]`$")
    assert [line for line in said if not axis.search(line)] == []


def test_the_readme_lists_every_package() -> None:
    """If it fails, the tree in the README is not the tree."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    packages = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    assert [name for name in packages if f"{name}/" not in readme] == []


SCRIPTS = sorted(
    path
    for folder in ("experiments", "configs", "launch")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_import_what_is_there(path: Path) -> None:
    """If it fails, an experiment dies on its first line: nothing else looks at what it imports."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gemma_qat":
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            submodules = [
                name for name in missing if importlib.util.find_spec(f"{node.module}.{name}")
            ]
            assert sorted(missing) == sorted(submodules), f"{node.module} has no {missing}"
