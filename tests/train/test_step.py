"""The step against the plain mathematics: layers that round their own weights, one batch, naive losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.errors import InputError
from gemma_qat.models import (
    Gemma4,
    ModelConfig,
    RunOptions,
    fit,
    initialize,
    made_ready,
    quantize_parameters,
    round_ahead,
    unstack_layers,
)
from gemma_qat.models.capture import differing
from gemma_qat.quant import scale_path
from gemma_qat.train import (
    Fixed,
    Objective,
    OptimizerConfig,
    Student,
    cross_entropy,
    divergence,
    gradients,
    make_optimizer,
    with_scales,
)
from gemma_qat.train.selection import EVERYTHING, select

CONFIG = ModelConfig(
    name="four layers", layer_kinds=("sliding", "full") * 2, vocab_size=80, width=32, query_heads=2, kv_heads=1,
    global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=32, shared_ffn_width=64, shared_kv_layers=2,
    window=4, max_positions=64, per_layer_width=32, per_layer_vocab=80,
)  # fmt: skip
ROWS, LENGTH = 4, 8


def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 80, (ROWS, LENGTH)).astype(np.int32)
    weights = (rng.random((ROWS, LENGTH)) > 0.3).astype(np.float32)
    where = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    arrays = {
        "tokens": tokens, "segments": np.ones_like(tokens), "positions": where,
        "targets": np.roll(tokens, -1, axis=1), "weights": weights,
    }  # fmt: skip
    return {name: jnp.asarray(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return initialize(CONFIG, 0)


@pytest.fixture(scope="module")
def whole(reference: Any) -> tuple[Student, dict[str, jax.Array], Any, Any]:
    """The student of q4_0, its leaves, and the gradients and means of one float32 step over the batch at once."""
    student, leaves, _ = masters("q4_0", reference)
    how = objective(student, "ce", chunk=0)
    run = jax.jit(lambda p: gradients(how, EVERYTHING, p, batch(), Fixed())[:2])
    return student, leaves, *run(leaves)


def masters(recipe: str, reference: Any) -> tuple[Student, dict[str, jax.Array], Any]:
    scales = "recomputed" if recipe == "q4_0" else "learned"
    fitted = fit(CONFIG, recipe, scales, learn_activations=recipe == "mobile")
    start = with_scales(reference, fitted, "rtn", [batch()])
    student = Student.of(fitted)
    return student, student.stack(start), fitted


def objective(student: Student, loss: str, **more: Any) -> Objective:
    teacher = Student.of(CONFIG) if loss == "kl" else None
    return Objective(
        student=student, teacher=teacher, loss=loss, options=more.get("options", RunOptions()),
        chunk=more.get("chunk", 4),
    )  # fmt: skip


def naive(student: Student, leaves: Any, teacher: Any, loss: str) -> Any:
    """Mean loss and its gradient with every weight rounded inside its layer and whole logits."""

    def mean(leaves: Any) -> jax.Array:
        data = batch()
        model = Gemma4(student.config, leaves, student.plans)
        logits = model.logits(model.hidden(data["tokens"])[0])
        if loss == "ce":
            values = cross_entropy(logits, data["targets"])
        else:
            guide = Gemma4(CONFIG, teacher, {})
            values = divergence(guide.logits(guide.hidden(data["tokens"])[0]), logits)
        return jnp.sum(values * data["weights"]) / jnp.sum(data["weights"])

    return jax.jit(jax.value_and_grad(mean))(leaves)


def close(ours: Any, theirs: Any, *, codes_may_flip: bool = False) -> None:
    """Two programs of the same sums: float32 rounding of the largest entry, some hundred terms deep.

    Where activations are rounded, what float rounding moves across a tie is a whole code: one operand of one token, a
    step of 1/127. With three of them a gradient may be 3/127 of its norm away.
    """
    floor = 1e-6 * max(float(np.abs(x).max()) for x in theirs.values())
    for path, want in theirs.items():
        if codes_may_flip:
            off = float(jnp.linalg.norm(ours[path] - want))
            assert off <= 3 / 127 * float(jnp.linalg.norm(want)) + floor * want.size**0.5, path
            continue
        atol = 2e-4 * float(np.abs(want).max()) + floor
        np.testing.assert_allclose(ours[path], want, atol=atol, rtol=0, err_msg=path)


@pytest.mark.parametrize(
    ("recipe", "loss"),
    [
        ("mobile", "kl"),
        *(pytest.param(recipe, "ce", marks=pytest.mark.slow) for recipe in ("q4_0", "w8a8")),
    ],
)
def test_rounding_ahead_equals_rounding_in_the_layers(
    recipe: str, loss: str, reference: Any
) -> None:
    """Loss, gradients of masters and scales, and the codes of the step, which are those a save stores."""
    student, leaves, fitted = masters(recipe, reference)
    teacher = Student.of(CONFIG).stack(reference)
    fixed = Fixed(teacher=teacher if loss == "kl" else None)
    run = jax.jit(lambda p: gradients(objective(student, loss), EVERYTHING, p, batch(), fixed))
    ours, means, codes = run(leaves)
    value, theirs = naive(student, leaves, teacher, loss)
    np.testing.assert_allclose(means["nll" if loss == "ce" else "kl"], value, rtol=2e-5)
    close(ours, theirs, codes_may_flip=recipe == "w8a8")
    stored = quantize_parameters(student.unstack(leaves), fitted)
    seen = unstack_layers(codes, student.config, student.plans)
    assert differing({p: stored[p] for p in seen}, seen) == {"codes": 0, "scales": 0}
    left = stored.keys() - seen.keys()
    assert left <= {"embed/table", "per_layer/embed/table"}


def test_microbatches_sum_to_the_batch(whole: Any) -> None:
    student, leaves, gradient, means = whole

    def run(parts: int) -> Any:
        how = objective(student, "ce", chunk=0)
        return jax.jit(lambda p: gradients(how, EVERYTHING, p, batch(), Fixed(), parts)[:2])(leaves)

    summed, again = run(2)
    close(summed, gradient)
    for name, value in means.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-5, err_msg=name)
    with pytest.raises(ValueError, match="3 microbatches do not divide a batch of 4 rows"):
        run(3)


def test_half_precision_holds_one_narrow_copy(whole: Any) -> None:
    """bfloat16 activations: gradients stay near the float32 ones, masters' gradients are float32."""
    student, leaves, wide, _ = whole
    how = objective(student, "ce", options=RunOptions(dtype="bfloat16"))
    narrow = jax.jit(lambda p: gradients(how, EVERYTHING, p, batch(), Fixed())[0])(leaves)
    # A norm follows the last layer's scalar: its gradient is rounding and nothing else.
    floor = 2.0**-8 * max(float(jnp.linalg.norm(want)) for want in wide.values())
    for path, want in wide.items():
        assert narrow[path].dtype == jnp.float32
        size = float(jnp.linalg.norm(want))
        # 8 bits of mantissa through four layers: a few percent of the norm, not of every entry.
        assert float(jnp.linalg.norm(narrow[path] - want)) <= 0.1 * size + floor, path


