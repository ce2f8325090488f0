"""The studies: what their READMEs say is what their results say, and their instruments measure what they claim."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.evals.reference import hidden_states
from gemma_qat.evals.variants import Variants
from gemma_qat.models import Gemma4, ModelConfig, initialize
from gemma_qat.nn.module import split
from gemma_qat.nn.shapes import ExpertsShape
from gemma_qat.numerics import Grid, mse_search, quantize
from gemma_qat.quant import Activation

Script = Callable[[str], Any]

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
STUDIES = sorted(file.parent.name for file in EXPERIMENTS.glob("*/run.py") if "Study(" in file.read_text())  # fmt: skip


def test_every_study_is_looked_at() -> None:
    """If it fails, the tests below look at fewer studies than there are."""
    assert {"embedding_head", "router", "kv_bits", "distillation", "moe_experts", "step_cost"} <= {*STUDIES}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_a_readme_says_what_its_result_says(name: str, script: Script) -> None:
    """If it fails, a table was written by hand, or is of another run than the result that lies beside it."""
    study, run = script("study"), script(f"{name}.run")
    text = (EXPERIMENTS / name / "README.md").read_text("utf-8")
    assert f"python -m experiments.{name}.run" in text
    assert "**Predicted" in text
    result = EXPERIMENTS / name / "result.json"
    if not result.is_file():
        between = text.partition(study.BEGIN)[2].partition(study.END)[0]
        assert "|" not in between, "a table without a result"
        return
    found = json.loads(result.read_text("utf-8"))["measured"]
    assert study.with_tables(text, run.tables(found)) == text
    assert (EXPERIMENTS / name / "plot.png").is_file()
    assert "## What was learnt" in text


def test_results_name_no_place_of_a_machine() -> None:
    """If it fails, a committed result holds a path of the machine that made it."""
    for file in EXPERIMENTS.glob("*/result.json"):
        assert not re.search(r'"/(work|home|tmp|root)', file.read_text("utf-8")), file


def test_tables_stand_between_their_marks(script: Script) -> None:
    """If it fails, writing tables again eats or doubles the text around them."""
    study = script("study")
    text = f"before\n{study.BEGIN}\nold\n{study.END}\nafter\n"
    once = study.with_tables(text, "| \\1 |")
    assert once == study.with_tables(once, "| \\1 |")
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "| \\1 |" in once
    with pytest.raises(ValueError, match="no <!--"):
        study.with_tables("nothing", "")


def test_nothing_to_show_is_one_line(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """If it fails, a study that was never measured ends in a traceback when it is asked to show itself."""
    monkeypatch.setattr("sys.argv", ["run", "--show"])
    one = script("study").Study(folder=tmp_path / "new", measure=dict, tables=str, plot=bytes)
    with pytest.raises(SystemExit) as caught:
        one.main()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "without --show it is measured" in said
    assert said.count("\n") == 1


def test_moved_counts_sets_and_weight(script: Script) -> None:
    """If it fails, shares of tokens that were sent elsewhere are of something else: order is no change, weight is the lost one's."""
    experts = np.asarray([[0, 1], [2, 3], [4, 5]])
    weights = np.asarray([[0.6, 0.4], [3.0, 1.0], [0.5, 0.5]])
    others = np.asarray([[1, 0], [2, 7], [6, 7]])
    changed, lost = script("router.forced").moved((experts, weights), (others, weights))
    assert changed.tolist() == [False, True, True]
    np.testing.assert_allclose(lost, [0.0, 0.25, 1.0])


