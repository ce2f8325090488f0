"""Hidden states beside probabilities: gradients against the plain formula, what falls, what it leaves alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.checkpoint.native import save_model
from gemma_qat.config import ExperimentConfig
from gemma_qat.errors import InputError
from gemma_qat.models import SIZES, Gemma4, ModelConfig, RunOptions, fit, initialize
from gemma_qat.nn.shapes import ExpertsShape
from gemma_qat.start import check_teacher
from gemma_qat.train import (
    Fixed,
    Objective,
    OptimizerConfig,
    Student,
    TrainConfig,
    cross_entropy,
    gradients,
    train,
)
from gemma_qat.train.selection import EVERYTHING

CONFIG = ModelConfig(
    name="six layers", layer_kinds=("sliding", "full") * 3, vocab_size=64, width=32, query_heads=2, kv_heads=1,
    global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=32, shared_ffn_width=64, shared_kv_layers=2,
    window=4, max_positions=64, per_layer_width=32, per_layer_vocab=64,
)  # fmt: skip
MOE = dataclasses.replace(
    CONFIG, name="experts", shared_kv_layers=0, shared_ffn_width=0, per_layer_width=0, per_layer_vocab=0,
    layer_kinds=("full", "full"), experts=ExpertsShape(count=4, per_token=2, width=32),
)  # fmt: skip
ROWS, LENGTH = 4, 8
SCAN = RunOptions(remat="full")

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def batch() -> dict[str, jax.Array]:
    """Rows whose last positions are padding, with tokens in them that must not count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32)
    segments = (np.arange(LENGTH) < np.array([8, 5, 6, 8])[:, None]).astype(np.int32)
    arrays = {
        "tokens": tokens, "segments": segments,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "targets": np.roll(tokens, -1, axis=1), "weights": segments.astype(np.float32),
    }  # fmt: skip
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def plain(student: Student, leaves: Any, teacher: Any, which: str, weight: float) -> Any:
    """Mean cross-entropy and hidden error, whole arrays, layers that round their own weights; and the gradient."""
    data = batch()

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(x * data["weights"]) / jnp.sum(data["weights"])

    def total(leaves: Any) -> tuple[jax.Array, jax.Array]:
        seen: list[dict[str, Any]] = [{}, {}]
        mine = Gemma4(student.config, leaves, student.plans)
        guide = Gemma4(student.config, teacher, {})
        where = (data["tokens"], data["positions"], data["segments"])
        hidden, last = mine.hidden(*where, taps=seen[0])[0], guide.hidden(*where, taps=seen[1])[0]
        names = [f"layers/{i}/out" for i in range(student.config.layers)]
        pairs = [(hidden, last)] if which == "final" else [(seen[0][n], seen[1][n]) for n in names]
        errors = [mean(jnp.sum((s - t) ** 2, -1) / jnp.sum(t**2, -1)) for s, t in pairs]
        error = sum(errors) / len(errors)
        nll = mean(cross_entropy(mine.logits(hidden), data["targets"]))
        return nll + weight * error, error

    return jax.jit(jax.value_and_grad(total, has_aux=True))(leaves)


@pytest.mark.parametrize(
    ("config", "which", "options", "parts"),
    [
        pytest.param(
            CONFIG, "layers", SCAN, 2, id="layers-scan-remat-parts", marks=pytest.mark.slow
        ),
        pytest.param(CONFIG, "final", RunOptions(), 1, id="final", marks=pytest.mark.slow),
        pytest.param(
            MOE, "layers", RunOptions(scan=False), 1, id="experts", marks=pytest.mark.slow
        ),
    ],
)
def test_the_gradient_is_that_of_the_plain_formula(
    config: ModelConfig, which: Any, options: RunOptions, parts: int
) -> None:
    """If it fails, hidden states are compared at other places or tokens, or pull a student elsewhere."""
    fitted = fit(config, "q4_0", "recomputed")
    student = Student.of(fitted)
    parameters = initialize(config, 0)
    leaves, teacher = student.stack(parameters), Student.of(config).stack(initialize(config, 1))
    weight = 3.0
    how = Objective(
        student=student, teacher=Student.of(config), loss="ce", options=options, chunk=4,
        hidden_weight=weight, hidden=which,
    )  # fmt: skip
    run = jax.jit(
        lambda p: gradients(how, EVERYTHING, p, batch(), Fixed(teacher=teacher), parts)[:2]
    )
    ours, means = run(leaves)
    (total, error), theirs = plain(student, leaves, teacher, which, weight)
    assert float(error) > 0.05
    np.testing.assert_allclose(means["hidden"], error, rtol=2e-5)
    np.testing.assert_allclose(means["nll"] + weight * means["hidden"], total, rtol=2e-5)
    assert ("expert_load" in means) == (config is MOE)
    # Two programs of the same sums: float32 rounding of the largest entry, some hundred terms deep.
    floor = 1e-6 * max(float(np.abs(x).max()) for x in theirs.values())
    for path, want in theirs.items():
        atol = 2e-4 * float(np.abs(want).max()) + floor
        np.testing.assert_allclose(ours[path], want, atol=atol, rtol=0, err_msg=path)


