"""From token records to the numbers of the report, each with its interval, in the terms of llama.cpp's perplexity tool.

    nll              sum of nll / tokens                      nats per token
    bits_per_byte    sum of nll / ln 2 / sum of bytes         bits per UTF-8 byte
    perplexity       exp(nll)
    perplexity_ratio exp(loss_gap), PPL(model) / PPL(reference)
    loss_gap         sum of (nll - reference nll) / tokens    nats per token
    kl_mean          of KL(reference || model)                nats per token
    kl_median, kl_p90, kl_p99, kl_p999, kl_max                the same, quantiles over tokens
    top1_agreement   share of tokens where both put the same token first ("same top")
    mean_shift       mean of p - p_reference of the true token, and
    rms_shift        its root mean square ("mean, RMS delta p"); shares, 0 to 1

Bits per byte can be compared across tokenizers, loss per token cannot. The loss gap can be zero or negative for a model
that differs everywhere (gains and losses cancel); the divergence cannot, which is why both are reported. A maximum has
no interval: resampling what was seen says nothing about what was not.

Source: ggml-org/llama.cpp `tools/perplexity` (README and perplexity.cpp), whose errors are over single tokens;
intervals here are over documents and wider.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from gemma_qat.evals.bootstrap import Resamples, interval, quantile, resampled_quantile
from gemma_qat.evals.records import TokenRecords

LEVEL = 0.95
KL_QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}
KL_EDGES = np.logspace(-9, 2, 111)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ratio:
    """A statistic that is a function of one ratio of sums over documents."""

    column: Callable[[TokenRecords], np.ndarray]
    per_byte: bool = False
    then: Callable[[Any], Any] = lambda ratio: ratio

    def sums(self, records: TokenRecords) -> tuple[np.ndarray, np.ndarray]:
        numerator = records.document_sums(self.column(records))
        if self.per_byte:
            return numerator, records.document_bytes.astype(np.float64)
        return numerator, records.document_sums(np.ones(records.tokens))

    def value(self, records: TokenRecords) -> float:
        numerator, denominator = self.sums(records)
        return float(self.then(numerator.sum() / denominator.sum()))

    def draws(self, records: TokenRecords, resamples: Resamples) -> np.ndarray:
        return self.then(resamples.ratio(*self.sums(records)))


_RATIOS = {
    "nll": _Ratio(column=lambda r: r.nll),
    "bits_per_byte": _Ratio(column=lambda r: r.nll, per_byte=True, then=lambda x: x / math.log(2)),
    "perplexity": _Ratio(column=lambda r: r.nll, then=np.exp),
    "perplexity_ratio": _Ratio(column=lambda r: r.nll - r.reference_nll, then=np.exp),
    "loss_gap": _Ratio(column=lambda r: r.nll - r.reference_nll),
    "kl_mean": _Ratio(column=lambda r: r.kl),
    "top1_agreement": _Ratio(column=lambda r: r.agree),
    "mean_shift": _Ratio(column=lambda r: r.shift),
    "rms_shift": _Ratio(column=lambda r: r.shift**2, then=np.sqrt),
}
_DIFFERENCES = ("nll", "bits_per_byte", "kl_mean", "top1_agreement", "rms_shift")
_PARTS = ("nll", "perplexity_ratio", "loss_gap", "kl_mean", "top1_agreement", "rms_shift")
"""What is said of a part of the tokens: bytes are not known of less than a document."""

_RECOVERED = {"loss_gap": "loss gap", "kl_mean": "mean KL"}


def summarize(records: TokenRecords, resamples: Resamples) -> dict[str, Any]:
    """Returns every statistic of one model as {"value", "low", "high"}, with tokens and documents.

    Units: see the table at the top of this file; intervals hold 95 % of the draws.
    Raises: ValueError when `resamples` is for another number of documents.
    """
    _check_documents(records, resamples)
    summary: dict[str, Any] = {
        name: _estimate(ratio.value(records), ratio.draws(records, resamples))
        for name, ratio in _RATIOS.items()
    }
    for name, level in KL_QUANTILES.items():
        draws = resampled_quantile(records.kl, records.document, level, resamples)
        summary[name] = _estimate(quantile(records.kl, level), draws)
    summary["kl_max"] = {"value": float(records.kl.max())}
    return summary | {
        "tokens": records.tokens,
        "documents": records.documents,
        "draws": resamples.draws,
        "level": LEVEL,
    }


def estimates(
    records: TokenRecords, resamples: Resamples, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Returns some of the statistics that are ratios of sums, as {"value", "low", "high"}.

    Raises: ValueError when `resamples` is for another number of documents.
    """
    _check_documents(records, resamples)
    return {
        name: _estimate(_RATIOS[name].value(records), _RATIOS[name].draws(records, resamples))
        for name in names
    }


