"""The environment's secrets, kept out of what is written: the one place that reads their values.

`gemma_qat.redaction` says which variables are secret and what becomes of their values.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

from gemma_qat.errors import InputError
from gemma_qat.redaction import Secret, marked, redacted, secrets_in, shown

Config = TypeVar("Config")


def hide(config: Config) -> Config:
    """Returns a config, or a sweep, whose values are not written where they hold a secret of the environment.

    Raises: InputError when a folder would be named after one.
    """
    found: Config = marked(config, secrets_in(os.environ))
    for field in ("name", "directory"):
        text = getattr(found, field, "")
        if isinstance(text, Secret):
            raise InputError(
                f"{field}: it holds the value of {', '.join(text.secrets)}, and would be the name of a folder"
            )
    return found


def safe(text: str) -> str:
    """Returns a text that may be printed: without the environment's secrets and what looks like a credential."""
    return redacted(text, secrets_in(os.environ))


def safe_values(found: Any) -> Any:
    """Returns plain values that may be written, their texts as `safe` returns them."""
    return shown(found, secrets_in(os.environ))
