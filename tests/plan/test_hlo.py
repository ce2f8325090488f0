"""Reading compiled programs: turns of loops, FLOPs, bytes, and what is sent, by hand and against XLA's own count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.plan.chips import topology_named
from gemma_qat.plan.compile import needed_bytes
from gemma_qat.plan.exchange import Exchange, exchanges, group_of
from gemma_qat.plan.hlo import Shape, parse, shapes_of
from gemma_qat.plan.loops import executed
from gemma_qat.plan.work import Work, work

# Cut down from a program that libtpu 0.0.42 made: layouts with tiles and memory spaces, a loop of 5 turns whose bound stands
# in its condition, an asynchronous gather in three pieces, a reduce-scatter written as an all-reduce of which a slice is kept.
TPU = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cond (p: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%starts (q: bf16[8,32]) -> (bf16[8,32], bf16[8,128]) {
  %q = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  %ag.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=1, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={1}
  ROOT %cc = (bf16[8,32]{1,0}, bf16[8,128]{1,0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (q2: bf16[8,128], r2: bf16[128,128]) -> bf16[8,128] {
  %q2 = bf16[8,128]{1,0} parameter(0)
  %r2 = bf16[128,128]{1,0} parameter(1)
  %ag.2 = bf16[8,128]{1,0} all-gather(%q2), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %dot.1 = bf16[8,128]{1,0:T(8,128)(2,1)} convolution(%q2, %r2), dim_labels=bf_io->bf
}

%ends (q3: bf16[8,128]) -> bf16[8,128] {
  %q3 = bf16[8,128]{1,0} parameter(0)
  %ag.3 = bf16[8,128]{1,0} all-gather(%q3), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %cc2 = bf16[8,128]{1,0} custom-call(%ag.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.3 (q4: f32[16,128]) -> f32[4,128] {
  %q4 = f32[16,128]{1,0} parameter(0)
  %ar = f32[16,128]{1,0} all-reduce(%q4), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %ds = f32[4,128]{1,0} dynamic-slice(%ar, %zero, %zero), dynamic_slice_sizes={4,128}
}

%body (p: (s32[], bf16[8,128], bf16[5,128,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[5,128,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %w = bf16[5,128,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %small = bf16[8,32]{1,0:T(8,128)(2,1)} copy(%x)
  %begun = (bf16[8,32]{1,0}, bf16[8,128]{1,0}) fusion(%small), kind=kCustom, calls=%starts
  %one = bf16[128,128]{1,0:T(8,128)(2,1)} dynamic-slice(%w, %i, %i, %i), dynamic_slice_sizes={1,128,128}
  %y = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %one), kind=kOutput, calls=%async_collective_fusion.7
  %done = bf16[8,128]{1,0:S(1)} fusion(%y), kind=kCustom, calls=%ends
  %turn = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %turn)
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %done)
}

ENTRY %main (x: bf16[8,128], w: bf16[5,128,128], g: f32[16,128]) -> f32[4,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[5,128,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %g = f32[16,128]{1,0:T(8,128)} parameter(2)
  %first = s32[]{:T(128)} constant(0)
  %none = s32[]{:T(128)} copy(%first)
  %start = (s32[], /*index=1*/bf16[8,128]{1,0}, bf16[5,128,128]{2,1,0}) tuple(%none, %x, %w)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) while(%start), condition=%cond, body=%body, metadata={op_name="jit(step)/while"}
  ROOT %kept = f32[4,128]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3, metadata={op_name="jit(step)/grad"}
}
"""


