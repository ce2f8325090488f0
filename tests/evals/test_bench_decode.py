"""The figures of packed decoding: what is measured, and that they are quotients of one another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.cli.main import main
from gemma_qat.evals import bench_whole
from gemma_qat.evals.bench_cases import KINDS, cases_of, group_sizes, matrices_of
from gemma_qat.evals.bench_decode import Measure, bench_decode
from gemma_qat.models import SIZES, Gemma4, RunOptions, fit, size_named
from gemma_qat.numerics import PackedArray

MEASURE = Measure(dtype="float32", rounds=1, bytes=1, memory=2**30, bandwidth=1e9)

SMALL = dataclasses.replace(
    SIZES["tiny_26b_a4b"], vocab_size=64, layer_kinds=("sliding", "full"), window=4
)


def test_matrices_of_a_model() -> None:
    """If it fails, a shape of the model is not measured, or one is measured that no step multiplies with."""
    found = {(m.outputs, m.reduced, m.experts) for m in matrices_of(size_named("26b_a4b"))}
    assert {
        (262144, 2816, 0),
        (704, 2816, 128),
        (2816, 704, 128),
        (2112, 2816, 0),
        (2816, 2112, 0),
    } <= found
    assert (128, 2816, 0) in found  # the router
    small = {(m.outputs, m.reduced) for m in matrices_of(size_named("e2b"))}
    assert {(262144, 1536), (12288, 1536), (256, 1536), (1536, 256)} <= small


def test_every_kind_is_measured() -> None:
    """If it fails, an operation of a decode step, or a layer's way to attend, goes unmeasured."""
    made = cases_of(SMALL, KINDS, ["q4_0", "int4"], [1, 2], "float32", 8)
    found = {(case.kind, case.name, case.format) for case in made}
    assert {kind for kind, _, _ in found} == set(KINDS)
    assert {f for kind, _, f in found if kind.startswith("integer")} == {"int4"}  # one scale a row
    assert {(name, f) for kind, name, f in found if kind == "attention"} == {
        ("local", "int8"), ("local", "int4"), ("global", "int8"), ("global", "int4"),
    }  # fmt: skip
    assert {name for kind, name, _ in found if kind == "experts"} == {"expert_gate", "expert_down"}
    assert {case.rows for case in made} == {1, 2}


def test_speeds_are_of_what_is_read() -> None:
    """If it fails, bandwidth or speedup are of other bytes or seconds than are reported."""
    for s in bench_decode(SMALL, ["int4"], [2], MEASURE, kinds=["head"], cache_length=8):
        assert s.bandwidth == pytest.approx(s.bytes / s.seconds)
        assert s.share == pytest.approx(s.bandwidth / 1e9)
        assert s.plain_seconds is not None
        assert s.speedup == pytest.approx(s.plain_seconds / s.seconds)
        assert s.backend == "blocked" and "blocked takes it" in s.why and not s.note


def test_bytes_are_those_that_have_to_be_read() -> None:
    """If it fails, experts that nobody chose are counted, or half a weight is, or a cache without its scales."""
    made = [
        one.make()
        for one in cases_of(SMALL, ("head", "experts", "attention"), ["q4_0"], [3], "float32", 8)
        if one.kind != "attention" or one.format == "int8"
    ]
    (head,) = (c for c in made if c.kind == "head")
    assert head.bytes == 64 * 96 * 4.5 / 8
    experts = [c for c in made if c.kind == "experts"]
    for c in experts:  # 3 tokens x 2 of 8 experts
        assert (c.rows, c.dims["chosen"], c.turns) == (3, 6, 1)
        assert c.bytes == 6 * c.dims["outputs"] * c.dims["reduced"] * 4.5 / 8
    ring, whole = (c for c in made if c.kind == "attention")
    assert (ring.dims["slots"], whole.dims["slots"]) == (4, 32)  # as the engine keeps them
    for c in made:
        weights = jax.eval_shape(lambda c=c: c.packed.make(jax.random.key(0), 1))
        sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(weights) if x.ndim]
        assert c.packed.bytes == sum(sizes)  # but for the number of the layer


def test_a_batch_chooses_different_experts() -> None:
    """If it fails, rows of one expert are measured where a batch would read many, or the next call reads the same."""
    assert np.array_equal(group_sizes(8, 2), [1, 0, 0, 0, 1, 0, 0, 0])
    assert np.array_equal(group_sizes(8, 6) > 0, [1, 1, 1, 0, 1, 1, 1, 0])
    assert np.array_equal(group_sizes(4, 10), [3, 3, 2, 2])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "attention"])
def test_both_sides_do_the_same(kind: str) -> None:
    """If it fails, a packed operation is compared with another one: other rows, another expert, another axis."""
    case = cases_of(SMALL, [kind], ["int8"], [3], "float32", 8)[0].make()
    weights = case.packed.make(jax.random.key(0), 1)
    one: PackedArray = weights if isinstance(weights, PackedArray) else weights[0]
    value = one.alone().dequantize()
    if kind.startswith("integer"):
        value = value / 0.01
    plain_inputs = (case.inputs[0].astype(jnp.float32), *case.inputs[1:])
    got = case.packed.call(one, 1, *case.inputs)
    expected = case.plain.call(value, 1, *plain_inputs)
    np.testing.assert_allclose(
        np.asarray(got, np.float64).ravel(), np.asarray(expected, np.float64).ravel(),
        rtol=1e-4, atol=1e-3,  # two orders of float32 sums of some hundred products
    )  # fmt: skip