@pytest.fixture(scope="module")
def experts_model() -> Gemma4:
    config = ModelConfig(
        name="small", layer_kinds=("sliding", "full"), vocab_size=17, width=32, query_heads=2, kv_heads=1,
        global_kv_heads=1, head_width=16, global_head_width=16, ffn_width=32, window=4,
        experts=ExpertsShape(count=8, per_token=2, width=24),
    )  # fmt: skip
    return Gemma4.from_parameters(config, initialize(config, 0))


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 17, (2, 13)).astype(np.int32)
    positions = np.broadcast_to(np.arange(13, dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "positions": positions, "segments": np.ones_like(tokens)}


@pytest.mark.parametrize("mode", ["set", "whole"])
def test_told_its_own_routing_a_model_is_itself(
    mode: str, script: Script, experts_model: Gemma4, batch: dict[str, np.ndarray]
) -> None:
    """If it fails, what is laid to flips is partly what the walk through told layers changed."""
    routed = script("router.forced").routed
    hidden = hidden_states(*split(experts_model), {n: jnp.asarray(a) for n, a in batch.items()})
    free, routing = routed(experts_model, batch)
    told, _ = routed(experts_model, batch, mode, routing)
    np.testing.assert_allclose(free, hidden, atol=2e-5)
    np.testing.assert_allclose(told, hidden, atol=2e-5)


def test_told_another_routing_a_model_follows(
    script: Script, experts_model: Gemma4, batch: dict[str, np.ndarray]
) -> None:
    """If it fails, tokens are not sent where they are told."""
    routed = script("router.forced").routed
    free, routing = routed(experts_model, batch)
    other = [((experts + 1) % 8, weights) for experts, weights in routing]
    whole, _ = routed(experts_model, batch, "whole", other)
    assert np.abs(np.asarray(whole - free)).max() > 1e-2
    chosen, _ = routed(experts_model, batch, "set", other)
    assert np.abs(np.asarray(whole - chosen)).max() > 1e-4, (
        "weights of experts that were not its own"
    )


def test_a_tile_that_does_not_divide_the_width_ends_short(
    script: Script, experts_model: Gemma4
) -> None:
    """If it fails, what padding costs is the cost of something else."""
    run = script("moe_experts.run")
    before = experts_model.parameters()
    paths = [path for path in before if path.endswith("experts/down/kernel")]
    assert len(paths) == 2 and before[paths[0]].shape == (8, 24, 32)

    def values(model: Gemma4) -> dict[str, np.ndarray]:
        after = model.parameters()
        assert all(
            after[p] is before[p] or (after[p] == before[p]).all() for p in before if p not in paths
        )
        return {path: np.asarray(after[path]) for path in paths}

    def alone(rows: slice, tile: int) -> dict[str, np.ndarray]:
        grid, leaves = (
            Grid(format="int4", tile=tile),
            {path: before[path][:, rows] for path in paths},
        )
        return {
            p: quantize(w, grid, (1,), mse_search(w, grid, (1,))).dequantize()
            for p, w in leaves.items()
        }

    variants = Variants.of(experts_model, experts_model.config, "mse")
    whole = values(variants.on(dict.fromkeys(paths, Grid(format="int4", tile=8))))
    found = {tile: values(run._in_tiles(experts_model, paths, tile)) for tile in (8, 16)}
    first, last = alone(slice(0, 16), 16), alone(slice(16, 24), 8)
    for path in paths:
        np.testing.assert_array_equal(found[8][path], whole[path])
        np.testing.assert_array_equal(
            found[16][path], np.concatenate([first[path], last[path]], axis=1)
        )


def test_a_cache_plan_rounds_what_it_names_and_no_weight(script: Script) -> None:
    """If it fails, the KL of keys is that of values too, or of a weight on a grid."""
    kv_bits = script("kv_bits.run")
    config = ModelConfig(
        name="small", layer_kinds=("full", "full"), vocab_size=17, width=32, query_heads=2, kv_heads=1,
        global_kv_heads=1, head_width=16, global_head_width=16, ffn_width=32, window=4, shared_kv_layers=1,
    )  # fmt: skip
    parameters = initialize(config, 0)
    tokens = jnp.arange(10, dtype=jnp.int32)[None]

    def hidden(only: tuple[str, ...]) -> jax.Array:
        plan = kv_bits.CachePlan(
            weight=Grid(format="int8"), cache=Activation(bits=4, per="token"), only=only
        )
        path = "layers/0/attn/k/kernel"
        leaves = parameters | {path: kv_bits.Rounded(parameters[path])}
        return Gemma4.from_parameters(config, leaves, {path: plan}).hidden(tokens)[0]

    plain = Gemma4.from_parameters(config, parameters).hidden(tokens)[0]
    np.testing.assert_array_equal(hidden(()), plain)
    keys, values, both = (hidden(one) for one in (kv_bits.KEYS, kv_bits.VALUES, kv_bits.BOTH))
    for one, other in (
        (keys, plain),
        (values, plain),
        (keys, values),
        (both, keys),
        (both, values),
    ):
        assert np.abs(np.asarray(one - other)).max() > 1e-4
