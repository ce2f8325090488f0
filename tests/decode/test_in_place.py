"""A decode step writes one token where its cache lies: if these fail, a token costs copies of all there is room for."""

from __future__ import annotations

import dataclasses
import json

import pytest
from step_memory import step_memory
from tpu_process import needs_compiler, printed

from gemma_qat.models import SIZES


@pytest.mark.parametrize("cache", ["float", "int8"])
def test_no_stack_is_copied_on_cpu(cache: str) -> None:
    """Eight layers: floats are multiplied out of a copy of one layer's at most, of codes some slots are made floats."""
    config = dataclasses.replace(
        SIZES["tiny_12b"], layer_kinds=("full",) * 8, vocab_size=64, max_positions=2**14
    )
    found = step_memory(config, config.max_positions, cache, "float32")
    print(found)
    assert found["in place"] >= found["caches"] > 2 * found["keys"]
    assert found["temporaries"] < found["keys"] // 2


PROGRAM = r"""
import dataclasses, json, sys
sys.path.insert(0, "tests")
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from step_memory import step_memory
from gemma_qat.models import SIZES

place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0])
found = {}
for size, cache, rows in json.loads(CASES):
    whole = SIZES[size]
    # Caches of the released sizes, and matrices so small that they do not count.
    config = dataclasses.replace(
        whole, layer_kinds=("full",) * 8 if size == "12b" else whole.layer_kinds[: 12 if size == "31b" else None],
        max_positions=2**15, width=32, ffn_width=32, shared_ffn_width=64 if size == "e2b" else 0, vocab_size=512,
        per_layer_vocab=512 if size == "e2b" else 0)
    found[f"{size} {cache} {rows}"] = step_memory(config, 2**15, cache, "bfloat16", place, rows)
print(json.dumps(found))
"""


def check(cases: list[tuple[str, str, int]]) -> None:
    found = printed(f"CASES = {json.dumps(cases)!r}\n{PROGRAM}")
    assert len(found) == len(cases)
    for case, one in found.items():
        print(case, {name: f"{size / 2**20:.1f} MiB" for name, size in one.items()})
        assert one["in place"] >= one["caches"] > 2 * one["keys"], case
        assert one["temporaries"] < one["layer"], case


@needs_compiler
def test_no_stack_is_copied_on_tpu() -> None:
    """12B's global layers, eight of them with 32768 slots."""
    check([("12b", "float", 1), ("12b", "int8", 1)])


@needs_compiler
@pytest.mark.slow
def test_no_stack_is_copied_on_tpu_whatever_it_is() -> None:
    """Several rows, two codes a byte, shared keys and values, several heads of keys in codes."""
    check([
        ("12b", "int8", 4), ("12b", "float", 4), ("12b", "int4", 1),
        ("e2b", "float", 1), ("e2b", "int8", 1), ("31b", "int8", 4),
    ])  # fmt: skip