# What the partitioner writes for a product that sends shards around, inside a loop over layers: constants moved out of
# both loops, an unsigned counter, two shards in each direction a turn.
NESTED = """
HloModule jit_step, is_scheduled=true

%next (a: u32[], b: u32[]) -> u32[] {
  %a = u32[] parameter(0)
  %b = u32[] parameter(1)
  ROOT %sum = u32[] add(%a, %b)
}

%cond.in (p: (u32[], u32[], u32[])) -> pred[] {
  %p = (u32[], u32[], u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=2
  %bound = u32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body.in (p: (u32[], u32[], u32[])) -> (u32[], u32[], u32[]) {
  %p = (u32[], u32[], u32[]) parameter(0)
  %bound = u32[] get-tuple-element(%p), index=0
  %two = u32[] get-tuple-element(%p), index=1
  %i = u32[] get-tuple-element(%p), index=2
  %step = u32[] constant(2)
  %up = u32[] fusion(%i, %step), kind=kLoop, calls=%next
  ROOT %out = (u32[], u32[], u32[]) tuple(%bound, %two, %up)
}

%cond.out (p: (s32[], u32[])) -> pred[] {
  %p = (s32[], u32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body.out (p: (s32[], u32[])) -> (s32[], u32[]) {
  %p = (s32[], u32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = u32[] get-tuple-element(%p), index=1
  %none = u32[] constant(0)
  %given = (u32[], u32[], u32[]) tuple(%bound, %none, %none)
  %sends = (u32[], u32[], u32[]) while(%given), condition=%cond.in, body=%body.in
  %one = s32[] constant(1)
  %up = s32[] add(%i, %one)
  ROOT %out = (s32[], u32[]) tuple(%up, %bound)
}

ENTRY %main () -> (s32[], u32[]) {
  %none = s32[] constant(0)
  %many = u32[] constant(16)
  %given = (s32[], u32[]) tuple(%none, %many)
  ROOT %layers = (s32[], u32[]) while(%given), condition=%cond.out, body=%body.out
}
"""


def test_a_product_that_sends_takes_several_shards_a_turn() -> None:
    """If it fails, FLOPs and messages of such products are counted twice, or once for the whole loop."""
    assert executed(parse(NESTED)) == ({"main": 1, "body.out": 3, "body.in": 3 * 8}, [])


def test_a_loop_runs_as_often_as_its_condition_says() -> None:
    """If it fails, a scan over layers is counted once, as XLA does."""
    module = parse(TPU)
    assert module.entry == "main"
    assert executed(module) == ({"main": 1, "body": 5}, [])


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
    unknown = [] if turns else ["loop"]
    assert executed(parse(TPU.replace(was, now))) == ({"main": 1, "body": turns or 1}, unknown)


def test_shapes_with_layouts_and_memory_spaces() -> None:
    """If it fails, on-chip arrays are counted as traffic of HBM, or the other way round."""
    text = "(s32[]{:T(128)}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s4[6]{0:S(0)}, token[])"
    found = shapes_of(text)
    assert found[1] == Shape("bf16", (2, 3), False)
    assert [shape.bytes for shape in found] == [4, 12, 3, 0]
    assert found[2].in_hbm


def total(text: str) -> Work:
    module = parse(text)
    found = Work()
    for name, count in executed(module)[0].items():
        for one in module.computations[name].values():
            found += work(module, module.computations[name], one).times(count)
    return found


def test_work_of_a_loop() -> None:
    """If it fails, FLOPs or bytes are not those of every turn."""
    found = total(TPU)
    assert found.flops == found.passes == 5 * 2 * 8 * 128 * 128
    # Per turn: the copy writes [8, 32]; the slice of the weight is read, written, and read again by the product.
    # What a reduce-scatter keeps is written once; the messages themselves are the wires' work.
    counter = 5 * 3 * 4 + 2 * 4
    assert found.bytes == 5 * (8 * 32 * 2 + 3 * 128 * 128 * 2) + 4 * 128 * 4 + counter


def test_a_message_in_three_pieces_is_one() -> None:
    """If it fails, asynchronous collectives count two or three times."""
    found = exchanges(parse(TPU), 4)
    assert [(e.kind, e.bytes, e.count, e.group) for e in found] == [
        ("reduce-scatter", 16 * 128 * 4, 1, (0, 1, 2, 3)),
        ("all-gather", 8 * 128 * 2, 5, (0, 1, 2, 3)),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", tuple(range(8))),
        ("replica_groups=mesh['a'=8] {'a':(1)2}, x", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}, x", (3, 2)),
        ("source_target_pairs={{0,1},{1,0}}, x", (0, 1)),
        ("replica_groups={}, x", tuple(range(8))),
    ],
)
def test_groups_in_every_spelling(text: str, expected: tuple[int, ...]) -> None:
    """If it fails, a message is timed over links it does not use."""
    assert group_of(text, 8) == expected


