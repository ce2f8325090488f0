"""The whole idea in one run: text -> float twin -> PTQ and QAT -> measured -> exported -> decoded -> report.

Each stage takes what the one before it left and leaves what the next one needs; all of it is the code that larger runs
use. The held-out test files are read once, at the end; nothing was chosen on them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.beside import Beside
from gemma_qat.checkpoint.native import load_model, load_quantized, save_model
from gemma_qat.config.quickstart import QuickstartConfig, RecipeConfig
from gemma_qat.data.held_out import first_rows
from gemma_qat.data.loader import make_loader
from gemma_qat.data.prepare import STDLIB_TOKENIZER, Prepared, prepare_stdlib
from gemma_qat.data.token_bytes import token_bytes
from gemma_qat.decode import generate
from gemma_qat.errors import InputError
from gemma_qat.evals import (
    BigramModel,
    Resamples,
    TokenRecords,
    kl_counts,
    paired_difference,
    recovered,
    summarize,
)
from gemma_qat.evals.environment import environment
from gemma_qat.evals.score import score
from gemma_qat.export import artifact_of, compare, export_gguf, export_native, read_gguf
from gemma_qat.models import (
    Fitted,
    Gemma4,
    ModelConfig,
    RunOptions,
    declare,
    fit,
    initialize,
    packed_model,
    parameter_count,
    size_named,
)
from gemma_qat.models.capture import captured_codes, differing
from gemma_qat.numerics import QArray
from gemma_qat.ptq import quantize_model
from gemma_qat.quant import by_role, coverage, total_bytes
from gemma_qat.train import TrainConfig, Trained, train, with_scales

Progress = Callable[[str, int, int], None]
RECIPES = ("q4_0", "mobile")
PTQ = ("rtn", "mse")
Parameters = Mapping[str, Any]


@dataclasses.dataclass
class Run:
    """What the stages share."""

    config: QuickstartConfig
    directory: Path
    progress: Progress
    model: ModelConfig
    data: Prepared
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    curves: dict[str, dict[str, list[tuple[int, float]]]] = dataclasses.field(default_factory=dict)

    def timed(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what `work` returns for the arguments, noting how long it took."""
        start = time.perf_counter()
        result = work(*arguments)
        self.seconds[name] = round(time.perf_counter() - start, 2)
        return result


@dataclasses.dataclass
class Candidate:
    """One recipe: its plans, the PTQ codes, the trained masters and controls."""

    fitted: Fitted
    ptq: dict[str, tuple[dict[str, QArray], dict[str, Any]]]
    """Codes and what stays in float, static scales calibrated, by method."""
    trained: dict[str, Parameters]
    """`qat`, and with cross-entropy on `qat_ce`: masters by checkpoint path."""


def quickstart(config: QuickstartConfig, progress: Progress) -> dict[str, Any]:
    """Runs every stage and returns the report's data; files are under `config.directory`.

    Raises: InputError when the tokenizer's vocabulary is not the model's.
    """
    directory = Path(config.directory)
    begin = time.perf_counter()
    model = size_named(config.model)
    data = prepare_stdlib(
        directory / "data", vocab_size=config.vocab_size, length=config.length, progress=progress
    )
    if data.tokenizer.vocab_size != model.vocab_size:
        raise InputError(
            f"vocabulary of {data.tokenizer.vocab_size}, but {model.name} has {model.vocab_size}"
        )
    run = Run(config, directory, progress, model, data)
    run.seconds["data"] = round(time.perf_counter() - begin, 2)
    reference = run.timed("train float", _float, run)
    candidates = {name: _candidate(run, name, reference) for name in RECIPES}
    control = _control(run, reference) if config.cross_entropy else None
    records, floats = run.timed("evaluate", _evaluate, run, reference, candidates, control)
    report = {
        "title": f"gemma_qat quickstart: {model.name} trained on the grid it is deployed on",
        "model": {
            "size": model.name,
            "parameters": parameter_count(model),
            "vocabulary": model.vocab_size,
        },
        "environment": environment(),
        "float": floats,
        "recipes": {},
        "curves": {name: curves["loss"] for name, curves in run.curves.items()},
        "curves_ylabel": "training loss, nats/token (cross-entropy for float, KL to float for QAT)",
        "kl_histograms": {},
    }
    for name, candidate in candidates.items():
        report["recipes"][name] = _figures(run, name, candidate, records)
        report["recipes"][name]["export"] = run.timed(
            f"export {name}", _export, run, name, candidate
        )
        for method in (*PTQ, "qat"):
            report["kl_histograms"][f"{name} {method}"] = kl_counts(records[name][method].kl)
    report["decode"] = run.timed("decode", _decode, run, candidates)
    report["timing"] = run.seconds | {"total": round(time.perf_counter() - begin, 2)}
    return report


