"""Overlays are read by the type of the field they name, and refuse everything else in one line."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any, Literal

import pytest

from gemma_qat.config import apply, flatten, from_json, provenance, to_json
from gemma_qat.errors import InputError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    path: str = "here"
    rows: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    rate: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    count: int = 7
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count {self.count}: 0 or more expected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    name: str
    debug: bool = False
    out: Path = Path("out")
    loss: Literal["ce", "kl"] = "ce"
    bits: Literal[4, 8] = 4
    colour: Colour = Colour.RED
    shape: tuple[int, ...] = (2, 3)
    pair: tuple[int, str] = (1, "a")
    limit: float | None = None
    source: Files | Noise | Needs = Files()
    step: Step = Step(count=9)
    parts: tuple[Files, ...] = ()
    table: dict[str, int] = dataclasses.field(default_factory=dict)


BASE = Whole(name="base")


@pytest.mark.parametrize(
    ("overlay", "path", "value"),
    [
        ("name=a=b", "name", "a=b"),
        ("debug=true", "debug", True),
        ("debug=False", "debug", False),
        ("out=a/b", "out", Path("a/b")),
        ("loss=kl", "loss", "kl"),
        ("bits=8", "bits", 8),
        ("colour=blue", "colour", Colour.BLUE),
        ("shape=5,7,11", "shape", (5, 7, 11)),
        ("shape=", "shape", ()),
        ("pair=3,x", "pair", (3, "x")),
        ("limit=1e-3", "limit", 1e-3),
        ("limit=none", "limit", None),
        ("source.rows=5", "source.rows", 5),
        ("source=Noise", "source.rate", 0.5),
        ("step.count=200", "step.count", 200),
        ("step.rate=3", "step.rate", 3.0),
        ("parts=", "parts", ()),
        ('parts=[{"path": "a", "rows": 3}, {}]', "parts", (Files(path="a", rows=3), Files())),
    ],
)
def test_a_value_is_read_as_its_fields_type(overlay: str, path: str, value: Any) -> None:
    """If it fails, a run is configured with another value, or another type, than was asked for."""
    found = flatten(apply(BASE, [overlay]))[path]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ("step.count=1e-3", "step.count=1e-3: int expected"),
        ("step.count=2.0", "step.count=2.0: int expected"),
        ("step.rate=fast", "step.rate=fast: float expected"),
        ("debug=1", "debug=1: true or false expected"),
        ("loss=lk", "loss=lk: one of ce, kl expected (nearest: kl)"),
        ("bits=2", "bits=2: one of 4, 8 expected"),
        ("shape=1,x", "shape=1,x: tuple[int, ...] expected"),
        ("pair=1", "pair=1: tuple[int, str] expected"),
        ("limit=big", "limit=big: float or none expected"),
        ("source=File", "source=File: Files or Noise or Needs expected"),
        ("source=Needs", "source=Needs: Needs has no defaults"),
        ("parts=a", "parts=a: tuple["),
        ("parts=[{", "parts=[{: tuple["),
        ('parts=[{"rows": 1.5}]', "parts.rows=1.5: int expected"),
        ('parts=[{"row": 1}]', "unknown key of Files 'parts.row'"),
        ("table=3", "table=3: dict[str, int] expected"),
        ("step.cuont=3", "unknown key 'step.cuont': Step has no 'cuont' (nearest: count)"),
        ("zzz=3", "unknown key 'zzz': Whole has no 'zzz'"),
        ("name.x=3", "unknown key 'name.x': name is a value"),
        ("step=3", "step=3: step is a group; give one of its values (count, rate)"),
        ("step.count=-1", "step.count=-1: count -1: 0 or more expected"),
        ("step.count", "overlay 'step.count': path=value expected"),
        ("=3", "overlay '=3': path=value expected"),
    ],
)
def test_anything_else_is_one_line_saying_where(overlay: str, said: str) -> None:
    """If it fails, a slip of the hand trains something else, or ends in a traceback."""
    with pytest.raises(InputError) as caught:
        apply(BASE, [overlay])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_later_overlays_win_and_the_base_stays() -> None:
    """If it fails, overlays leak into the config they were applied to, or apply out of order."""
    out = apply(BASE, ["step.count=1", "source=Noise", "source.rate=0.25", "step.count=2"])
    assert out == dataclasses.replace(BASE, step=Step(count=2), source=Noise(rate=0.25))
    assert Whole(name="base") == BASE
    assert apply(BASE, []) is BASE


def test_provenance_names_who_spoke_last() -> None:
    """If it fails, a run's record says a value was chosen where it was a default, or the reverse."""
    file = dataclasses.replace(BASE, loss="kl", source=Files(rows=5))
    rows = {path: (value, who) for path, value, who in provenance(file, apply(file, ["bits=8"]))}
    assert rows["bits"] == (8, "overlay")
    assert rows["loss"] == ("kl", "file")
    assert rows["source.rows"] == (5, "file")
    assert rows["source.path"] == ("here", "default")
    assert rows["name"] == ("base", "file"), "a field without a default is the file's"
    assert rows["step.count"] == (9, "default"), "the outer field's default, not the class's 7"
    assert list(rows) == list(flatten(BASE))


@pytest.mark.parametrize(
    "overlays",
    [
        [],
        ["source=Noise", "source.rate=2", "limit=3", "colour=blue", "out=x/y"],
        ["shape=", "pair=5,b", "bits=8", "debug=true", "limit=none"],
        ['parts=[{"path": "a", "rows": 3}, {}]'],
    ],
)
def test_json_reads_back_equal(overlays: list[str]) -> None:
    """If it fails, the config saved beside a checkpoint is not the one that made it."""
    config = apply(Plain(), overlays)
    again = from_json(Plain, to_json(config))
    assert again == config
    assert {p: type(v) for p, v in flatten(again).items()} == {
        p: type(v) for p, v in flatten(config).items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    debug: bool = False
    out: Path = Path("out")
    bits: Literal[4, 8] = 4
    colour: Colour = Colour.RED
    shape: tuple[int, ...] = (2, 3)
    pair: tuple[int, str] = (1, "a")
    limit: float | None = 0.5
    source: Files | Noise = Files()
    step: Step = Step()
    parts: tuple[Files, ...] = ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a Plain in JSON"),
        ("[1]", "not a Plain in JSON"),
        ('{"bits": true}', "bits=True: one of 4, 8 expected"),
        ('{"bits": "4"}', "bits=4: one of 4, 8 expected"),
        ('{"debug": 1}', "debug=1: true or false expected"),
        ('{"step": {"count": true}}', "step.count=True: int expected"),
        ('{"step": {"count": -1}}', "step: count -1: 0 or more expected"),
        ('{"step": {"cuont": 1}}', "unknown key of Step 'step.cuont'"),
        ('{"source": {"class": "Nose"}}', "unknown class at source 'Nose'"),
        ('{"shape": "12"}', "shape=12: tuple[int, ...] expected"),
    ],
)
def test_json_of_another_shape_is_refused(text: str, said: str) -> None:
    """If it fails, a damaged or foreign file is taken for the record of a run."""
    with pytest.raises(InputError) as caught:
        from_json(Plain, text)
    assert str(caught.value).startswith(said)
