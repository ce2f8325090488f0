"""What a low-bit number is: formats, rounding, scales, codes, bit layouts, packed arrays."""

# What values codes may take.
from gemma_qat.numerics.formats import FORMATS, Format, Grid, format_named

# Where bits sit.
from gemma_qat.numerics.layouts import LAYOUTS, Layout, layout_named
from gemma_qat.numerics.packed import PackedArray, is_packed, pack

# Codes and scales of a weight.
from gemma_qat.numerics.qarray import QArray, quantize, refuse_nonfinite
from gemma_qat.numerics.search import lsq_scale, mse_search, percentile_scale, refitted
from gemma_qat.numerics.tiles import scale_shape, tiled_shape

__all__ = [
    "FORMATS",
    "LAYOUTS",
    "Format",
    "Grid",
    "Layout",
    "PackedArray",
    "QArray",
    "format_named",
    "is_packed",
    "layout_named",
    "lsq_scale",
    "mse_search",
    "pack",
    "percentile_scale",
    "quantize",
    "refitted",
    "refuse_nonfinite",
    "scale_shape",
    "tiled_shape",
]
