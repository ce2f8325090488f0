"""What the cells of a sweep are measured with, and what was measured: kept, so that it is measured once.

CELL/evaluation.json       what `gemma-qat evaluate` writes, of this cell alone
.sweep/CELL.npz            the records of its tokens, from which cells are compared in pairs and seeds put together
.sweep/hidden_states/      of the reference; `kept.json` in it says of which, on which text
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_qat.checkpoint.appear import appearing_file
from gemma_qat.checkpoint.store import write_json
from gemma_qat.companions import companions_of
from gemma_qat.config import MeasureConfig
from gemma_qat.config.values import encode
from gemma_qat.data.files import tokenizer_path
from gemma_qat.data.held_out import Corpus, HeldOut, first_rows, held_out
from gemma_qat.data.prepare import write_stdlib
from gemma_qat.data.tokenizer import Tokenizer, tokenizer_among
from gemma_qat.evals import TokenRecords
from gemma_qat.evaluation import EvaluationConfig, keep_reference
from gemma_qat.evaluation import run as evaluate
from gemma_qat.loading import named
from gemma_qat.start import resolve_checkpoint
from gemma_qat.sweep.plan import Plan
from gemma_qat.sweep.text import check_text, corpora_of

Progress = Callable[[str, int, int], None]

_COLUMNS = tuple(field.name for field in dataclasses.fields(TokenRecords))


class Measure:
    """The held-out text of a sweep, read when it is first needed, and what was measured on it.

    Where others may be measuring beside (`shared`), hidden states are written by the one whose cell is
    the reference, and read by the others.
    """

    def __init__(
        self, plan: Plan, progress: Progress | None = None, *, shared: bool = False
    ) -> None:
        self.plan, self._progress = plan, progress
        self._hidden_states, self._shared = plan.hidden / "hidden_states", shared
        self._text: tuple[HeldOut, Tokenizer] | None = None

    def check(self) -> None:
        """Refuses text that is not there, or that a cell is trained or calibrated on.

        Raises: InputError; FileNotFoundError.
        """
        check_text(self.plan.sweep)

    def is_kept(self, name: str) -> bool:
        """Whether a cell was measured as it now is."""
        return self._stored(name) is not None and self._file(name).is_file()

    def evaluation(self, name: str) -> dict[str, Any]:
        """Returns what was measured of a cell."""
        found: dict[str, Any] = json.loads(self._file(name).read_text("utf-8"))
        return found

    def records(self, name: str) -> TokenRecords:
        """Returns the records of a cell's tokens."""
        stored = self._stored(name)
        assert stored is not None
        return TokenRecords(**stored)

    def keep_reference(self) -> None:
        """Runs the reference, a cell that is done, and keeps its hidden states for all who measure against it."""
        text, _ = self._text = self._text or self._read_text()
        how = self._how(self.plan.sweep.reference, str(self._hidden_states))
        keep_reference(self.plan.reference, text, how, self._progress)
        with appearing_file(self._hidden_states / "kept.json") as file:
            write_json(file, {"digest": self._digest_of(self._reference_digest())})

    def run(self, name: str) -> None:
        """Measures a cell and keeps what is found.

        Raises: InputError as `evaluate` does.
        """
        found: list[TokenRecords] = []
        text, tokenizer = self._text = self._text or self._read_text()
        planned = self.plan.cells[name]
        is_read = not self._shared or self._is_reference_kept()
        how = self._how(name, str(self._hidden_states) if is_read else "")
        document = evaluate(
            {name: planned.folder}, self.plan.reference, text, tokenizer, how, {name: None},
            self._progress, lambda _, records: found.append(records),
        )  # fmt: skip
        with appearing_file(self._file(name)) as file:
            write_json(file, document)
        columns = {column: getattr(found[0], column) for column in _COLUMNS}
        with appearing_file(self._npz(name)) as file, file.open("wb") as out:
            np.savez(out, digest=np.asarray(self._digest(name)), **columns)

    def _how(self, name: str, cache: str) -> EvaluationConfig:
        config, mesh = self.plan.sweep.evaluation, self.plan.cells[name].cell.config.mesh
        return EvaluationConfig(
            length=config.length, draws=config.draws, batch_size=config.batch_size,
            dtype=config.dtype, cache=cache, mesh=mesh if jax.device_count() > 1 else None,
        )  # fmt: skip

    def _is_reference_kept(self) -> bool:
        try:
            said = json.loads((self._hidden_states / "kept.json").read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return said == {"digest": self._digest_of(self._reference_digest())}

    def _file(self, name: str) -> Path:
        return self.plan.cells[name].folder / "evaluation.json"

    def _npz(self, name: str) -> Path:
        return self.plan.hidden / f"{name}.npz"

    def _stored(self, name: str) -> dict[str, np.ndarray] | None:
        try:
            with np.load(self._npz(name)) as stored:
                if str(stored["digest"]) != self._digest(name):
                    return None
                return {column: stored[column] for column in _COLUMNS}
        except (OSError, KeyError, ValueError):
            return None

    def _digest(self, name: str) -> str:
        """Of the cell, of what it is compared with, and of the text by its files' names, sizes and times."""
        return self._digest_of(self.plan.cells[name].digest, self._reference_digest())

    def _reference_digest(self) -> str:
        plan = self.plan
        if plan.sweep.reference in plan.cells:
            return plan.cells[plan.sweep.reference].digest
        return named(plan.reference).identity

    def _digest_of(self, *models: str) -> str:
        """Of models on the text as it is."""
        corpora = corpora_of(self.plan.sweep)
        config = dataclasses.replace(self.plan.sweep.evaluation, text=tuple(corpora))
        said = [
            *models, encode(config, MeasureConfig), [_files(_where(corpus)) for corpus in corpora],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    def _read_text(self) -> tuple[HeldOut, Tokenizer]:
        config = self.plan.sweep.evaluation
        beside = tokenizer_among(companions_of(resolve_checkpoint(self.plan.reference)).files)
        tokenizer = Tokenizer.load(beside or tokenizer_path(self.plan.sweep.cells[0].config.data))
        corpora = corpora_of(self.plan.sweep)
        for corpus in corpora:
            if corpus.kind == "stdlib" and not Path(corpus.path, "source").is_dir():
                write_stdlib(Path(corpus.path), self._progress or (lambda *_: None))
        text = held_out(corpora, tokenizer, config.length)
        rows = first_rows(text.rows, config.rows_per_document)
        return dataclasses.replace(text, rows=rows), tokenizer


def _where(corpus: Corpus) -> Path:
    # Beside the standard library's texts lies a tokenizer, which every run writes again.
    return Path(corpus.path, "source") if corpus.kind == "stdlib" else Path(corpus.path)


def _files(path: Path) -> list[list[Any]]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
