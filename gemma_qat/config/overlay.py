"""Typed overlays on nested dataclasses: `train.steps=200`.

A path names a field, the value is read as the field's type. Nothing is guessed: an unknown name and a value of
another type are errors, and the validation of the dataclasses themselves runs again.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from gemma_qat.errors import InputError, nearest

Config = TypeVar("Config")


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


def _set(config: Any, names: list[str], value: str, path: str) -> Any:
    fields = {field.name for field in dataclasses.fields(config)}
    name, rest = names[0], names[1:]
    if name not in fields:
        close = nearest(name, fields) or ", ".join(sorted(fields))
        raise InputError(
            f"unknown key {path!r}: {type(config).__name__} has no {name!r} (nearest: {close})"
        )
    current = getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(current):
            raise InputError(f"unknown key {path!r}: {name} is a value, nothing lies below it")
        new = _set(current, rest, value, path)
    elif dataclasses.is_dataclass(current):
        inside = ", ".join(field.name for field in dataclasses.fields(current))
        raise InputError(f"{path}={value}: {path} is a group; give one of its values ({inside})")
    else:
        new = _parse(value, typing.get_type_hints(type(config))[name], path)
    try:
        return dataclasses.replace(config, **{name: new})
    except ValueError as error:
        raise InputError(f"{path}={value}: {error}") from None


def _parse(text: str, kind: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if text in arguments:
            return text
        raise InputError(f"{path}={text}: one of {', '.join(map(str, arguments))} expected")
    if origin in (typing.Union, types.UnionType):
        if text == "none" and type(None) in arguments:
            return None
        return _parse(text, next(a for a in arguments if a is not type(None)), path)
    if origin is tuple:
        return tuple(_parse(part, arguments[0], path) for part in text.split(",") if part)
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise InputError(f"{path}={text}: true or false expected")
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{path}={text}: {kind.__name__} expected") from None