def test_seconds_on_a_torus_by_hand() -> None:
    """If it fails, wires are faster or slower than the formula above them says."""
    cube = topology_named("v5p:4x4x4")
    places = [tuple(int(n) for n in place) for place in np.ndindex(4, 4, 4)]

    def seconds(kind: str, group: tuple[int, ...]) -> float:
        return Exchange(kind, 64e6, 1, group, "").seconds(cube, places)

    everyone, row, half = tuple(range(64)), (0, 1, 2, 3), (0, 1)
    assert seconds("all-gather", everyone) == pytest.approx(64e6 * 63 / 64 / 600e9)
    assert seconds("all-reduce", everyone) == pytest.approx(2 * 64e6 * 63 / 64 / 600e9)
    assert seconds("all-gather", row) == pytest.approx(64e6 * 3 / 4 / 200e9)
    assert seconds("reduce-scatter", half) == pytest.approx(64e6 / 2 / 100e9)  # no ring: one link
    assert seconds("all-to-all", row) == pytest.approx(64e6 / 200e9)
    assert seconds("collective-permute", row) == pytest.approx(64e6 / 100e9)
    assert seconds("all-gather", (7,)) == 0
    flat = topology_named("v5e:16x16")
    places = [tuple(int(n) for n in place) for place in np.ndindex(16, 16)]
    crossing = Exchange("all-to-all", 1e6, 1, tuple(range(256)), "").seconds(flat, places)
    assert crossing == pytest.approx(
        1e6 * 16 / (8 * 50e9)
    )  # the middle of the torus, not the chips' own links


def test_xla_agrees_on_an_unrolled_program_and_not_on_a_loop() -> None:
    """If it fails, FLOPs are not counted as XLA counts them, or XLA has learnt to count loops."""
    x, w = jnp.zeros((8, 32)), jnp.zeros((6, 32, 32))

    def looped(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, one: (jnp.einsum("BD,DE->BE", c, one), None), x, w)[0]

    def unrolled(x: jax.Array, w: jax.Array) -> jax.Array:
        for i in range(6):
            x = jnp.einsum("BD,DE->BE", x, w[i])
        return x

    loop, flat = jax.jit(looped).lower(x, w).compile(), jax.jit(unrolled).lower(x, w).compile()
    product = 2 * 8 * 32 * 32
    assert flat.cost_analysis()["flops"] == 6 * product
    assert total(flat.as_text()).flops == total(loop.as_text()).flops == 6 * product
    assert product <= loop.cost_analysis()["flops"] < 2 * product  # the body once, and its counter


def test_a_batched_product_written_as_a_convolution() -> None:
    """If it fails, the padding that stands for a batch axis counts as work."""
    # BTD,DNH->BTNH with N 4 as a spatial axis, as TPU programs have it: one of 7 x 4 positions meets each of 4 x 4 pairs.
    text = TPU.replace(
        "convolution(%q2, %r2), dim_labels=bf_io->bf",
        "convolution(%q5, %r5), window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
    ).replace(
        "  %ag.2",
        "  %q5 = bf16[4,256,128,1]{3,2,1,0} parameter(2)\n  %r5 = bf16[128,4,32,1]{3,2,1,0} parameter(3)\n  %ag.2",
    ).replace("ROOT %dot.1 = bf16[8,128]{1,0:T(8,128)(2,1)}", "ROOT %dot.1 = bf16[4,256,4,32]{3,2,1,0}")  # fmt: skip
    assert total(text).flops == 5 * 2 * (4 * 256) * 128 * (4 * 32)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.", 20.5 * 2**30),
        ("memory required for HLO temporaries (595.79G) exceeds available HBM (95.74G).", 595.79 * 2**30),
        ("something else", 0.0),
    ],
)  # fmt: skip
def test_what_a_refused_program_asked_for(message: str, expected: float) -> None:
    """If it fails, a plan cannot say by how much a program does not fit."""
    assert needed_bytes(message) == expected
