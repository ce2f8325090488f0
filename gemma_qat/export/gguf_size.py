"""How large a GGUF file will be, from shapes alone: no weights, no file.

    24 bytes | key/values | tensor infos | padding | tensors, each padded to 32 bytes

Exact, but for a vocabulary that is not given: Gemma's 262,144 pieces with their merges are some 15 MB.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gemma_qat.export.gguf import float_type_of, has_factors, kind_of, recipe_keys
from gemma_qat.export.gguf_blocks import Blocks
from gemma_qat.export.gguf_keys import rope_factors
from gemma_qat.export.gguf_map import ROPE_FACTORS, tensors_of
from gemma_qat.export.gguf_vocab import KeyValues
from gemma_qat.models import Fitted

_ALIGNMENT = 32


def file_bytes(fitted: Fitted, vocabulary: KeyValues | None = None) -> int:
    """Returns the bytes of a model's GGUF file under a recipe; `vocabulary` are the key/values of its tokenizer.

    Raises: InputError for a grid that has no form among ggml's blocks.
    Exactness: to the byte what `write_gguf` writes when every scale is a float16.
    """
    config, kind = fitted.config, float_type_of(fitted.recipe)
    keys = recipe_keys(config, fitted.recipe, fitted.plans, kind)
    keys |= vocabulary or {"tokenizer.ggml.model": "none"}
    header = 24 + sum(_text(name) + 4 + _value(value) for name, value in keys.items())
    data = 0
    if has_factors(config):
        header += _info(ROPE_FACTORS, 1)
        data += _padded(rope_factors(config).nbytes)
    for tensor in tensors_of(config).values():
        header += _info(tensor.name, len(tensor.shape))
        stored, elements = kind_of(tensor, fitted.plans, kind), math.prod(tensor.shape)
        if isinstance(stored, Blocks):
            data += _padded(elements // stored.elements * stored.size)
        else:
            data += _padded(elements * np.dtype(stored).itemsize)
    return _padded(header) + data


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _text(text: str) -> int:
    return 8 + len(text.encode())


def _value(value: Any) -> int:
    if isinstance(value, list):
        return 12 + sum(map(_value, value))
    if isinstance(value, str):
        return _text(value)
    return 1 if isinstance(value, bool) else 4


def _info(name: str, rank: int) -> int:
    return _text(name) + 4 + 8 * rank + 4 + 8