def _loader(run: Run, train_config: TrainConfig) -> Any:
    return make_loader(
        run.data.rows["train"],
        batch_size=train_config.batch_size,
        seed=run.config.seed + train_config.seed,
    )


def _float(run: Run) -> Parameters:
    config = run.config.float_reference
    trained = train(
        run.model, initialize(run.model, run.config.seed), _loader(run, config.train),
        config.train, config.optimizer, mesh_config=run.config.mesh,
        progress=run.progress, label="train float",
    )  # fmt: skip
    run.curves["float"] = trained.curves
    _save(run, "float", trained.parameters, run.model, config.train.steps)
    return trained.parameters


def _save(
    run: Run, name: str, parameters: Parameters, model: ModelConfig | Fitted, step: int
) -> None:
    """Saves a checkpoint with the tokenizer that it was trained with beside it."""
    save_model(run.directory / name, parameters, model, step=step)
    tokenizer = run.directory / "data" / STDLIB_TOKENIZER
    Beside(files=(tokenizer,)).keep(run.directory / name)


def _candidate(run: Run, name: str, reference: Parameters) -> Candidate:
    plain = fit(run.model, name)
    config: RecipeConfig = getattr(run.config, name)
    ptq = {
        method: run.timed(
            f"ptq {name} {method}", quantize_model, reference, plain, method,
            _loader(run, config.train), run.config.calibration, RunOptions(), run.progress,
        )
        for method in PTQ
    }  # fmt: skip
    fitted = fit(run.model, name, scales="learned", learn_activations=run.config.learn_activations)
    losses = {"qat": config.train}
    if run.config.cross_entropy:
        losses["qat_ce"] = dataclasses.replace(config.train, loss="ce")
    trained = {}
    for label, how in losses.items():
        title = f"{label} {name}"
        done = run.timed(title, _qat, run, fitted, reference, config, how, title)
        run.curves[f"{name} {label}"] = done.curves
        trained[label] = done.parameters
    _save(run, name, trained["qat"], fitted, config.train.steps)
    return Candidate(fitted, ptq, trained)


def _qat(
    run: Run,
    fitted: Fitted,
    reference: Parameters,
    config: RecipeConfig,
    how: TrainConfig,
    label: str,
) -> Trained:
    masters = with_scales(
        reference, fitted, run.config.scale_init, _loader(run, how), run.config.calibration
    )
    return train(
        fitted, masters, _loader(run, how), how, config.optimizer, mesh_config=run.config.mesh,
        teacher=(run.model, reference), progress=run.progress, label=label,
    )  # fmt: skip


def _control(run: Run, reference: Parameters) -> dict[str, Parameters]:
    """Returns, per recipe, the float model trained on for the same steps at the same rates with cross-entropy."""
    out: dict[str, Parameters] = {}
    for name in RECIPES:
        config: RecipeConfig = getattr(run.config, name)
        how = dataclasses.replace(config.train, loss="ce")
        done = train(
            run.model, reference, _loader(run, how), how, config.optimizer, mesh_config=run.config.mesh,
            progress=run.progress, label=f"float control {name}",
        )  # fmt: skip
        run.curves[f"{name} float_control"] = done.curves
        out[name] = done.parameters
    return out


