"""What models are measured against: the last hidden states of a reference, and the head that takes them to logits.

A token's log probabilities are V numbers, its hidden state D, and the head is one matrix for all of them. So the
states are what is kept, in memory or on disk, and log probabilities are computed again, exactly, a few positions at a
time:

    kept per token, float32       E2B        12B        31B
    log probabilities          1.05 MB    1.05 MB    1.05 MB
    hidden state               6.14 kB    15.4 kB    21.5 kB

Once they are kept the rest of the reference is not needed: a model and one head are in memory at a time. llama.cpp's
`--kl-divergence-base` keeps log probabilities, rounded to 16 bits to halve them; nothing is rounded here.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemma_qat.data.packing import Rows
from gemma_qat.errors import InputError
from gemma_qat.models import Gemma4, ModelConfig, RunOptions
from gemma_qat.models.gemma4 import head_logits, head_name
from gemma_qat.nn.module import merge, split
from gemma_qat.quant.plan import Plans
from gemma_qat.sharding import Placement, batch_parts, batch_sharding, constrain

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """How hidden states become logits; hashable, the leaves go beside it."""

    config: ModelConfig
    plans: tuple[tuple[str, Any], ...]
    options: RunOptions
    placement: Placement | None

    def logits(
        self, leaves: Mapping[str, Any], hidden: Float[Array, "B T D"]
    ) -> Float[Array, "B T V"]:
        """Returns the soft-capped logits."""
        plans: Plans = dict(self.plans)
        hidden = hidden.astype(self.options.dtype)
        return head_logits(self.config, leaves, plans, hidden, self.options, self.placement)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference's hidden states of some rows, and its head.

    Shapes: hidden float32 [rows, T, D], an array or a file that is mapped into memory; leaves by in-memory path.
    """

    rows: Rows
    hidden: np.ndarray
    head: Head
    leaves: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        """The size of its vocabulary."""
        return self.head.config.vocab_size


def reference_of(
    model: Gemma4,
    rows: Rows,
    *,
    batch_size: int = 16,
    folder: Path | None = None,
    identity: str = "",
    progress: Progress | None = None,
    label: str = "reference",
) -> Reference:
    """Returns what `model` says of `rows`, kept below `folder` under a name that `identity` and the rows give.

    What is there is used again: the model is not run. A run that was stopped goes on with the row it had come to; one
    that another process is at is waited for.
    Raises: InputError when the model's vocabulary is smaller than the rows', or the folder cannot be written.
    """
    check_vocabulary("the reference", model, rows)
    leaves = model.leaves()
    prefix = f"{head_name(model.config)}/"
    kept = {path: leaf for path, leaf in leaves.items() if path.startswith(prefix)}
    head = Head(
        config=model.config, plans=tuple(dict(model.plans).items()), options=model.options,
        placement=model.placement,
    )  # fmt: skip
    if folder is None:
        hidden = np.empty((*rows.tokens.shape, model.config.width), np.float32)
        _fill(hidden, 0, model, rows, batch_size, progress, label, lambda done: None)
    else:
        hidden = _kept(folder, identity, model, rows, batch_size, progress, label)
    return Reference(rows=rows, hidden=hidden, head=head, leaves=kept)


def check_vocabulary(name: str, model: Gemma4, rows: Rows) -> None:
    """Refuses rows with a token that the model does not have.

    Raises: InputError.
    """
    largest = rows.tokens.max(initial=0)
    if largest >= model.config.vocab_size:
        raise InputError(
            f"{name}: vocabulary of {model.config.vocab_size}, but the text has token {largest}"
        )


def batch_of(
    arrays: Mapping[str, np.ndarray], start: int, size: int, placement: Placement | None
) -> dict[str, jax.Array]:
    """Returns rows start .. start + size over the devices of a mesh, filled up with empty ones: shapes repeat."""
    cut = {name: np.asarray(array[start : start + size]) for name, array in arrays.items()}
    short = size - len(next(iter(cut.values())))
    full = {n: np.pad(a, ((0, short), *((0, 0),) * (a.ndim - 1))) for n, a in cut.items()}
    if placement is None or placement.mesh.size == 1:
        return {name: jnp.asarray(array) for name, array in full.items()}
    return jax.device_put(full, batch_sharding(placement.mesh))


def rows_at_once(batch_size: int, placement: Placement | None) -> int:
    """Returns the batch size, rounded up to one that all devices have an equal part of."""
    parts = 1 if placement is None else batch_parts(placement.mesh)
    return -(-batch_size // parts) * parts


def _kept(
    folder: Path, identity: str, model: Gemma4, rows: Rows, batch_size: int,
    progress: Progress | None, label: str,
) -> np.ndarray:  # fmt: skip
    shape = (*rows.tokens.shape, model.config.width)
    said = {
        "reference": identity, "rows": rows.digest, "shape": shape, "dtype": model.options.dtype,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
    whole, making = folder / f"reference-{name}", folder / f".reference-{name}.making"
    if not whole.is_dir():
        making.mkdir(parents=True, exist_ok=True)
        with (making / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Another process may be making it: it is waited for.
            if whole.is_dir():
                shutil.rmtree(making, ignore_errors=True)
            else:
                _make(making, said, model, rows, batch_size, progress, label)
                os.replace(making, whole)
    return np.load(whole / "hidden.npy", mmap_mode="r")


def _make(
    making: Path, said: Mapping[str, Any], model: Gemma4, rows: Rows, batch_size: int,
    progress: Progress | None, label: str,
) -> None:  # fmt: skip
    """Fills a folder with hidden states, from the row on that `done` in it says."""
    done, file, shape = making / "done", making / "hidden.npy", said["shape"]
    begun = int(done.read_text("utf-8")) if done.is_file() else 0
    if not begun:
        _refuse_full(making.parent, 4 * int(np.prod(shape, dtype=np.int64)))
    hidden = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        file, "r+" if begun and file.is_file() else "w+", np.float32, shape
    )

    def note(rows_done: int) -> None:
        hidden.flush()
        (making / "done.new").write_text(str(rows_done), "utf-8")
        os.replace(making / "done.new", done)

    _fill(hidden, begun, model, rows, batch_size, progress, label, note)
    done.unlink()
    (making / "card.json").write_text(json.dumps(said, indent=1) + "\n", "utf-8")


def _refuse_full(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise InputError(
            f"{folder}: {wanted / 1e9:.2f} GB of hidden states to keep, {free / 1e9:.2f} GB free"
        )


def _fill(
    hidden: np.ndarray, begun: int, model: Gemma4, rows: Rows, batch_size: int,
    progress: Progress | None, label: str, note: Callable[[int], None],
) -> None:  # fmt: skip
    """Writes the hidden states of all rows from `begun` on."""
    size = rows_at_once(batch_size, model.placement)
    arrays = {"tokens": rows.tokens, "positions": rows.positions, "segments": rows.segments}
    graph, state = split(model)
    for start in range(begun, len(rows), size):
        stop = min(start + size, len(rows))
        found = hidden_states(graph, state, batch_of(arrays, start, size, model.placement))
        hidden[start:stop] = np.asarray(found)[: stop - start]
        note(stop)
        if progress:
            progress(label, stop, len(rows))


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(graph: Any, state: Any, batch: dict[str, jax.Array]) -> Float[Array, "B T D"]:
    """Returns the final hidden states of a batch, float32, whole on every device."""
    model: Gemma4 = merge(graph, state)
    found, _ = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
    return constrain(found.astype(jnp.float32), (None, None, None), model.placement)
