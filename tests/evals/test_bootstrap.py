"""Resampled statistics against a slow implementation that builds every resampled text."""

import numpy as np
import pytest

from gemma_qat.evals import Resamples, interval, quantile, resampled_quantile


def sample(seed=0, tokens=211, documents=13, ties=False):
    rng = np.random.default_rng(seed)
    document = np.concatenate([np.arange(documents), rng.integers(documents, size=tokens)])
    values = rng.gamma(0.5, size=document.size)
    return document.astype(np.int32), np.round(values, 1) if ties else values


def drawn_tokens(document, counts):
    """Returns token indices of one draw, every document repeated as often as it was drawn."""
    return np.concatenate(
        [np.repeat(np.flatnonzero(document == d), c) for d, c in enumerate(counts)]
    )


def test_counts_are_draws_with_replacement():
    """If this fails, draws are not resamples of the documents, or the seed does not fix them."""
    resamples = Resamples(7, draws=4000, seed=3)
    counts = resamples.counts
    assert counts.shape == (4000, 7)
    assert (counts.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(counts, Resamples(7, draws=4000, seed=3).counts)
    assert (counts != Resamples(7, draws=4000, seed=4).counts).any()
    # A count is binomial(7, 1/7): mean 1, variance 6/7; five standard errors of 4000 draws.
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=5 * np.sqrt(6 / 7 / 4000))
    np.testing.assert_allclose(counts.var(axis=0), 6 / 7, atol=0.12)


def test_ratio_equals_the_mean_of_the_resampled_tokens():
    """If this fails, intervals of the loss are not those of a document bootstrap."""
    document, values = sample()
    resamples = Resamples(13, draws=50, seed=1)
    fast = resamples.ratio(np.bincount(document, values), np.bincount(document).astype(np.float64))
    slow = [values[drawn_tokens(document, counts)].mean() for counts in resamples.counts]
    np.testing.assert_allclose(fast, slow, rtol=1e-12)
    assert interval(fast) == pytest.approx(np.percentile(slow, [2.5, 97.5]), rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("level", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("tokens", [0, 3, 211, 243])
def test_quantile_equals_that_of_the_resampled_tokens(level, ties, tokens):
    """If this fails, the median or the tail of the KL is off by a token or a block."""
    document, values = sample(tokens=tokens, ties=ties)
    resamples = Resamples(13, draws=60, seed=2)
    fast = resampled_quantile(values, document, level, resamples)
    slow = [
        np.quantile(values[drawn_tokens(document, counts)], level, method="inverted_cdf")
        for counts in resamples.counts
    ]
    np.testing.assert_array_equal(fast, slow)
    assert quantile(values, level) == np.quantile(values, level, method="inverted_cdf")


def test_quantile_rank_is_not_moved_by_float_rounding():
    """If this fails, a level such as 0.07 of 100 tokens picks the eighth value."""
    assert quantile(np.arange(1.0, 101.0), 0.07) == 7.0


def test_documents_stay_whole():
    """If this fails, tokens are resampled one by one and intervals are far too narrow."""
    document = np.repeat(np.arange(20), 500)
    values = np.repeat(np.random.default_rng(0).normal(size=20), 500)
    draws = Resamples(20, draws=2000, seed=0).ratio(
        np.bincount(document, values), np.bincount(document).astype(np.float64)
    )
    # Within a document all tokens are equal, so 20 facts remain: standard error sd / sqrt(20).
    assert draws.std() == pytest.approx(values.std() / np.sqrt(20), rel=0.1)


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    """If this fails, the intervals of a large corpus are of other draws than those of a small one."""
    values, document = np.random.default_rng(1).normal(size=90), np.arange(90) % 13
    sums = np.bincount(document, weights=values), np.bincount(document).astype(float)

    def found():
        resamples = Resamples(13, draws=50, seed=3)
        quantiles = resampled_quantile(values, document, 0.9, resamples)
        return resamples.counts, resamples.ratio(*sums), quantiles

    whole = found()
    monkeypatch.setattr("gemma_qat.evals.bootstrap.AT_ONCE", 40)
    for one, other in zip(whole, found(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_too_little_to_resample_is_an_error():
    """If this fails, one document gives an interval of width zero that looks like certainty."""
    with pytest.raises(ValueError, match=r"1 document\(s\) given, expected at least 2"):
        Resamples(1, seed=0)
    with pytest.raises(ValueError, match="draws = 0"):
        Resamples(3, draws=0, seed=0)
    with pytest.raises(ValueError, match="level = 95"):
        interval(np.arange(4.0), 95.0)
    with pytest.raises(ValueError, match="level = 1"):
        quantile(np.arange(4.0), 1.0)
