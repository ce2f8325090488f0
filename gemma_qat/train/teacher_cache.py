"""A teacher's most likely words, kept on disk: distilling many students from one pass of a large teacher.

For every token of every row the k most likely next words and their log probabilities; what is left of the
probability is one outcome more (`losses.py`), so nothing has to be renormalized and nothing is lost but its shape.

    DIRECTORY/part-2-of-4/
      card.json       what it was made of and for: rows, teacher, k; written last
      ids.npy         int32   [rows of the part, T, k], most likely first
      logprobs.npy    float32 [rows of the part, T, k]

Parts are consecutive runs of row numbers, made independently of each other, on one machine or many. A part is made in a
folder beside it and appears by rename; one that was interrupted goes on at the batch it had come to.

Units: bytes are 8 k T a row: 2 MiB at k = 64 and T = 4096.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.errors import InputError
from gemma_qat.models import Gemma4, RunOptions
from gemma_qat.sharding import Placement, batch_parts, batch_sharding
from gemma_qat.train.distributed import spread
from gemma_qat.train.losses import chunks
from gemma_qat.train.state import Student

Progress = Callable[[str, int, int], None]
_ARRAYS = {"ids": np.int32, "logprobs": np.float32}


@runtime_checkable
class NumberedRows(Protocol):
    """Rows by number, as `data.training_rows` returns them."""

    def __len__(self) -> int: ...
    def __getitem__(self, ids: np.ndarray) -> Any: ...
    def order(self) -> Mapping[str, Any]: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Which of `count` consecutive runs of rows."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"part {self.index} of {self.count}: 0 <= part < parts expected")

    def span(self, rows: int) -> tuple[int, int]:
        """Returns (first row, one past the last)."""
        return rows * self.index // self.count, rows * (self.index + 1) // self.count

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"part-{self.index}-of-{self.count}"


def write_cache(
    directory: Path,
    rows: NumberedRows,
    teacher: Student,
    leaves: Mapping[str, Any],
    *,
    k: int,
    placement: Placement,
    source: str,
    batch_size: int = 8,
    chunk: int = 0,
    part: Part = Part(),
    options: RunOptions = RunOptions(),
    progress: Progress | None = None,
) -> Path:
    """Returns the folder of a part, made unless it is there; `leaves` are the teacher's, by in-memory path.

    `source` says for people where the teacher came from.
    Raises: InputError when k is not in 1 .. vocabulary, or the folder holds a part of something else.
    """
    if not 1 <= k <= teacher.config.vocab_size:
        raise InputError(f"k={k}: 1 .. {teacher.config.vocab_size} expected, the vocabulary")
    first, last = part.span(len(rows))
    length = rows[np.zeros(1, np.int64)].tokens.shape[1]
    card = {
        "rows": _said(rows), "first": first, "last": last, "total": len(rows),
        "length": length, "k": k, "teacher": source, "vocabulary": teacher.config.vocab_size,
    }  # fmt: skip
    out, making = directory / part.name, directory / f".{part.name}.making"
    if out.is_dir():
        if _card(out) != card:
            raise InputError(
                f"{out}: kept words of other rows or another teacher; give a new folder"
            )
        return out
    arrays, done = _begun(making, card, (last - first, length, k))
    run = _topk(teacher, options, placement, k, chunk)
    mesh = placement.mesh
    placed = spread(dict(leaves), teacher.shardings(mesh, placement.preset))
    ready = jax.jit(lambda tree: teacher.ready(tree, options))(placed)
    del placed
    size = -(-batch_size // batch_parts(mesh)) * batch_parts(mesh)
    for start in range(done, last - first, size):
        stop = min(start + size, last - first)
        numbers = first + np.minimum(np.arange(start, start + size), stop - 1)
        batch = jax.device_put(_batch(rows[numbers]), batch_sharding(mesh))
        for array, found in zip(arrays.values(), run(ready, batch), strict=True):
            array[start:stop] = np.asarray(found)[: stop - start]
            array.flush()
        (making / "done").write_text(str(stop), "utf-8")
        if progress:
            progress(f"teacher {part.name}", stop, last - first)
    (making / "done").unlink(missing_ok=True)
    (making / "card.json").write_text(json.dumps(card, indent=1) + "\n", "utf-8")
    os.replace(making, out)
    return out


def _begun(
    making: Path, card: dict[str, Any], shape: tuple[int, ...]
) -> tuple[dict[str, Any], int]:
    """Returns the arrays to be filled and how many of their rows are."""
    making.mkdir(parents=True, exist_ok=True)
    begun = making / "begun.json"
    is_same = begun.is_file() and json.loads(begun.read_text("utf-8")) == card
    done = making / "done"
    count = int(done.read_text("utf-8")) if is_same and done.is_file() else 0
    if not count:
        done.unlink(missing_ok=True)
        begun.write_text(json.dumps(card), "utf-8")
    arrays = {
        name: np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            making / f"{name}.npy", "r+" if count else "w+", kind, shape
        )
        for name, kind in _ARRAYS.items()
    }
    return arrays, count


def _topk(
    teacher: Student, options: RunOptions, placement: Placement, k: int, chunk: int
) -> Callable[[Any, dict[str, Any]], tuple[jax.Array, jax.Array]]:
    def run(leaves: dict[str, Any], batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        model = Gemma4(teacher.config, leaves, teacher.plans, options, placement)
        hidden, _ = model.hidden(batch["tokens"], batch["positions"], batch["segments"])

        def one(_: None, part: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
            values, ids = jax.lax.top_k(jax.nn.log_softmax(model.logits(part)), k)
            return None, (ids.astype(jnp.int32), values)

        _, found = jax.lax.scan(one, None, chunks(hidden, chunk))
        ids, values = (jnp.moveaxis(x, 0, 1).reshape(*hidden.shape[:2], k) for x in found)
        return ids, values

    return jax.jit(run)


def _batch(rows: Any) -> dict[str, np.ndarray]:
    return {name: getattr(rows, name) for name in ("tokens", "positions", "segments")}


def _card(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "card.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _said(rows: NumberedRows) -> dict[str, Any]:
    """What tells rows from others, whatever order they are taken in."""
    order = rows.order()
    return json.loads(json.dumps({name: order[name] for name in ("rows", "digest")}))


class CachedTeacher:
    """A loader whose batches also hold the teacher's kept words of their rows."""

    def __init__(self, loader: Any, directory: Path, rows: NumberedRows) -> None:
        """Wraps a loader over `rows`.

        Raises: FileNotFoundError when there is no cache; InputError when it is of other rows or not complete.
        """
        self._loader, self._parts = loader, _parts(directory, rows)
        self._ends = np.asarray([last for last, _ in self._parts])

    def __next__(self) -> dict[str, np.ndarray]:
        batch = dict(next(self._loader))
        for name in _ARRAYS:
            batch[f"topk_{name}"] = self._rows(name, batch["ids"])
        return batch

    def __iter__(self) -> CachedTeacher:
        return self

    def get_state(self) -> Any:
        """Returns the state of the loader inside."""
        return self._loader.get_state()

    def set_state(self, state: Any) -> None:
        """Sets the state of the loader inside."""
        self._loader.set_state(state)

    def _rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        owner = np.searchsorted(self._ends, ids, side="right")
        starts = [0, *self._ends[:-1]]
        picked = [
            self._parts[part][1][name][number - starts[part]]
            for part, number in zip(owner, ids, strict=True)
        ]
        return np.stack(picked)


