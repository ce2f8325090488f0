"""The table of post-training quantization methods: what each does to a site or a layer, and whether it needs text."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gemma_qat.errors import unknown
from gemma_qat.ptq import awq
from gemma_qat.ptq.config import PtqConfig
from gemma_qat.ptq.gptq import gptq
from gemma_qat.ptq.layer import LayerMethod, SiteMethod
from gemma_qat.ptq.rtn import ROUNDINGS, rounding

Needs = Literal["nothing", "diagonal", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row: a way to come from float weights to codes.

    `site` quantizes one weight, `needs` says what of its input it has to be told: nothing, the mean square of each
    (`diagonal`), or all second moments. `layer` does a whole layer where a method does more than site after site.
    """

    name: str
    summary: str
    site: SiteMethod
    needs: Needs = "nothing"
    layer: LayerMethod | None = None

    @property
    def needs_text(self) -> bool:
        """Whether it looks at text whatever its options are."""
        return self.needs != "nothing" or self.layer is not None

    def looks_at(self, config: PtqConfig) -> Needs:
        """Returns what sites have to be told of their inputs with these options."""
        return "diagonal" if self.needs == "nothing" and config.importance else self.needs

    def wants_text(self, config: PtqConfig) -> bool:
        """Returns whether it looks at text with these options."""
        return self.needs_text or self.looks_at(config) != "nothing"


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="rtn", summary="rounding to nearest, scales from each tile's extremum",
            site=rounding("rtn"),
        ),
        Method(
            name="mse", summary="rounding to nearest, scales searched for the least squared error",
            site=rounding("mse"),
        ),
        Method(
            name="percentile", summary="rounding to nearest, the largest 0.1 % of a tile saturate",
            site=rounding("percentile"),
        ),
        Method(
            name="awq", summary="inputs that matter get finer steps, by scales folded into what stands before",
            site=awq.quantize_site, needs="diagonal", layer=awq.quantize_layer,
        ),
        Method(
            name="gptq", summary="rounding one input after the other, the rest make up for the error",
            site=gptq, needs="full",
        ),
    )
}  # fmt: skip

DATA_FREE = tuple(ROUNDINGS)
"""Methods that give scales from weights alone, without text: what `scale_init` may be."""


def method_named(name: str) -> Method:
    """Returns the method called `name`.

    Raises: InputError naming the nearest methods when there is none.
    """
    if name not in METHODS:
        raise unknown("PTQ method", name, METHODS)
    return METHODS[name]
