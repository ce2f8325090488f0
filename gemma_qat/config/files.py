"""Config files: Python with `get_config(variant)`, and their resolved form as JSON."""

from __future__ import annotations

import dataclasses
import json
import runpy
import typing
from pathlib import Path
from typing import Any, TypeVar

from gemma_qat.config.experiment import ExperimentConfig
from gemma_qat.errors import InputError

Config = TypeVar("Config")
VARIANTS = ("default", "tiny")


def load_config(path: Path, variant: str = "default") -> ExperimentConfig:
    """Returns what `get_config(variant)` of the Python file at `path` returns.

    Raises: FileNotFoundError; InputError when the file has no get_config, does not know the variant, or returns
        something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    try:
        scope = runpy.run_path(str(path))
    except (SyntaxError, ImportError) as error:
        raise InputError(f"{path}: cannot be imported ({error})") from None
    if "get_config" not in scope:
        raise InputError(f"{path}: no get_config(variant) in it")
    config = scope["get_config"](variant)
    if not isinstance(config, ExperimentConfig):
        raise InputError(
            f"{path}: get_config returned {type(config).__name__}, ExperimentConfig expected"
        )
    return config


def check_variant(variant: str) -> None:
    """Refuses a variant that config files do not have.

    Raises: InputError naming those they have.
    """
    if variant not in VARIANTS:
        raise InputError(f"unknown variant {variant!r}: expected one of {', '.join(VARIANTS)}")


def to_json(config: Any) -> str:
    """Returns a config as JSON that `from_json` reads back equal."""
    return json.dumps(dataclasses.asdict(config), indent=1, sort_keys=True) + "\n"


def from_json(cls: type[Config], text: str) -> Config:
    """Returns the config of class `cls` that `to_json` wrote.

    Raises: InputError when the text is not one.
    """
    try:
        return _build(cls, json.loads(text))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"not a {cls.__name__} in JSON ({error})") from None


def _build(cls: Any, raw: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in raw.items():
        nested = dataclasses.is_dataclass(hints[name]) and isinstance(value, dict)
        values[name] = _build(hints[name], value) if nested else value
    return cls(**values)
