"""What a decode step reads: counted by hand on a tiny model."""

from __future__ import annotations

import dataclasses

import pytest

from gemma_qat.decode import roofline
from gemma_qat.models import SIZES, Gemma4, initialize


def _model(name: str) -> Gemma4:
    config = dataclasses.replace(
        SIZES[name], vocab_size=64, layer_kinds=("sliding", "full"), window=4,
        per_layer_vocab=64 if SIZES[name].per_layer_width else 0,
        shared_kv_layers=0,
    )  # fmt: skip
    return Gemma4.from_parameters(config, initialize(config, 0))


def test_every_weight_once_and_experts_by_choice() -> None:
    """If it fails, a roofline share is of the wrong bytes: experts nobody chose, or a head that is not read."""
    model = _model("tiny_26b_a4b")
    config = model.config
    assert config.experts is not None
    sizes = {path: leaf.nbytes for path, leaf in model.parameters().items()}
    experts = sum(size for path, size in sizes.items() if "/experts/" in path)
    found = roofline.traffic(model, 1, 10)
    assert found.experts == experts * config.experts.per_token / config.experts.count
    assert found.weights == sum(sizes.values()) - experts
    many = roofline.traffic(model, config.experts.count, 10)
    assert many.experts == experts


def test_rows_of_tables_and_slots_of_caches() -> None:
    """If it fails, a per-layer table counts whole, or a ring counts as long as a row."""
    model = _model("tiny_e2b")
    sizes = {path: leaf.nbytes for path, leaf in model.parameters().items()}
    table = sizes["per_layer/embed/table"]
    found = roofline.traffic(model, 2, 10)
    assert found.weights == sum(sizes.values()) - table + table * 2 / 64
    kv = 2 * (4 * model.config.head_width + 10 * model.config.global_head_width)
    heads = model.config.kv_heads
    slots = 2 * 4 * (4 + 10) * 2
    assert found.cache == 2 * 4 * kv * heads + slots
    small = roofline.traffic(model, 2, 10, "int8")
    # Caches of codes have a multiple of 32 slots, a ring its window: 4 and 32, for positions and segments too.
    kv = 2 * (4 * model.config.head_width + 32 * model.config.global_head_width)
    assert small.cache == 2 * (kv * heads + 2 * 4 * (4 + 32) + 2 * 4 * heads * (4 + 32))


def test_figures_are_quotients() -> None:
    """If it fails, tokens/s or the share are of another batch."""
    model = _model("tiny_e2b")
    found = roofline.figures(model, 4, 10, "float", 0.5, bandwidth=1e9)
    total = roofline.traffic(model, 4, 10).total
    assert found["tokens_per_second"] == 8.0 and found["bytes_per_token"] == total / 4
    assert found["roofline_share"] == pytest.approx(total / 1e9 / 0.5)


def test_a_copy_is_measured() -> None:
    """If it fails, no bandwidth, or one of nothing, is reported."""
    assert roofline.copy_bandwidth(megabytes=1, rounds=2) > 1e6
