"""Sensitivity: each row is what its definition says, from one compiled program, and a proposal is a recipe that trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import gemma_qat
from gemma_qat.api import SensitivityConfig, sensitivity
from gemma_qat.data.held_out import HeldOut
from gemma_qat.data.packing import pack
from gemma_qat.data.tokenizer import Piece, Tokenizer
from gemma_qat.errors import InputError
from gemma_qat.evals import variants as variants_module
from gemma_qat.evals.plot_sensitivity import sensitivity_bars
from gemma_qat.evals.score import _scores, score
from gemma_qat.evals.variants import Variants
from gemma_qat.evaluation import EvaluationConfig
from gemma_qat.models import SIZES, Gemma4, fit, initialize, quantize_parameters
from gemma_qat.quant import weights_only

CONFIG = dataclasses.replace(
    SIZES["tiny_12b"], name="small", vocab_size=283, width=32, head_width=16, global_head_width=32,
    ffn_width=32, window=8, layer_kinds=("sliding", "full") * 2,
)  # fmt: skip
MEASURE = EvaluationConfig(draws=200, batch_size=4)
TOKENIZER = mock.Mock(spec=Tokenizer)
TOKENIZER.pieces.return_value = [Piece("x", 0.0, "normal")] * 283


@pytest.fixture(scope="module")
def text() -> HeldOut:
    generator = np.random.default_rng(0)
    documents = [generator.integers(3, 283, size=size).tolist() for size in (29, 7, 22)]
    rows = pack(documents, 12, mix=False)
    return HeldOut(rows=rows, format="text", categories=("a",), category=np.zeros(3, np.int32))


@pytest.fixture(scope="module")
def model() -> Gemma4:
    parameters = initialize(CONFIG, 0)
    table = parameters["embed/table"]
    return Gemma4.from_parameters(CONFIG, parameters | {"embed/table": table * 8.0})


def kl_of(model: Gemma4, reference: Gemma4, text: HeldOut) -> float:
    _, found = score({"m": model}, reference, text.rows, np.ones(283, np.int64), batch_size=4)
    return float(found["m"].kl.mean())


def test_values_on_a_grid_are_those_of_training(model: Gemma4) -> None:
    """If it fails, what is measured is not the grid that is trained and exported."""
    fitted = fit(CONFIG, "q4_0")
    wanted = quantize_parameters(model.parameters(), fitted)
    some = [path for path in fitted.plans if "layers/3/" in path or path == "embed/table"]
    on = Variants.of(model, CONFIG, "rtn").on({p: fitted.plans[p].weight for p in some})
    for path, leaf in on.parameters().items():
        expected = wanted[path].dequantize() if path in some else model.parameters()[path]
        np.testing.assert_array_equal(leaf, expected, err_msg=path)


@pytest.fixture(scope="module")
def ranked(model: Gemma4, text: HeldOut) -> dict[str, Any]:
    how = SensitivityConfig(recipe="w4a8", method="rtn", all_but_one=True)
    return sensitivity(model, text, TOKENIZER, how, MEASURE)


def test_a_row_is_the_kl_of_its_class_alone(
    ranked: dict[str, Any], model: Gemma4, text: HeldOut
) -> None:
    """If it fails, classes are ranked by something else: measured here by models that quantize as they run."""
    fitted = fit(CONFIG, "w4a8")
    plans = weights_only(fitted.plans)

    def among(names: set[str]) -> float:
        some = {path: plan for path, plan in plans.items() if path.split("/")[-2] in names}
        made = Gemma4.from_parameters(CONFIG, model.parameters(), some)
        return kl_of(made, model, text)

    names = {path.split("/")[-2] for path in plans}
    rows = {row["class"]: row for row in ranked["rows"]}
    # Two programs of one function: a token's KL, some 4e-5 here, is a float32 sum that rounds by 1e-7. The next largest
    # class is 15 % away.
    near = {"rel": 1e-2, "abs": 0}
    assert rows["attn_o"]["kl_mean"]["value"] == pytest.approx(among({"o"}), **near)
    others = ranked["whole"]["kl_mean"]["value"] - rows["attn_o"]["restored"]["value"]
    assert others == pytest.approx(among(names - {"o"}), **near)
    assert ranked["rounds_activations"] and len(rows) == 8
    values = [row["kl_mean"]["value"] for row in ranked["rows"]]
    assert values == sorted(values, reverse=True) and values[-1] > 0
    assert sum(row["share"] for row in ranked["rows"]) == pytest.approx(1)
    saved = sum(row["saved"] for row in ranked["rows"])
    assert ranked["whole"]["bytes"] == ranked["reference"]["float_bytes"] - saved
    assert sensitivity_bars(ranked["rows"], "png").startswith(b"\x89PNG")


def test_one_program_and_one_quantization_of_each_site(
    model: Gemma4, text: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, a study of a large model compiles for hours, or the mix is not the one on file."""
    quantized: list[tuple[str, str]] = []
    plain = variants_module.round_to_nearest

    def noted(parameters: Any, fitted: Any, method: str) -> Any:
        quantized.extend((path, plan.weight.format) for path, plan in fitted.plans.items())
        return plain(parameters, fitted, method)

    monkeypatch.setattr(variants_module, "round_to_nearest", noted)
    _scores.clear_cache()
    file = str(tmp_path / "mix.json")
    how = SensitivityConfig(
        method="rtn", candidates=("q4_0", "q8_0", "q6_k", "int2_no_zero"), budget="0.4x", propose=file,
    )  # fmt: skip
    found = sensitivity(model, text, TOKENIZER, how, MEASURE)
    assert _scores._cache_size() == 1
    assert len(quantized) == len(set(quantized))
    assert {row["format"] for row in found["rows"]} == {"q4_0", "q8_0", "int2_no_zero"}, "no 256"
    proposal = found["proposal"]
    coverage = gemma_qat.coverage(CONFIG, file)
    size = sum(row["bytes"] for row in coverage)
    assert size == proposal["bytes"] <= proposal["budget"] == 0.4 * proposal["float_bytes"]
    assert len({one["format"] for one in proposal["chosen"]}) > 1
    plans = fit(CONFIG, file).plans
    mixed = Gemma4.from_parameters(CONFIG, model.parameters(), plans)
    measured = kl_of(mixed, model, text)
    assert proposal["kl_mean"]["value"] == pytest.approx(measured, rel=1e-2, abs=0)
    assert proposal["predicted"] == pytest.approx(sum(one["kl"] for one in proposal["chosen"]))


