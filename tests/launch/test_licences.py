"""docs/licences.md: every package that is asked for, with the licence that it states."""

from __future__ import annotations

import re
from email.message import Message
from pathlib import Path

import licences_script
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")

LICENCES = licences_script.load()


def test_every_dependency_has_its_row() -> None:
    """If it fails, something is installed whose terms nobody has looked at: run launch/licences.py."""
    direct, others = LICENCES.tables(DOCUMENT)
    assert set(direct) == set(LICENCES.declared())
    assert set(others) == set(LICENCES.pinned()) - set(direct)
    assert [name for name, (_, said) in direct.items() if said == "not known"] == []
    assert [name for name, said in others.items() if said == "not known"] == []


def test_the_rows_say_what_the_packages_say() -> None:
    """If it fails, a package changed its licence, or a row was written by hand."""
    direct, others = LICENCES.tables(DOCUMENT)
    pins = LICENCES.pinned()
    for name, (version, _) in direct.items():
        assert version == pins.get(name, version)
    stated = {**others, **{name: said for name, (_, said) in direct.items()}}
    found = {
        name: said
        for name, (version, said) in LICENCES.installed(set(stated)).items()
        if version == pins.get(name)
    }
    assert found, "no package of launch/constraints.txt is installed at its version"
    assert found == {name: stated[name] for name in found}


def test_what_only_cuda_brings_is_named() -> None:
    """If it fails, a lock has a package that docs/licences.md is silent about."""
    _, others = LICENCES.tables(DOCUMENT)
    locks = sorted((ROOT / "launch" / "lock").glob("*.txt"))
    for path in locks:
        names = set(re.findall(r"^([a-z0-9-]+)==", path.read_text(encoding="utf-8"), re.MULTILINE))
        rest = names - set(others) - set(LICENCES.declared())
        assert {name for name in rest if not name.startswith(("nvidia-", "jax-cuda1"))} == set()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"License-Expression": "MIT OR Apache-2.0", "License": "other"}, "MIT OR Apache-2.0"),
        ({"License": "Apache 2.0"}, "Apache-2.0"),
        (
            {"License": "Apache License\n   Version 2.0, January 2004\n" + 90 * "text "},
            "Apache-2.0",
        ),
        ({"License": 90 * "text ", "Classifier": "License :: OSI Approved :: MIT License"}, "MIT"),
        ({"Classifier": "Programming Language :: Python"}, "not said"),
        ({"License": "BSD"}, "BSD"),
    ],
)
def test_a_licence_is_found_wherever_it_is_written(headers: dict[str, str], expected: str) -> None:
    """If it fails, a row says something else than the package does."""
    said = Message()
    for name, value in headers.items():
        said[name] = value
    assert LICENCES.licence_of(said) == expected


def test_writing_again_changes_nothing() -> None:
    """If it fails, the document grows or loses rows each time it is made."""
    once = LICENCES.written(DOCUMENT)
    assert LICENCES.written(once) == once
    assert once.startswith(DOCUMENT.partition(LICENCES.BEGIN)[0])
