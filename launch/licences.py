"""Writes the tables of docs/licences.md from the metadata of the packages that are installed.

    .venv-test/bin/python launch/licences.py

The first table has every package that setup.cfg names, the second the others that launch/constraints.txt pins. Rows of
packages that are not installed here stay as they are: run it in one environment after another (extras eval, notebooks).
"""

from __future__ import annotations

import configparser
import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "licences.md"
BEGIN, END = "<!-- packages: begin -->", "<!-- packages: end -->"
DIRECT_HEAD = "| package | tested with | needed by | licence |\n|---|---|---|---|\n"
OTHERS_HEAD = "| licence | packages |\n|---|---|\n"

SPDX = {
    "apache 2.0": "Apache-2.0",
    "apache license version 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "3-clause bsd license": "BSD-3-Clause",
}
"""Names of licences as packages write them, in lower case, and the identifier that each has at SPDX."""

Stated = tuple[str, str]
"""A version and a licence."""


def declared() -> dict[str, set[str]]:
    """Every package that setup.cfg names, and what needs it: `run`, or names of extras."""
    found: dict[str, set[str]] = {}
    for extra, requirements in requirements_of().items():
        for requirement in requirements:
            found.setdefault(canonicalize_name(requirement.name), set()).add(extra)
    return found


def requirements_of() -> dict[str, list[Requirement]]:
    """What setup.cfg asks for, by extra; `run` is what every installation needs."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = {"run": parser["options"]["install_requires"], **parser["options.extras_require"]}
    return {
        extra: [
            Requirement(line)
            for line in text.splitlines()
            if line.strip() and not line.lstrip().startswith("#")
        ]
        for extra, text in texts.items()
    }


def pinned() -> dict[str, str]:
    """The version of every package of launch/constraints.txt."""
    lines = (ROOT / "launch" / "constraints.txt").read_text(encoding="utf-8").split()
    pairs = (line.split("==") for line in lines)
    return {canonicalize_name(name): version for name, version in pairs}


def licence_of(said: metadata.PackageMetadata) -> str:
    """What a package says its licence is: the SPDX expression, else a short licence field, else its classifiers."""
    expression = said.get("License-Expression")
    if expression:
        return str(expression)
    field = " ".join((said.get("License") or "").split())
    if field.lower().startswith("apache license version 2.0"):  # Grain gives the whole text.
        field = "Apache-2.0"
    classifiers = [
        line.split(" :: ")[-1]
        for line in said.get_all("Classifier") or ()
        if line.startswith("License :: ")
    ]
    texts = [field] if 0 < len(field) <= 60 else sorted(classifiers)
    return " AND ".join(SPDX.get(text.lower(), text) for text in texts) or "not said"


def installed(names: set[str]) -> dict[str, Stated]:
    """Versions and licences of those of `names` that are installed here."""
    found = {}
    for name in names:
        try:
            found[name] = (metadata.version(name), licence_of(metadata.metadata(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def tables(document: str) -> tuple[dict[str, Stated], dict[str, str]]:
    """What `document` states: of the packages that setup.cfg names, and the licences of the others."""
    row = r"^\| `([a-z0-9-]+)` \| ([^|]*) \| [^|]* \| ([^|]*) \|$"
    found = re.findall(row, document, re.MULTILINE)
    direct = {name: (version, licence) for name, version, licence in found}
    others: dict[str, str] = {}
    for licence, names in re.findall(r"^\| ([^|`]+) \| (`[^|]*) \|$", document, re.MULTILINE):
        others.update(dict.fromkeys(re.findall(r"`([^`]+)`", names), licence))
    return direct, others


def written(document: str) -> str:
    """`document` with its tables made anew."""
    stated, stated_others = tables(document)
    needed_by, pins = declared(), pinned()
    rest = set(pins) - set(needed_by)
    direct = {**stated, **installed(set(needed_by))}
    others = {**stated_others, **{name: said for name, (_, said) in installed(rest).items()}}
    rows = []
    for name in sorted(needed_by):
        version, licence = direct.get(name, ("not known", "not known"))
        extras = ", ".join(sorted(needed_by[name]))
        rows.append(f"| `{name}` | {pins.get(name, version)} | {extras} | {licence} |\n")
    by_licence: dict[str, list[str]] = {}
    for name in sorted(rest):
        by_licence.setdefault(others.get(name, "not known"), []).append(f"`{name}`")
    more = [f"| {licence} | {', '.join(by_licence[licence])} |\n" for licence in sorted(by_licence)]
    before, _, tail = document.partition(BEGIN)
    after = tail.partition(END)[2]
    made = DIRECT_HEAD + "".join(rows) + "\n" + OTHERS_HEAD + "".join(more)
    return f"{before}{BEGIN}\n{made}{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
