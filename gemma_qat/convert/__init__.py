"""Foreign checkpoints of any kind in: what a directory or file holds, and how it becomes one of ours."""

# What is recognised.
from gemma_qat.convert.describe import described, digests
from gemma_qat.convert.describe_native import described_native, native_digests
from gemma_qat.convert.formats import FORMATS, Format, format_of, open_source

# The lattice behind bfloat16 weights.
from gemma_qat.convert.lattice import Tally, on_lattice

# Converting.
from gemma_qat.convert.native import CARRIED, Converted, convert

__all__ = [
    "CARRIED",
    "FORMATS",
    "Converted",
    "Format",
    "Tally",
    "convert",
    "described",
    "described_native",
    "digests",
    "format_of",
    "native_digests",
    "on_lattice",
    "open_source",
]
