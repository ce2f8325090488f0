"""llama.cpp itself on our GGUF files: tiny twins of every design, trained, their logits against ours.

    pip install llama-cpp-python==0.3.36        (compiles llama.cpp: see docs/formats.md)
    bash launch/test.sh -n 0 -s -m judges tests/judges/test_llama_cpp.py

Figures are printed (`first`: the median over the first two tokens of each row). Between float32 programs little is left
(mean KL < 1e-5): llama.cpp takes GELU from a table of float16, and sums in another order. With experts single positions
jump where a top-k choice flips, so there the median counts (< 1e-4). A Q4_0 file is judged by the logits of the float32
file of the same weights; what the file itself differs by is llama.cpp's rounding of activations, and simulating that
must take a part of the difference away.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge_twins import UNSEEN, Twin, as_floats, dequantized, trained

from gemma_qat.export import Artifact, export_gguf, read_gguf
from gemma_qat.models import (
    Gemma4,
    fit,
    float_parameters,
    packed_model,
    quantize_parameters,
)
from gemma_qat.numerics import QArray
from gemma_qat.quant import Activation, Plan

pytestmark = [
    pytest.mark.judges,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None,
        reason="needs llama.cpp: pip install llama-cpp-python==0.3.36 (it compiles for some ten minutes)",
    ),
]

PROGRAM = Path(__file__).with_name("llama_runs.py")
ROWS, LENGTH, FEW = 8, 96, 2
LIMITS = {"e2b": ("mean", 1e-5), "12b": ("mean", 1e-5), "26b_a4b": ("median", 1e-4)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module", params=LIMITS)
def twin(request, data, tmp_path_factory) -> Twin:
    return trained(request.param, tmp_path_factory.mktemp(request.param), data)


def _unseen(twin: Twin) -> np.ndarray:
    """Rows of the licence."""
    ids, bos = twin.tokenizer.encode(UNSEEN.read_text()), twin.tokenizer.bos_id
    rows = [[bos, *ids[i * LENGTH : (i + 1) * LENGTH - 1]] for i in range(ROWS)]
    return np.asarray(rows, np.int32)


def _theirs(twin: Twin, artifact: Artifact, name: str) -> np.ndarray:
    file, given, out = (twin.directory / f"{name}.{end}" for end in ("gguf", "tokens.npy", "npy"))
    export_gguf(artifact, file)
    np.save(given, _unseen(twin))
    _run("logits", file, given, out)
    return np.load(out)


def _run(what: str, *paths: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), what, *map(str, paths)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compared(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """KL(ours || theirs) in nats, over positions, and how often the same token is on top."""
    a, b = (_log_softmax(np.asarray(x, np.float64)) for x in (ours, theirs))
    kl = np.sum(np.exp(a) * (a - b), axis=-1)
    same = float(np.mean(ours.argmax(-1) == theirs.argmax(-1)))
    first = float(np.median(kl[:, :FEW]))
    return {
        "mean": float(kl.mean()),
        "median": float(np.median(kl)),
        "first": first,
        "same top": same,
    }


def _say(twin: Twin, what: str, found: dict[str, float]) -> None:
    shown = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    print(f"{twin.artifact.config.name}, {what}: KL {shown}")


def _limit(twin: Twin) -> tuple[str, float]:
    return LIMITS[twin.artifact.config.name.removeprefix("tiny_")]


def test_float32_files(twin: Twin) -> None:
    """Masters, and the weights that Q4_0 codes stand for: if it fails, llama.cpp builds another network of them."""
    statistic, limit = _limit(twin)
    for what, floats in (("float32 masters", twin.masters), ("dequantized", dequantized(twin))):
        ours = np.asarray(
            Gemma4.from_parameters(twin.artifact.config, floats)(jnp.asarray(_unseen(twin)))
        )
        found = compared(ours, _theirs(twin, as_floats(twin, floats), what.split()[-1]))
        _say(twin, what, found)
        assert ours.std() > 0.5  # it learned something: logits are not flat
        assert found[statistic] < limit


@pytest.fixture
def gelu_by_table(monkeypatch) -> Iterator[None]:
    """GELU as llama.cpp computes it: float16 in, float16 out.

    Without it our activations are off by 2^-11 before they are rounded, one code in some thirty is another one, and
    after a few layers two roundings of the same kind are as different as two of different kinds.
    """
    gelu = jax.nn.gelu

    def table(x: jax.Array, approximate: bool = True) -> jax.Array:
        y = gelu(x.astype(jnp.float16).astype(jnp.float32), approximate=approximate)
        inside = y.astype(jnp.float16).astype(jnp.float32)
        return jnp.where(x <= -10, 0.0, jnp.where(x >= 10, x, inside))

    monkeypatch.setattr(jax.nn, "gelu", table)
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_q4_0_file(twin: Twin, gelu_by_table) -> None:
    """If it fails, llama.cpp does something else with our codes than round activations to Q8_0 and multiply.

    One code that falls to the other side, of thousands in a chain of layers, moves all that follow: so the difference
    does not vanish, and is least at the first token of a text, where attention brings nobody else's.
    """
    theirs = _theirs(twin, twin.artifact, "q4_0")
    found = {}
    for recipe in ("q4_0", "q4_0+q8_0_acts"):
        fitted = fit(twin.artifact.config, recipe)
        model = packed_model(twin.artifact.quantized, twin.artifact.floats, fitted)
        found[recipe] = compared(np.asarray(model(jnp.asarray(_unseen(twin)))), theirs)
        _say(twin, f"Q4_0 against ours as {recipe}", found[recipe])
    plain, rounded = found["q4_0"], found["q4_0+q8_0_acts"]
    assert rounded["mean"] < plain["mean"] and rounded["median"] < plain["median"]
    assert rounded["first"] < plain["first"] / 2


def test_mobile_file(twin: Twin, gelu_by_table) -> None:
    """Q2_0, Q4_0 and Q8_0 blocks of channels. If it fails, 2-bit codes mean something else to llama.cpp.

    Masters rounded to the mobile grids; no static scales, which the file cannot hold; activations rounded as it rounds.
    """
    if twin.artifact.config.family != "e2b":
        pytest.skip("the mobile schema was released for the E sizes")
    fitted = fit(twin.artifact.config, "mobile")
    parameters = fitted.adopt({path: jnp.asarray(x) for path, x in twin.masters.items()})
    floats = {p: np.asarray(x) for p, x in float_parameters(parameters, fitted).items()}
    artifact = Artifact(
        config=fitted.config, recipe="mobile", plans=fitted.plans, imported=True, floats=floats,
        quantized=quantize_parameters(parameters, fitted), tokenizer=twin.artifact.tokenizer,
    )  # fmt: skip
    theirs = _theirs(twin, artifact, "mobile")
    read = read_gguf(twin.directory / "mobile.gguf")
    codes = {path: q for path, q in read.items() if isinstance(q, QArray)}
    kept = {path: x for path, x in read.items() if path not in codes}
    tables = ("embed/table", "per_layer/embed/table")
    tile = Activation(per="tile")
    plans = {p: Plan(weight=q.grid, input=None if p in tables else tile) for p, q in codes.items()}
    assert {str(q.grid.format) for q in codes.values()} == {"int2", "q4_0", "q8_0"}
    model = packed_model(codes, kept, dataclasses.replace(fitted, plans=plans))
    found = compared(np.asarray(model(jnp.asarray(_unseen(twin)))), theirs)
    _say(twin, "mobile weights against ours, activations as llama.cpp's", found)
    assert found["first"] < 1e-9


def test_the_vocabulary_cuts_alike(twin: Twin) -> None:
    """If it fails, llama.cpp gives the model other tokens than it was trained on."""
    texts = [line for line in Path(__file__).read_text().splitlines() if line.strip()][:60]
    texts += ["caf\u00e9 \u4f60\u597d", "  two spaces", "tab\tand 1234567890"]
    file, given, out = (twin.directory / f"v.{end}" for end in ("gguf", "texts.json", "ids.json"))
    export_gguf(twin.artifact, file)
    given.write_text(json.dumps(texts))
    _run("tokenize", file, given, out)
    assert json.loads(out.read_text()) == [twin.tokenizer.encode(text) for text in texts]
