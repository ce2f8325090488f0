"""What models keep of a reference on held-out text, in one document of plain values.

    kind            "evaluation"
    text            documents, tokens, length, format, digest, categories {NAME: documents}, warnings [sentence]
    reference       name, path, size, recipe, method, bytes, summary
    models          {NAME: {path, size, recipe, method ("qat", "rtn", "" where nothing says), bytes, float_bytes,
                        summary      against the reference (`evals/summary.py` says what every statistic is)
                        own          {name, summary}: against its own fake-quantized model, where it has one
                        categories   {CATEGORY: statistics of its documents}, where there are several
                        positions    [{from, to, statistics of the tokens with that many before them}]
                        kl_histogram}}
    differences     {"A-B": paired differences}, every two models
    recovered       {A: {B: share of what B lost that A has}}, every two of one recipe
    tasks           results of lm-eval, where tasks were asked for: {lm_eval, tasks, models {NAME: {TASK: ...}}}
    environment     versions, device

An *estimate* is {"value", "low", "high"}: 95 % of the draws of a bootstrap over documents, the same draws for every
model.
One model is in memory at a time, beside the head of the reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.checkpoint.beside import chat_template
from gemma_qat.checkpoint.store import read_manifest
from gemma_qat.companions import companions_of
from gemma_qat.data.held_out import Corpus, HeldOut, held_out
from gemma_qat.data.token_bytes import token_bytes
from gemma_qat.data.tokenizer import Tokenizer, tokenizer_among
from gemma_qat.errors import InputError
from gemma_qat.evals import (
    Resamples,
    TokenRecords,
    kl_counts,
    paired_difference,
    recovered,
    summarize,
    summarize_part,
)
from gemma_qat.evals.environment import environment
from gemma_qat.evals.reference import Reference, reference_of
from gemma_qat.evals.score import Progress, score
from gemma_qat.loading import PathLike, checked, load, named, readable
from gemma_qat.models import Gemma4, declare, parameter_count
from gemma_qat.quant import coverage, name_of, total_bytes
from gemma_qat.sharding import MeshConfig

RAW_TEXT = (
    "raw text, but the reference answers in conversations (a chat template travels with it): its perplexity on text "
    "says little; give conversations, format=chat"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How models are measured.

    `length` is tokens a row, `draws` resamples of the bootstrap, `cache` a folder where hidden states of references are
    kept for the next time (none: they are made again), `mesh` the devices that models are laid over.
    """

    length: int = 512
    draws: int = 2000
    seed: int = 0
    batch_size: int = 16
    dtype: str = "float32"
    cache: str = ""
    mesh: MeshConfig | None = None


Model = Gemma4 | PathLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measure:
    """What every model is measured with."""

    config: EvaluationConfig
    text: HeldOut
    sizes: np.ndarray
    progress: Progress | None

    def kept(self, what: Model, label: str, *, masters: bool = False) -> tuple[Reference, str]:
        """Runs a reference and lets go of all of it but its head; also returns its recipe."""
        folder = Path(self.config.cache) if self.config.cache else None
        identity = ""
        if isinstance(what, Gemma4):
            folder = None  # Who made it, and from what, is not known.
        else:
            identity = f"{named(what).identity}{' masters' if masters else ''}"
        with opened(what, self.config, masters=masters) as (model, recipe):
            found = reference_of(
                model, self.text.rows, batch_size=self.config.batch_size, folder=folder,
                identity=identity, progress=self.progress, label=label,
            )  # fmt: skip
        return found, recipe

    def records(
        self, name: str, model: Gemma4, reference: Reference, label: str
    ) -> tuple[TokenRecords, TokenRecords]:
        """Returns (records of the reference, of the model)."""
        own, found = score(
            {name: model}, reference, self.text.rows, self.sizes,
            batch_size=self.config.batch_size, progress=self.progress, label=label,
        )  # fmt: skip
        return own, found[name]


