"""What a run leaves beside its checkpoints: what was trained, on what, with which numbers, and what came of it.

    config.json     the resolved config, which `config.from_json` reads back
    coverage.txt    one row an array for people; coverage.json the same for programs
    beside/         what travels with the model: tokenizer, templates
    run.json        versions, devices, mesh, parameters, digests of the data, when it ran; nothing of the environment.
                    A session's "ended" is null while it runs and after it was killed; "error" says why one failed
    codes.json      of a quantized run that came to its end: use of codes and error, site by site (`train/codes.py`)

Beside them lie checkpoints/, metrics.jsonl (a line of figures a report) and tensorboard/ (`train/`), the page
report.html with its numbers in report.json (`cli/train.py`), and while it trains the mark .running (`runs.py`). Secrets
in a config are redacted in all of them (`redaction.py`).

The first process of a run writes them; nothing is written before everything that can refuse a run has been asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from gemma_qat import __version__
from gemma_qat.checkpoint.appear import appearing_file
from gemma_qat.checkpoint.beside import FOLDER, Beside
from gemma_qat.checkpoint.store import write_json
from gemma_qat.config import ExperimentConfig, to_json
from gemma_qat.data.files import needs_tokenizer, tokenizer_path
from gemma_qat.data.tokenizer import tokenizer_files
from gemma_qat.errors import InputError
from gemma_qat.models import Fitted, ModelConfig, declare
from gemma_qat.quant import Row, coverage
from gemma_qat.redaction import redacted, secrets_within, shown
from gemma_qat.runs import latest_save
from gemma_qat.train import Program, Trained

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of one run; `program` and `rows` are what trains and what on."""

    directory: Path
    config: ExperimentConfig
    model: ModelConfig | Fitted
    program: Program
    rows: Any
    beside: Beside

    def begin(self) -> None:
        """Writes config, coverage and companions, and says in run.json that a session began."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.beside.keep(self.directory)
        for name, content in self._tokenizer().items():
            (self.directory / FOLDER / name).write_bytes(content)
        with appearing_file(self.directory / "config.json") as file:  # A resume reads it.
            file.write_text(to_json(self.config), "utf-8")
        table = self._coverage()
        write_json(self.directory / "coverage.json", [dataclasses.asdict(row) for row in table])
        lines = "".join(f"{_line(row)}\n" for row in table)
        (self.directory / "coverage.txt").write_text(lines, "utf-8")
        sessions = [
            *_kept(self._file, "sessions", []),
            {"started": _now(), "ended": None, "steps": None},
        ]
        self._write(self._described() | {"sessions": sessions})

    def end(self, steps: int, trained: Trained | None) -> None:
        """Says in run.json that the session ended with so many steps done; of a whole run, writes codes.json."""
        sessions = _kept(self._file, "sessions", [{}])
        sessions[-1] |= {"ended": _now(), "steps": steps}
        self._write(self._described() | {"sessions": sessions})
        if trained is not None and trained.codes is not None:
            (self.directory / "codes.json").write_text(self._codes(trained, steps), "utf-8")

    def fail(self, error: BaseException) -> None:
        """Says in run.json that the session ended in an error, if it still can; what is left is the newest save."""
        last = latest_save(self.directory / "checkpoints")
        first = (str(error).strip().splitlines() or [""])[0]
        if not isinstance(error, InputError):
            first = f"{type(error).__name__}: {first}".removesuffix(": ")
        said = redacted(first, secrets_within(self.config))
        with contextlib.suppress(OSError):
            sessions = _kept(self._file, "sessions", [{}])
            sessions[-1] |= {"ended": _now(), "steps": int(last.name) if last else 0, "error": said}
            self._write({**json.loads(self._file.read_text("utf-8")), "sessions": sessions})

    def _write(self, about: dict[str, Any]) -> None:
        with appearing_file(self._file) as file:
            write_json(file, shown(about))

    def _codes(self, trained: Trained, steps: int) -> str:
        found = {**(trained.codes or {}), "recipe": shown(self.config.recipe), "step": steps}
        if trained.expert_share is not None:
            shapes = self.program.student.config.layer_shapes()
            layers = [n for n, shape in enumerate(shapes) if shape.experts is not None]
            shares = [[float(share) for share in row] for row in trained.expert_share]
            found["expert_load"] = dict(zip(map(str, layers), shares, strict=True))
        elif loads := _kept(self.directory / "codes.json", "expert_load", None):
            found["expert_load"] = loads  # A whole run that was started again did no step.
        return json.dumps(found) + "\n"

    @property
    def _file(self) -> Path:
        return self.directory / "run.json"

    def _tokenizer(self) -> dict[str, bytes]:
        data = self.config.data
        if not data.tokenizer and not needs_tokenizer(data):
            return {}  # The start's own, if it has one, is beside already.
        return tokenizer_files(tokenizer_path(data))

    def _coverage(self) -> list[Row]:
        plans = self.model.plans if isinstance(self.model, Fitted) else {}
        return coverage(declare(self.program.student.config).values(), plans)

    def _described(self) -> dict[str, Any]:
        program, data = self.program, self.config.data
        kinds = Counter(device.device_kind for device in program.mesh.devices.flat)
        return {
            "kind": "run", "name": self.config.name, "model": self.config.model,
            "recipe": self.config.recipe, "start": self.config.start,
            "loss": self.config.train.loss, "planned_steps": self.config.train.steps,
            "versions": _versions(),
            "devices": dict(kinds), "processes": jax.process_count(),
            "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
            "parameters": sum(p.size for p in declare(program.student.config).values()),
            "trained": sum(math.prod(x.shape) for x in program.selection.of(program.leaves).values()),
            "data": {
                "kind": data.kind, "length": data.length, **self.rows.order(),
                "tokenizer": {n: hashlib.sha256(c).hexdigest() for n, c in self._tokenizer().items()},
            },
        }  # fmt: skip


def _line(row: Row) -> str:
    text = (
        f"{row.site:<52}{row.format:<12}{row.bits:>7.3f} bits{row.bytes:>16,.0f} B{row.share:>8.2%}"
    )
    return f"{text}  {row.activations}".rstrip()


def _versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "gemma_qat": __version__}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}


def _kept(file: Path, key: str, otherwise: Any) -> Any:
    """What a file of an earlier session says under `key`; `otherwise` where there is none, or it was cut off."""
    try:
        return json.loads(file.read_text("utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
