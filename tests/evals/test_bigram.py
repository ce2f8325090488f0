"""The bigram floor: normalisation, hand-computed probabilities, packing."""

import numpy as np
import pytest

from gemma_qat.evals import BigramModel


def text(seed=0, rows=5, length=17, vocab=11):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(vocab - 3, size=(rows, length)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, size=(rows, length)), axis=1).astype(np.int32)
    segments[:, -3:] = 0
    return tokens, segments


def test_every_context_sums_to_one():
    """If this fails, the floor's likelihoods are not those of a model; unseen contexts included."""
    model = BigramModel.count(*text(), 11)
    for context in range(11):
        probabilities = model.probabilities(context)
        assert (probabilities > 0).all()
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_probabilities_by_hand():
    """If this fails, the smoothing is not Witten and Bell's."""
    tokens, segments = np.array([[0, 1, 0, 1, 0, 2]]), np.ones((1, 6), np.int64)
    model = BigramModel.count(tokens, segments, 4)
    # Followers 1 0 1 0 2: N = 5, T = 3, so P(w) = (n + 3/4) / 8 with n = 2, 2, 1, 0.
    unigram = np.array([2.75, 2.75, 1.75, 0.75]) / 8
    # Context 0 was followed by 1 1 2: n = 3, T = 2. Context 3 was never seen.
    np.testing.assert_allclose(
        model.probabilities(0), (np.array([0, 2, 1, 0]) + 2 * unigram) / 5, rtol=1e-14
    )
    np.testing.assert_allclose(model.probabilities(3), unigram, rtol=1e-14)


def test_nll_reads_the_distribution_pair_by_pair():
    """If this fails, the loss of the floor is not that of its own probabilities."""
    tokens, segments = text()
    model = BigramModel.count(*text(seed=1), 11)
    expected = [
        -np.log(model.probabilities(int(tokens[m, t]))[tokens[m, t + 1]])
        for m in range(tokens.shape[0])
        for t in range(tokens.shape[1] - 1)
        if segments[m, t] == segments[m, t + 1] != 0
    ]
    nll = model.nll(tokens, segments)
    assert nll.dtype == np.float64
    np.testing.assert_allclose(nll, expected, rtol=1e-12)


def test_pairs_do_not_cross_documents_or_padding():
    """If this fails, the last token of a document predicts the first of the next."""
    tokens = np.array([[0, 1, 2, 3, 9, 9]])
    model = BigramModel.count(tokens, np.array([[1, 1, 2, 2, 0, 0]]), 10)
    np.testing.assert_array_equal(model.keys, [1, 23])


def test_nothing_counted_is_uniform():
    """If this fails, an empty text divides by zero."""
    model = BigramModel.count(np.zeros((2, 4), np.int32), np.zeros((2, 4), np.int32), 5)
    np.testing.assert_allclose(model.probabilities(2), 0.2)


def test_large_vocabulary_needs_no_square_table():
    """If this fails, counting with a real vocabulary allocates V x V or overflows the key."""
    last = 262_143
    model = BigramModel.count(np.array([[last, last, 5]]), np.ones((1, 3), np.int64), last + 1)
    np.testing.assert_array_equal(model.keys, [last * 262_144 + 5, last * 262_144 + last])


def test_token_outside_the_vocabulary_is_named():
    """If this fails, ids of another tokenizer are counted in silence."""
    with pytest.raises(ValueError, match=r"range over 0\.\.7, expected 0\.\.5"):
        BigramModel.count(np.array([[0, 7, 1]]), np.ones((1, 3), np.int64), 6)
