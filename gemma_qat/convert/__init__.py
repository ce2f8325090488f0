"""Foreign checkpoints of any kind in: what a directory or file holds, and how it becomes one of ours."""

# What is recognised.
from gemma_qat.convert.formats import FORMATS, Format, format_of, open_source

# Converting.
from gemma_qat.convert.native import CARRIED, Converted, convert

__all__ = ["CARRIED", "FORMATS", "Converted", "Format", "convert", "format_of", "open_source"]
