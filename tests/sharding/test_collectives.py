"""Collectives read from the text of compiled programs: every kind, groups in every notation, loops, asynchronous pairs."""

from __future__ import annotations

import pytest

from gemma_qat.sharding import collectives, summary

TEXT = """\
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %g = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %x)
}

%outer (p: (s32[], /*index=1*/bf16[4,8])) -> (s32[], bf16[4,8]) {
  %w = (s32[], bf16[4,8]) while(%p), condition=%until, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %s = f32[2,8]{1,0} reduce-scatter(%y), replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="jit(step)/rs"}
}

%until (p: (s32[], bf16[4,8])) -> pred[] {
  ROOT %done = pred[] constant(false)
}

%all-reduce-scatter.1 (input: f32[256,128]) -> f32[32,128] {
  %ar = f32[256,128]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[32,128]{1,0:T(8,128)} dynamic-slice(%ar, %i, %zero), dynamic_slice_sizes={32,128}
}

%below (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="cond/lt"}
}

%scanned (p: (s32[])) -> (s32[]) {
  ROOT %r = bf16[64,2]{1,0} ragged-all-to-all(%u, %v, %a, %b, %c, %d), replica_groups={{0,1},{2,3}}
}

%unknown (p: (s32[])) -> (s32[]) {
  ROOT %a2a = (s32[1,2]{1,0}, s32[1,2]{1,0}) all-to-all(%u, %v), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %loop = (s32[], bf16[4,8]) while(%z), condition=%until, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %scan = (s32[]) while(%z), condition=%below, body=%scanned
  %fused = f32[32,128]{1,0} fusion(%grad), kind=kCustom, calls=%all-reduce-scatter.1
  %some = (s32[]) while(%z), condition=%until, body=%unknown
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %end = f32[32]{0} all-gather-done(%start)
  %reduced = (f32[8]{0}, pred[16]{0}) all-reduce(%x, %q), replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b','c'}, to_apply=%add
  %hop = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %out = f32[8]{0} fusion(%reduced), kind=kLoop, calls=%add
}
"""


def test_every_kind_and_what_it_moves() -> None:
    """By hand: bytes of the whole message, executions, devices of a group."""
    found = {(one.kind, one.bytes, one.count, one.group, one.exact) for one in collectives(TEXT)}
    assert found == {
        ("all-gather", 16 * 8 * 2, 15, 4, True),  # 3 trips inside 5
        ("reduce-scatter", 2 * 8 * 4 * 4, 5, 4, True),
        ("ragged-all-to-all", 64 * 2 * 2, 7, 2, True),
        ("reduce-scatter", 256 * 128 * 4, 1, 8, True),  # as a TPU fuses it
        ("all-to-all", 2 * 2 * 4, 1, 2, False),  # how often, nobody knows
        ("all-gather", 32 * 4, 1, 4, True),
        ("all-reduce", 8 * 4 + 16, 1, 8, True),
        ("collective-permute", 8 * 4, 1, 1, True),
    }
    assert "jit(step)/rs" in [one.source for one in collectives(TEXT)]


def test_the_summary_adds_up_executions() -> None:
    assert summary(collectives(TEXT))["all-gather"] == {
        "instructions": 2, "count": 16, "bytes": 15 * 256 + 128,
    }  # fmt: skip


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("module @jit_step {}")
