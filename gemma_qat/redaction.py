"""What is never written: values of secret environment variables, and texts that look like credentials.

A config file is Python and may read the environment, so a path may hold a password that nobody typed into a file. Only
`cli/` knows the environment: it calls `marked` once, and what holds the value of a variable with a secret's name goes
on as a `Secret`: a text like any other for whoever opens the path, `<redacted: NAME>` for whoever writes it (`shown`).
Credentials of known shape are covered wherever something is written, marked or not:

| shape | becomes |
|---|---|
| scheme://{user}:{password}@host | scheme://{user}:<redacted: password>@host |
| ?token=..., &sig=..., X-Amz-Signature=... in a URL | the name, <redacted: NAME> |
| hf_..., ghp_..., github_pat_..., glpat-..., AKIA..., AIza..., ya29...., sk-..., xox?-..., JWT | <redacted: token> |
| Bearer and 16 letters or more | Bearer <redacted: token> |
| ...token=, ...secret=, ...password=, ...key= and 20 letters of base64 or more, a digit among them | <redacted: NAME> |
| -----BEGIN ... PRIVATE KEY----- | <redacted: private key> |

A secret of none of these shapes that is typed into a config is not recognized. Values of fewer than `SHORTEST` letters
are left: they would black out ordinary words. Variables whose names end in FILE, PATH, DIR and the like hold places.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

SHORTEST = 6

_SECRET_WORD = re.compile(
    r"(?i).*(?:TOKEN|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?)"
    r"|(?:API|ACCESS|AUTH|PRIVATE)?KEYS?"
)
_PLACES = ("FILE", "PATH", "DIR", "DIRECTORY", "HOME", "SOCK")
_NAMED = r"[\w.-]*(?:token(?!iz)|secret|password|passwd|credential|signature)[\w.-]*"
_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL),
        "<redacted: private key>",
    ),
    (
        re.compile(r"(?<=://)([^\s/:@<>]*):(?!<redacted)[^\s/@]+(?=@)"),
        r"\1:<redacted: password>",
    ),
    (
        re.compile(rf"(?i)([?&])({_NAMED}|sig|key|api_?key|access_?key)=(?!<redacted)[^\s&#'\"]+"),
        r"\1\2=<redacted: \2>",
    ),
    (
        re.compile(
            r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}|gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{20,}"
            r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}|ya29\.[\w-]{20,}|xox[a-z]-[\w-]{10,}"
            r"|sk-(?=[\w-]*\d)[\w-]{20,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
        ),
        "<redacted: token>",
    ),
    (re.compile(r"(?i)\b(bearer) [\w.~+/-]{16,}=*"), r"\1 <redacted: token>"),
    (
        re.compile(
            r"(?i)\b([\w.-]*(?:token|secret|password|passwd|key))([=:]['\"]?)"
            r"(?=[A-Za-z0-9+/_-]*\d)[A-Za-z0-9+/_-]{20,}={0,2}"
        ),
        r"\1\2<redacted: \1>",
    ),
)  # fmt: skip


class Secret(str):
    """A text that holds the values of secret variables: itself where it is used, `shown` where it is written."""

    __slots__ = ("secrets",)
    secrets: Mapping[str, str]

    def __new__(cls, text: str, secrets: Mapping[str, str]) -> Secret:
        """Returns the text with the values, by the names of their variables, that it holds."""
        made = super().__new__(cls, text)
        made.secrets = secrets
        return made

    def __repr__(self) -> str:
        """Returns what may be written, so that a config in a message or a traceback keeps its secrets."""
        return repr(shown(self))


def secrets_in(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of an environment that are secret by their names, the longest value first."""
    found = {
        name: value
        for name, value in environment.items()
        if len(value) >= SHORTEST and is_secret_name(name)
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def marked(value: Any, secrets: Mapping[str, str]) -> Any:
    """Returns a config, or a part of one, whose texts that hold a value of `secrets` are each a `Secret`."""
    if isinstance(value, str):
        held = {name: secret for name, secret in secrets.items() if secret in value}
        return Secret(value, held) if held else value
    if type(value) is tuple:
        parts = tuple(marked(part, secrets) for part in value)
        return parts if any(a is not b for a, b in zip(parts, value, strict=True)) else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        before = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        now = {name: marked(part, secrets) for name, part in before.items()}
        changed = {name: part for name, part in now.items() if part is not before[name]}
        return dataclasses.replace(value, **changed) if changed else value
    return value


def secrets_within(value: Any) -> dict[str, str]:
    """Returns every secret that `marked` found in a config, by the name of its variable."""
    if isinstance(value, Secret):
        return dict(value.secrets)
    parts: list[Any] = []
    if isinstance(value, tuple):
        parts = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return {name: text for part in parts for name, text in secrets_within(part).items()}


def redacted(text: str, secrets: Mapping[str, str] | None = None) -> str:
    """Returns a text without the values of `secrets` and without what looks like a credential."""
    for name, value in (secrets or {}).items():
        text = text.replace(value, f"<redacted: {name}>")
    for shape, instead in _SHAPES:
        text = shape.sub(instead, text)
    return text


def shown(value: Any, secrets: Mapping[str, str] | None = None) -> Any:
    """Returns what may be written of a value that JSON has a form for: every text in it redacted.

    `secrets` are kept out beside those that a `Secret` knows of.
    """
    if isinstance(value, str):
        own = value.secrets if isinstance(value, Secret) else {}
        return redacted(str(value), {**own, **(secrets or {})})
    if isinstance(value, Mapping):
        return {shown(key, secrets): shown(part, secrets) for key, part in value.items()}
    return [shown(part, secrets) for part in value] if isinstance(value, list | tuple) else value


def is_redacted(text: str) -> bool:
    """Whether something was taken out of a text, so that it cannot be used."""
    return "<redacted: " in text


def is_secret_name(name: str) -> bool:
    """Whether a variable, option or field of this name holds what is nobody else's: HF_TOKEN, --api-key, s3.secret."""
    words = re.split(r"[_.-]", name)
    return words[-1].upper() not in _PLACES and any(_SECRET_WORD.fullmatch(word) for word in words)