def run(
    models: Mapping[str, Model],
    reference: Model,
    text: HeldOut | Sequence[PathLike],
    tokenizer: Any,
    config: EvaluationConfig,
    own: Mapping[str, Model | None],
    progress: Progress | None,
    heard: Callable[[str, TokenRecords], None] = lambda name, records: None,
) -> dict[str, Any]:
    """Returns the document above; see `api.evaluate`. `heard` is told the records of every model."""
    if not models:
        raise InputError("no model to evaluate")
    _refuse((reference, *models.values(), *(one for one in own.values() if one is not None)))
    text, sizes = text_of(text, reference, tokenizer, config.length)
    measure = _Measure(config=config, text=text, sizes=sizes, progress=progress)
    kept, recipe = measure.kept(reference, "reference")
    documents, records = {}, {}
    draws, base = None, None
    for name, what in models.items():
        documents[name], base, records[name], draws = _one(name, what, kept, measure, own, draws)
        heard(name, records[name])
    assert base is not None and draws is not None
    return {
        "kind": "evaluation",
        "text": described(text, base, config, reference),
        "reference": _about(reference, kept.head.config, dict(kept.head.plans), recipe)
        | {"summary": summarize(base, draws)},
        "models": documents,
        "differences": {
            f"{a}-{b}": paired_difference(records[a], records[b], draws)
            for a, b in itertools.combinations(records, 2)
        },
        "recovered": {
            a: {
                b: recovered(records[a], records[b], draws)
                for b in records
                if a != b and documents[a]["recipe"] == documents[b]["recipe"] != "float"
            }
            for a in records
        },
        "environment": environment(),
    }


def keep_reference(
    reference: Model, text: HeldOut, config: EvaluationConfig, progress: Progress | None = None
) -> None:
    """Runs a reference on held-out rows and keeps its hidden states in `config.cache`, where `run` finds them."""
    measure = _Measure(config=config, text=text, sizes=np.empty(0), progress=progress)
    measure.kept(reference, "reference")


def _refuse(whats: Sequence[Model]) -> None:
    """Refuses, before an array is read, what cannot be loaded, or cannot be compared with the first.

    Raises: FileNotFoundError; InputError.
    """
    wanted = None
    for what in whats:
        config = what.config if isinstance(what, Gemma4) else checked(named(what))
        wanted = wanted or config.vocab_size
        if config.vocab_size != wanted:
            raise InputError(
                f"{_name(what)}: vocabulary of {config.vocab_size}, that of the reference is {wanted}"
            )


def text_of(
    text: HeldOut | Sequence[PathLike], reference: Model, tokenizer: Any, length: int
) -> tuple[HeldOut, np.ndarray]:
    """Returns held-out rows and the bytes of every token; the tokenizer is the reference's own unless one is given.

    Raises: InputError when there is none, or there are fewer than two documents.
    """
    if not isinstance(text, HeldOut):
        tokenizer = tokenizer or tokenizer_of(reference)
        text = held_out([Corpus(path=str(path)) for path in text], tokenizer, length)
    if tokenizer is None:
        raise InputError("evaluate: a tokenizer is needed to count the bytes of tokens")
    return text, token_bytes(tokenizer)


def _one(
    name: str, what: Model, kept: Reference, measure: _Measure, own: Mapping[str, Model | None],
    draws: Resamples | None,
) -> tuple[dict[str, Any], TokenRecords, TokenRecords, Resamples]:  # fmt: skip
    """Measures one model and lets go of it."""
    config = measure.config
    mine, label = _own(name, what, measure, own)
    with opened(what, config) as (model, recipe):
        base, found = measure.records(name, model, kept, "evaluate")
        draws = draws or Resamples(base.documents, seed=config.seed, draws=config.draws)
        document = _about(what, model.config, dict(model.plans), recipe) | {
            "summary": summarize(found, draws),
            "positions": _positions(found, config),
            "kl_histogram": kl_counts(found.kl),
        }
        if len(measure.text.categories) > 1:
            document["categories"] = _categories(found, measure.text, config)
        if mine is not None:
            _, beside = measure.records(name, model, mine, "evaluate beside its own")
            document["own"] = {"name": label, "summary": summarize(beside, draws)}
    return document, base, found, draws


def _own(
    name: str, what: Model, measure: _Measure, own: Mapping[str, Model | None]
) -> tuple[Reference | None, str]:
    """Returns the hidden states of a model's own fake-quantized model, if there is one, and what it is called."""
    label = f"own of {name}"
    if name in own:
        other = own[name]
        return (None, "") if other is None else (measure.kept(other, label)[0], _name(other))
    if isinstance(what, Gemma4) or not named(what).has_masters():
        return None, ""
    return measure.kept(what, label, masters=True)[0], "fake-quantized masters"


