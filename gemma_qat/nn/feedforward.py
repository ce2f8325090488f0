"""The gated feed-forward: (gelu(z Wgate) * (z Wup)) Wdown, tanh form of GELU."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from gemma_qat.nn.contract import Weight, contract
from gemma_qat.nn.module import Leaves, Module
from gemma_qat.nn.taps import Taps, listen, tap, under
from gemma_qat.quant.plan import Plan
from gemma_qat.sharding import Placement, constrain


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the tanh form of GELU."""
    return jax.nn.gelu(x, approximate=True)


class FeedForward(Module):
    """The dense feed-forward of a layer."""

    def __init__(self, leaves: Leaves, plans: dict[str, Plan]) -> None:
        self.gate = Weight("kernel", leaves["gate"], (0,), plans.get("gate/kernel"))
        self.up = Weight("kernel", leaves["up"], (0,), plans.get("up/kernel"))
        self.down = Weight("kernel", leaves["down"], (0,), plans.get("down/kernel"))

    def __call__(
        self,
        z: Float[Array, "B T D"],
        taps: Taps | None = None,
        placement: Placement | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the feed-forward of an already normalized input."""
        gate, up, down = listen(taps), listen(taps), listen(taps)
        hidden = gelu(contract("BTD,DF->BTF", z, self.gate, gate))
        hidden = hidden * contract("BTD,DF->BTF", z, self.up, up)
        hidden = constrain(hidden, ("batch", None, "ffn"), placement)
        hidden = checkpoint_name(hidden, "ffn_hidden")
        out = contract("BTF,FD->BTD", hidden, self.down, down)
        for name, inner in (("gate", gate), ("up", up), ("down", down)):
            under(taps, name, inner)
        tap(taps, "out", out)
        return out
