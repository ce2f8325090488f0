"""Collectives read from the text of compiled programs: every kind, groups in every notation, loops, asynchronous pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_qat.compiled import collectives, group_of, parse, summary

TEXTS = Path(__file__).parent / "texts"
KINDS, TPU = (parse((TEXTS / name).read_text("utf-8")) for name in ("kinds.txt", "tpu.txt"))


def test_every_kind_and_what_it_moves() -> None:
    """By hand: bytes of the whole message, executions, devices of the first group."""
    found = {(one.kind, one.bytes, one.count, one.group, one.exact) for one in collectives(KINDS)}
    assert found == {
        ("all-gather", 16 * 8 * 2, 15, (0, 1, 2, 3), True),  # 3 trips inside 5
        ("reduce-scatter", 2 * 8 * 4 * 4, 5, (0, 1, 2, 3), True),
        ("ragged-all-to-all", 64 * 2 * 2, 7, (0, 1), True),
        ("reduce-scatter", 256 * 128 * 4, 1, tuple(range(8)), True),  # as a TPU fuses it
        ("all-to-all", 2 * 2 * 4, 1, (0, 4), False),  # how often, nobody knows
        ("all-gather", 32 * 4, 1, (0, 1, 2, 3), True),
        ("all-reduce", 8 * 4 + 16, 1, (0, 4, 1, 5, 2, 6, 3, 7), True),  # in the mesh's order
        ("collective-permute", 8 * 4, 1, (0, 1), True),
        ("collective-broadcast", 8 * 4, 1, tuple(range(8)), True),
    }
    assert "jit(step)/rs" in [one.source for one in collectives(KINDS)]


def test_the_summary_adds_up_executions() -> None:
    """If it fails, a plan sends less than its messages together."""
    assert summary(collectives(KINDS))["all-gather"] == {"count": 16, "bytes": 15 * 256 + 128}


PAIRS = """
HloModule jit_step, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%aside (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %sent = f32[8]{0} collective-broadcast(%q), replica_groups={{0,1}}
}

ENTRY %main (x: f32[8], y: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %pair = MESSAGE
  ROOT %end = f32[8]{0} copy(%x)
}
"""


@pytest.mark.parametrize(
    ("message", "kind", "size"),
    [
        ("(f32[8]{0}, f32[32]{0}) all-gather-start(%x)", "all-gather", 32),
        ("((f32[8]{0}, f32[8]{0}), (f32[32]{0}, f32[32]{0})) all-gather-start(%x, %y)", "all-gather", 64),
        ("f32[8]{0} all-reduce-start(%x), to_apply=%add", "all-reduce", 8),
        ("(f32[8]{0}, f32[8]{0}) all-reduce-start(%x, %y), to_apply=%add", "all-reduce", 16),
        ("((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%x), to_apply=%add", "reduce-scatter", 8),
        ("((f32[8]{0}), f32[8]{0}, u32[], u32[]) all-to-all-start(%x)", "all-to-all", 8),
        ("(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x)", "collective-permute", 8),
        ("((f32[8], f32[6], s32[4], s32[4], s32[4], s32[4]), f32[6]) ragged-all-to-all-start(%x, %y, %a, %b, %c, %d)", "ragged-all-to-all", 6),
        ("((f32[8]{0}), f32[8]{0}, u32[]) async-start(%x), calls=%aside", "collective-broadcast", 8),
        ("f32[8]{0} all-gather-done(%x)", None, 0),
        ("f32[8]{0} async-done(%x), calls=%aside", None, 0),
        ("f32[8]{0} custom-call(%x), metadata={op_name=\"a \\\"b\\\" = all-gather(c)\"}", None, 0),
    ],
)  # fmt: skip
def test_a_pair_is_one_message(message: str, kind: str | None, size: int) -> None:
    """What starts one names operands, results and context: if it fails, bytes of GPU programs are those of all three."""
    found = collectives(parse(PAIRS.replace("MESSAGE", message)))
    assert [(one.kind, one.bytes, one.count) for one in found] == (
        [(kind, 4 * size, 1)] if kind else []
    )


def test_a_message_in_three_pieces_is_one() -> None:
    """If it fails, asynchronous collectives count two or three times."""
    found = collectives(TPU)
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
