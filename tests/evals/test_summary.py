"""The figures of a report, computed by hand from a few tokens."""

import json
import math

import numpy as np
import pytest

from gemma_qat.evals import (
    Resamples,
    TokenRecords,
    kl_counts,
    paired_difference,
    recovered,
    summarize,
)


def noisy(gap, kl, seed, documents=11, tokens=500, noise=0.1):
    """Returns records whose loss is `gap` above a shared reference, with noise of their own."""
    shared = np.random.default_rng(100)
    document = np.sort(
        np.concatenate([np.arange(documents), shared.integers(documents, size=tokens)])
    )
    reference = shared.gamma(2.0, size=document.size) + shared.normal(size=documents)[document] ** 2
    own = np.random.default_rng(seed)
    return TokenRecords(
        document=document.astype(np.int32),
        position=np.arange(document.size) % 5 + 1,
        nll=reference + gap + noise * own.normal(size=document.size),
        reference_nll=reference,
        kl=kl * own.gamma(1.0, size=document.size),
        agree=own.random(document.size) > kl,
        document_bytes=3 * np.bincount(document),
    )


def test_values_by_hand():
    """If this fails, a headline figure has the wrong definition."""
    records = TokenRecords(
        document=np.array([0, 0, 1], np.int32),
        position=np.array([1, 2, 1]),
        nll=np.array([1.0, 2.0, 6.0]),
        reference_nll=np.array([1.0, 1.0, 4.0]),
        kl=np.array([0.5, 0.25, 3.0]),
        agree=np.array([True, True, False]),
        document_bytes=np.array([4, 6]),
    )
    summary = summarize(records, Resamples(2, draws=400, seed=0))
    value = {key: entry["value"] for key, entry in summary.items() if isinstance(entry, dict)}
    assert value == pytest.approx(
        {
            "nll": 3.0,
            "bits_per_byte": 9 / math.log(2) / 10,
            "perplexity": math.exp(3),
            "loss_gap": 1.0,
            "kl_mean": 1.25,
            "kl_median": 0.5,
            "kl_p90": 3.0,
            "kl_p99": 3.0,
            "kl_p999": 3.0,
            "kl_max": 3.0,
            "top1_agreement": 2 / 3,
            "perplexity_ratio": math.exp(1),
            "mean_shift": (math.exp(-2) - math.exp(-1) + math.exp(-6) - math.exp(-4)) / 3,
            "rms_shift": math.hypot(math.exp(-2) - math.exp(-1), math.exp(-6) - math.exp(-4))
            / math.sqrt(3),
        }
    )
    # A draw holds only the first document, only the second, or both; the ends are the pure ones.
    assert (summary["nll"]["low"], summary["nll"]["high"]) == (1.5, 6.0)
    assert (summary["kl_median"]["low"], summary["kl_median"]["high"]) == (0.25, 3.0)
    assert (summary["tokens"], summary["documents"]) == (3, 2)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_reference_summary_has_no_loss():
    """If this fails, the float row of the table shows a divergence from itself."""
    records = noisy(0.0, 0.0, seed=1, noise=0.0)
    summary = summarize(records, Resamples(11, draws=100, seed=0))
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert summary["loss_gap"] == summary["kl_mean"] == summary["kl_p99"] == nothing
    assert summary["top1_agreement"]["low"] == 1.0


def test_paired_difference_is_narrower_than_the_parts():
    """If this fails, models are not compared on the same draws and differences drown in noise."""
    a, b = noisy(0.05, 0.1, seed=1), noisy(0.10, 0.2, seed=2)
    resamples = Resamples(11, seed=0)
    difference = paired_difference(a, b, resamples)["nll"]
    alone = summarize(a, resamples)["nll"]
    assert difference["value"] == pytest.approx(a.nll.mean() - b.nll.mean())
    assert difference["high"] - difference["low"] < 0.2 * (alone["high"] - alone["low"])
    assert difference["low"] < difference["value"] < difference["high"] < 0
    assert difference["excludes_zero"] is True


def test_equal_models_do_not_exclude_zero():
    """If this fails, a model is called better than itself."""
    a = noisy(0.05, 0.1, seed=1)
    for difference in paired_difference(a, a, Resamples(11, seed=0)).values():
        assert difference == {"value": 0.0, "low": 0.0, "high": 0.0, "excludes_zero": False}


def test_recovered_percent_by_hand():
    """If this fails, the share of PTQ's loss that QAT wins back is not 100 (1 - qat / ptq)."""
    ptq = noisy(0.8, 0.4, seed=3, noise=0.0)
    qat = noisy(0.2, 0.4, seed=3, noise=0.0)
    share = recovered(qat, ptq, Resamples(11, seed=0))
    # Without noise the gap is the same in every document, so every draw says 75 %.
    assert share["loss_gap"] == pytest.approx(
        {"value": 75.0, "low": 75.0, "high": 75.0, "undefined_draws": 0}
    )
    assert share["kl_mean"]["value"] == pytest.approx(0.0)


def test_recovered_interval_against_a_slow_one():
    """If this fails, QAT and PTQ are resampled on different documents."""
    qat, ptq = noisy(0.1, 0.1, seed=4), noisy(0.3, 0.3, seed=5)
    resamples = Resamples(11, draws=300, seed=6)
    slow = []
    for counts in resamples.counts:
        times = counts[qat.document]
        slow.append(100 * (1 - (qat.kl * times).sum() / (ptq.kl * times).sum()))
    share = recovered(qat, ptq, resamples)["kl_mean"]
    expected = (100 * (1 - qat.kl.sum() / ptq.kl.sum()), *np.percentile(slow, [2.5, 97.5]))
    assert (share["value"], share["low"], share["high"]) == pytest.approx(expected)


def test_nothing_lost_is_nothing_recovered():
    """If this fails, a ratio to a gap of zero is reported as a result."""
    ptq, qat = noisy(0.0, 0.0, seed=7, noise=0.5), noisy(0.0, 0.0, seed=8, noise=0.5)
    share = recovered(qat, ptq, Resamples(11, seed=0))
    for key, words in (("loss_gap", "the loss gap of PTQ"), ("kl_mean", "the mean KL of PTQ")):
        assert share[key]["value"] is None
        assert words in share[key]["reason"]


def test_other_tokens_are_refused():
    """If this fails, models scored on different text are compared token by token."""
    a, b = noisy(0.1, 0.1, seed=1), noisy(0.1, 0.1, seed=1, tokens=400)
    with pytest.raises(ValueError, match="expected the same tokens of the same documents"):
        paired_difference(a, b, Resamples(11, seed=0))
    with pytest.raises(ValueError, match="drawn over 12 documents, the records have 11"):
        summarize(a, Resamples(12, seed=0))


def test_kl_counts_lose_no_token():
    """If this fails, tokens of zero or huge divergence vanish from the histogram."""
    bins = kl_counts(np.array([0.0, 1e-12, 0.03, 5.0, 1e6]))
    assert sum(bins["counts"]) == 5
    assert bins["counts"][0] == 2 and bins["counts"][-1] == 1
    assert len(bins["edges"]) == len(bins["counts"]) + 1
