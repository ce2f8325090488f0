"""Values by their field's type: read from an overlay's text, from JSON, and written to JSON.

| field type | overlay | JSON |
|---|---|---|
| bool | true, false | true, false |
| int | 7, not 7.0 or 1e3 | 7 |
| float | 1e-3, 3 | number |
| str, Path, Enum (by value) | text | text |
| Literal["a", 8] | one of them | one of them |
| tuple[int, ...], tuple[int, str] | 1,2,3; empty for () | list |
| tuple[A, ...], A a dataclass | list in JSON; empty for () | list of objects |
| X or None | none, or as X | null, or as X |
| A or B, dataclasses | the class's name: its defaults | object with "class" |

Source: PEP 484 type hints as `typing.get_type_hints` gives them; other types are refused, not guessed at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from gemma_qat.errors import InputError, nearest, unknown
from gemma_qat.redaction import shown


def read(text: str, kind: Any, path: str) -> Any:
    """Returns the value of type `kind` that `text` says, at the overlay path `path`.

    Raises: InputError naming the path, the text and what was expected.
    """
    origin = typing.get_origin(kind)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float):
        return _number(text, kind, path)
    if kind in (str, Path):
        return kind(text)
    if origin is Literal or _is_class(kind, enum.Enum):
        return _choice(text, kind, path)
    if origin is tuple and text.startswith("["):
        with contextlib.suppress(json.JSONDecodeError):
            return decode(json.loads(text), kind, path)
    if origin is tuple:
        parts = text.split(",") if text else []
        kinds = _element_kinds(kind, len(parts))
        if kinds is not None:
            with contextlib.suppress(InputError):
                return tuple(read(part, k, path) for part, k in zip(parts, kinds, strict=True))
    if _members(kind):
        return _read_union(text, kind, path)
    raise _wrong(path, text, kind)


def decode(raw: Any, kind: Any, path: str) -> Any:
    """Returns the value of type `kind` that `encode` wrote as `raw`.

    Raises: InputError naming the path, what was found and what was expected.
    """
    if dataclasses.is_dataclass(kind):
        return _decode_group(raw, kind, path)
    if kind is float and type(raw) in (int, float):
        return float(raw)
    if kind in (bool, int, str) and type(raw) is kind:
        return raw
    if kind is Path and isinstance(raw, str):
        return Path(raw)
    if typing.get_origin(kind) is Literal and any(_same(raw, one) for one in typing.get_args(kind)):
        return raw
    if _is_class(kind, enum.Enum) and any(_same(raw, member.value) for member in kind):
        return kind(raw)
    if typing.get_origin(kind) is tuple and isinstance(raw, list):
        kinds = _element_kinds(kind, len(raw))
        if kinds is not None:
            return tuple(decode(part, k, path) for part, k in zip(raw, kinds, strict=True))
    if _members(kind):
        return _decode_union(raw, kind, path)
    raise _wrong(path, raw, kind)


def encode(value: Any, kind: Any) -> Any:
    """Returns a value of type `kind` as what JSON can say; `decode` reads it back equal, but for secrets: redacted."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        names = [field.name for field in dataclasses.fields(value)]
        inside = {name: encode(getattr(value, name), hints[name]) for name in names}
        return {"class": type(value).__name__, **inside} if len(_groups(kind)) > 1 else inside
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str | Path):
        return shown(value if isinstance(value, str) else str(value))
    if isinstance(value, tuple):
        kinds = _element_kinds(kind, len(value)) or [type(part) for part in value]
        return [encode(part, k) for part, k in zip(value, kinds, strict=True)]
    return value


def said(kind: Any) -> str:
    """Returns what a person calls a type: `int`, `one of ce, kl`, `int or none`."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if _is_class(kind, enum.Enum):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    if _members(kind):
        return " or ".join(said(one) for one in _members(kind))
    if kind in (bool, type(None)):
        return "true or false" if kind is bool else "none"
    is_class = isinstance(kind, type) and not typing.get_args(kind)
    return kind.__name__ if is_class else str(kind)


def _number(text: str, kind: Callable[[str], Any], path: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise _wrong(path, text, kind) from None


def _choice(text: str, kind: Any, path: str) -> Any:
    values = _values(kind)
    for value in values:
        if text == str(value):
            return value if typing.get_origin(kind) is Literal else kind(value)
    close = nearest(text, map(str, values))
    hint = f" (nearest: {close})" if close else ""
    raise InputError(f"{path}={text}: {said(kind)} expected{hint}")


def _read_union(text: str, kind: Any, path: str) -> Any:
    if text == "none" and type(None) in _members(kind):
        return None
    for group in _groups(kind):
        if text == group.__name__:
            return _defaults_of(group, path)
    for member in _scalars(kind):
        with contextlib.suppress(InputError):
            return read(text, member, path)
    raise _wrong(path, text, kind)


def _decode_union(raw: Any, kind: Any, path: str) -> Any:
    if raw is None and type(None) in _members(kind):
        return None
    groups = _groups(kind)
    if isinstance(raw, dict) and groups:
        if len(groups) == 1:
            return _decode_group(raw, groups[0], path)
        by_name = {group.__name__: group for group in groups}
        name = str(raw.get("class", ""))
        if name not in by_name:
            raise unknown(f"class at {path}", name, by_name)
        rest = {key: value for key, value in raw.items() if key != "class"}
        return _decode_group(rest, by_name[name], path)
    for member in _scalars(kind):
        with contextlib.suppress(InputError):
            return decode(raw, member, path)
    raise _wrong(path, raw, kind)


def _decode_group(raw: Any, cls: Any, path: str) -> Any:
    if not isinstance(raw, dict):
        raise _wrong(path, raw, cls)
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    values = {}
    for name, value in raw.items():
        at = f"{path}.{name}" if path else name
        if name not in known:
            raise unknown(f"key of {cls.__name__}", at, known)
        values[name] = decode(value, hints[name], at)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path or cls.__name__}: {error}") from None


def _defaults_of(cls: Any, path: str) -> Any:
    try:
        return cls()
    except TypeError:
        raise InputError(f"{path}={cls.__name__}: {cls.__name__} has no defaults") from None


def _members(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else ()


def _scalars(kind: Any) -> list[Any]:
    # bool first: `true` is one, and also the text of a str; the other members stay in the order they are written.
    left = [one for one in _members(kind) if one is not type(None) and one not in _groups(kind)]
    return sorted(left, key=lambda one: (one is str, one is not bool))


def _groups(kind: Any) -> list[Any]:
    return [member for member in _members(kind) if dataclasses.is_dataclass(member)]


def _values(kind: Any) -> list[Any]:
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    return [member.value for member in kind]


def _element_kinds(kind: Any, count: int) -> Sequence[Any] | None:
    arguments = typing.get_args(kind)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return [arguments[0]] * count
    return arguments if len(arguments) == count else None


def _is_class(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def _same(one: Any, other: Any) -> bool:
    # 1 == True in Python; a config that says true where 1 was meant is not the same config.
    return type(one) is type(other) and one == other


def _wrong(path: str, given: Any, kind: Any) -> InputError:
    given = given if isinstance(given, str) else repr(given)
    return InputError(f"{path}={given}: {said(kind)} expected")