def check_cache(directory: Path, rows: NumberedRows | None, length: int, vocab_size: int) -> None:
    """Refuses a folder of kept words that a run could not use; the words themselves are not read.

    Without `rows`, which are still to be made, only their length and the vocabulary are compared.
    Raises: FileNotFoundError when there is none; InputError when it is of other rows or not complete.
    """
    _parts(directory, rows)
    for folder in _folders(directory):
        card = _card(folder) or {}
        for name, wanted in (("length", length), ("vocabulary", vocab_size)):
            if card[name] != wanted:
                raise InputError(f"{folder}: {name} {card[name]}, this run's is {wanted}")


def _folders(directory: Path) -> list[Path]:
    return [p for p in directory.glob("part-*") if re.fullmatch(r"part-\d+-of-\d+", p.name)]


def _parts(directory: Path, rows: NumberedRows | None) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Returns (one past the last row, arrays) of each part, in the order of their rows."""
    folders = _folders(directory)
    if not folders:
        raise FileNotFoundError(f"{directory}: no kept words of a teacher (part-0-of-1/card.json)")
    found: list[tuple[dict[str, Any], Path]] = []
    for folder in folders:
        card = _card(folder)
        if card is None or (rows is not None and card["rows"] != _said(rows)):
            raise InputError(
                f"{folder}: made for other rows than this run's (data, tokenizer, length)"
            )
        found.append((card, folder))
    found.sort(key=lambda one: one[0]["first"])
    _check_cover(
        directory, [card for card, _ in found], len(rows) if rows else found[0][0]["total"]
    )
    return [(card["last"], _opened(folder)) for card, folder in found]


def _opened(folder: Path) -> dict[str, np.ndarray]:
    try:
        return {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in _ARRAYS}
    except ValueError as error:  # cut short, or no array
        raise InputError(f"{folder}: cannot be read ({error})") from None


def _check_cover(directory: Path, cards: Sequence[Mapping[str, Any]], rows: int) -> None:
    reached = 0
    for card in [*cards, {"first": rows, "last": rows}]:
        if card["first"] != reached:
            raise InputError(
                f"{directory}: rows {reached} .. {card['first']} are in no part, or in two; "
                "make every part of one number of parts"
            )
        reached = card["last"]
    if len({(card["k"], card["teacher"]) for card in cards}) != 1:
        raise InputError(f"{directory}: parts of different teachers or k")
