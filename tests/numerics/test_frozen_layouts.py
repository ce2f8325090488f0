"""The bytes of a packed weight are a file format: exports, kernels and stored checkpoints agree by these alone."""

from __future__ import annotations

import json

from frozen_layouts import GOLDEN, digests


def test_no_byte_of_a_packed_weight_has_moved() -> None:
    """If it fails, every packed checkpoint that was ever written is read wrongly, by training and by kernels."""
    assert digests() == json.loads(GOLDEN.read_text("utf-8"))
