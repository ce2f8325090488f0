"""What a decode step holds in memory, read off its compiled program."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.decode.generate import _step
from gemma_qat.decode.sampling import Sampling
from gemma_qat.models import Gemma4, RunOptions, declare
from gemma_qat.models.config import ModelConfig
from gemma_qat.nn.module import split


def step_memory(
    config: ModelConfig, length: int, cache: str, dtype: str, place: Any = None, rows: int = 1
) -> dict[str, int]:
    """Bytes of a step's caches, of what it writes in place, of its temporaries, of a global stack of keys and a layer of it."""

    def array(one: Any) -> Any:
        return jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place)

    options = RunOptions(dtype=dtype)
    parameters = {
        path: jax.ShapeDtypeStruct(one.shape, jnp.dtype(dtype))
        for path, one in declare(config).items()
    }
    leaves = jax.eval_shape(
        lambda given: Gemma4.from_parameters(config, given, options=options).leaves(), parameters
    )
    model = Gemma4(config, jax.tree.map(array, leaves), {}, options)
    caches = jax.eval_shape(
        lambda: model.empty_caches(rows, length, None if cache == "float" else cache)
    )
    token = jax.ShapeDtypeStruct((rows, 1), jnp.dtype("int32"))
    key = jax.eval_shape(lambda: jax.random.key(0))
    given = jax.tree.map(array, (token, token, caches, key))
    program = _step.lower(*split(model), Sampling(), *given).compile()
    memory = program.memory_analysis()
    keys = jax.tree.leaves(caches[0][-1].keys)[0]
    return {
        "caches": sum(_bytes(one) for one in jax.tree.leaves(caches)),
        "in place": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "keys": _bytes(keys),
        "layer": _bytes(keys) // keys.shape[0],
    }


def _bytes(one: Any) -> int:
    return math.prod(one.shape) * one.dtype.itemsize
