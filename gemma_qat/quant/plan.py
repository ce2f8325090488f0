"""How one site is quantized.

A training matmul is three contractions (fwd, dlhs, drhs) of two operands each; a plan says how each operand is
quantized, and what becomes of the result.

| field | operand | None or default |
|---|---|---|
| `weight`, `scales`, `gradient` | rhs of fwd | (always there) |
| `input` | lhs of fwd | stays in float |
| `output` | result of fwd | stays in float |
| `cache` | the layer's keys and values (at its key projection) | stay in float |
| `arithmetic` | the dot itself | `float`: a float dot of rounded operands |
| `backward` | both operands of dlhs and drhs | full precision, straight-through gradient |

Source: the ontology of AQT v2 (google/aqt); static input and output rounding as in huggingface/transformers
`integrations/gemma_quant.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from gemma_qat.numerics import Grid

ScaleMode = Literal["recomputed", "learned", "frozen"]
Gradient = Literal["straight", "clipped"]
Held = Literal["held"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """How numbers that are made on the way are rounded: activations, keys, values.

    `per` "tensor": one static scale, calibrated and stored beside the site; a scale of 0 means identity. "token": one
    scale per token (per head and token for keys and values), from the extremum at the time. "tile": ggml's Q8_0, a
    float16 scale per 32 of the contracted elements, which is what llama.cpp rounds the input of a quantized matrix to.
    `learned` static scales train on after calibration, the others stay as calibrated.
    """

    bits: int = 8
    per: Literal["tensor", "token", "tile"] = "tensor"
    learned: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"activations of {self.bits} bits given, 4 or 8 expected")
        if self.per == "tile" and self.bits != 8:
            raise ValueError(f"activations of {self.bits} bits in tiles given, 8 expected: Q8_0")
        if self.learned and self.per != "tensor":
            raise ValueError("only static scales (per='tensor') can be learned")

    @property
    def is_static(self) -> bool:
        """Whether its scale is stored."""
        return self.per == "tensor"

    @property
    def highest(self) -> int:
        """Largest code; the smallest is one further on the other side."""
        return 2 ** (self.bits - 1) - 1

    def __str__(self) -> str:
        if self.is_static:
            return f"int{self.bits} static{', learned' if self.learned else ''}"
        return "q8_0 tiles" if self.per == "tile" else f"int{self.bits} per token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backward:
    """Integer contractions of the backward pass: bits of both operands of dlhs and drhs, and how gradients round."""

    dlhs_bits: int = 8
    drhs_bits: int = 8
    stochastic: bool = True

    def __post_init__(self) -> None:
        for name in ("dlhs_bits", "drhs_bits"):
            bits = getattr(self, name)
            if bits not in (4, 8):
                raise ValueError(f"backward.{name} of {bits} given, 4 or 8 expected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How one site is quantized.

    `scales`: `recomputed` from the weights at every step, `learned` as parameters of their own (LSQ), or `frozen` at
    the values they were given. `gradient` of given scales: `clipped` is zero where a code saturates, `straight` passes
    everywhere; with recomputed scales nothing saturates by more than a step and the gradient is always straight. A step
    that trains scales alone makes it `held`.
    `arithmetic` "integer" multiplies codes with int32 sums, and needs an input plan per token and one scale per output
    channel. "packed" does so with weights that are packed and inputs that have a static scale, which has to be
    calibrated (`summing_codes`); it is what a float dot trained, up to float32 rounding.
    """

    weight: Grid
    scales: ScaleMode = "recomputed"
    gradient: Gradient | Held = "clipped"
    input: Activation | None = None
    output: Activation | None = None
    cache: Activation | None = None
    arithmetic: Literal["float", "integer", "packed"] = "float"
    backward: Backward | None = None

    def __post_init__(self) -> None:
        if self.arithmetic != "integer" and self.backward is not None:
            raise ValueError("a quantized backward pass needs arithmetic='integer'")
        if self.arithmetic == "float":
            return
        per, what = ("token", "a scale per token")
        if self.arithmetic == "packed":
            per, what = ("tensor", "a static scale")
        if self.input is None or self.input.per != per:
            given = "none" if self.input is None else str(self.input)
            raise ValueError(
                f"{self.arithmetic} arithmetic needs an input plan with {what}; given {given}"
            )
        if not self.has_channel_codes:
            raise ValueError(
                f"{self.arithmetic} arithmetic needs one scale per output channel and a code for 0; given {self.weight}"
            )

    @property
    def has_static_input(self) -> bool:
        """Whether activations are rounded to a stored scale."""
        return self.input is not None and self.input.is_static

    @property
    def has_channel_codes(self) -> bool:
        """Whether codes stand for themselves times one scale per output channel, so that they can be summed."""
        return (
            self.weight.tile is None and not self.weight.number.zero and not self.weight.two_level
        )

    @property
    def has_scale_leaf(self) -> bool:
        """Whether the scales are stored beside the weight rather than derived from it."""
        return self.scales != "recomputed"

    @property
    def activations(self) -> dict[str, Activation]:
        """What is rounded beside the weight, by the suffix of the scale that is stored for it when it is static."""
        found = {"input_scale": self.input, "output_scale": self.output}
        found |= {"key_cache_scale": self.cache, "value_cache_scale": self.cache}
        return {name: how for name, how in found.items() if how is not None}

    @property
    def static_scales(self) -> tuple[str, ...]:
        """Suffixes of the static scales stored beside the site, each float32 of shape [1]."""
        return tuple(name for name, how in self.activations.items() if how.is_static)


Plans = dict[str, Plan]
"""Plan of each quantized parameter, by path; a parameter that is not there stays in float."""


def within(plans: Plans, prefix: str) -> Plans:
    """Returns the plans under `prefix/`, with paths relative to it."""
    start = f"{prefix}/"
    return {path[len(start) :]: plan for path, plan in plans.items() if path.startswith(start)}


def weight_only(plan: Plan) -> Plan:
    """Returns the plan with every activation, key and value left in float."""
    return dataclasses.replace(
        plan, input=None, output=None, cache=None, arithmetic="float", backward=None
    )


def summing_codes(plans: Plans) -> Plans:
    """Returns the plans with int32 sums of packed codes where inputs have static scales and weights allow it."""
    return {
        path: dataclasses.replace(plan, arithmetic="packed")
        if plan.has_static_input and plan.has_channel_codes
        else plan
        for path, plan in plans.items()
    }


def weights_only(plans: Plans) -> Plans:
    """Returns the plans with every activation, key and value left in float."""
    return {path: weight_only(plan) for path, plan in plans.items()}
