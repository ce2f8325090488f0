"""The model card of an exported directory: what it is, how it is quantized, what it was made of, what it kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_qat.errors import unknown
from gemma_qat.export.artifact import Artifact
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare, parameter_count
from gemma_qat.numerics import Grid
from gemma_qat.quant import by_role, coverage

_FORMATS = {
    "huggingface": "float safetensors for transformers; quantized sites hold the values of their codes",
    "compressed-tensors": "compressed-tensors",
    "native": "packed codes and scales for gemma_qat (Orbax)",
    "mobile": "the mobile schema (`quant_method: gemma`) of transformers",
}


def model_card(
    artifact: Artifact,
    *,
    format: str,
    facts: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    towers: int = 0,
) -> str:
    """Returns README.md of an export.

    `towers` counts the tensors of other models beside the decoder; `facts` are those of gemma_qat.json, which count
    those that were left out; figures are taken from `report` (a report.json) for the artifact's recipe.
    Raises: InputError when the report has nothing on that recipe.
    """
    beside, left = "text only", facts["left_out"]
    if left:
        kinds = f"{sum(left.values())} tensors ({', '.join(left)})"
        beside = f"text only: {kinds} of the checkpoint it began from are left out"
    if towers:
        beside = (
            f"and {towers} tensors of vision and audio as they were in the checkpoint it began from"
        )
    parts = [
        _front(artifact),
        f"# {artifact.config.name}, {artifact.recipe}",
        f"{_size(artifact.config)}, {artifact.config.layers} layers, {beside}. "
        f"Format: {_FORMATS[format]}. Written by gemma_qat from {_origin(artifact)}; "
        "nothing was quantized again, and the files were read back and compared before they appeared.",
        *notes,
        *_notes(artifact, format),
        "## What is quantized",
        _coverage(artifact, 32 if facts["dtype"] == "float32" else 16),
        *_quality(artifact, report),
        "## Provenance",
        _provenance(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _size(config: ModelConfig) -> str:
    """Parameters of the model; a head that was untied from the embedding is stored beside them."""
    count = parameter_count(dataclasses.replace(config, ties_head=True))
    own = parameter_count(config) - count
    return f"{count:,} parameters" + (f" and {own:,} of a head of its own" if own else "")


def _origin(artifact: Artifact) -> str:
    if not artifact.plans:
        return "the weights that were stored in the checkpoint"
    known = artifact.provenance
    after = known.get("kind") == "packed" and not known.get("step") and "run" not in known
    return f"the codes and scales that were stored in {'the checkpoint' if after else 'training'}"


def _front(artifact: Artifact) -> str:
    tags = ["gemma4", "quantization-aware-training", artifact.recipe]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join([*lines, *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _notes(artifact: Artifact, format: str) -> Iterator[str]:
    """What a reader of the weights must know before they quantize them again or run them."""
    plans = artifact.plans.values()
    if format == "huggingface" and artifact.plans:
        if any(plan.has_scale_leaf for plan in plans):
            yield (
                "The scales were learned: only the stored codes and scales (the packed checkpoint, GGUF, "
                "compressed-tensors) are authoritative. A quantizer that derives scales from these values gets others."
            )
        elif all(rederives(plan.weight) for plan in plans):
            yield (
                "In float32 the values round to the same codes again under the recipe's own rule. In bfloat16 they "
                "do not: values move, and with them scales."
            )
        else:
            yield (
                "Scales derived from these values are not the trained ones in every tile (a positive extremum, for one,"
                " saturates a step below itself), and a quantizer gets other codes there: use the stored codes."
            )
    rounded = sum(1 for plan in plans if plan.activations)
    if rounded and format == "huggingface":
        yield (
            f"{rounded} sites were trained with rounded activations, keys or values. These files leave that out: "
            "the model that was trained is not the one that runs here."
        )
    elif rounded:
        yield (
            f"{rounded} sites round their activations, keys or values to int8: that is part of the trained model. "
            "A runtime that leaves it out runs another one."
        )


def rederives(grid: Grid) -> bool:
    """Whether a tile's values, exact in float32, give its scale and codes again by the format's own rule.

    They do where the element that set the scale lies on the grid whatever its sign: the signed extremum, or an absmax
    divisor no larger than the highest code.
    """
    fmt = grid.number
    if fmt.scale_rule == "signed_extremum":
        return not grid.two_level
    return fmt.scale_rule == "absmax" and grid.divisor <= fmt.highest


def _coverage(artifact: Artifact, float_bits: int) -> str:
    declared = declare(artifact.config).values()
    rows = by_role(coverage(declared, artifact.plans, float_bits=float_bits))
    lines = ["| site | arrays | format | bits per weight | share of bytes | activations |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['site']} | {row['count']} | {row['format']} | {row['bits']:.3f} | {row['share']:.2%} | "
            f"{row['activations']} |"
        )
    return "\n".join(lines)


def _quality(artifact: Artifact, report: Mapping[str, Any] | None) -> Iterator[str]:
    if report is None:
        return
    if artifact.recipe not in report["recipes"]:
        raise unknown("recipe in the report", artifact.recipe, report["recipes"])
    methods = report["recipes"][artifact.recipe]["methods"]
    lines = ["| model | loss | KL to float | top-1 agreement |", "|---|---|---|---|"]
    named = {"float": report["float"]} if "float" in report else {}
    for name, summary in {**named, **methods}.items():
        figures = [summary.get(k) for k in ("nll", "kl_mean", "top1_agreement")]
        lines.append(f"| {name} | {' | '.join(map(_estimate, figures))} |")
    yield "## Quality"
    yield f"{report.get('title', 'Measured')}; 95 % intervals over documents.\n\n" + "\n".join(
        lines
    )


def _estimate(figure: Any) -> str:
    if figure is None:
        return "-"
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]"


def _provenance(facts: Mapping[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts["source"].items() if name != "run"]
    lines += [f"| {name} | {value} |" for name, value in facts["versions"].items()]
    lines += [f"| sha256 of {name} | `{value}` |" for name, value in facts["sha256"].items()]
    text = "\n".join(lines)
    run = facts["source"].get("run")
    if run is not None:
        text += "\n\nConfig of the run:\n\n```json\n" + json.dumps(run, indent=1, sort_keys=True)
        text += "\n```"
    return text