def test_weight_0_is_the_step_without() -> None:
    """The same program whatever `hidden` names, and no metric of it; with a weight it is another."""
    student = Student.of(CONFIG)
    leaves = student.stack(initialize(CONFIG, 0))

    def program(**how: Any) -> str:
        objective = Objective(
            student=student, teacher=student, loss="kl", options=RunOptions(), chunk=0, **how
        )
        run = lambda p: gradients(objective, EVERYTHING, p, batch(), Fixed(teacher=leaves))[:2]  # noqa: E731
        assert ("hidden" in jax.eval_shape(run, leaves)[1]) == (how.get("hidden_weight", 0) > 0)
        return str(jax.make_jaxpr(run)(leaves))

    before = program()
    assert program(hidden="final") == program(hidden="layers", hidden_weight=0.0) == before
    assert program(hidden_weight=0.1) != before


@pytest.mark.parametrize("which", [pytest.param("layers", marks=pytest.mark.slow), "final"])
def test_it_falls_when_trained(which: Any, one_batch: Any) -> None:
    """A float student of other numbers than its teacher's: if it does not fall, the term pulls nowhere."""
    how = TrainConfig(
        steps=10, batch_size=ROWS, log_every=1, hidden_weight=10.0, hidden=which, watch_codes=False
    )
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup=0, decay="constant")
    teacher = (CONFIG, initialize(CONFIG, 0))
    same = one_batch({name: np.asarray(array) for name, array in batch().items()})
    found = train(CONFIG, initialize(CONFIG, 1), same, how, optimizer, teacher=teacher)
    hidden = [value for _, value in found.curves["hidden"]]
    print(which, hidden)
    assert hidden[-1] < 0.8 * hidden[0]
    loss, nll = (np.array([value for _, value in found.curves[n]]) for n in ("loss", "nll"))
    np.testing.assert_allclose(loss, nll + 10.0 * np.array(hidden), rtol=1e-5)
    assert {"kl", "agree"} <= found.curves.keys()


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, known_sizes: None) -> None:
    """Kept words have no hidden states; other widths and numbers of layers have other ones."""
    SIZES[CONFIG.name] = CONFIG
    config = ExperimentConfig(
        name="run", model=CONFIG.name, start="start", train=TrainConfig(hidden_weight=0.5)
    )
    with pytest.raises(InputError, match=r"hidden_weight=0.5: teacher_cache=words keeps"):
        dataclasses.replace(config, teacher_cache="words")
    with pytest.raises(InputError, match=r"hidden_weight=-1.0: at least 0 expected"):
        TrainConfig(hidden_weight=-1.0)
    others = {
        "wide": dataclasses.replace(CONFIG, width=64),
        "deep": dataclasses.replace(CONFIG, layer_kinds=("sliding", "full") * 4),
    }
    for name, other in others.items():
        save_model(tmp_path / name, initialize(other, 0), other)
    wide = dataclasses.replace(config, teacher=str(tmp_path / "wide"))
    with pytest.raises(InputError, match="wide: hidden states of width 64, those of six layers"):
        check_teacher(wide)
    deep = dataclasses.replace(config, teacher=str(tmp_path / "deep"))
    with pytest.raises(InputError, match="deep: 8 layers, six layers has 6: train.hidden=final"):
        check_teacher(deep)
    last = dataclasses.replace(deep, train=TrainConfig(hidden_weight=0.5, hidden="final"))
    assert check_teacher(last).layers == 8
    student = Student.of(CONFIG)
    how = Objective(
        student=student, teacher=None, loss="ce", options=RunOptions(), chunk=0, hidden_weight=0.5
    )
    with pytest.raises(ValueError, match="hidden states need the teacher itself"):
        how.sums(student.stack(initialize(CONFIG, 0)), batch(), None)
