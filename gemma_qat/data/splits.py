"""What parts of a dataset a split names: `train`, `train[:90%]`, `train[:100]+validation`, `all`.

Source: the split API of TFDS (tensorflow_datasets/docs/splits.md).
"""

from __future__ import annotations

import re

_PART = re.compile(r"([^\[\]]+)(?:\[([^:\]]*):([^:\]]*)\])?")
_END = re.compile(r"(-?\d+)(%|shard)?")
_End = tuple[int, str]


def may_overlap(a: str, b: str) -> bool:
    """Whether two splits of one dataset may have documents in common: always, unless what they name says otherwise.

    Slices are apart of which one ends before the other begins, both counted in one unit and from the same side.
    """
    return any(_meet(one.strip(), two.strip()) for one in a.split("+") for two in b.split("+"))


def _meet(a: str, b: str) -> bool:
    one, two = _PART.fullmatch(a), _PART.fullmatch(b)
    if one is None or two is None:
        return True
    if "all" in (one[1], two[1]):
        return True
    if one[1] != two[1]:
        return False
    (low, high), (other_low, other_high) = _ends(one), _ends(two)
    return not (_is_before(high, other_low) or _is_before(other_high, low))


def _ends(part: re.Match[str]) -> tuple[_End | None, _End | None]:
    return _end(part[2]), _end(part[3])


def _end(said: str | None) -> _End | None:
    """A number and its unit; None for an end of the split, or what cannot be compared."""
    found = _END.fullmatch((said or "").strip())
    if found is None:
        return None
    number, unit = int(found[1]), found[2] or ""
    return (number + 100 if unit == "%" and number < 0 else number), unit


def _is_before(high: _End | None, low: _End | None) -> bool:
    if high is None or low is None or high[1] != low[1]:
        return False
    return high[0] <= low[0] and (high[0] < 0) == (low[0] < 0)
