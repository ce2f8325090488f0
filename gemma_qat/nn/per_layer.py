"""Per-layer inputs of E2B and E4B: a second, small embedding that feeds every layer.

Once, before layer 0, from the scaled embedding x and the token ids:

    c = rms(x Wmodel * D^(-1/2)) * w          e = table[token] * sqrt(P)          input = (c + e) * 2^(-1/2)

and in layer l:   x + norm((gelu(x Wgate) * input_l) Wproj).

The factors D^(-1/2) and 2^(-1/2) meet a norm later and do not show in the logits, but they set the range
quantizers see.

Source: `Gemma4TextModel.project_per_layer_inputs` in huggingface/transformers; google-deepmind/gemma `gm/nn/gemma4`.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from gemma_qat.nn.contract import Weight, contract
from gemma_qat.nn.feedforward import gelu
from gemma_qat.nn.lookup import look_up
from gemma_qat.nn.module import Leaves, Module
from gemma_qat.nn.norms import RMSNorm
from gemma_qat.nn.taps import Taps, listen, tap, under
from gemma_qat.quant.plan import Plan
from gemma_qat.sharding import Placement, constrain


class PerLayerInputs(Module):
    """Makes the input of every layer from the token ids and the scaled embedding."""

    def __init__(self, eps: float, leaves: Leaves, plans: dict[str, Plan]) -> None:
        self.embed = Weight("table", leaves["embed"], (2,), plans.get("embed/table"))
        self.projection = Weight(
            "kernel", leaves["projection"], (0,), plans.get("projection/kernel")
        )
        self.norm = RMSNorm(leaves["norm"], eps)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        x: Float[Array, "B T D"],
        taps: Taps | None = None,
        placement: Placement | None = None,
    ) -> Float[Array, "B T L P"]:
        """Returns the inputs of all layers, layer axis before the width."""
        inner = listen(taps)
        c = contract("BTD,DLP->BTLP", x, self.projection, inner) * x.shape[-1] ** -0.5
        under(taps, "projection", inner)
        looked_up = listen(taps)
        e = look_up(self.embed, tokens, "per_layer_vocab", "float32", placement, looked_up)
        under(taps, "embed", looked_up)
        e = (e * e.shape[-1] ** 0.5).astype(x.dtype)
        combined = (self.norm(c) + e) * 2.0**-0.5
        combined = constrain(combined, ("batch", None, None, None), placement)
        tap(taps, "out", combined)
        return combined


class PerLayerBranch(Module):
    """Adds one layer's input to its residual, gated by the residual."""

    def __init__(self, leaves: Leaves, plans: dict[str, Plan]) -> None:
        self.gate = Weight("kernel", leaves["gate"], (0,), plans.get("gate/kernel"))
        self.projection = Weight(
            "kernel", leaves["projection"], (0,), plans.get("projection/kernel")
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        per_layer: Float[Array, "B T P"],
        taps: Taps | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the branch, before its norm."""
        gate, projection = listen(taps), listen(taps)
        g = gelu(contract("BTD,DP->BTP", x, self.gate, gate)) * per_layer
        out = contract("BTP,PD->BTD", g, self.projection, projection)
        under(taps, "gate", gate)
        under(taps, "projection", projection)
        return out
