"""Whether a config would start on a machine: everything that `training.run` refuses, found without running it.

In order: config and recipe on the mesh; paths, from names, headers and a few documents; the run's folder and what it
would go on from; one step's memory and time; room for the saves. Problems are gathered, not only the first. The rules
are those that training applies: this asks for them early, on the submitting machine too. What only arrays tell is not
found: weights that are not finite, a document in the middle that cannot be read, adapters of another start.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gemma_qat.checkpoint.store import nbytes
from gemma_qat.companions import companions_of
from gemma_qat.config import ExperimentConfig
from gemma_qat.data.loader import make_loader
from gemma_qat.data.looked_at import Looked, look_at, rows_of, sources_of, tokenizer_of
from gemma_qat.errors import InputError
from gemma_qat.launch.machines import Machine
from gemma_qat.models import ModelConfig, size_named
from gemma_qat.plan import Workload
from gemma_qat.preflight.disk import REPORT_BYTES, Space, saves_to_come, spaces, try_directory
from gemma_qat.preflight.findings import Findings
from gemma_qat.preflight.step import SLACK, Step, check_hosts, refuse_slices, step_here, step_on
from gemma_qat.runs import read_run
from gemma_qat.sharding import abstract_mesh, make_mesh
from gemma_qat.start import check_start, check_teacher, model_of, workload_of
from gemma_qat.train import Program
from gemma_qat.train.saves import check_latest, read_data, save_shapes, saves
from gemma_qat.train.teacher_cache import check_cache
from gemma_qat.training import program_for

NEAR = 0.9
"""Share of what there is from which a need is warned of."""

LONG = 1.0
"""Hours that a run without saves on the way may lose before that is warned of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was found; what could not be found for a problem before it is None.

    Units: bytes; `begun` and `steps` in steps, those that are done and all.
    """

    name: str
    model: str
    recipe: str
    loss: str
    machine: str
    """Its name; empty for the devices of this machine."""
    devices: int
    hosts: int
    mesh: dict[str, int]
    rows: int
    length: int
    steps: int
    begun: int | None = None
    save_every: int = 0
    step: Step | None = None
    save: dict[str, int] | None = None
    """Of one save, by part."""
    saves: int | None = None
    """Still to be written."""
    saves_at_once: int | None = None
    data: tuple[Looked, ...] = ()
    spaces: tuple[Space, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def hours(self) -> tuple[float, float] | None:
        """Of the steps that are left, at best and at worst."""
        if self.step is None or self.step.best is None or self.step.worst is None:
            return None
        left = max(self.steps - (self.begun or 0), 0) / 3600
        return left * self.step.best, left * self.step.worst

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain values."""
        return dataclasses.asdict(self)


def preflight(
    config: ExperimentConfig,
    machine: Machine | None = None,
    *,
    paths: bool = True,
    compiles: bool | None = None,
) -> Report:
    """Returns what stands in the way of a run of `config` and what it would take, on a machine or on this one.

    Reads no weights and trains nothing. Without `paths` nothing outside the config is looked at. `compiles` False
    estimates in any case; with problems it is an estimate too.
    """
    check = _Check(config, machine)
    check.config_itself()
    if paths:
        check.start_and_teacher()
        check.documents()
        check.folder()
    check.one_step(compiles)
    check.saves_and_space(paths)
    return check.report()