def test_weights_move_to_the_grid_in_equal_parts(reference: Any) -> None:
    """By value: half way is the mean of master and grid, all the way is the grid to the bit."""
    student, leaves, _ = masters("q4_0", reference)
    path = "groups/0/0/ffn/up/kernel"

    def at(strength: float | None) -> np.ndarray:
        part = None if strength is None else jnp.float32(strength)
        rounded, _ = jax.jit(
            lambda p: round_ahead(p, student.config, student.plans, RunOptions(), part)
        )(leaves)
        return np.asarray(rounded[path])

    np.testing.assert_array_equal(at(1.0), at(None))
    half = (np.asarray(leaves[path]) + at(None)) / 2
    np.testing.assert_allclose(at(0.5), half, rtol=1e-5, atol=1e-7)


def primitives(jaxpr: Any, inside: bool = False) -> Any:
    """Yields (primitive name, whether it is in the body of a loop, shapes made)."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, inside, [v.aval.shape for v in equation.outvars]
        looped = inside or equation.primitive.name in ("scan", "while")
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, looped)


def test_no_weight_is_rounded_in_a_loop_and_no_logits_are_whole(reference: Any) -> None:
    """Once a step: not once a microbatch, a chunk or a layer of a scan; and [B, T, V] is never made."""
    student, leaves, _ = masters("q4_0", reference)
    options = RunOptions(remat="full")
    how = objective(student, "ce", options=options, chunk=4)
    jaxpr = jax.make_jaxpr(lambda p: gradients(how, EVERYTHING, p, batch(), Fixed(), 2)[:2])(leaves)
    found = list(primitives(jaxpr.jaxpr))
    rounding = [looped for name, looped, _ in found if name == "floor"]
    # The per-layer table is looked up: its rows are rounded where a microbatch asks for them.
    lookups = [shapes for name, looped, shapes in found if name == "floor" and looped]
    assert any(not looped for looped in rounding)
    rows = ROWS // 2 * LENGTH
    assert all(np.prod(shape) == rows * 4 * 32 for shapes in lookups for shape in shapes), lookups
    made = {shape for _, _, shapes in found for shape in shapes}
    assert (ROWS // 2, 4, 80) in made
    assert not {(ROWS, LENGTH, 80), (ROWS // 2, LENGTH, 80)} & made


def test_what_trains_is_chosen_by_pattern(reference: Any) -> None:
    student, leaves, _ = masters("mobile", reference)
    scales = select(["*_scale"], leaves, student.config, student.plans)
    assert scales.of(leaves).keys() == {p for p in leaves if p.endswith("_scale")}
    rounded = {p for p, site in made_ready(student.config, student.plans).items() if site.plan}
    assert rounded and not scales.still & rounded
    some = select(["layers/0/*", "layers/1/ffn/*"], leaves, student.config, student.plans)
    assert "embed/table" in some.still
    assert "groups/0/0/attn/q/kernel" in some.whole
    assert "groups/0/1/attn/q/kernel" in some.still
    with pytest.raises(InputError, match="unknown train.only pattern 'layer/0/\\*'"):
        select(["layer/0/*"], leaves, student.config, student.plans)


def test_layers_that_share_a_stack_train_apart() -> None:
    """One of two layers in a stacked leaf: its gradient as if all trained, the other's zero, updates too."""
    config = dataclasses.replace(
        CONFIG, shared_kv_layers=0, shared_ffn_width=0, per_layer_width=0, per_layer_vocab=0
    )
    fitted = fit(config, "q4_0", "learned")
    student = Student.of(fitted)
    leaves = student.stack(with_scales(initialize(config, 1), fitted, "rtn"))
    selection = select(["layers/2/*"], leaves, config, student.plans)
    assert selection.parts["groups/0/0/ffn/up/kernel"].tolist() == [False, True]
    how = objective(student, "ce")
    still = {path: leaves[path] for path in selection.still}
    fixed = Fixed(still=student.ready(still, RunOptions()))
    part = jax.jit(lambda p: gradients(how, selection, p, batch(), fixed)[0])(leaves)
    whole = jax.jit(lambda p: gradients(how, EVERYTHING, p, batch(), Fixed())[0])(leaves)
    assert part.keys() == selection.of(leaves).keys()
    for path, gradient in part.items():
        assert not np.asarray(gradient[0]).any(), path
    close({p: g[1] for p, g in part.items()}, {p: whole[p][1] for p in part})
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), 10, selection.of(leaves))
    trained = selection.of(leaves)
    updates, _ = optimizer.update(part, optimizer.init(trained), trained)
    assert not any(np.asarray(u[0]).any() for u in selection.masked(updates).values())
    assert scale_path("groups/0/0/ffn/up/kernel") in part