@contextlib.contextmanager
def opened(
    what: Model, config: EvaluationConfig, *, masters: bool = False
) -> Iterator[tuple[Gemma4, str]]:
    """Gives a model to measure, packed where it is stored so unless `masters` are asked for, and its recipe."""
    if isinstance(what, Gemma4):
        yield what, "quantized" if what.plans else "float"
        return
    with readable(named(what)) as found:
        model = load(
            found.path, config.dtype, found.recipe, config.mesh,
            packed=found.recipe is None and not masters,
        )  # fmt: skip
        recipe = found.recipe and name_of(found.recipe, model.config.family)
        yield model, recipe or _recipe(found.directory)


def _about(what: Model, config: Any, plans: dict[str, Any], recipe: str) -> dict[str, Any]:
    rows = coverage(declare(config).values(), plans)
    float_bytes = 2 * parameter_count(config)
    return {
        "name": _name(what),
        "path": "" if isinstance(what, Gemma4) else str(what),
        "size": config.name,
        "recipe": recipe,
        "method": _method(what, recipe),
        "bytes": int(total_bytes(rows)) if plans else float_bytes,
        "float_bytes": float_bytes,
    }


def _name(what: Model) -> str:
    return what.config.name if isinstance(what, Gemma4) else Path(what).name or str(what)


def _method(what: Model, recipe: str) -> str:
    """How a model came to its grid, as far as its checkpoint says: a packed one does not say."""
    if recipe == "float":
        return "float"
    if isinstance(what, Gemma4):
        return ""
    found = named(what)
    return "qat" if found.has_masters() else "rtn" if found.recipe else ""


def _recipe(directory: Path) -> str:
    is_ours = (directory / "manifest.json").is_file()
    return (read_manifest(directory).recipe if is_ours else "") or "float"


def described(
    text: HeldOut, base: TokenRecords, config: EvaluationConfig, reference: Model
) -> dict[str, Any]:
    """Returns what a document says of its text, with sentences of warning."""
    warnings = []
    if text.format == "text" and not isinstance(reference, Gemma4):
        where = named(reference).directory
        if chat_template(companions_of(where).files) is not None:
            warnings.append(RAW_TEXT)
    if text.dropped:
        warnings.append(
            f"{text.dropped} tokens of conversations longer than {config.length} were left out"
        )
    counts = np.bincount(text.category, minlength=len(text.categories))
    return {
        "documents": base.documents,
        "tokens": base.tokens,
        "length": text.rows.tokens.shape[1],
        "format": text.format,
        "digest": f"{text.rows.digest:08x}",
        "categories": dict(zip(text.categories, counts.tolist(), strict=True)),
        "warnings": warnings,
    }


def _categories(records: TokenRecords, text: HeldOut, config: EvaluationConfig) -> dict[str, Any]:
    # Records number the documents that have scored tokens; those are the ones rows hold, in their order.
    present = text.scored_documents
    of_token = text.category[present][records.document]
    found = {}
    for index, name in enumerate(text.categories):
        mask = of_token == index
        if mask.any():
            found[name] = summarize_part(records, mask, seed=config.seed, draws=config.draws)
    return found


def _positions(records: TokenRecords, config: EvaluationConfig) -> list[dict[str, Any]]:
    """Statistics by how many tokens stand before one: 1, 2 to 3, 4 to 7, ..."""
    found, start = [], 1
    while start <= records.position.max():
        mask = (records.position >= start) & (records.position < 2 * start)
        if mask.any():
            part = summarize_part(records, mask, seed=config.seed, draws=config.draws)
            found.append({"from": start, "to": 2 * start} | part)
        start *= 2
    return found


def tokenizer_of(reference: Model) -> Tokenizer:
    """Returns the tokenizer that travels with a checkpoint.

    Raises: InputError when there is none.
    """
    found = None
    if not isinstance(reference, Gemma4):
        found = tokenizer_among(companions_of(named(reference).directory).files)
    if found is None:
        raise InputError(f"{_name(reference)}: no tokenizer lies beside it; give one")
    return Tokenizer.load(found)
