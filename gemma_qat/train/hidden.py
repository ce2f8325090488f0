"""How far a student's hidden states are from its teacher's, of every token the loss counts.

    error = mean over D of (s - t)^2  /  mean over D of t^2

A token at a time, so that the few tokens with a residual stream a hundred times the others' do not stand for all of
them, and a sum over tokens is the same however a batch is cut. States are those

    layers    after every layer, the mean over layers; each layer's residual stream of both models is held
    final     after the last norm, which the head multiplies; costs nothing that is not there

Source: hidden states beside probabilities are what TinyBERT (arXiv 1909.10351) distils; there one mean over everything,
not relative to anything.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_qat.errors import InputError
from gemma_qat.models import ModelConfig

Which = Literal["layers", "final"]


def relative_error(
    student: Float[Array, "B T D"], teacher: Float[Array, "B T D"]
) -> Float[Array, "B T"]:
    """Returns each token's mean squared error over the teacher's mean square, float32; 0 / 0 is 0."""
    s, t = student.astype(jnp.float32), teacher.astype(jnp.float32)
    size = jnp.mean(jnp.square(t), axis=-1)
    return jnp.mean(jnp.square(s - t), axis=-1) / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)


def error_of_layers(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> jax.Array:
    """Returns the mean over layers of `relative_error`, of what `nn.taps.Residuals` kept of both."""
    names = [name for name in student if name.endswith("/out")]
    errors = [relative_error(student[name], teacher[name]) for name in names]
    return functools.reduce(jnp.add, errors) / len(errors)


def check_states(which: Which, student: ModelConfig, teacher: ModelConfig, where: str) -> None:
    """Refuses a teacher whose states are not a student's.

    Raises: InputError.
    """
    if teacher.width != student.width:
        raise InputError(
            f"{where}: hidden states of width {teacher.width}, those of {student.name} are {student.width} wide: "
            "train.hidden_weight=0, or a teacher of that width"
        )
    if which == "layers" and teacher.layers != student.layers:
        raise InputError(
            f"{where}: {teacher.layers} layers, {student.name} has {student.layers}: train.hidden=final compares the "
            "last states alone"
        )
