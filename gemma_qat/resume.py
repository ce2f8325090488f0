"""Going on with a run that lies somewhere: its own config.json stands for the config file it was started with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gemma_qat.config import ExperimentConfig, apply, flatten, from_json
from gemma_qat.errors import InputError, unknown
from gemma_qat.redaction import is_redacted
from gemma_qat.runs import read_run, run_folders

HERE = Path("runs")
"""Where runs are looked for by name alone."""


def run_named(text: str, base: Path = HERE) -> Path:
    """Returns the folder of a run: a path, or the name of a run below `base`, with its sweep's where two share it.

    Raises: InputError naming the nearest, or those that share the name.
    """
    path = Path(text)
    if next(run_folders(path), None) == path:
        return path
    below = {str(folder.relative_to(base)): folder for folder in run_folders(base)}
    found = {name for name in below if text in (name, Path(name).name)}
    if text in found or len(found) == 1:
        return below[text if text in found else found.pop()]
    if found:
        raise InputError(f"run {text!r}: there are several: {', '.join(sorted(found))}")
    if path.is_dir():
        inside = [str(folder) for folder in run_folders(path)]
        hint = f"; runs in it: {', '.join(inside[:8])}" if inside else ""
        raise InputError(f"{text}: no run lies there{hint}")
    if not below:
        raise InputError(f"{text}: no such run, and there are none in {base}/")
    raise unknown(f"run in {base}/", text, below)


def resumed(run: str, overlays: Sequence[str]) -> tuple[Path, ExperimentConfig, ExperimentConfig]:
    """Returns the file of a run's config, that config for where the run now lies, and the same with overlays.

    Raises: InputError for a run that is not there, was not trained, cannot be read or would be another by its overlays,
        and for a value that was redacted and is not given.
    """
    folder = run_named(run)
    file = folder / "config.json"
    state = read_run(folder)
    if state.state == "damaged":
        raise InputError(f"{folder}: {state.note}")
    if state.state == "quantized":
        raise InputError(f"{folder}: quantized without training, nothing to go on with")
    try:
        base = from_json(ExperimentConfig, file.read_text("utf-8"))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if (Path(base.directory) / base.name).resolve() != folder.resolve():
        where = folder if folder.name else folder.resolve()
        base = dataclasses.replace(base, name=where.name, directory=str(where.parent))
    config = apply(base, overlays)
    if (config.directory, config.name) != (base.directory, base.name):
        raise InputError(f"name and directory: --resume goes on in {folder}, they cannot be given")
    for path, value in flatten(config).items():
        if is_redacted(repr(value)):
            raise InputError(f"{file}: {path} was redacted ({value}); give {path}=...")
    return file, base, config
