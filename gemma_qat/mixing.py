"""Which sites lose most when they are quantized, and the mix of formats that loses least under a number of bytes.

    kind            "sensitivity"
    text            as `evaluation.py` has it
    reference       {name, path, size, float_bytes}
    recipe, method, by, parts
    rounds_activations  whether the recipe does: that part is not measured here, weights alone are
    rows            [{class, format, bits, sites, weights, bytes, float_bytes, saved, share, kl_per_mb, statistics}],
                    largest KL first (`evals/sensitivity.py`); with `all_but_one` also `restored`
    whole           where rows are the recipe's: {recipe, bytes, statistics, sum_of_rows}, all its sites at once
    proposal        where there is a budget: {budget, bytes, float_bytes, predicted, statistics, chosen
                    [{class, format, bytes, kl}], recipe (what a recipe file holds)}
    environment     versions, device

A proposal takes divergences of classes, each measured alone, to add up: `predicted` is their sum over what was chosen
(`evals/budget.py`), and `kl_mean` beside it is what the whole mix was then measured to have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_qat.data.held_out import HeldOut
from gemma_qat.errors import InputError, unknown
from gemma_qat.evals.budget import best_mix, bytes_of
from gemma_qat.evals.environment import environment
from gemma_qat.evals.records import TokenRecords
from gemma_qat.evals.reference import reference_of
from gemma_qat.evals.score import Progress
from gemma_qat.evals.sensitivity import Bench, Choice, add_restored, rank
from gemma_qat.evals.variants import Variants
from gemma_qat.evaluation import EvaluationConfig, Model, described, opened, text_of
from gemma_qat.loading import PathLike, config_of, named
from gemma_qat.models import Fitted, Gemma4, ModelConfig, declare, fit
from gemma_qat.ptq import DATA_FREE
from gemma_qat.quant import Recipe, coverage, recipe_named, to_json, total_bytes, write_recipe
from gemma_qat.quant.classes import (
    FLOAT,
    SiteClass,
    grid_named,
    mixed_recipe,
    site_classes,
)

CANDIDATES = ("q8_0", "q6_k", "q4_0")
"""What a class may become under a budget unless told otherwise: what a GGUF file can hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityConfig:
    """What is quantized, and how.

    `recipe`: whose grids are measured, by name or JSON file. `method`: how codes are found (`ptq`). `by`, `parts`: what
    is one class (`quant/classes.py`). `all_but_one` measures the other way round too. `candidates`: formats to measure
    each class in, in place of the recipe's. `budget`: bytes a mix of them, and of float, may have (`2.5GB`, `0.3x`).
    `propose`: where that mix is written as a recipe, a path that ends in `.json`.
    """

    recipe: str = "q4_0"
    method: str = "mse"
    by: str = "role"
    parts: int = 1
    all_but_one: bool = False
    candidates: tuple[str, ...] = ()
    budget: str = ""
    propose: str = ""

    def __post_init__(self) -> None:
        if self.method not in DATA_FREE:
            raise unknown("PTQ method", self.method, DATA_FREE)
        if self.propose and not self.budget:
            raise InputError(
                f"propose={self.propose}: a budget is needed to propose a recipe under"
            )
        if self.propose and Path(self.propose).suffix != ".json":
            raise InputError(f"propose={self.propose}: the name of a recipe file ends in .json")
        if self.propose and not Path(self.propose).absolute().parent.is_dir():
            raise InputError(f"{self.propose}: no such directory to write it in")
        if self.all_but_one and (self.candidates or self.budget):
            raise InputError(
                "all but one is of a recipe's own grids: leave candidates and budget out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Study:
    """A recipe on a model, its classes and what each may become."""

    fitted: Fitted
    recipe: Recipe
    classes: list[SiteClass]
    choices: list[Choice]
    float_bytes: float
    budget: float

    @property
    def grids(self) -> dict[str, Any]:
        """The recipe's own grids by path."""
        return {path: plan.weight for path, plan in self.fitted.plans.items()}

    @property
    def rounds_activations(self) -> bool:
        return any(plan.activations for plan in self.fitted.plans.values())


def run(
    reference: Model,
    text: HeldOut | Sequence[PathLike],
    tokenizer: Any,
    how: SensitivityConfig,
    config: EvaluationConfig,
    progress: Progress | None,
) -> dict[str, Any]:
    """Returns the document above; see `api.sensitivity`."""
    study = _study(_config_of(reference), how)
    text, sizes = text_of(text, reference, tokenizer, config.length)
    with opened(reference, config) as (model, _):
        if model.plans:
            raise InputError(f"{_name(reference)}: quantized already; give the float model")
        from_disk = config.cache and not isinstance(reference, Gemma4)
        kept = reference_of(
            model, text.rows, batch_size=config.batch_size, progress=progress,
            folder=Path(config.cache) if from_disk else None,
            identity="" if isinstance(reference, Gemma4) else named(reference).identity,
        )  # fmt: skip
        variants = Variants.of(model, study.fitted.config, how.method)
        del model  # The last variant frees leaf by leaf what nobody else holds.
    bench = Bench(
        variants=variants, reference=kept, rows=text.rows, token_bytes=sizes,
        batch_size=config.batch_size, seed=config.seed, draws=config.draws,
    )  # fmt: skip
    first = bench.records(study.grids) if how.all_but_one else None
    rows = rank(bench, study.choices, progress)
    if first is not None:
        add_restored(bench, rows, study.choices, first, progress)
    found: dict[str, Any] = {"rows": rows}
    if how.budget:
        found["proposal"], base = _propose(study, bench, rows, how)
    elif how.candidates:
        base = bench.records({})
    else:
        base = first or bench.records(study.grids, last=True)
        found["whole"] = _whole(study, bench, base, rows)
    about = {
        "kind": "sensitivity",
        "text": described(text, base, config, reference),
        "reference": _reference(reference, study),
        "recipe": study.fitted.recipe,
        **{name: getattr(how, name) for name in ("method", "by", "parts")},
        "rounds_activations": study.rounds_activations,
    }
    return about | found | {"environment": environment()}


def refuse(reference: Model, how: SensitivityConfig) -> None:
    """Refuses a study that cannot be made; reads names and headers, no arrays and no text.

    Raises: FileNotFoundError; InputError for a recipe, class or format that is unknown or does not fit the model, or a
        budget that nothing fits into.
    """
    _study(_config_of(reference), how)


def _study(config: ModelConfig, how: SensitivityConfig) -> _Study:
    fitted, recipe = fit(config, how.recipe), recipe_named(how.recipe, config.family)
    declared = declare(fitted.config).values()
    classes = site_classes(
        declared, fitted.plans, by=how.by, parts=how.parts, size=fitted.config.name
    )
    candidates = how.candidates or (CANDIDATES if how.budget else ())
    float_bytes = total_bytes(coverage(declared, {}))
    study = _Study(
        fitted=fitted, recipe=recipe, classes=classes, choices=[], float_bytes=float_bytes,
        budget=bytes_of(how.budget, float_bytes) if how.budget else 0.0,
    )  # fmt: skip
    choices = _candidates(classes, candidates) if candidates else _own(classes, study.grids)
    if not choices:
        if candidates:
            raise InputError(
                f"candidates {', '.join(candidates)}: none fits a class of {config.name}"
            )
        raise InputError(f"recipe {how.recipe} quantizes no site of {config.name}: nothing to rank")
    study = dataclasses.replace(study, choices=choices)
    if how.budget:  # Refused before anything is read.
        _mix(study, {})
    return study


def _own(classes: Sequence[SiteClass], grids: Mapping[str, Any]) -> list[Choice]:
    """The recipe's own grids, for classes that it quantizes something of."""
    choices = []
    for one in classes:
        mine = {site.path: grids[site.path] for site in one.sites if site.path in grids}
        names = " ".join(dict.fromkeys(grid.format for grid in mine.values()))
        if mine:
            choices.append(Choice(of=one, format=names, grids=mine))
    return choices


def _candidates(classes: Sequence[SiteClass], names: Sequence[str]) -> list[Choice]:
    """Every class in every format whose tiles cover it."""
    grids = {name: grid_named(name) for name in dict.fromkeys(names) if name != FLOAT}
    return [
        Choice(of=one, format=name, grids=one.on(grid))
        for one in classes
        for name, grid in grids.items()
        if one.fits(grid)
    ]


def _whole(
    study: _Study, bench: Bench, records: TokenRecords, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    size = total_bytes(coverage(declare(study.fitted.config).values(), study.fitted.plans))
    total = sum(row["kl_mean"]["value"] for row in rows)
    about = {"recipe": study.fitted.recipe, "bytes": size, "sum_of_rows": total}
    return about | bench.measured(records)


def _propose(
    study: _Study, bench: Bench, rows: Sequence[Mapping[str, Any]], how: SensitivityConfig
) -> tuple[dict[str, Any], TokenRecords]:
    """Returns the proposal and the records of the whole mix."""
    lost = {(row["class"], row["format"]): row["kl_mean"]["value"] for row in rows}
    mix = _mix(study, lost)
    name = Path(how.propose).stem if how.propose else f"{study.fitted.recipe}_mixed"
    recipe = mixed_recipe(
        name, f"formats by measured KL, within {study.budget:,.0f} bytes on {study.fitted.config.name}",
        [(choice.of, grid_named(choice.format)) for choice in mix],
        family=study.fitted.config.family, unties_head=study.recipe.unties_head,
    )  # fmt: skip
    fitted = fit(study.fitted.config, recipe)
    records = bench.records({path: plan.weight for path, plan in fitted.plans.items()}, last=True)
    chosen = [
        {
            "class": choice.of.name,
            "format": choice.format,
            "bytes": choice.bytes,
            "kl": lost.get((choice.of.name, choice.format), 0.0),
        }
        for choice in mix
    ]
    if how.propose:
        write_recipe(recipe, Path(how.propose))
    proposal = {
        "budget": study.budget,
        "bytes": total_bytes(coverage(declare(fitted.config).values(), fitted.plans)),
        "float_bytes": study.float_bytes,
        "predicted": sum(one["kl"] for one in chosen),
        **bench.measured(records),
        "chosen": chosen,
        "recipe": to_json(recipe),
    }
    return proposal, records


def _mix(study: _Study, lost: Mapping[tuple[str, str], float]) -> list[Choice]:
    """The choice of every class, float among them, that loses least within the budget."""
    options = [
        [
            *(choice for choice in study.choices if choice.of.name == one.name),
            Choice(of=one, format=FLOAT, grids={}),
        ]
        for one in study.classes
    ]
    outside = study.float_bytes - sum(one.bytes({}) for one in study.classes)
    sizes = [[choice.bytes for choice in of_class] for of_class in options]
    losses = [[lost.get((c.of.name, c.format), 0.0) for c in of_class] for of_class in options]
    best = best_mix([*sizes, [outside]], [*losses, [0.0]], study.budget)[:-1]
    return [of_class[index] for of_class, index in zip(options, best, strict=True)]


def _config_of(reference: Model) -> ModelConfig:
    if isinstance(reference, Gemma4):
        return reference.config
    found = named(reference)
    if found.recipe is not None:
        raise InputError(f"{reference}: sensitivity starts from floats; give the checkpoint alone")
    return config_of(found.directory)


def _name(reference: Model) -> str:
    return reference.config.name if isinstance(reference, Gemma4) else str(reference)


def _reference(reference: Model, study: _Study) -> dict[str, Any]:
    return {
        "name": _name(reference),
        "path": "" if isinstance(reference, Gemma4) else str(reference),
        "size": study.fitted.config.name,
        "float_bytes": study.float_bytes,
    }
