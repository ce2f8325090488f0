"""What stays in float, as tensors of a hub directory; experts' gate and up share one there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_qat.checkpoint.maps import Foreign, foreign
from gemma_qat.checkpoint.safetensors_file import Tensor
from gemma_qat.errors import InputError
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.hub_rows import PREFIX
from gemma_qat.models.declare import declare
from gemma_qat.quant.sites import Parameter

_KINDS: dict[str, Any] = {"F32": np.float32, "BF16": jnp.bfloat16}


def float_tensors(artifact: Artifact, dtype: str) -> Iterator[Tensor]:
    """Yields the tensors of arrays without a plan, in `dtype` (F32, BF16).

    Raises: InputError when of two arrays that share a tensor one is quantized and the other is not.
    """
    for name, parameters in fused(declare(artifact.config).values()).items():
        planned = [p.path for p in parameters if p.path in artifact.plans]
        if len(planned) == len(parameters):
            continue
        if planned:
            raise InputError(f"{name}: {planned[0]} is quantized, the rest of the tensor is not")
        yield tensor_of(name, parameters, dtype, lambda path: artifact.floats[path])


def fused(parameters: Iterable[Parameter]) -> dict[str, list[Parameter]]:
    """Returns the parameters that each tensor of a float checkpoint holds, in order, by its name in a text-only one."""
    found: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        name = foreign(parameter).name
        found.setdefault(name if name == "lm_head.weight" else PREFIX + name, []).append(parameter)
    return found


def tensor_of(
    name: str, parameters: Sequence[Parameter], dtype: str, array_of: Callable[[str], Any]
) -> Tensor:
    """Returns the tensor that holds `parameters`, whose arrays are asked for when it is written."""
    there: Foreign = foreign(parameters[0])

    def make() -> np.ndarray:
        arrays = [np.asarray(array_of(p.path), np.float32) for p in parameters]
        moved = there.move.write(arrays, parameters[0])
        return np.ascontiguousarray(moved.astype(_KINDS[dtype]))

    return Tensor(name=name, dtype=dtype, shape=there.move.shape(parameters[0]), make=make)
