"""The instruments of the study of LiteRT: blocks alone, and what is compared with what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phone_twins import phone

from gemma_qat.export.litert import Lengths, write_model
from gemma_qat.export.litert.stored import stored

pytest.importorskip("litert_converter", reason="LiteRT's converter has no wheel for this machine")

LENGTHS = Lengths(prefill=8, cache=32)
TOKENS = np.random.default_rng(0).integers(0, 64, 24).astype(np.int32)


@pytest.fixture
def blocks(script: Callable[[str], Any]) -> Any:
    return script("litert.blocks")


def test_blocks_alone_are_those_of_the_model(blocks: Any, tmp_path: Path) -> None:
    """If it fails, a feed-forward or an attention of the phone's is another one: its products, its cache, its softmax.

    Of the very inputs that ours have; a number next to a tie between two codes may become the other one.
    """
    artifact, model = phone("e2b")
    values, mine = blocks.Ours(model, artifact.floats)(TOKENS)
    alone = blocks.Blocks(artifact, tmp_path)
    for layer, part, site in ((0, "ffn", "gate"), (3, "ffn", "gate"), (1, "attn", "q")):
        given = values[f"layers/{layer}/{part}/{site}/kernel_input_scale"]
        run = alone.feed_forward if part == "ffn" else alone.attention
        found = run(layer, given)
        assert {name.split("/")[3] for name in found} == (
            {"gate", "up", "down"} if part == "ffn" else {"q", "k", "v", "o"}
        )
        for name, codes in found.items():
            steps = np.abs(codes.astype(int) - mine[name])
            assert np.ptp(codes.astype(int)) > 50 and steps.max() <= 1 and np.mean(steps) < 0.002, (
                name
            )


def test_products_are_compared_with_those_of_their_own_inputs(blocks: Any, tmp_path: Path) -> None:
    """If it fails, the study calls every product exact whatever the runtime computes."""
    artifact, _ = phone("e2b")
    path = tmp_path / "taps.tflite"
    write_model(
        path, artifact.config, artifact.plans, artifact.quantized, artifact.floats, recipe="mobile", lengths=LENGTHS,
        taps=True,
    )  # fmt: skip
    codes = blocks.theirs(path, LENGTHS, artifact.config, TOKENS)
    sites = stored(artifact.config, artifact.plans, artifact.quantized, artifact.floats)
    found = blocks.exact_products(codes, sites, artifact)
    tables = {"embed/table", "per_layer/embed/table"}
    assert found.keys() == artifact.quantized.keys() - tables
    assert sum(np.abs(steps).sum() for steps in found.values()) <= 3
    codes["head/table/output"][5, 7] += 2
    assert blocks.exact_products(codes, sites, artifact)["head/table"][5, 7] == 2
