"""GGUF files that lie: truncated, with flipped bits, absurd counts, names with tricks. One line each, nothing large read."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma_qat.errors import InputError
from gemma_qat.export import export_gguf, open_gguf
from gemma_qat.export.gguf_header import TYPES, read_header


@pytest.fixture(scope="module")
def good(case, tmp_path_factory) -> bytes:
    """A valid file."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    export_gguf(case.artifact(case.smallest()), path)
    return path.read_bytes()


def _opened(path: Path, data: bytes) -> str:
    """Opens a file; returns "" when it opens, else the one line it is refused with."""
    path.write_bytes(data)
    try:
        with open_gguf(path) as source:
            assert source.leaves
    except InputError as error:
        line = str(error)
        assert line.startswith(str(path)) and "\n" not in line and len(line) < len(str(path)) + 300
        return line[len(str(path)) :]
    return ""


def _header_end(data: bytes, path: Path) -> int:
    path.write_bytes(data)
    return min(tensor.start for tensor in read_header(path).tensors.values())


def test_every_truncation_is_refused(good: bytes, tmp_path: Path) -> None:
    """If it fails, half a download opens, or ends in a traceback."""
    path = tmp_path / "m.gguf"
    rng, end = np.random.default_rng(3), _header_end(good, path)
    cuts = [0, 3, 4, 8, 23, 24, *rng.integers(24, end, 60), *rng.integers(end, len(good) - 32, 20)]
    for cut in cuts:
        assert "not a readable GGUF file" in _opened(path, good[:cut])


def test_flipped_bits_open_or_are_refused(good: bytes, tmp_path: Path) -> None:
    """A hundred files with one to four wrong bits in the header. If it fails, one of them ends the program."""
    path = tmp_path / "m.gguf"
    rng, end = np.random.default_rng(5), _header_end(good, path)
    refused = 0
    for _ in range(100):
        bad = bytearray(good)
        for place in rng.integers(0, end, rng.integers(1, 5)):
            bad[place] ^= 1 << int(rng.integers(8))
        refused += bool(_opened(path, bytes(bad)))
    assert refused > 50  # the rest are other names, constants or padding


def _text(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _file(*entries: bytes, tensors: int = 0, after: bytes = b"", version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, len(entries))
    return head + b"".join(entries) + after + bytes(64)


def _array(count: int, kind: int = 0, raw: bytes = b"") -> bytes:
    return _text("x") + struct.pack("<IIQ", 9, kind, count) + raw


def _tensor(name: str, shape: tuple[int, ...], kind: int = 0, start: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _text(name) + dimensions + struct.pack("<IQ", kind, start)


HUGE = 2**63 - 1
LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "magic"),
    "another magic": (lambda: b"PK\x03\x04" + bytes(99), "does not begin with GGUF"),
    "big endian": (lambda: b"GGUF" + struct.pack(">I", 3) + bytes(99), "a big-endian file?"),
    "a version to come": (lambda: _file(version=9), "version 9 given"),
    "tensors without end": (lambda: b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), f"{HUGE} of them"),
    "keys without end": (lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), f"{HUGE} of them"),
    "an array without end": (lambda: _file(_array(HUGE)), f"{HUGE} of them"),
    "an array beyond the file": (lambda: _file(_array(2**20, 12)), f"{2**20} of them"),
    "an array of arrays": (lambda: _file(_array(1, 9, bytes(12))), "an array of values of type 9"),
    "a text without end": (lambda: _file(_text("x") + struct.pack("<IQ", 8, HUGE)), f"a text of {HUGE} bytes"),
    "a name without end": (lambda: _file(struct.pack("<Q", HUGE)), f"a text of {HUGE} bytes"),
    "an unknown value": (lambda: _file(_text("x") + struct.pack("<I", 77)), "values of type 77"),
    "a key twice": (lambda: _file(*[_text("x") + struct.pack("<IB", 7, 1)] * 2), "key 'x': there twice"),
    "a name with a line": (lambda: _file(_text("a\nb") + bytes(5)), r"key 'a\nb': a name of printable"),
    "a name that is no text": (lambda: _file(_text(b"\xff\xfe") + bytes(5)), "not UTF-8"),
    "an empty name": (lambda: _file(_text("") + bytes(5)), "a name of printable characters"),
    "alignment 3": (lambda: _file(_text("general.alignment") + struct.pack("<II", 4, 3)), "alignment '3'"),
    "five dimensions": (lambda: _file(tensors=1, after=_tensor("t", (1,) * 5)), "5 of them"),
    "no elements": (lambda: _file(tensors=1, after=_tensor("t", (0,))), "shape (0,) of F32"),
    "more than there is": (lambda: _file(tensors=1, after=_tensor("t", (HUGE, HUGE))), "ends at byte"),
    "half a block": (lambda: _file(tensors=1, after=_tensor("t", (33,), 2)), "whole blocks of 32"),
    "an unknown type": (lambda: _file(tensors=1, after=_tensor("t", (1,), 999)), "type 999"),
    "behind the end": (lambda: _file(tensors=1, after=_tensor("t", (1,), 0, 2**62)), "ends at byte"),
    "off the grid": (lambda: _file(tensors=1, after=_tensor("t", (1,), 0, 7)), "a multiple of 32"),
    "two on one place": (
        lambda: _file(tensors=2, after=_tensor("t", (1,)) + _tensor("../../u", (1,))),
        "shares bytes with",
    ),
    "no architecture": (lambda: _file(), "architecture 'None' given"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str, tmp_path: Path) -> None:
    """If it fails, what a file claims is believed before it is compared with the file's length: 2 MB is enough."""
    make, expected = LIES[lie]
    tracemalloc.start()
    line = _opened(tmp_path / "m.gguf", make())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert expected in line
    assert peak < 2e6


def test_keys_that_promise_another_model(good: bytes, tmp_path: Path) -> None:
    """If it fails, a wrong number in the keys makes arrays of its own, or another type passes for a number."""
    path = tmp_path / "m.gguf"
    for name in ("embedding_length", "attention.head_count"):
        at = good.find(f"gemma4.{name}".encode()) + len(f"gemma4.{name}")
        for value in (0, 2**31 - 1, 2**32 - 1):
            assert _opened(path, good[: at + 4] + struct.pack("<I", value) + good[at + 8 :])
        real = good[:at] + struct.pack("<If", 6, 64.0) + good[at + 8 :]
        assert "of type int expected" in _opened(path, real)
    tricky = good.replace(b"blk.0.ffn_up.weight", b"../.0.ffn_up.weight")
    line = _opened(path, tricky)
    assert "tensor blk.0.ffn_up.weight: missing" in line


def test_the_table_of_types_is_gguf_pys() -> None:
    """If it fails, a tensor's length is taken for another than it is."""
    import gguf

    for number, (name, elements, size) in TYPES.items():
        if name != "Q2_0":
            kind = gguf.GGMLQuantizationType(number)
            assert (kind.name, *gguf.constants.GGML_QUANT_SIZES[kind]) == (name, elements, size)
