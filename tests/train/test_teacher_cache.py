"""A teacher's kept words: what is on disk is what it said, parts fit together, and students learn the same from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.data.blend import Blend
from gemma_qat.data.loader import make_loader
from gemma_qat.data.packing import pack
from gemma_qat.errors import InputError
from gemma_qat.models import Gemma4, ModelConfig, RunOptions, initialize
from gemma_qat.sharding import MeshConfig, Placement, make_mesh
from gemma_qat.train import Fixed, Objective, Student
from gemma_qat.train.teacher_cache import CachedTeacher, Part, write_cache

CONFIG = ModelConfig(
    name="one layer", layer_kinds=("full",), vocab_size=64, width=32, query_heads=2, kv_heads=1,
    global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=32, window=4, max_positions=64,
)  # fmt: skip
TEACHER = Student.of(CONFIG)


def rows(seed: int = 0) -> Blend:
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, 64, rng.integers(3, 20)).tolist() for _ in range(12)]
    return Blend([pack(documents, 8)], [1.0])


@pytest.fixture(scope="module")
def parameters() -> dict[str, Any]:
    return initialize(CONFIG, 0)


def write(directory: Path, parameters: Any, data: Blend | None = None, **more: Any) -> Path:
    how = {"k": 3, "source": "here", "batch_size": 4, "chunk": 4} | more
    placement = Placement(make_mesh(MeshConfig()), "fsdp")
    leaves = TEACHER.stack(parameters)
    return write_cache(directory, data or rows(), TEACHER, leaves, placement=placement, **how)


def test_parts_hold_what_the_teacher_says_and_a_killed_one_goes_on(
    parameters: Any, tmp_path: Path
) -> None:
    """If it fails, a student learns from the words of another row, or a night's work is done again."""
    data = rows()
    whole = write(tmp_path / "whole", parameters)
    logits = Gemma4.from_parameters(CONFIG, parameters)
    every = data[np.arange(len(data))]
    values, ids = jax.lax.top_k(
        jax.nn.log_softmax(
            logits(
                jnp.asarray(every.tokens), jnp.asarray(every.positions), jnp.asarray(every.segments)
            )
        ),
        3,
    )
    np.testing.assert_allclose(np.load(whole / "logprobs.npy"), values, rtol=1e-5, atol=1e-5)
    assert (
        np.load(whole / "ids.npy") == np.asarray(ids)
    ).mean() > 0.99  # near ties may change places
    for index in (1, 0):
        write(tmp_path / "parts", parameters, part=Part(index=index, count=2))
    batches = [
        CachedTeacher(make_loader(data, batch_size=5, seed=1), tmp_path / name, data)
        for name in ("whole", "parts")
    ]
    for _ in range(4):
        one, other = (next(b) for b in batches)
        np.testing.assert_array_equal(one["topk_ids"], np.load(whole / "ids.npy")[one["ids"]])
        for name, array in one.items():
            np.testing.assert_allclose(other[name], array, rtol=1e-5, err_msg=name)

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt(f"{what} {done} of {total}")

    with pytest.raises(KeyboardInterrupt, match="4 of"):
        write(tmp_path / "again", parameters, progress=stop)
    assert not list((tmp_path / "again").glob("part-*"))
    said: list[int] = []
    write(tmp_path / "again", parameters, progress=lambda what, done, total: said.append(done))
    assert said[0] == 8
    again = tmp_path / "again" / whole.name
    np.testing.assert_array_equal(np.load(again / "logprobs.npy"), np.load(whole / "logprobs.npy"))


def test_a_student_learns_the_same_from_kept_words(parameters: Any, tmp_path: Path) -> None:
    """Every word kept: the loss is that of the teacher beside it."""
    data = rows()
    write(tmp_path, parameters, k=64)
    batch = next(CachedTeacher(make_loader(data, batch_size=4, seed=0), tmp_path, data))
    batch.pop("ids")
    leaves = TEACHER.stack(initialize(CONFIG, 1))
    kept = {name: batch.pop(f"topk_{name}") for name in ("ids", "logprobs")}
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}

    def sums(teacher: Student | None, fixed: Fixed, more: dict[str, Any]) -> Any:
        how = Objective(student=TEACHER, teacher=teacher, loss="kl", options=RunOptions(), chunk=4)
        return how.sums(leaves, arrays | more, fixed.teacher)

    beside, scores = sums(TEACHER, Fixed(teacher=TEACHER.stack(parameters)), {})
    more = {f"topk_{name}": jnp.asarray(array) for name, array in kept.items()}
    ours, again = sums(None, Fixed(), more)
    # 64 probabilities in float32 miss 1 by some 64 x 2^-24 a token, against log(1e-30): under 3e-4 nats each.
    assert abs(float(ours - beside)) <= 3e-4 * float(jnp.sum(arrays["weights"]))
    assert float(again["agree"]) == float(scores["agree"])


def test_what_does_not_fit_is_refused(parameters: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"k=65: 1 \.\. 64 expected"):
        write(tmp_path, parameters, k=65)
    with pytest.raises(InputError, match="part 2 of 2: 0 <= part < parts"):
        Part(index=2, count=2)
    data = rows()
    loader = make_loader(data, batch_size=2, seed=0)
    with pytest.raises(FileNotFoundError, match="no kept words of a teacher"):
        CachedTeacher(loader, tmp_path, data)
    half = write(tmp_path, parameters, part=Part(index=0, count=2))
    with pytest.raises(InputError, match="are in no part, or in two"):
        CachedTeacher(loader, tmp_path, data)
    with pytest.raises(InputError, match="made for other rows"):
        CachedTeacher(loader, tmp_path, rows(1))
    with pytest.raises(InputError, match="kept words of other rows or another teacher"):
        write(tmp_path, parameters, part=Part(index=0, count=2), k=2)
    shutil.rmtree(half)
