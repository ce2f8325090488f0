"""Token records refuse what would make a figure wrong."""

import numpy as np
import pytest

from gemma_qat.evals import TokenRecords


def columns(**changed):
    base = {
        "document": np.array([0, 0, 1], np.int32),
        "position": np.array([1, 2, 1]),
        "nll": np.array([1.0, 2.0, 3.0]),
        "reference_nll": np.array([0.5, 2.5, 3.0]),
        "kl": np.array([0.1, 0.0, 0.2]),
        "agree": np.array([True, False, True]),
        "document_bytes": np.array([7, 5]),
    }
    return base | changed


def test_sums_are_per_document():
    """If this fails, every statistic mixes documents up."""
    records = TokenRecords(**columns())
    assert (records.tokens, records.documents) == (3, 2)
    np.testing.assert_array_equal(records.document_sums(records.nll), [3.0, 3.0])
    np.testing.assert_array_equal(records.document_sums(records.agree), [1.0, 1.0])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"nll": np.array([1.0, np.nan, 3.0])}, "nll: 1 of 3 values are not finite"),
        ({"kl": np.array([0.1, 0.2])}, "kl: has 2 tokens, document has 3"),
        ({"kl": np.zeros((3, 1))}, r"kl: expected one axis of float64, was float64 \(3, 1\)"),
        ({"agree": np.array([1, 0, 1])}, "agree: expected one axis of bool, was int64"),
        ({"nll": np.array([1, 2, 3])}, "nll: expected one axis of float64"),
        ({"document": np.array([0, 0, 2])}, r"document: ranges over 0\.\.2, expected 0\.\.1"),
        ({"document": np.array([-1, 0, 1])}, "ranges over -1"),
        ({"document": np.array([0, 0, 0])}, "document 1 has no scored tokens"),
        ({"document_bytes": np.array([7, 0])}, "document 1 has no UTF-8 bytes"),
        ({"document_bytes": np.array([], np.int64)}, "document_bytes: is empty"),
    ],
)
def test_bad_columns_are_named_in_one_line(changed, words):
    """If this fails, a wrong column reaches the report or the message does not say which one."""
    with pytest.raises(ValueError, match=words) as caught:
        TokenRecords(**columns(**changed))
    assert "\n" not in str(caught.value)


def test_reference_has_no_divergence_from_itself():
    """If this fails, the reference's own row shows a loss it does not have."""
    given = columns()
    records = TokenRecords.of_reference(
        document=given["document"],
        position=given["position"],
        nll=given["nll"],
        document_bytes=given["document_bytes"],
    )
    assert not records.kl.any() and records.agree.all()
    np.testing.assert_array_equal(records.nll, records.reference_nll)


def test_records_cannot_be_written_through():
    """If this fails, changing an array after scoring changes the report."""
    given = columns()
    records = TokenRecords(**given)
    given["nll"][0] = 99.0
    assert records.nll[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        records.nll[0] = 5.0
