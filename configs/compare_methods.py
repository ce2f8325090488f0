"""What training on a grid is worth beside the best of post-training quantization, on twins of E2B and of 26B A4B.

A float reference, trained long enough that rounding to 4 bits hurts measurably, then recipes by methods. All that is
trained sees as many tokens, block-wise reconstruction and the steps after it together; what depends on a seed has three
(for PTQ that looks at text: three texts). Measured on files that nobody trained, calibrated or chose settings on.

    gemma-qat sweep configs/compare_methods.py                   # dense; VARIANTS below are the others
    gemma-qat sweep configs/compare_methods.py --variant moe
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from gemma_qat.config import (
    Cell,
    DataConfig,
    ExperimentConfig,
    MeasureConfig,
    PtqCell,
    SweepConfig,
    TrainCell,
    check_variant,
)
from gemma_qat.models import fit, size_named
from gemma_qat.ptq import CalibrationConfig, PtqConfig
from gemma_qat.train import BlockwiseConfig, OptimizerConfig, TrainConfig

VARIANTS = ("default", "tiny", "rates", "moe", "moe_tiny", "moe_rates")
"""Dense, in few steps, and what RATES were picked by; the same of experts, which take the dense twin's RATES."""


@dataclass(frozen=True)
class Rates:
    """Learning rates of weights and of scales (relative steps), and of scales by LSQ, block by block, and alone."""

    weights: float
    scales: float
    lsq_scales: float
    block: float
    block_scales: float
    scales_alone: float


# By the bits of the narrowest matrix. Picked on split `validation`, with a seed that the comparison does not use, by
#     gemma-qat sweep configs/compare_methods.py --variant rates
RATES = {
    4: Rates(
        weights=3e-4, scales=1e-3, lsq_scales=3e-2, block=1e-3, block_scales=1e-3, scales_alone=3e-3
    ),
    2: Rates(
        weights=1e-3, scales=3e-3, lsq_scales=1e-2, block=1e-3, block_scales=1e-3, scales_alone=1e-2
    ),
}
TRIED = {4: ((1e-4, 3e-4, 1e-3), (1e-3, 3e-3)), 2: ((5e-4, 1e-3, 3e-3), (3e-3, 1e-2))}
"""Of weights, and of scales: every pair."""
LSQ_TRIED = (3e-3, 1e-2, 3e-2, 1e-1)
"""Of scales from LSQ's start, which is further from where they end; weights as RATES have them."""
BLOCK_TRIED = (1e-4, 3e-4, 1e-3, 3e-3)
"""Of weights, block by block."""
CE_TRIED = (1e-4, 3e-4, 1e-3, 3e-3)
"""Of weights towards the text; scales as RATES have them."""

FREE = ("rtn", "mse")
ON_TEXT = ("gptq", "awq", "gptq+tokens", "mse+importance", "gptq+importance")
OPTIONS = ("gptq+tokens", "mse+importance", "gptq+importance", "qat_kl_recomputed")
"""Options of another method: one seed shows what they do."""
TRAINED = ("qat_ce", "qat_kl", "qat_kl+hidden", "qat_kl_recomputed", "lsq", "blockwise")
SOME = ("qat_ce", "qat_kl", "qat_kl+hidden", "blockwise")


@dataclass(frozen=True)
class Comparison:
    """A float reference of so many steps, what is compared on it, and for how many steps and seeds."""

    model: str
    float_steps: int
    steps: int
    seeds: tuple[int, ...]
    trained: dict[str, tuple[str, ...]]  # by recipe
    baselines: tuple[str, ...] = ()  # recipes for their speed


_ALL = tuple(m for m in TRAINED if m not in ("qat_kl_recomputed", "qat_kl+hidden"))
_DENSE = {"q4_0": TRAINED, "mobile": TRAINED, "w2": TRAINED, "w4a8": _ALL, "ternary": _ALL}
_EXPERTS = {
    "q4_0": SOME, "mobile_like": SOME, "w2": SOME, "w4a8": ("qat_kl",), "ternary": ("qat_kl",),
}  # fmt: skip
COMPARISONS = {
    "default": Comparison("tiny_e2b", 1100, 200, (1, 2, 3), _DENSE, ("int8_training",)),
    "tiny": Comparison("tiny_e2b", 12, 4, (1,), {"q4_0": TRAINED, "mobile": SOME}, ("int8_training",)),
    "rates": Comparison("tiny_e2b", 1100, 200, (0,), dict.fromkeys(_DENSE, ())),
    "moe": Comparison("tiny_26b_a4b", 700, 100, (1, 2, 3), _EXPERTS),
    "moe_rates": Comparison("tiny_26b_a4b", 700, 100, (0,), dict.fromkeys(_EXPERTS, ())),
    "moe_tiny": Comparison("tiny_26b_a4b", 12, 4, (1,), {"q4_0": SOME}),
}  # fmt: skip


def get_sweep(variant: str = "default") -> SweepConfig:
    check_variant(variant, VARIANTS)
    what = COMPARISONS[variant]
    is_tiny, picks = what.steps < 10, variant.endswith("rates")
    reference = ExperimentConfig(
        name="", model=what.model, data=DataConfig(kind="stdlib", length=128),
        calibration=CalibrationConfig(batches=2 if is_tiny else 32, batch_size=8, length=128),
        train=TrainConfig(
            steps=what.float_steps, batch_size=8, log_every=2 if is_tiny else 20, keep=1,
            watch_codes=False, tensorboard=False,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=4 if is_tiny else 50),
    )  # fmt: skip
    cells: list[Cell] = [TrainCell(name="float", config=reference)]
    for recipe in what.trained:
        cells += _ptq(reference, recipe, what)
    if picks:
        cells += _rates(reference, what)
    else:
        cells += _trained(reference, what)
    evaluation = MeasureConfig(length=128, rows_per_document=2 if is_tiny else 32)
    return SweepConfig(
        name="compare_methods" + ("" if variant == "default" else f"_{variant}"),
        cells=tuple(cells), reference="float",
        evaluation=replace(evaluation, split="validation" if picks else "test"),
    )  # fmt: skip


