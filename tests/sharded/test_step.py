"""A step over eight devices is the step on one, and moves between them what it was meant to move.

**The bound.** Masters, quantizer and codes are the same on any mesh (rounding is element by element and tiles are whole), so
two programs differ by the order of their float32 sums alone. Rounding errors of a sum of n terms behave like a random walk:
about sqrt(n) u of the size of the sum, u = 2^-24, for either order. A gradient has passed through S such sums one after the
other, forward and back; each hands the relative error on and adds its own, so that

    |difference| <= 2 S sqrt(n) u       relative to the largest gradient of the leaf

Here n = 512 (the widest feed-forward; B T = 64 for weight gradients, V = 160), and S counts, per layer, seven
contractions, five norms and a softmax in each direction, and embedding, final norm, head and loss: S = 2 (13 L + 4), at
most 86 for three layers. A layer's scalar has one number that may cancel to nothing: it is held against the norm of the
whole gradient. An updated parameter adds one rounding of its own: |difference| <= rate |gradient difference| + u |p|.

**Rounded activations** (mobile). A value within that error of a tie falls either way, and then everything later that
depends on it is rounded anew. Two such runs are two draws of the same rounding noise, and differ by at most sqrt(2) times
that noise, which is how far rounding the activations at all moves the gradient (measured in the same run). With weights
rounded and activations not, mobile keeps the strict bound.

**What moves.** `collectives.json` has kinds and counts of every case (`python tests/sharded/write_collectives.py` writes it
anew). The compiler's choices belong to its version, so counts are compared for the
version they were written with, kinds for every one. That no table and no stack of experts is ever gathered is asked of all.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PINNED = Path(__file__).with_name("collectives.json")

U = 2.0**-24
LAYERS = 3
BOUND = 2 * 2 * (13 * LAYERS + 4) * math.sqrt(512) * U

DEFAULT = ["e_series fsdp+tensor q4_0", "moe fsdp+expert q4_0"]
EVERY = [
    f"{family} {preset} {recipe}"
    for family, recipes in {
        "dense": ("float", "q4_0"),
        "e_series": ("float", "q4_0", "mobile"),
        "moe": ("float", "q4_0"),
    }.items()
    for recipe in recipes
    for preset in ("fsdp", "fsdp+tensor", "fsdp+expert", "decode")
]
ACCIDENTS = ["bad table", "bad experts"]
REST = [name for name in EVERY if name not in DEFAULT]


@pytest.fixture(scope="module")
def some(eight: Any) -> dict[str, Any]:
    return eight("on_step.py", [*DEFAULT, *ACCIDENTS, "codes", "hidden"])


@pytest.fixture(scope="module")
def rest(eight: Any) -> dict[str, Any]:
    return eight("on_step.py", REST)


def check(name: str, found: dict[str, Any]) -> None:
    far = found["distance"]
    print(f"{name}: bound {BOUND:.1e}, {far}")
    assert far["loss"] <= BOUND and far["leaf"] <= BOUND, far
    assert far["updated"] <= 2 * U * far["largest"], far
    if "flips" in found:
        noise, flips = found["rounding"]["gradient"], found["flips"]["gradient"]
        print(f"{name}: rounding noise {noise:.1e}, draws differ by {flips:.1e}")
        assert flips <= math.sqrt(2) * noise


def kinds_and_counts(found: dict[str, Any]) -> dict[str, int]:
    """Arrays that each kind moves in a step: into how many messages the compiler puts them depends on its schedule."""
    total: dict[str, int] = {}
    for kind, shapes, count, _ in found["moved"]:
        total[kind] = total.get(kind, 0) + count * len(shapes.split())
    return dict(sorted(total.items()))


def whole_arrays(name: str, moved: list[Any]) -> list[Any]:
    """Collectives whose result is a whole table, or, where tokens are meant to move, the experts of other devices."""
    shapes = ["[160,", "[128,160]"]
    if "moe fsdp+expert" in name:
        shapes += ["[8,128,64]", "[8,64,128]", "[4,128,64]", "[4,64,128]"]
    return [one for one in moved if any(shape in one[1] for shape in shapes)]


def check_moves(name: str, found: dict[str, Any]) -> None:
    assert whole_arrays(name, found["moved"]) == []
    pinned, counts = json.loads(PINNED.read_text("utf-8")), kinds_and_counts(found)
    assert list(counts) == list(pinned["counts"][name])
    if importlib.metadata.version("jax") == pinned["jax"]:
        assert counts == pinned["counts"][name]


@pytest.mark.parametrize("name", DEFAULT)
def test_the_step_moves_what_it_is_meant_to(
    name: str, some: Any, figures: Callable[..., Any]
) -> None:
    """If it fails, a table or the experts are gathered, or an array more (or fewer) is moved than before."""
    check_moves(name, figures(some[name]))


def test_hidden_states_are_compared_where_they_lie(some: Any, figures: Callable[..., Any]) -> None:
    """If it fails, `train.hidden_weight` depends on the mesh, or makes experts and tables move to every device."""
    found = figures(some["hidden"])
    assert found["hidden"] > 0.01
    check("hidden", found)
    assert whole_arrays("moe fsdp+expert", found["moved"]) == []


@pytest.mark.parametrize("name", ACCIDENTS)
def test_a_gather_by_accident_is_seen(name: str, some: Any, figures: Callable[..., Any]) -> None:
    """The compiler left to itself: if this fails, the test above is blind."""
    assert whole_arrays("moe fsdp+expert", figures(some[name])["moved"])


@pytest.mark.parametrize("name", DEFAULT)
def test_the_step_is_that_of_one_device(name: str, some: Any, figures: Callable[..., Any]) -> None:
    """If it fails, training depends on the mesh."""
    check(name, figures(some[name]))


def test_codes_are_counted_where_they_lie(some: Any, figures: Callable[..., Any]) -> None:
    """If it fails, a report of the codes depends on the mesh, or gathers what is as large as a model to make it."""
    found = figures(some["codes"])
    assert found["kinds"] == ["all-reduce"] and found["largest"] <= 4 * 16 * LAYERS
    assert found["eight"]["code_use"] == found["one"]["code_use"]
    assert found["use"] == {n: use["counts"] for n, use in found["one"]["code_use"].items()}
    for path, row in found["one"]["sites"].items():
        error = pytest.approx(row["relative_error"], rel=1e-5)
        assert found["eight"]["sites"][path] == row | {"relative_error": error}


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_every_other_step_is(name: str, rest: Any, figures: Callable[..., Any]) -> None:
    """The other presets, families and recipes: about 8 s of one core each."""
    check(name, figures(rest[name]))
    check_moves(name, figures(rest[name]))


def write(found: dict[str, Any]) -> None:
    """Writes kinds and counts of all cases."""
    counts = {name: kinds_and_counts(found[name]["found"]) for name in EVERY}
    text = {"jax": importlib.metadata.version("jax"), "counts": counts}
    PINNED.write_text(json.dumps(text, indent=1) + "\n", "utf-8")
