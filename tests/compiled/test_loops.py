"""How often parts of a compiled program run: loops multiplied out, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_qat.compiled import Runs, executed, parse

TEXTS = Path(__file__).parent / "texts"

TPU = (TEXTS / "tpu.txt").read_text("utf-8")
"""Cut down from a program that libtpu 0.0.42 made: layouts with tiles and memory spaces, a loop of 5 turns whose bound stands
in its condition, an asynchronous gather in three pieces, a reduce-scatter written as an all-reduce of which a slice is kept."""

NESTED = (TEXTS / "nested.txt").read_text("utf-8")
"""What the partitioner writes for a product that sends shards around, inside a loop over layers: constants moved out of
both loops, an unsigned counter, two shards in each direction a turn."""


def test_a_product_that_sends_takes_several_shards_a_turn() -> None:
    """If it fails, FLOPs and messages of such products are counted twice, or once for the whole loop."""
    times = {"main": 1, "body.out": 3, "cond.out": 4, "body.in": 3 * 8, "cond.in": 3 * 9}
    assert executed(parse(NESTED)) == Runs(times)


def test_a_loop_runs_as_often_as_its_condition_says() -> None:
    """If it fails, a scan over layers is counted once, as XLA does."""
    assert executed(parse(TPU)) == Runs({"main": 1, "body": 5, "cond": 6})


@pytest.mark.parametrize("said", ['"known_trip_count":{"n":"7"}', '"known_trip_count": { "n": "7"'])
def test_a_loop_runs_as_often_as_the_compiler_says(said: str) -> None:
    """If it fails, loops of CPU and GPU programs are read off what only TPU ones show."""
    told = TPU.replace("body=%body", f"body=%body, backend_config={{{said}}}")
    told = told.replace("copy(%first)", "partition-id()")
    assert executed(parse(told)) == Runs({"main": 1, "body": 7, "cond": 8})


@pytest.mark.parametrize(
    ("was", "now", "turns"),
    [
        ("%turn = s32[]{:T(128)} constant(1)", "%turn = s32[]{:T(128)} constant(2)", 3),  # products that send: two a turn
        ("%first = s32[]{:T(128)} constant(0)", "%first = s32[]{:T(128)} constant(2)", 3),
        ("direction=LT", "direction=LE", 6),
        ("direction=LT", "direction=NE", 5),
        ("compare(%i, %bound), direction=LT", "compare(%bound, %i), direction=GT", 5),
        ("add(%i, %turn)", "subtract(%i, %turn)", None),
        ("add(%i, %turn)", "multiply(%i, %turn)", None),
        ("direction=LT", "direction=EQ", None),
        ("%none = s32[]{:T(128)} copy(%first)", "%none = s32[]{:T(128)} partition-id()", None),
    ],
)  # fmt: skip
def test_a_loop_runs_from_its_start_to_its_bound_by_its_step(
    was: str, now: str, turns: int | None
) -> None:
    """If it fails, loops are multiplied out wrongly, or a plan hides that it does not know how often one runs."""
    assert was in TPU
    found = executed(parse(TPU.replace(was, now)))
    assert found.times == {"main": 1, "body": turns or 1, "cond": (turns or 1) + 1}
    assert found.unknown == (() if turns else ("loop",))
    assert found.inexact == (frozenset() if turns else {"body", "cond"})


def test_what_is_called_inside_a_loop_runs_with_it() -> None:
    """If it fails, work in branches and asynchronous computations is counted once, or again where it ends."""
    called = """
HloModule m

%either (a: f32[]) -> f32[] {
  ROOT %a = f32[] parameter(0)
}

%or (b: f32[]) -> f32[] {
  ROOT %b = f32[] parameter(0)
}

%aside (c: f32[]) -> f32[] {
  ROOT %c = f32[] parameter(0)
}

ENTRY %main (x: pred[], y: f32[]) -> f32[] {
  %x = pred[] parameter(0)
  %y = f32[] parameter(1)
  %which = f32[] conditional(%x, %y, %y), true_computation=%either, false_computation=%or
  %begun = ((f32[]), f32[]) async-start(%y), calls=%aside
  %on = ((f32[]), f32[]) async-update(%begun), calls=%aside
  %ended = f32[] async-done(%on), calls=%aside
  ROOT %again = f32[] call(%ended), to_apply=%aside
}
"""
    assert executed(parse(called)).times == {"main": 1, "either": 1, "or": 1, "aside": 2}
