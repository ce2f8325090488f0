"""The letters that name array axes everywhere in this project.

| letter | axis | letter | axis |
|---|---|---|---|
| B | batch | E | experts |
| T | query positions | X | experts chosen per token |
| S | key/value positions | C | token rows after routing, sorted by expert |
| D | model width | P | per-layer-input width |
| N | query heads | L | layers |
| K | key/value heads | V | vocabulary |
| G | query heads per key/value head | M, R, O | rows, reduced axis, output axis of a bare matmul |
| H | head width | Q | tiles along the reduced axis |
| F | feed-forward width | W | storage words along a packed axis |

Einsum equations use upper case and keep the operand order (activation, weight). Weight shapes list reduced
axes first and output axes after them, except where a batch axis leads (`EDF`) or where a table is indexed by
its first axis (`VD`).
"""

AXES = {
    "B": "batch",
    "T": "query positions",
    "S": "key/value positions",
    "D": "model width",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads per key/value head",
    "H": "head width",
    "F": "feed-forward width",
    "E": "experts",
    "X": "experts chosen per token",
    "C": "token rows after routing",
    "P": "per-layer-input width",
    "L": "layers",
    "V": "vocabulary",
    "M": "rows",
    "R": "reduced axis",
    "O": "output axis",
    "Q": "tiles along the reduced axis",
    "W": "storage words along a packed axis",
}
