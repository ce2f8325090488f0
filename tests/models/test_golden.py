"""The model against values that transformers gave: if these fail, it is not Gemma 4."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.checkpoint.hf_config import read_config
from gemma_qat.checkpoint.huggingface import read_parameters
from gemma_qat.checkpoint.maps import foreign
from gemma_qat.decode import generate
from gemma_qat.models import Gemma4, declare
from gemma_qat.train import cross_entropy

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
BASE = [case for case in CASES if not case.endswith("_hub")]
GRADIENTS = ("dense_unified", "e_series", "moe")
"""One of each family; the others only beside -m slow."""


class Case:
    """One fixture, loaded through the real reader."""

    def __init__(self, name: str) -> None:
        base = json.loads((GOLDEN / name / "meta.json").read_text()).get("base_case", name)
        self.config, arrays = read_parameters(GOLDEN / name)
        self.parameters = {path: jnp.asarray(array) for path, array in arrays.items()}
        self.model = Gemma4.from_parameters(self.config, self.parameters)
        self.want = dict(np.load(GOLDEN / base / "golden.npz"))


@pytest.fixture(scope="module", params=BASE)
def case(request: Any) -> Case:
    return Case(request.param)


def test_logits_and_loss(case: Case) -> None:
    tokens = jnp.asarray(case.want["full/input_ids"])
    logits = case.model(tokens)
    np.testing.assert_allclose(logits, case.want["full/logits"], atol=3e-3, rtol=0)
    loss = cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()
    np.testing.assert_allclose(loss, case.want["full/loss"], atol=1e-4, rtol=0)


def test_what_happens_inside(case: Case) -> None:
    """Four mistakes (factors that a norm removes later) show here and not in the logits."""

    tokens = jnp.asarray(case.want["full/input_ids"])

    @jax.jit
    def look(parameters: dict[str, jax.Array]) -> dict[str, Any]:
        taps: dict[str, Any] = {}
        hidden, _ = Gemma4.from_parameters(case.config, parameters).hidden(tokens, taps=taps)
        return taps | {"final": hidden}

    taps = look(case.parameters)
    pairs = {"embed/out": ("full/embed", 1e-5), "final": ("full/final_norm", 2e-3)}
    if case.config.per_layer_width:
        pairs["per_layer/out"] = ("full/ple", 1e-5)
    for layer in range(case.config.layers):
        at = f"full/layer_{layer:02d}"
        inside = {
            "attn/out": ("attn_out", 5e-4),
            "ffn/out": ("mlp_out", 1e-3),
            "out": ("out", 2e-3),
        }
        if case.config.experts is not None:
            inside |= {"experts/out": ("moe_out", 1e-3), "router/weights": ("router_w", 1e-4)}
            inside["router/experts"] = ("router_idx", 0)
        pairs |= {f"layers/{layer}/{k}": (f"{at}/{name}", tol) for k, (name, tol) in inside.items()}
    assert len(pairs) >= 3 * case.config.layers
    for ours, (theirs, tolerance) in pairs.items():
        want = case.want[theirs]
        got = np.asarray(taps[ours]).reshape(want.shape)
        np.testing.assert_allclose(got, want, atol=tolerance, rtol=0, err_msg=theirs)


def test_left_padding(case: Case) -> None:
    mask = case.want["pad/attention_mask"]
    positions = jnp.asarray(case.want["pad/position_ids"]).astype(jnp.int32)
    tokens = jnp.asarray(case.want["pad/input_ids"])
    logits = np.asarray(case.model(tokens, positions, jnp.asarray(mask).astype(jnp.int32)))
    assert np.isfinite(logits).all()
    want = case.want["pad/logits"]
    np.testing.assert_allclose(logits[mask == 1], want[mask == 1], atol=3e-3, rtol=0)


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=() if name in GRADIENTS else pytest.mark.slow) for name in BASE],
    indirect=True,
)
def test_gradients(case: Case) -> None:
    tokens = jnp.asarray(case.want["full/input_ids"])

    @jax.jit
    def gradient(parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def loss(parameters: dict[str, jax.Array]) -> jax.Array:
            model = Gemma4.from_parameters(case.config, parameters)
            logits = model.logits(model.hidden(tokens)[0])
            return cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()

        return jax.grad(loss)(parameters)

    found = gradient(case.parameters)
    theirs: dict[str, list[np.ndarray]] = {}
    moves = {}
    for path, parameter in declare(case.config).items():
        there = foreign(parameter)
        theirs.setdefault(f"model.{there.name}", []).append(np.asarray(found[path]))
        moves[f"model.{there.name}"] = (there.move, parameter)
    norms = {
        k.removeprefix("full/grad_norm/") for k in case.want if k.startswith("full/grad_norm/")
    }
    # transformers keeps the layer scalar in a buffer: no gradient is stored for it.
    assert norms == {name for name in theirs if not name.endswith("layer_scalar")}
    for name in norms:
        norm = np.sqrt(sum(float(np.sum(part**2)) for part in theirs[name]))
        want = case.want[f"full/grad_norm/{name}"]
        np.testing.assert_allclose(norm, want, rtol=1e-3, err_msg=name)
    for key in (k for k in case.want if k.startswith("full/grad/")):
        move, parameter = moves[key.removeprefix("full/grad/")]
        whole = move.write(theirs[key.removeprefix("full/grad/")], parameter)
        scale = np.abs(case.want[key]).max()
        np.testing.assert_allclose(whole, case.want[key], atol=1e-3 * scale, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", BASE)
def test_greedy_traces_through_the_cache(name: str) -> None:
    case = Case(name)
    tokens = case.want["gen/tokens"]
    got = generate(case.model, case.want["gen/prompt"], max_new_tokens=tokens.shape[1])
    np.testing.assert_array_equal(got, tokens)


@pytest.mark.parametrize("name", BASE)
def test_config_dialects_agree(name: str) -> None:
    assert read_config(GOLDEN / name / "config_as_saved.json") == read_config(
        GOLDEN / name / "config.json"
    )


@pytest.mark.parametrize(("hub", "base"), [("e_series_hub", "e_series"), ("moe_hub", "moe")])
def test_released_layout_reads_the_same(hub: str, base: str) -> None:
    """Bit for bit the base case, whose values are compared above."""
    a, b = Case(hub), Case(base)
    assert dataclasses.replace(a.config, name=base) == b.config
    assert a.parameters.keys() == b.parameters.keys()
    for path in a.parameters:
        np.testing.assert_array_equal(a.parameters[path], b.parameters[path])
