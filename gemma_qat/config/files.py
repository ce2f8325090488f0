"""Config files: Python with `get_config(variant)` or `get_sweep(variant)`, and their resolved form as JSON."""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from gemma_qat.config.experiment import ExperimentConfig
from gemma_qat.config.sweep import SweepConfig
from gemma_qat.config.values import decode, encode
from gemma_qat.errors import InputError, nearest

Config = TypeVar("Config")
VARIANTS = ("default", "tiny")
"""What every config file has."""


def load_config(path: Path, variant: str = "default") -> ExperimentConfig:
    """Returns what `get_config(variant)` of the Python file at `path` returns.

    Raises: FileNotFoundError; InputError when the file has no get_config, does not know the variant, or returns
        something else.
    """
    return _called(path, "get_config", variant, ExperimentConfig)


def load_sweep(path: Path, variant: str = "default") -> SweepConfig:
    """Returns what `get_sweep(variant)` of the Python file at `path` returns.

    Raises: as `load_config`.
    """
    return _called(path, "get_sweep", variant, SweepConfig)


def _alike(path: Path) -> str:
    """Says which configs beside it are called like one that is not there."""
    close = nearest(path.name, [one.name for one in path.parent.glob("*.py")])
    return f" (nearest: {close})" if close else ""


def _called(path: Path, name: str, variant: str, expected: type[Config]) -> Config:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file{_alike(path)}")
    try:
        scope = runpy.run_path(str(path))
    except (SyntaxError, ImportError) as error:
        raise InputError(f"{path}: cannot be imported ({error})") from None
    if name not in scope:
        raise InputError(f"{path}: no {name}(variant) in it")
    config = scope[name](variant)
    if not isinstance(config, expected):
        raise InputError(
            f"{path}: {name} returned {type(config).__name__}, {expected.__name__} expected"
        )
    return config


def check_variant(variant: str, known: Sequence[str] = VARIANTS) -> None:
    """Refuses a variant that a config file does not have; `known` is of one that has others than most.

    Raises: InputError naming those it has.
    """
    if variant not in known:
        raise InputError(f"unknown variant {variant!r}: expected one of {', '.join(known)}")


def to_json(config: Any) -> str:
    """Returns a config as JSON that `from_json` reads back equal, but for secrets, which are redacted."""
    return json.dumps(encode(config, type(config)), indent=1, sort_keys=True) + "\n"


def from_json(cls: type[Config], text: str) -> Config:
    """Returns the config of class `cls` that `to_json` wrote.

    Raises: InputError when the text is not one, naming the path that is wrong.
    """
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not a {cls.__name__} in JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"not a {cls.__name__} in JSON (an object expected, {raw!r} given)")
    return decode(raw, cls, "")