def test_a_head_of_its_own_is_a_class(model: Gemma4, text: HeldOut) -> None:
    """If it fails, recipes that store the head apart cannot be studied, or quantize the embedding twice."""
    how = SensitivityConfig(recipe="mobile_like", method="rtn")
    found = sensitivity(model, text, TOKENIZER, how, MEASURE)
    rows = {row["class"]: row for row in found["rows"]}
    assert {"embed", "head"} <= set(rows)
    assert rows["embed"]["kl_mean"]["value"] != rows["head"]["kl_mean"]["value"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "gptq"}, "unknown PTQ method"),
        ({"propose": "x.json"}, "a budget is needed"),
        ({"propose": "x.txt", "budget": "1x"}, "ends in .json"),
        ({"propose": "no/such/x.json", "budget": "1x"}, "no such directory"),
        ({"all_but_one": True, "budget": "1x"}, "leave candidates and budget out"),
        ({"budget": "0.2x"}, "the smallest candidates of all classes are"),
        ({"candidates": ("q6_k",)}, "candidates q6_k: none fits a class of small"),
        ({"by": "layers"}, "nearest: layer"),
    ],
)
def test_what_cannot_be_studied_is_refused(
    changes: dict[str, Any], said: str, model: Gemma4, text: HeldOut
) -> None:
    """If it fails, an hour passes before a typing mistake is found."""
    with pytest.raises(InputError, match=said):
        sensitivity(model, text, TOKENIZER, SensitivityConfig(**changes), MEASURE)


def test_a_quantized_model_is_refused(model: Gemma4, text: HeldOut) -> None:
    """If it fails, what is left of one quantization is taken for floats."""
    quantized = gemma_qat.quantize(model, "q4_0")
    with pytest.raises(InputError, match="quantized already"):
        sensitivity(quantized, text, TOKENIZER)
