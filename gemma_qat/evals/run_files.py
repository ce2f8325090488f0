"""From folders of runs and files of figures to the one dictionary that a report is made of.

A run's folder holds config.json and what training and later commands left beside it; what is not there yet is left
out. What is there and broken is refused, by its name: a report that silently drops a file says less than it seems to.

The dictionary's sections are those of `report.py`; curves of more than `MOST` reports are thinned to every n-th.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gemma_qat.errors import InputError
from gemma_qat.evals import evaluations
from gemma_qat.evals.plots import Number
from gemma_qat.redaction import shown

MOST = 1000
"""Points that a curve keeps."""

FLOAT_BITS = 16


def gather(
    runs: Sequence[Path],
    evaluation_files: Sequence[Path] = (),
    bench_files: Sequence[Path] = (),
    title: str = "",
) -> dict[str, Any]:
    """Returns the data of a report on runs, side by side, with evaluations and benchmarks from elsewhere.

    Raises: InputError, in one line with the name of the file, for a folder that is no run, for a file that is not what
    its name or option says, and for nothing to report on.
    """
    folders = dict(zip(labels_of(runs), runs, strict=True))
    data: dict[str, Any] = {"runs": {name: _run(folder) for name, folder in folders.items()}}
    found: list[tuple[str, dict[str, Any]]] = []
    benches: dict[str, Any] = {}
    aside = []
    for name, folder in folders.items():
        for file in sorted(folder.glob("evaluation*.json")):
            one = read_json(file)
            if one.get("kind", evaluations.KIND) != evaluations.KIND:
                aside.append(f"{file} (of kind {one['kind']})")
                continue
            found.append((name, evaluations.checked(one, str(file))))
        for file in sorted(folder.glob("bench*.json")):
            benches[_unused(name, file.stem, benches)] = _bench(file)
    for label, file in zip(labels_of(evaluation_files), evaluation_files, strict=True):
        found.append((label, evaluations.checked(read_json(file), str(file))))
    for label, file in zip(labels_of(bench_files), bench_files, strict=True):
        benches[_unused(label, "", benches)] = _bench(file)
    if not (data["runs"] or found or benches):
        raise InputError("nothing to report on: name a run's folder, --evaluation or --bench FILE")
    data["evaluations"] = evaluations.together(found)
    data["benches"] = benches
    data["left_aside"] = aside
    data["title"] = title or _title(data)
    return {key: value for key, value in data.items() if value}


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises: InputError, naming the file, when it cannot be read, or is not JSON, or no object.
    """
    return _object(_text(path), str(path))


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Returns a name for each path: its last part, of files without the ending; with more parts where two are equal."""
    whole = [path.absolute() for path in paths]
    names = [path.stem if path.suffix == ".json" else path.name for path in whole]
    depth = 1
    while len(set(names)) < len(set(whole)) and depth < max(len(path.parts) for path in whole):
        depth += 1
        parts = [path.with_suffix("") if path.suffix == ".json" else path for path in whole]
        names = ["/".join(path.parts[-depth:]) for path in parts]
    if len(set(names)) < len(names):
        twice = next(path for path, name in zip(paths, names, strict=True) if names.count(name) > 1)
        raise InputError(f"{twice}: named twice")
    return names


def _run(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory")
    config = folder / "config.json"
    if not config.is_file():
        within = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; runs in it: {', '.join(within[:8])}" if within else ""
        raise InputError(f"{folder}: no run: no config.json in it{hint}")
    settings = read_json(config)
    if not {"train", "model"} <= set(settings):
        raise InputError(f"{config}: not the config of a run: no 'train' and 'model' in it")
    run: dict[str, Any] = {"config": shown(settings)}
    if (folder / "run.json").is_file():
        run["about"] = read_json(folder / "run.json")
    rows = _coverage(folder)
    if rows:
        total = sum(row["bytes"] for row in rows)
        weights = sum(8 * row["bytes"] / row["bits"] for row in rows if row["bits"])
        run |= {
            "coverage": grouped(rows),
            "bytes": total,
            "float_bytes": weights * FLOAT_BITS / 8,
        }
    if (folder / "metrics.jsonl").is_file():
        run |= _curves(folder / "metrics.jsonl")
    if (folder / "codes.json").is_file():
        run["codes"] = _codes(folder / "codes.json")
    exports = {file.stem: read_json(file) for file in sorted(folder.glob("export*.json"))}
    return run | ({"exports": exports} if exports else {})


def _coverage(folder: Path) -> list[dict[str, Any]]:
    file = folder / "coverage.json"
    if not file.is_file():
        return _coverage_text(folder / "coverage.txt")
    found = _parsed(_text(file), str(file))
    rows = found.get("rows") if isinstance(found, Mapping) else found
    if not isinstance(rows, list):
        raise InputError(f"{file}: no list of rows")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not {"site", "format", "bits", "bytes"} <= set(row):
            raise InputError(f"{file}: row {number} has no site, format, bits and bytes")
        if not all(isinstance(row[key], int | float) for key in ("bits", "bytes")):
            raise InputError(f"{file}: row {number}: bits and bytes are not numbers")
    return [dict(row) for row in rows]


def _coverage_text(file: Path) -> list[dict[str, Any]]:
    """Rows of the table that runs wrote before they wrote coverage.json."""
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        match = re.match(
            r"(\S+)\s+(\S+)\s+([\d.]+) bits\s+([\d,]+) B\s+[\d.]+%\s*(.*)", line.strip()
        )
        if match is None:
            raise InputError(f"{file}: line {number} is no row of a coverage table")
        site, name, bits, size, activations = match.groups()
        size = float(size.replace(",", ""))
        rows.append(
            {"site": site, "format": name, "bits": float(bits), "bytes": size, "activations": activations}
        )  # fmt: skip
    return rows


def class_of(path: str) -> str:
    """Returns the class of a site: its path without the number of the layer and without what all paths end in."""
    path = re.sub(r"^layers/\d+/", "", path)
    return re.sub(r"/(kernel|weight|table)(?=$|_)", "", path)


def grouped(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns coverage rows added up by role (or class of path), format and activations, largest first.

    Units: bits are stored bits per weight; share is of all bytes.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        site = str(row.get("role") or class_of(row["site"]))
        key = (site, str(row["format"]), str(row.get("activations") or ""))
        groups.setdefault(key, []).append(row)
    total = max(1e-30, sum(row["bytes"] for group in groups.values() for row in group))
    out = []
    for (site, name, activations), group in groups.items():
        size = sum(row["bytes"] for row in group)
        weights = sum(8 * row["bytes"] / row["bits"] for row in group if row["bits"])
        out.append(
            {
                "site": site, "format": name, "activations": activations, "count": len(group), "bytes": size,
                "bits": 8 * size / weights if weights else 0.0, "share": size / total,
            }
        )  # fmt: skip
    return sorted(out, key=lambda row: -row["bytes"])


def _curves(file: Path) -> dict[str, Any]:
    """Curves of every number that a line of metrics holds; a last line without its end is being written."""
    *whole, last = _text(file).split("\n")
    lines = whole if not last else [*whole, last] if _is_json(last) else whole
    curves: dict[str, list[list[Number]]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = _object(line, f"{file}: line {number}")
        if not isinstance(found.get("step"), int | float):
            raise InputError(f"{file}: line {number} has no step")
        for key, value in found.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault(key, []).append([found["step"], value])
    longest = max((len(curve) for curve in curves.values()), default=0)
    every = max(1, math.ceil(longest / MOST))
    thinned = {key: _thinned(curve, every) for key, curve in curves.items()}
    found = {"curves": thinned} if curves else {}
    return found | ({"curves_every": every} if every > 1 else {})


def _thinned(curve: list[list[Number]], every: int) -> list[list[Number]]:
    """Every n-th point, counted from the last, which is always kept."""
    return curve[::-1][::every][::-1]


def _codes(file: Path) -> dict[str, Any]:
    found = read_json(file)
    for part in ("sites", "code_use", "expert_load"):
        if not isinstance(found.get(part, {}), Mapping):
            raise InputError(f"{file}: {part!r} is no object")
    for name, site in found.get("sites", {}).items():
        if not isinstance(site, Mapping):
            raise InputError(f"{file}: sites/{name} is no object")
        for key in ("relative_error", "clipped"):
            if not isinstance(site.get(key, 0), int | float):
                raise InputError(f"{file}: sites/{name}/{key} is no number")
    for name, use in found.get("code_use", {}).items():
        evaluations.counts(use, "codes", 0, f"{file}: code_use/{name}")
    return found


def _bench(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if not any(isinstance(found.get(part), list) for part in ("speeds", "whole", "costs")):
        raise InputError(
            f"{file}: not what 'gemma-qat bench --json' writes: no speeds, whole, costs"
        )
    for part in ("speeds", "whole", "costs"):
        for number, row in enumerate(found.get(part, [])):
            if not isinstance(row, Mapping) or not NEEDED[part] <= set(row):
                needed = ", ".join(sorted(NEEDED[part]))
                raise InputError(f"{file}: {part}/{number} has not all of {needed}")
    return found


NEEDED = {
    "speeds": {"kind", "format", "rows", "bytes", "share"},
    "whole": {"weights", "cache", "batch", "weight_bytes", "tokens_per_second"},
    "costs": {"name", "seconds"},
}


def _unused(name: str, stem: str, taken: Mapping[str, Any]) -> str:
    return f"{name} {stem}".strip() if name in taken else name


def _title(data: Mapping[str, Any]) -> str:
    names = list(data["runs"])
    if len(names) > 3:
        return f"{len(names)} runs side by side"
    if names:
        return " and ".join(", ".join(names).rsplit(", ", 1))
    return "Evaluation" if data["evaluations"] else "Speed"


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _parsed(text: str, where: str) -> Any:
    def refuse(name: str) -> NoReturn:
        raise InputError(f"{where}: {name} is no number that JSON has")

    def finite(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else refuse(digits)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error})") from None


def _object(text: str, where: str) -> dict[str, Any]:
    found = _parsed(text, where)
    if not isinstance(found, dict):
        raise InputError(f"{where}: a JSON object expected, not a {type(found).__name__}")
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