class _Check:
    """The parts of the check, in order; each leaves what it found for the next."""

    def __init__(self, config: ExperimentConfig, machine: Machine | None) -> None:
        self.config, self.machine, self.found = config, machine, Findings()
        self.directory = Path(config.directory)
        self.cache = (
            Path(config.data.cache) if config.data.cache else Path(config.directory, "rows")
        )
        self.mesh: Any = None
        self.program: Program | None = None
        self.work: Workload | None = None
        self.teacher: ModelConfig | None = None
        self.rows: Any = None
        self.begun: int | None = None
        self.left: dict[str, Any] = {}

    def config_itself(self) -> None:
        config, machine = self.config, self.machine
        with self.found.refusals():
            self.directory = config.folder
        with self.found.refusals():
            model_of(config)
        with self.found.refusals():
            config.train.check_length(config.data.length)
        with self.found.refusals():
            if machine is None:
                self.mesh = make_mesh(config.mesh)
            else:
                refuse_slices(config.mesh, machine)
                self.mesh = abstract_mesh(config.mesh, machine.place.devices)
        if self.mesh is not None:
            with self.found.refusals():
                self.program = program_for(config, self.mesh)
                self.work = workload_of(config)

    def start_and_teacher(self) -> None:
        config = self.config
        with self.found.refusals():
            check_start(config)
        with self.found.refusals():
            if config.start:
                companions_of(config.start)
        if (
            config.train.needs_teacher
            and not config.teacher_cache
            and (config.start or config.teacher)
        ):
            with self.found.refusals():
                self.teacher = check_teacher(config)

    def documents(self) -> None:
        data, looked, tokenizer = self.config.data, [], None
        vocab_size = self.work.config.vocab_size if self.work else size_or_none(self.config)
        if vocab_size is None:
            return
        with self.found.refusals():
            tokenizer = tokenizer_of(data, vocab_size)
        for source in sources_of(data):
            with self.found.refusals():
                looked.append(look_at(source, data, tokenizer))
        self.left["data"] = tuple(looked)
        with self.found.refusals():
            if looked and all(one.written for one in looked):
                self.rows = rows_of(data, self.cache, tokenizer)
        tokens = sum(one.documents * one.tokens for one in looked)
        few = tokens < data.length * self.config.train.batch_size
        if few and tokens and self.rows is None and not data.blend:
            self.found.warn(
                f"{data.path}: about {tokens:,.0f} tokens, fewer than the {self.config.train.batch_size} rows of "
                f"{data.length} of one step: training refuses a batch larger than all rows"
            )
        if self.config.train.needs_teacher and self.config.teacher_cache:
            with self.found.refusals():
                check_cache(Path(self.config.teacher_cache), self.rows, data.length, vocab_size)

    def folder(self) -> None:
        corpora = [Path(one.path) for one in self.left.get("data", ()) if not one.written]
        for directory in dict.fromkeys((self.directory, self.cache, *corpora)):
            with self.found.refusals():
                try_directory(directory)
        if read_run(self.directory).state == "running":
            self.found.warn(
                f"{self.directory}: this run is being trained, or was a short while ago: training waits a minute for "
                "that to end, then it is refused; from another machine two would write over each other's saves"
            )
        if self.program is None:
            return
        with self.found.refusals():
            self.begun = check_latest(
                self.directory / "checkpoints", model_of(self.config), self.program
            )
        if self.rows is not None:
            with self.found.refusals():
                loader = make_loader(
                    self.rows, batch_size=self.config.train.batch_size, seed=self.config.train.seed
                )
                if self.begun is not None:
                    loader.set_state(read_data(self.directory / "checkpoints")["loader"])

    def one_step(self, compiles: bool | None) -> None:
        config, machine = self.config, self.machine
        if self.work is None:
            return
        work = self.work
        if self.teacher is not None or (config.train.needs_teacher and config.teacher_cache):
            work = dataclasses.replace(work, teacher=self.teacher or work.config)
        if config.teacher_cache:
            self.found.warn(
                "memory and time have the teacher in the step, which teacher_cache leaves out"
            )
        with self.found.refusals():
            if machine is None:
                step = step_here(work, self.mesh)
            else:
                if self.found.problems:
                    compiles = False
                if compiles is not False or not machine.is_tpu:
                    check_hosts(config.mesh, machine)
                step = step_on(work, machine, compiles)
            self.left["step"] = step
            self._memory(step)
        if machine is not None and machine.is_tpu and config.options.dtype == "float32":
            self.found.warn("options.dtype=float32: TPUs multiply bfloat16 several times as fast")

    def _memory(self, step: Step) -> None:
        if step.available is None:
            return
        gib = 2**30
        said = f"{step.peak / gib:.2f} of {step.available / gib:.2f} GiB a device"
        if not step.fits and step.may_fit:
            on_tpu = self.machine is not None and self.machine.is_tpu
            tells = (
                "the compiler tells, where libtpu is installed"
                if on_tpu
                else "the first step tells"
            )
            self.found.warn(
                f"memory: {said} by an estimate, which may be up to {SLACK} times too high: it may fit or not; {tells}"
            )
        elif not step.fits:
            more = (step.peak - step.available) / gib
            too_much = f", {more:.2f} GiB too much" if more > 0 else ""
            self.found.problem(
                f"memory: {said} ({step.how}){too_much}; fewer rows, microbatches, remat=full or more devices "
                "take less"
            )
        elif step.peak > NEAR * step.available:
            self.found.warn(f"memory: {said} ({step.how}), little is left")

    def saves_and_space(self, paths: bool) -> None:
        config = self.config
        if self.program is None:
            return
        shapes = save_shapes(model_of(config), self.program)
        sizes = {part: sum(map(nbytes, leaves.values())) for part, leaves in shapes.items()}
        there = [int(save.name) for save in saves(self.directory / "checkpoints")] if paths else []
        count, most = saves_to_come(config.train, there)
        self.left |= {"save": sizes, "saves": count, "saves_at_once": most}
        if not config.train.save_every:
            self._nothing_saved()
        if not paths:
            return
        unmade = () if self.rows is not None else self.left.get("data", ())
        rows = sum((one.row_bytes for one in unmade), 0.0)
        more = float(sum(sizes.values()) * (most - len(there)))
        reports = (config.train.steps - (self.begun or 0)) / config.train.log_every
        needs = [
            ("saves", self.directory, more), ("rows", self.cache, rows),
            ("logs", self.directory, max(reports, 0.0) * REPORT_BYTES),
        ]  # fmt: skip
        with self.found.refusals():
            self.left["spaces"] = tuple(spaces(needs))
        for space in self.left.get("spaces", ()):
            self._room(space)

    def _nothing_saved(self) -> None:
        hours = self.report().hours
        if hours is not None and hours[0] > LONG:
            self.found.warn(
                f"train.save_every=0: {hours[0]:.1f} hours of work at best, and nothing is saved before the end"
            )

    def _room(self, space: Space) -> None:
        parts = ", ".join(f"{what} {size / 2**30:.2f}" for what, size in space.needed.items())
        said = f"{space.total / 2**30:.2f} GiB are written ({parts}), {space.free / 2**30:.2f} are free"
        if space.total > space.free:
            self.found.problem(
                f"{space.path}: {said}; fewer saves (train.keep, train.keep_every) or another directory take less"
            )
        elif space.total > NEAR * space.free:
            self.found.warn(f"{space.path}: {said}")

    def report(self) -> Report:
        config, machine = self.config, self.machine
        recipe = self.work.recipe if self.work else config.recipe
        return Report(
            name=config.name, model=config.model, recipe=recipe, loss=config.train.loss,
            machine=machine.name if machine else "", hosts=machine.hosts if machine else 1,
            devices=machine.place.devices if machine else getattr(self.mesh, "size", 0),
            mesh=dict(self.mesh.shape) if self.mesh is not None else {},
            rows=config.train.batch_size, length=config.data.length, steps=config.train.steps,
            begun=self.begun, save_every=config.train.save_every,
            problems=tuple(self.found.problems), warnings=tuple(self.found.warnings), **self.left,
        )  # fmt: skip


def size_or_none(config: ExperimentConfig) -> int | None:
    """Returns the vocabulary of a config's size, None for a size that is refused already."""
    try:
        return size_named(config.model).vocab_size
    except InputError:
        return None
