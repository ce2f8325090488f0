"""Block-wise reconstruction: what a layer learns, from which inputs, and that a stopped one goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_qat import training
from gemma_qat.checkpoint.native import load_parameters
from gemma_qat.checkpoint.safetensors_file import read_header, read_tensor
from gemma_qat.cli.main import main
from gemma_qat.config import apply, load_config
from gemma_qat.errors import InputError, Stopped
from gemma_qat.models import (
    Layerwise,
    ModelConfig,
    declare,
    fit,
    initialize,
    quantize_parameters,
    size_named,
)
from gemma_qat.nn.shapes import ExpertsShape
from gemma_qat.numerics import quantize
from gemma_qat.runs import read_run
from gemma_qat.train import (
    BlockwiseConfig,
    OptimizerConfig,
    TrainConfig,
    make_optimizer,
    reconstruct,
    settled,
    train,
    with_scales,
)
from gemma_qat.train.blockwise import _step

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SMALL = ModelConfig(
    name="small e", layer_kinds=("full",) * 3, vocab_size=64, width=32, query_heads=2, kv_heads=1, global_kv_heads=1,
    head_width=16, global_head_width=32, ffn_width=32, shared_ffn_width=64, window=4, max_positions=64,
    shared_kv_layers=1, per_layer_width=32, per_layer_vocab=64,
)  # fmt: skip
MOE = ModelConfig(
    name="small m", layer_kinds=("full",) * 2, vocab_size=64, width=32, query_heads=2, kv_heads=1, global_kv_heads=1,
    head_width=16, global_head_width=32, ffn_width=32, window=4, max_positions=64, key_equals_value=True,
    experts=ExpertsShape(count=4, per_token=2, width=32),
)  # fmt: skip
HOW = BlockwiseConfig(steps=6, rows=6, batch_size=2, learning_rate=3e-3, scale_learning_rate=1e-2)


def _texts(vocab: int = 64, length: int = 8, batches: int = 3) -> list[dict[str, np.ndarray]]:
    """Batches of two rows, of which the second ends in padding."""
    tokens = np.random.default_rng(0).integers(0, vocab, (batches, 2, length), dtype=np.int32)
    segments = np.ones_like(tokens)
    segments[:, 1, -3:] = 0
    positions = np.tile(np.arange(length, dtype=np.int32), (batches, 2, 1))
    names = ("tokens", "segments", "positions")
    return [dict(zip(names, one, strict=True)) for one in zip(tokens, segments, positions, strict=True)]  # fmt: skip


def _begun(
    size: ModelConfig, recipe: str, texts: Any, **options: Any
) -> tuple[Any, dict[str, Any]]:
    fitted = fit(size, recipe, scales="learned", **options)
    return fitted, with_scales(initialize(size, 0), fitted, "rtn", texts)


@pytest.fixture(scope="module")
def small() -> tuple[Any, dict[str, Any], dict[str, Any], list[Any]]:
    """Layers with per-layer inputs, the last with the keys of the one before: start, reconstructed, errors."""
    fitted, start = _begun(SMALL, "w2", _texts())
    before = _step._cache_size()
    found, errors = reconstruct(fitted, start, _texts(), HOW)
    assert _step._cache_size() - before == 2, "two equal layers and another: two programs"
    return fitted, start, found, errors


def _stream(walk: Layerwise, parameters: Any, batch: Any, layers: int) -> Any:
    flow = walk.begin(parameters, batch)
    for index in range(layers):
        flow = walk.layer(index, walk.leaves_of(parameters, index), flow)
    return flow


def test_every_layer_comes_nearer_to_the_float_stream(small: Any) -> None:
    """If it fails, a layer is trained towards something else, or from inputs it will not have."""
    fitted, start, found, errors = small
    assert [one.layer for one in errors] == [0, 1, 2]
    assert all(one.after < 0.8 * one.before for one in errors), errors
    floats = initialize(SMALL, 0)
    for layers in (1, 3):
        off = own = 0.0
        for batch in _texts():
            target = _stream(Layerwise(SMALL), floats, batch, layers).x
            reached = _stream(Layerwise(fitted.config, fitted.plans), found, batch, layers).x
            counts = batch["segments"][..., None] > 0
            off += float(np.sum(np.where(counts, reached - target, 0) ** 2, dtype=np.float64))
            own += float(np.sum(np.where(counts, target, 0) ** 2, dtype=np.float64))
        np.testing.assert_allclose(off / own, errors[layers - 1].after, rtol=1e-4)
    for path, leaf in found.items():
        if not path.startswith("layers/"):  # Tables keep what they began with.
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(start[path]), err_msg=path)


def test_a_layer_is_a_plain_loop(small: Any) -> None:
    """If it fails, the steps are not those of the optimizer on the relative squared error."""
    fitted, start, found, _ = small
    walk, floats = Layerwise(fitted.config, fitted.plans), Layerwise(SMALL)
    inputs = [walk.begin(start, batch) for batch in _texts()]
    targets = [_stream(floats, start, batch, 1).x for batch in _texts()]
    counts = [batch["segments"] > 0 for batch in _texts()]
    squares = [np.sum(np.asarray(t, np.float64)[c] ** 2) for t, c in zip(targets, counts, strict=True)]  # fmt: skip
    power = np.sum(squares) / np.sum(counts)

    def error(leaves: Any, at: int) -> jax.Array:
        out = walk.layer(0, leaves, inputs[at]).x
        rows = jnp.where(counts[at][..., None], out - targets[at], 0)
        return jnp.sum(rows**2) / counts[at].sum() / power

    leaves = walk.leaves_of(start, 0)
    how = OptimizerConfig(
        learning_rate=3e-3, scale_learning_rate=1e-2, warmup=0, final_fraction=0.05
    )
    optimizer = make_optimizer(how, 6, leaves)
    state, draws = optimizer.init(leaves), np.random.default_rng([0, 0])
    gradient = jax.jit(jax.grad(error), static_argnums=1)
    for at in [*draws.permutation(3), *draws.permutation(3)]:
        updates, state = optimizer.update(gradient(leaves, int(at)), state, leaves)
        leaves = optax.apply_updates(leaves, updates)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(
            found[f"layers/0/{name}"], leaf, rtol=1e-3, atol=2e-5, err_msg=name
        )
    assert not np.array_equal(found["layers/0/attn/q/kernel_scale"], start["layers/0/attn/q/kernel_scale"])  # fmt: skip


@pytest.mark.slow
def test_experts_are_reconstructed() -> None:
    """If it fails, MoE layers do not train, or an expert is left out."""
    fitted, start = _begun(MOE, "w2", _texts())
    found, errors = reconstruct(fitted, start, _texts(), HOW)
    assert all(one.after < one.before for one in errors), errors
    moved = np.asarray(found["layers/1/experts/down/kernel"] != start["layers/1/experts/down/kernel"])  # fmt: skip
    assert moved.any(axis=(1, 2)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "recipe"), [("tiny_e2b", "w2"), ("tiny_26b_a4b", "q4_0"), ("tiny_e4b", "mobile")]
)
def test_layers_of_every_design_come_nearer(size: str, recipe: str) -> None:
    """If it fails, sliding layers, static activation scales or a head of its own are in the way."""
    texts = _texts(1024, 16)
    fitted, start = _begun(size_named(size), recipe, texts)
    how = dataclasses.replace(HOW, learning_rate=1e-3)
    found, errors = reconstruct(fitted, start, texts, how)
    assert all(one.after < one.before for one in errors), errors
    assert found.keys() == start.keys()
    for path in (p for p in start if p.endswith(("input_scale", "output_scale", "cache_scale"))):
        np.testing.assert_array_equal(found[path], start[path], err_msg=path)


def test_a_stopped_reconstruction_goes_on(small: Any, tmp_path: Path) -> None:
    """If it fails, layers that are done are made twice, or come from another start or config."""
    fitted, start, expected, errors = small
    asked: list[int] = []
    steps: list[int] = []

    def stop(step: int) -> bool:
        asked.append(step)
        return len(asked) == 9

    def progress(said: str, done: int, total: int) -> None:
        if said == "reconstruct":
            steps.append(done)

    def again(begin: Any, made: dict[str, int], stop: Any = None) -> Any:
        steps.clear()
        return reconstruct(fitted, begin, _texts(), HOW, kept=tmp_path, made=made, progress=progress, stop=stop)  # fmt: skip

    with pytest.raises(Stopped, match="stopped in the reconstruction of layer 1") as stopped:
        again(start, {"a": 1}, stop)
    assert stopped.value.step == 0
    found, told = again(start, {"a": 1})
    assert steps == list(range(7, 19)), "layer 0 was there"
    assert told == errors
    for path, leaf in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(leaf), err_msg=path)
    other = start | {"layers/1/scalar": 0.5 * start["layers/1/scalar"]}
    again(other, {"a": 1})
    assert steps == list(range(7, 19)), "layer 1 began otherwise"
    again(other, {"a": 2})
    assert steps == list(range(1, 19)), "another config"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": -1}, "blockwise.steps=-1: at least 0 expected"),
        ({"batch_size": 0}, "blockwise.batch_size=0: at least 1 expected"),
        ({"rows": 7}, "blockwise.rows=7: a multiple of blockwise.batch_size=2 expected"),
        ({"recipe": "float"}, "blockwise.steps=6 with recipe=float: layers are rebuilt on a recipe's grid"),
        ({"devices": 8}, "blockwise.steps=6 on 8 devices: one layer at a time fits one device"),
    ],
)  # fmt: skip
def test_what_cannot_be_reconstructed_is_one_line(change: dict[str, Any], said: str) -> None:
    """If it fails, it is found out after the layers before, or in a traceback."""
    where = {"recipe": "w2", "devices": 1} | {n: change[n] for n in ("recipe", "devices") if n in change}  # fmt: skip
    with pytest.raises(InputError, match=said):
        how = dataclasses.replace(HOW, **{n: v for n, v in change.items() if n not in where})
        how.check(**where)
    dataclasses.replace(HOW, steps=0, rows=7).check("float", 8)


def test_a_run_reconstructs_then_trains_scales(
    project: Any, compiled_once: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """If it fails, the phase is left out, done twice, or its weights do not reach the run's save."""
    monkeypatch.chdir(project.folder)
    overlays = [
        f"directory={project.folder / 'blocks'}", "recipe=w2", "scales=learned", "train.steps=2", "train.save_every=0",
        "blockwise.steps=3", "blockwise.rows=4", "blockwise.batch_size=2", "blockwise.learning_rate=3e-3",
    ]  # fmt: skip
    config = apply(load_config(project.folder / "config.py"), [*overlays, 'train.only=["*_scale"]'])
    asked: list[int] = []
    with pytest.raises(Stopped):
        training.run(config, stop=lambda step: asked.append(step) or len(asked) == 5)
    state = read_run(config.folder)
    assert (state.state, state.note) == ("stopped", "before its first step")
    kept = config.folder / "blockwise"
    assert [file.name for file in kept.iterdir()] == ["0.safetensors"]
    monkeypatch.setattr(training, "forget_layers", lambda folder: kept.rename(folder / "seen"))
    training.run(config)
    told = json.loads((config.folder / "blockwise.json").read_text())
    assert [row["layer"] for row in told["layers"]] == [0, 1]
    assert all(row["after"] < row["before"] for row in told["layers"])
    assert told["made"]["tokens"] == {"read": 4 * 16, "trained": 3 * 2 * 16}
    assert told["made"]["text"]["digest"], "layers of other text would be taken up"
    _, saved = load_parameters(config.folder / "checkpoints" / "2")
    plans, declared = fit(size_named("small"), "w2").plans, declare(size_named("small"))
    for index in (0, 1):
        file = config.folder / "seen" / f"{index}.safetensors"
        with file.open("rb") as content:
            kept = {n: read_tensor(content, e, "") for n, e in read_header(file).items()}
        for name, leaf in kept.items():
            path = f"layers/{index}/{name}"
            if path in plans:  # On its grid, where its codes stay while the scale moves.
                scale = jnp.asarray(kept[f"{name}_scale"])
                q = quantize(jnp.asarray(leaf), plans[path].weight, declared[path].reduced, scale)
                leaf = q.dequantize()
            same = np.array_equal(np.asarray(leaf), np.asarray(saved[path]))
            assert same is not name.endswith("_scale"), path
    monkeypatch.setattr(training, "forget_layers", lambda folder: None)
    monkeypatch.setattr(training, "reconstruct", None)
    training.run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3)))
    assert main(["train", "config.py", *overlays, f"start={config.folder}", "name=other"]) == 2
    assert "layers are rebuilt after a float start" in capsys.readouterr().err


def test_scales_alone_bring_the_divergence_down(batches: Any, one_batch: Any) -> None:
    """If it fails, `train.only=("*_scale",)` moves masters, or scales that learn nothing, or at the weights' rate."""
    floats = initialize(SMALL, 0)
    fitted, start = _begun(SMALL, "w2", _texts())
    codes = quantize_parameters(start, fitted)
    start = settled(start, fitted, fitted.plans)
    assert all(
        np.array_equal(q.codes, codes[p].codes)
        for p, q in quantize_parameters(start, fitted).items()
    )
    how = TrainConfig(
        steps=12, batch_size=2, loss="kl", log_every=1, only=("*_scale",), watch_codes=False
    )
    trained = train(
        fitted, start, one_batch(next(batches())), how, OptimizerConfig(learning_rate=0.0, scale_learning_rate=3e-2, warmup=1),
        teacher=(SMALL, floats),
    )  # fmt: skip
    curve = [value for _, value in trained.curves["kl"]]
    assert curve[-1] < 0.9 * curve[0], curve
    for path, leaf in start.items():
        same = np.array_equal(np.asarray(trained.parameters[path]), np.asarray(leaf))
        assert same is not path.endswith("_scale"), path