def bits(model: str, recipe: str) -> int:
    """Of the narrowest matrix: what RATES go by. Of recipes of 8 bits, 4."""
    plans = fit(size_named(model), recipe).plans
    return min(4, *(plan.weight.number.bits for plan in plans.values()))


def _ptq(reference: ExperimentConfig, recipe: str, what: Comparison) -> Iterator[Cell]:
    config = replace(reference, recipe=recipe, start="float")
    for method in FREE:
        yield PtqCell(name=f"{recipe}-{method}", config=config, method=method)
    for said, seed in _seeded(ON_TEXT, what.seeds):
        method, _, option = said.partition("+")
        batches = what.steps if option == "tokens" else 2 * config.calibration.batches
        own = replace(
            config, ptq=PtqConfig(importance=option == "importance"),
            calibration=replace(config.calibration, batches=batches),
            train=replace(config.train, seed=seed),
        )  # fmt: skip
        name = f"{recipe}-{said}-seed{seed}"
        yield PtqCell(name=name, config=own, method=method, called=said)


def _seeded(methods: tuple[str, ...], seeds: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """Yields every method with every seed, options with the first."""
    for method, seed in product(methods, seeds):
        if method not in OPTIONS or seed == seeds[0]:
            yield method, seed


def _trained(reference: ExperimentConfig, what: Comparison) -> Iterator[Cell]:
    for name, rates in RATES.items():
        for seed in what.seeds:
            yield TrainCell(
                name=f"float_control-{name}bit-seed{seed}", method=f"float_control_{name}bit",
                config=_method(reference, "float", "qat_ce", what.steps, rates, seed),
            )  # fmt: skip
    for recipe, methods in what.trained.items():
        rates = RATES[bits(what.model, recipe)]
        for method, seed in _seeded(methods, what.seeds):
            config = _method(reference, recipe, method, what.steps, rates, seed)
            yield TrainCell(name=f"{recipe}-{method}-seed{seed}", method=method, config=config)
    for recipe in what.baselines:
        config = _method(reference, recipe, "qat_ce", what.steps, RATES[4], what.seeds[0])
        config = replace(config, scales="recomputed")
        yield TrainCell(name=f"{recipe}-qat_ce", method="qat_ce", config=config)


def _rates(reference: ExperimentConfig, what: Comparison) -> Iterator[Cell]:
    (seed,) = what.seeds
    for recipe in what.trained:
        found = bits(what.model, recipe)
        for name, label, method, changes in _trials(found):
            rates = replace(RATES[found], **changes)
            config = _method(reference, recipe, method, what.steps, rates, seed)
            yield TrainCell(name=f"{recipe}-{name}", method=label, config=config)
        longer = _method(reference, recipe, "qat_kl", 2 * what.steps, RATES[found], seed)
        yield TrainCell(name=f"{recipe}-longer", method="qat_kl, twice the steps", config=longer)


def _trials(found: int) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """Yields (name of a cell, what tables call it, its method, which of RATES are others)."""
    for weights, scales in product(*TRIED[found]):
        said = f"{weights:g}-{scales:g}"
        yield said, f"qat_kl {said}", "qat_kl", {"weights": weights, "scales": scales}
    for rate in LSQ_TRIED:
        yield f"lsq-{rate:g}", f"lsq {rate:g}", "lsq", {"lsq_scales": rate}
    for rate in BLOCK_TRIED:
        yield f"blockwise-{rate:g}", f"blockwise-{rate:g}", "blockwise", {"block": rate}
    for rate in CE_TRIED:
        yield f"ce-{rate:g}", f"qat_ce {rate:g}", "qat_ce", {"weights": rate}
    yield "hidden", "qat_kl+hidden", "qat_kl+hidden", {}


def _method(
    reference: ExperimentConfig, recipe: str, method: str, steps: int, rates: Rates, seed: int
) -> ExperimentConfig:
    train = replace(
        reference.train, steps=steps, seed=seed, loss="ce" if method == "qat_ce" else "kl"
    )
    config = replace(
        reference, recipe=recipe, start="float", train=train,
        optimizer=OptimizerConfig(
            learning_rate=rates.weights, scale_learning_rate=rates.scales, warmup=min(10, steps // 2)
        ),
    )  # fmt: skip
    if method == "qat_kl_recomputed":
        return replace(config, scales="recomputed")
    if method == "qat_kl+hidden":
        return replace(config, train=replace(train, hidden_weight=1.0))
    if method == "lsq":
        return replace(
            config, scale_init="lsq",
            optimizer=replace(config.optimizer, scale_learning_rate=rates.lsq_scales),
        )  # fmt: skip
    if method == "blockwise":
        rebuilt = steps // 2
        return replace(
            config,
            blockwise=BlockwiseConfig(
                steps=rebuilt, rows=8 * rebuilt, batch_size=8, learning_rate=rates.block,
                scale_learning_rate=rates.block_scales,
            ),
            train=replace(train, steps=steps - rebuilt, only=("*_scale",)),
            optimizer=replace(config.optimizer, scale_learning_rate=rates.scales_alone),
        )  # fmt: skip
    return config
