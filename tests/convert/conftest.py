"""What tests of conversions share."""

from __future__ import annotations

from hf_directory import bfloat16, hugging_face

__all__ = ["bfloat16", "hugging_face"]