def _evaluate(
    run: Run,
    reference: Parameters,
    candidates: dict[str, Candidate],
    control: dict[str, Parameters] | None,
) -> tuple[dict[str, dict[str, TokenRecords]], dict[str, Any]]:
    float_model = Gemma4.from_parameters(run.model, reference)
    students: dict[str, Gemma4] = {}
    for name, candidate in candidates.items():
        for method, (codes, floats) in candidate.ptq.items():
            students[f"{name}/{method}"] = packed_model(codes, floats, candidate.fitted)
        # What is measured is what was saved: the codes beside the masters, packed.
        students[f"{name}/qat"] = load_model(run.directory / name, packed=True)
        if control:
            ce = Gemma4.from_parameters(
                candidate.fitted.config, candidate.trained["qat_ce"], candidate.fitted.plans
            )
            students[f"{name}/qat_ce"] = ce
            students[f"{name}/float_control"] = Gemma4.from_parameters(run.model, control[name])
    rows = first_rows(run.data.rows["test"], run.config.rows_per_document)
    own, scored = score(
        students, float_model, rows, token_bytes(run.data.tokenizer), progress=run.progress
    )
    draws = Resamples(own.documents, seed=run.config.seed, draws=run.config.draws)
    train_rows = run.data.rows["train"]
    bigram = BigramModel.count(train_rows.tokens, train_rows.segments, run.model.vocab_size)
    floats = summarize(own, draws)
    floats["bigram"] = {"nll": float(np.mean(bigram.nll(rows.tokens, rows.segments)))}
    by_recipe: dict[str, dict[str, TokenRecords]] = {name: {} for name in candidates}
    for label, records in scored.items():
        name, method = label.split("/")
        by_recipe[name][method] = records
    return by_recipe, floats


def _figures(
    run: Run, name: str, candidate: Candidate, records: dict[str, dict[str, TokenRecords]]
) -> dict[str, Any]:
    own = records[name]
    draws = Resamples(own["qat"].documents, seed=run.config.seed, draws=run.config.draws)
    rows = coverage(declare(candidate.fitted.config).values(), candidate.fitted.plans)
    figures = {
        "coverage": by_role(rows),
        "bytes": int(total_bytes(rows)),
        "float_bytes": 2 * parameter_count(run.model),
        "methods": {m: summarize(own[m], draws) for m in (*PTQ, "qat")},
        "differences": {f"qat-{m}": paired_difference(own["qat"], own[m], draws) for m in PTQ},
        "recovered": {m: recovered(own["qat"], own[m], draws) for m in PTQ},
    }
    if "qat_ce" in own:
        figures["cross_entropy"] = {
            "methods": {m: summarize(own[m], draws) for m in ("qat_ce", "float_control")},
            "differences": {
                "qat_ce-float_control": paired_difference(
                    own["qat_ce"], own["float_control"], draws
                )
            },
            "recovered": {m: recovered(own["qat_ce"], own[m], draws) for m in PTQ},
        }
    return figures


def _export(run: Run, name: str, candidate: Candidate) -> dict[str, Any]:
    """Exports from the codes that were saved, and compares them with those of the training forward."""
    witness = captured_codes(
        candidate.trained["qat"], candidate.fitted, row_length=run.config.length
    )
    artifact = artifact_of(run.directory / name, run.data.tokenizer)
    packed = run.directory / f"{name}-packed"
    export_native(artifact, packed)
    _, again = load_quantized(packed)
    result: dict[str, Any] = {
        "packed checkpoint": {"differing from the training forward": differing(again, witness)}
    }
    if name == "q4_0":
        out = run.directory / "model-q4_0.gguf"
        size = export_gguf(artifact, out)
        seen = dataclasses.replace(artifact, quantized=witness)
        result["gguf"] = size | {
            "differing from the training forward": compare(seen, read_gguf(out))
        }
    return result


def _decode(run: Run, candidates: dict[str, Candidate]) -> dict[str, Any]:
    """Decodes greedily from packed weights and from the fake-quantized masters, both recipes."""
    rows = run.data.rows["test"]
    prompt = rows.tokens[0][rows.segments[0] > 0][: run.config.length // 4]
    out: dict[str, Any] = {
        "prompt": run.data.tokenizer.decode(prompt.tolist()),
        "tokens_equal": True,
    }
    for name, candidate in candidates.items():
        packed = load_model(run.directory / f"{name}-packed")
        fake = Gemma4.from_parameters(
            candidate.fitted.config, candidate.trained["qat"], candidate.fitted.plans
        )
        both = [
            generate(model, [prompt], max_new_tokens=run.config.new_tokens)[0]
            for model in (packed, fake)
        ]
        texts = [run.data.tokenizer.decode(tokens.tolist()) for tokens in both]
        equal = bool((both[0] == both[1]).all())
        out[name] = {"packed_text": texts[0], "fake_quant_text": texts[1], "tokens_equal": equal}
        out["tokens_equal"] &= equal
        if name == RECIPES[0]:
            out |= {"packed_text": texts[0], "fake_quant_text": texts[1]}
    return out
