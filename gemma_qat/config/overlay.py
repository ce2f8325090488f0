"""Typed overlays on nested dataclasses: `train.steps=200`.

A path names a field, the value is read as the field's type. Nothing is guessed: an unknown name and a value of
another type are errors, and the validation of the dataclasses themselves runs again.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from gemma_qat.config.values import read
from gemma_qat.errors import InputError, nearest

Config = TypeVar("Config")
Origin = Literal["default", "file", "overlay"]


def apply(config: Config, overlays: Sequence[str]) -> Config:
    """Returns `config` with each `path=value` applied in turn.

    Raises: InputError naming the path, the value and what was expected.
    """
    for overlay in overlays:
        path, separator, value = overlay.partition("=")
        if not separator or not path:
            raise InputError(f"overlay {overlay!r}: path=value expected, such as train.steps=200")
        config = _set(config, path.split("."), value, path)
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns every value of a nested dataclass by its path."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        out |= flatten(value, f"{path}.") if dataclasses.is_dataclass(value) else {path: value}
    return out


def provenance(base: Any, overlaid: Any) -> list[tuple[str, Any, Origin]]:
    """Returns, for every path of `overlaid`, its value and who said it last.

    `base` is the config as its file gave it. "overlay": it differs from `base`; "file": `base` differs from what
    the dataclasses default to; "default": neither.
    """
    before, defaults = flatten(base), _defaults(base)
    rows: list[tuple[str, Any, Origin]] = []
    for path, value in flatten(overlaid).items():
        in_file = path in before and before[path] == value
        by_default = path in defaults and defaults[path] == value
        rows.append(
            (path, value, "overlay" if not in_file else "default" if by_default else "file")
        )
    return rows


def _defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    # A field's own default wins over its class's: `train: TrainConfig = TrainConfig(steps=9)` defaults to 9 steps.
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            out |= flatten(default, f"{path}.")
        elif default is not dataclasses.MISSING:
            out[path] = default
        elif dataclasses.is_dataclass(value):
            out |= _defaults(value, f"{path}.")
    return out


def _set(config: Any, names: list[str], value: str, path: str) -> Any:
    fields = {field.name for field in dataclasses.fields(config)}
    name, rest = names[0], names[1:]
    if name not in fields:
        close = nearest(name, fields) or ", ".join(sorted(fields))
        raise InputError(
            f"unknown key {path!r}: {type(config).__name__} has no {name!r} (nearest: {close})"
        )
    current = getattr(config, name)
    kind = typing.get_type_hints(type(config))[name]
    if rest:
        if not dataclasses.is_dataclass(current):
            raise InputError(f"unknown key {path!r}: {name} is a value, nothing lies below it")
        new = _set(current, rest, value, path)
    elif dataclasses.is_dataclass(kind):
        inside = ", ".join(field.name for field in dataclasses.fields(current))
        raise InputError(f"{path}={value}: {path} is a group; give one of its values ({inside})")
    else:
        new = read(value, kind, path)
    try:
        return dataclasses.replace(config, **{name: new})
    except ValueError as error:
        raise InputError(f"{path}={value}: {error}") from None