def summarize_part(
    records: TokenRecords, mask: Bool[np.ndarray, " n"], *, seed: int, draws: int
) -> dict[str, Any]:
    """Returns the statistics of some tokens, with tokens and documents; intervals where two documents or more have any.

    Raises: ValueError when the mask leaves none.
    """
    part = records.where(mask)
    found: dict[str, Any] = {"tokens": part.tokens, "documents": part.documents}
    if part.documents < 2:
        return found | {name: {"value": _RATIOS[name].value(part)} for name in _PARTS}
    resamples = Resamples(part.documents, seed=seed, draws=draws)
    return found | {
        name: _estimate(_RATIOS[name].value(part), _RATIOS[name].draws(part, resamples))
        for name in _PARTS
    }


def paired_difference(
    a: TokenRecords, b: TokenRecords, resamples: Resamples
) -> dict[str, dict[str, Any]]:
    """Returns a - b for each statistic, with the interval of the difference and `excludes_zero`.

    Raises: ValueError when the two were not scored on the same tokens of the same documents.
    """
    _check_pair(a, b, resamples)
    difference = {}
    for name in _DIFFERENCES:
        ratio = _RATIOS[name]
        estimate = _estimate(
            ratio.value(a) - ratio.value(b), ratio.draws(a, resamples) - ratio.draws(b, resamples)
        )
        excludes_zero = estimate["low"] > 0 or estimate["high"] < 0
        difference[name] = {**estimate, "excludes_zero": excludes_zero}
    return difference


def recovered(
    qat: TokenRecords, ptq: TokenRecords, resamples: Resamples
) -> dict[str, dict[str, Any]]:
    """Returns the percent of what PTQ lost that QAT won back, for the loss gap and the mean KL.

    Units: 100 * (1 - qat / ptq): 100 is all of it, 0 none, below 0 worse than PTQ.
    Raises: ValueError when the two were not scored on the same tokens of the same documents.
    Exactness: when the interval of what PTQ lost reaches zero there is nothing to win back a share
    of: `value` is None and `reason` says so. Draws where PTQ lost nothing have no percent;
    `undefined_draws` counts them and the interval is over the others (at most about 2.5 % are left
    out, or `value` would be None).
    """
    _check_pair(qat, ptq, resamples)
    return {
        name: _recovered(_RATIOS[name], words, qat, ptq, resamples)
        for name, words in _RECOVERED.items()
    }


def kl_counts(kl: Float64[np.ndarray, " n"]) -> dict[str, list[Any]]:
    """Returns a histogram of per-token KL over fixed logarithmic bins, as {"edges", "counts"}.

    Units: edges in nats, ten bins a decade; values outside the bins are counted in the first and
    the last one.
    """
    inside = np.clip(kl, KL_EDGES[0], KL_EDGES[-1])
    counts, edges = np.histogram(inside, KL_EDGES)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _recovered(
    ratio: _Ratio, words: str, qat: TokenRecords, ptq: TokenRecords, resamples: Resamples
) -> dict[str, Any]:
    lost = ratio.draws(ptq, resamples)
    low, high = interval(lost, LEVEL)
    lost_value = ratio.value(ptq)
    if low <= 0 or lost_value <= 0:
        reason = f"the {words} of PTQ, {low:.3g} to {high:.3g} nats, is not clearly above zero"
        return {"value": None, "low": None, "high": None, "reason": reason}
    defined = lost > 0
    left = ratio.draws(qat, resamples)
    estimate = _estimate(
        100 * (1 - ratio.value(qat) / lost_value), 100 * (1 - left[defined] / lost[defined])
    )
    return {**estimate, "undefined_draws": int((~defined).sum())}


def _estimate(value: float, draws: np.ndarray) -> dict[str, Any]:
    low, high = interval(draws, LEVEL)
    return {"value": value, "low": low, "high": high}


def _check_documents(records: TokenRecords, resamples: Resamples) -> None:
    if records.documents != resamples.document_count:
        raise ValueError(
            f"Resamples: drawn over {resamples.document_count} documents, the records have {records.documents}"
        )


def _check_pair(a: TokenRecords, b: TokenRecords, resamples: Resamples) -> None:
    _check_documents(a, resamples)
    same = np.array_equal(a.document, b.document)
    if not same or not np.array_equal(a.document_bytes, b.document_bytes):
        raise ValueError(
            f"paired records: {a.tokens} tokens of {a.documents} documents against {b.tokens} of "
            f"{b.documents}, expected the same tokens of the same documents"
        )