def test_what_does_not_fit_is_said() -> None:
    """If it fails, a benchmark dies for want of memory instead of leaving out the float side."""
    matrix = 64 * 96  # the head, largest; its float twin takes four bytes each
    small = dataclasses.replace(MEASURE, memory=int(2.5 * matrix))
    (speed,) = bench_decode(SMALL, ["int4"], [1], small, kinds=["head"])
    assert speed.speedup is None and "the float32 weight would take" in speed.note


def _wholes() -> list[bench_whole.Whole]:
    setting = bench_whole.Setting(
        batches=[2], caches=["int8"], steps=2, options=RunOptions(), memory=2**30, bandwidth=1e9
    )
    config = dataclasses.replace(SMALL, layer_kinds=("full",))
    return bench_whole.bench_whole(config, ["q4_0"], setting)


def test_whole_models_are_quotients(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it fails, tokens/s, the share of the roofline or the ratio to float weights are of another model or batch."""
    seconds = iter([0.5, 0.25])
    monkeypatch.setattr(bench_whole, "_seconds", lambda *_: next(seconds))
    plain, packed = _wholes()
    assert (plain.weights, packed.weights) == ("float32", "q4_0")
    assert (plain.tokens_per_second, packed.tokens_per_second) == (4.0, 8.0)
    assert plain.speedup is None and packed.speedup == 2.0
    for w in (plain, packed):
        assert w.bytes_per_token and w.seconds
        assert w.roofline_share == pytest.approx(2 * w.bytes_per_token / 1e9 / w.seconds)
    assert packed.weight_bytes < plain.weight_bytes / 4


@pytest.mark.slow
def test_whole_models_decode() -> None:
    """If it fails, `stream` does not run on the models that are made for it."""
    for w in _wholes():
        assert w.seconds and w.tokens_per_second == pytest.approx(2 / w.seconds)


def test_random_leaves_are_those_of_a_model() -> None:
    """If it fails, what is timed is not the model that decodes: a leaf is missing, unpacked or of another shape."""
    kinds = ("full", "full", "full")
    small = dataclasses.replace(SIZES["tiny_e2b"], layer_kinds=kinds, shared_kv_layers=1)
    fitted = fit(small, "mobile")
    shapes = bench_whole.abstract_leaves(fitted.config, fitted.plans, "bfloat16")
    leaves = bench_whole.random_leaves(fitted.config, fitted.plans, shapes)
    model = Gemma4(fitted.config, leaves, fitted.plans)
    assert set(model.leaves()) == set(leaves) == set(shapes)
    for path, leaf in leaves.items():
        assert jax.tree.map(lambda x: (x.shape, x.dtype), leaf) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes[path]
        ), path
    packed = {p for p, leaf in model.parameters().items() if isinstance(leaf, PackedArray)}
    assert packed == set(fitted.plans)
    assert float(leaves["head/table_input_scale"][0]) == np.float32(0.1)


def test_a_whole_model_that_does_not_fit() -> None:
    """If it fails, weights are made that no memory can hold, or nobody is told why a figure is missing."""
    setting = bench_whole.Setting(
        batches=[1], caches=["float"], steps=1, options=RunOptions(), memory=1000, bandwidth=1e9
    )
    (whole,) = bench_whole.bench_whole(size_named("31b"), [], setting)
    assert whole.seconds is None and "weights and cache would take" in whole.note
    assert 4 * 30e9 < whole.weight_bytes < 4 * 32e9


def test_the_verb(tmp_path: Path, capsys: Any) -> None:
    """If it fails, the figures a person asked for are not there."""
    bench = ["bench", "decode", "--size", "tiny_31b", "--rounds", "1", "--megabytes", "1"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main([*bench, "--kinds", "head", "--formats", "int4", "--batches", "1", *files]) == 0
    out = capsys.readouterr().out
    assert "of a copy" in out and "x float32" in out
    written = json.loads((tmp_path / "a.json").read_text())
    (speed,) = written["speeds"]
    assert speed["kind"] == "head" and speed["plain_dtype"] == "float32"
    assert {"jax", "jaxlib", "gemma_qat", "device"} <= set(written["environment"])
    assert written["command"].startswith("gemma-qat bench decode --size tiny_31b")
    assert written["copy_bandwidth"] > 0 and written["whole"] == []
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--formats", "int5"], "unknown format 'int5'"),
        (["--batches", "one"], "numbers of rows expected"),
        (["--batches", "0"], "--batches 0: at least 1 expected"),
        (["--kinds", "heads"], "unknown kind 'heads'"),
        (["--caches", "int3"], "unknown cache 'int3'"),
        (["--size", "tiny_e2b,e3b"], "unknown size 'e3b'"),
        (["--size", "tiny_31b,tiny_12b", "--recipes", "mobile"], "recipe mobile is for"),
        (["--cache-length", "0"], "--cache-length 0: at least 1 expected"),
    ],
)
def test_refusals(given: list[str], message: str, capsys: Any) -> None:
    """If it fails, a wrong name ends in a traceback, or after minutes of measuring."""
    assert main(["bench", "decode", *given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
