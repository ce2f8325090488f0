"""Attention over a cache of codes: every backend against float64, what it is lowered to, and tokens that come of it."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_cases import spanning
from tpu_process import needs_compiler, printed

from gemma_qat import kernels
from gemma_qat.kernels import BACKENDS, Cached, choose
from gemma_qat.kernels.cached import parts_seen
from gemma_qat.nn.cache import KeyValues, visible
from gemma_qat.numerics.cache_codes import Coded, encode

NAMES = [backend.name for backend in BACKENDS]
UNIT = 2.0**-24
"""Half a unit in the last place of float32, relative."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Heads of keys, queries of each, width, slots, window."""

    heads: int
    group: int
    width: int
    slots: int
    window: int | None = None


SIZES = {
    "a ring": Size(1, 2, 64, 37, 37),
    "two heads": Size(2, 3, 32, 201),
    "merged heads": Size(4, 2, 32, 131, 131),
    "several blocks": Size(1, 2, 256, 2111),
    "many merged heads": Size(8, 2, 64, 301),
}


def written(size: Size, bits: int, seed: int = 0) -> tuple[KeyValues, jax.Array]:
    """A cache of three rows, and the position each is at.

    The first has room left (a ring: has wrapped around), the second has one token, and of the third the first half is
    another text's, which is not seen.
    """
    rng = np.random.default_rng(seed)
    shape = (3, size.slots, size.heads, size.width)
    keys, values = (
        encode(jnp.asarray(rng.standard_normal(shape), jnp.float32), bits) for _ in "kv"
    )
    at = np.broadcast_to(np.arange(size.slots), (3, size.slots)).copy()
    segments = np.ones((3, size.slots), np.int32)
    last = np.asarray([size.slots - 1, 0, size.slots - 1])
    if size.window is None:
        last[0] = size.slots // 3
        segments[0, last[0] + 1 :] = 0
    else:
        at[0, :9] += size.slots
        last[0] = size.slots + 8
    segments[1, 1:] = 0
    segments[2, : size.slots // 2] = 2
    kept = KeyValues(keys, values, jnp.asarray(at, jnp.int32), jnp.asarray(segments))
    return kept, jnp.asarray(last, jnp.int32)[:, None]


def exact(q: jax.Array, kept: KeyValues, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The attention in float64 of the numbers that are there, and how far float32 may be from it.

    A score is a sum of H products times a scale, off by at most H + 1 roundings of the sum of its magnitudes; the
    largest of a row bounds what is in an exponent, twice, as the largest score is off too, and the difference is
    rounded. exp is good to 4 units. The sum of weights, earlier ones made smaller part after part, has at most 2 S
    roundings, the sum of weighted values as many, and 4 are left for scales and the division. bfloat16 rounds each
    weight by 2^-8 before it is multiplied.
    """
    wide = np.asarray(q, np.float64)
    keys, values = (
        np.asarray(one.integers(), np.float64) * np.asarray(one.scale, np.float64)[..., None]
        for one in (kept.keys, kept.values)
    )
    scores = np.einsum("bkgh,bskh->bkgs", wide, keys)
    sizes = np.einsum("bkgh,bskh->bkgs", np.abs(wide), np.abs(keys))
    scores = np.where(seen[:, None, None], scores, -np.inf)
    most = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - most)
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bkgs,bskh->bkgh", weights, values)
    size = np.einsum("bkgs,bskh->bkgh", weights, np.abs(values))
    n, slots = q.shape[-1], seen.shape[1]
    seen_sizes = np.where(seen[:, None, None], sizes, 0).max(axis=-1, keepdims=True)
    exponent = (2 * (n + 1) + 2) * UNIT * seen_sizes + 8 * UNIT
    relative = 2 * np.expm1(exponent) + (4 * slots + 4) * UNIT
    if q.dtype == jnp.bfloat16:
        relative = relative + 2.0**-8
    return out, relative * size


def given(size: Size, bits: int, dtype: str) -> tuple[jax.Array, KeyValues, jax.Array]:
    kept, last = written(size, bits)
    shape = (3, size.heads, size.group, size.width)
    # Queries of such a size that some scores are far apart.
    q = jnp.asarray(np.random.default_rng(7).standard_normal(shape) / 2, dtype)
    seen = visible(last, jnp.ones_like(last), kept, size.window)[:, 0]
    return q, kept, seen


@pytest.mark.parametrize(
    ("size", "bits", "dtype"),
    spanning(SIZES, {"int8": 8, "int4": 4}, {"float32": "float32", "bfloat16": "bfloat16"}),
)
@pytest.mark.parametrize("backend", NAMES)
def test_attention(backend: str, size: Size, bits: int, dtype: str) -> None:
    """Within what float32 sums may be off in any order, and one rounding to the queries' dtype."""
    q, kept, seen = given(size, bits, dtype)
    with kernels.using(backend):  # traced anew: jax would not trace one function for another
        found = jax.jit(lambda *a: kernels.attend(*a))(q, kept.keys, kept.values, seen)
    assert found.dtype == q.dtype and found.shape == q.shape
    want, bound = exact(q, kept, np.asarray(seen))
    if dtype == "bfloat16":
        bound = bound + 2.0**-8 * (np.abs(want) + bound)
    assert np.all(np.abs(np.asarray(found, np.float64) - want) <= bound)


@pytest.mark.parametrize("size", ["two heads", "merged heads"])
@pytest.mark.parametrize("backend", NAMES)
def test_a_layer_of_a_stack(backend: str, size: str) -> None:
    """Not a bit is another than by itself; if one is, a layer attends to the keys of another."""
    q, kept, seen = given(SIZES[size], 8, "float32")
    layers = [kept, written(SIZES[size], 8, seed=1)[0], written(SIZES[size], 8, seed=2)[0]]
    stack = jax.tree.map(lambda *one: jnp.stack(one), *layers)
    with kernels.using(backend):
        attend = jax.jit(lambda *a: kernels.attend(*a))
        for number, own in enumerate(layers):
            want = attend(q, own.keys, own.values, seen)
            found = attend(q, stack.keys, stack.values, seen, jnp.asarray(number, jnp.int32))
            np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("backend", NAMES)
def test_what_is_not_seen_does_not_count(backend: str) -> None:
    """Other codes and larger scales in slots that nobody sees: not a bit changes. A row that sees nothing is finite.

    Padding is attended from too; what it gives is not looked at, but must not spread.
    """
    q, kept, seen = given(SIZES["two heads"], 4, "float32")
    other, _ = written(SIZES["two heads"], 4, seed=1)

    def mixed(a: Coded, b: Coded) -> Coded:
        hidden = ~seen[:, :, None]
        scale = jnp.where(hidden, 3 * b.scale, a.scale)
        return Coded(codes=jnp.where(hidden[..., None], b.codes, a.codes), scale=scale, bits=4)

    changed = mixed(kept.keys, other.keys), mixed(kept.values, other.values)
    with kernels.using(backend):
        attend = jax.jit(lambda *a: kernels.attend(*a))
        found = np.asarray(attend(q, kept.keys, kept.values, seen))
        np.testing.assert_array_equal(attend(q, *changed, seen), found)
        blind = np.asarray(attend(q, *changed, seen.at[1].set(False)))
    assert np.all(np.isfinite(blind))
    np.testing.assert_array_equal(blind[2], found[2])


def test_parts_by_hand() -> None:
    """Broken: a part of the cache is left out, or all of what was never written is read."""
    seen = np.zeros((4, 11), bool)
    seen[0, [4, 7]], seen[1, 10], seen[2, 0] = True, True, True
    found = parts_seen(jnp.asarray(seen), 4)
    np.testing.assert_array_equal(found, [[1, 1], [2, 2], [0, 0], [0, -1]])


def test_a_choice_says_why() -> None:
    """Each platform has its own; what one refuses is said, and the definition takes it."""
    base = Cached(batch=1, heads=4, group=2, slots=64, width=256, bits=8, dtype="bfloat16")
    found = {on: choose("attend", base, on).backend.name for on in ("cpu", "tpu", "cuda", "rocm")}
    assert found == {"cpu": "blocked", "tpu": "tpu", "cuda": "gpu", "rocm": "reference"}
    for on, changes, why in (
        ("tpu", {"heads": 6}, "tpu: 6 heads of keys, up to 2 or a power of two up to 128 expected"),
        ("tpu", {"dtype": "float16"}, "tpu: queries of float16, float32 or bfloat16 expected"),
        ("tpu", {"width": 2**17}, "tpu: 4 heads of 131072: blocks of .* bytes, at most"),
        (
            "cuda",
            {"width": 96},
            "gpu: 96 bytes of codes a head, a power of two from 16 on expected",
        ),
        ("cuda", {"group": 17}, "gpu: 17 query heads for one of keys, at most 16"),
        ("cuda", {"slots": 2**21}, "gpu: 2 GiB of codes or more"),
        ("cuda", {"dtype": "float16"}, "gpu: queries of float16, float32 or bfloat16 expected"),
    ):
        choice = choose("attend", dataclasses.replace(base, **changes), on)
        assert choice.backend.name == "reference" and re.match(why, choice.why), choice.why


RELEASED = {
    "E2B local": (1, 512, 1, 8, 256), "E2B global": (1, 8192, 1, 8, 512),
    "E4B local": (8, 512, 2, 4, 256), "E4B global": (1, 8192, 2, 4, 512),
    "12B local": (1, 1024, 8, 2, 256), "12B global": (1, 131072, 1, 16, 512),
    "26B A4B global": (8, 8192, 2, 8, 512),
    "31B local": (8, 1024, 16, 2, 256), "31B global": (1, 8192, 4, 8, 512),
}  # fmt: skip
"""B, S, K, G, H of the released sizes; 26B A4B's local layers are 12B's."""


def test_no_released_size_is_refused() -> None:
    """In either number of bits, by neither kind of kernel."""
    for B, S, K, G, H in RELEASED.values():
        for bits in (8, 4):
            problem = Cached(
                batch=B, heads=K, group=G, slots=S, width=H, bits=bits, dtype="bfloat16"
            )
            for on, name in (("tpu", "tpu"), ("cuda", "gpu")):
                assert choose("attend", problem, on).backend.name == name, problem


def shapes(case: tuple[int, ...], bits: int, dtype: str) -> Any:
    """The operands of an attention, of which there are only shapes."""
    array = jax.ShapeDtypeStruct
    B, S, K, G, H = case
    kind = ("int8", H) if bits == 8 else ("uint8", H // 2)
    one = Coded(
        codes=array((B, S, K, kind[1]), jnp.dtype(kind[0])),
        scale=array((B, S, K), jnp.dtype("float32")), bits=bits,
    )  # fmt: skip
    q, seen = array((B, K, G, H), jnp.dtype(dtype)), array((B, S), jnp.dtype(bool))
    return q, one, one, seen


@pytest.mark.parametrize(
    ("case", "bits", "dtype"),
    spanning(RELEASED, {"int8": 8, "int4": 4}, {"bfloat16": "bfloat16", "float32": "float32"}),
)
def test_it_lowers_for_cuda(case: tuple[int, ...], bits: int, dtype: str) -> None:
    """Broken: Triton is given what it cannot lower, and decoding fails on every GPU."""
    traced = jax.jit(lambda *a: kernels.attend(*a)).trace(*shapes(case, bits, dtype))
    assert "gpu_attend_codes" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "gpu_attend_codes" not in traced.lower(lowering_platforms=("cpu",)).as_text()


PROGRAM = r"""
import functools, json, math, re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from gemma_qat import kernels
from gemma_qat.numerics.cache_codes import Coded

def moved(place, case, bits, dtype):
    # What is wrong with a program: no kernel in it, or codes, scales or masks that are laid another way first.
    B, S, K, G, H = case
    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)
    codes = array((B, S, K, H), "int8") if bits == 8 else array((B, S, K, H // 2), "uint8")
    one = Coded(codes=codes, scale=array((B, S, K), "float32"), bits=bits)
    lowered = jax.jit(lambda *a: kernels.attend(*a)).lower(array((B, K, G, H), dtype), one, one, array((B, S), bool))
    text = lowered.compile().as_text()
    if '"tpu_custom_call"' not in text:
        return ["no kernel"]
    made = re.findall(r"= \(?((?:s8|u8|f32)\[([0-9,]*)\][^ ]*) (?:copy|fusion|transpose|reshape)\(", text)
    return [what for what, dims in made if str(S) in dims.split(",") or math.prod(map(int, dims.split(","))) >= B * S * K]

found = {}
for chip, case, bits, dtype in json.loads(CASES):
    place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0])
    found[f"{chip} {case} {bits} {dtype}"] = moved(place, case, bits, dtype)
print(json.dumps(found))
"""

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def compiled(cases: list[Any]) -> dict[str, list[str]]:
    found = printed(f"CASES = {json.dumps(cases)!r}\n{PROGRAM}")
    assert len(found) == len(cases)
    return {case: moved for case, moved in found.items() if moved}


@needs_compiler
def test_it_compiles_for_chips() -> None:
    """The kernel, and no copy in front of it: codes and scales are read as the compiler lays them, or as they lie."""
    few = [
        ("v5e:2x2", "E2B global", 8, "bfloat16"), ("v5p:2x2x1", "12B local", 4, "bfloat16"),
        ("v6e:2x2", "31B global", 4, "bfloat16"), ("v5e:2x2", "E4B local", 8, "float32"),
    ]  # fmt: skip
    cases = [(chip, RELEASED[size], bits, dtype) for chip, size, bits, dtype in few]
    # Its length no multiple of 32: a cache the compiler lays in tiles of its own.
    odd = ("v5e:2x2", (8, 8191, 1, 8, 512), 8, "bfloat16")
    wrong = compiled([*cases, odd])
    assert [*wrong] == [f"{odd[0]} {list(odd[1])} 8 bfloat16"], wrong


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_released_size_compiles(chip: str) -> None:
    """Broken: decoding fails on a TPU, or copies its cache at every token."""
    cases = [
        (chip, case, bits, dtype)
        for case in RELEASED.values()
        for bits in (8, 4)
        for dtype in ("bfloat16", "float32")
    ]
    assert not compiled(cases)
