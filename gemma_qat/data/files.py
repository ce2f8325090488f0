"""From a data config, or a list of files, to rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gemma_qat.data.blend import Blend
from gemma_qat.data.encode import behind_bos, encoder
from gemma_qat.data.kinds import KINDS, SourceSettings, fingerprint, open_kind
from gemma_qat.data.loader import Batch, make_loader
from gemma_qat.data.packing import Progress, pack
from gemma_qat.data.prepare import STDLIB_TOKENIZER, stdlib_tokenizer, write_stdlib
from gemma_qat.data.sources import text_source
from gemma_qat.data.store import BLOCK, Plan, StoredRows, kept, stored_rows
from gemma_qat.data.tokenizer import Tokenizer
from gemma_qat.errors import InputError

_VERSION = 1
"""Counts changes to how documents become rows: rows of another version are made again."""


@runtime_checkable
class WeightedSettings(SourceSettings, Protocol):
    """What `config.BlendConfig` offers."""

    @property
    def weight(self) -> float: ...  # noqa: D102


@runtime_checkable
class DataSettings(SourceSettings, Protocol):
    """What `config.DataConfig` offers."""

    @property
    def blend(self) -> tuple[WeightedSettings, ...]: ...  # noqa: D102
    @property
    def tokenizer(self) -> str: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def length(self) -> int: ...  # noqa: D102
    @property
    def empty_thought(self) -> bool: ...  # noqa: D102
    @property
    def cache(self) -> str: ...  # noqa: D102
    @property
    def bos_in_every_piece(self) -> bool: ...  # noqa: D102


def training_rows(
    data: DataSettings,
    cache: Path,
    progress: Progress | None = None,
    *,
    vocab_size: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Blend:
    """Returns the training rows a data config describes, kept on disk under `data.cache`, or `cache`.

    `progress` hears, of every source, how full its rows are. The shards of a run share the work of
    making rows, and get the same ones.

    Raises: FileNotFoundError for a missing path; InputError when a tokenizer is needed and none is
        named, or when it has other than `vocab_size` pieces.
    """
    say = progress or (lambda description, done, total: None)
    sources: list[SourceSettings] = [data, *data.blend]
    for source in sources:
        if source.kind == "stdlib":
            write_stdlib(Path(source.path), say)
    tokenizer = _tokenizer(data, say)
    if vocab_size is not None and tokenizer is not None:
        refuse_pieces(tokenizer.vocab_size, vocab_size)
    sets = []
    for source in sources:
        rows = stored_rows(
            _below(data, cache) / _key(source, data, tokenizer, vocab_size),
            partial(open_kind, source), _plan(source, data, tokenizer, vocab_size),
            progress=progress, shard_index=shard_index, shard_count=shard_count,
        )  # fmt: skip
        say(_said(source, rows), len(rows), len(rows))
        sets.append(rows)
    return _blended(sets, data)


def calibration_rows(
    data: DataSettings, split: str, cache: Path, progress: Progress | None = None, **more: int
) -> Blend:
    """Returns rows of another part of the first source's data, kept on disk as training rows are.

    `more` is what else `training_rows` takes.
    Raises: InputError for a kind of data without parts, or a part that there is none of; as `training_rows` does.
    """
    if not KINDS[data.kind].splits:
        raise InputError(f"calibration.split={split}: data of kind {data.kind} has no splits")
    part: Any = data
    return training_rows(dataclasses.replace(part, split=split, blend=()), cache, progress, **more)


def refuse_pieces(pieces: int, vocab_size: int) -> None:
    """Refuses a tokenizer whose pieces are not a model's vocabulary.

    Raises: InputError.
    """
    if pieces != vocab_size:
        raise InputError(f"tokenizer has {pieces} pieces, the model a vocabulary of {vocab_size}")


def kept_rows(data: DataSettings, cache: Path, tokenizer: Tokenizer) -> Blend | None:
    """Returns the rows that `training_rows` made before and would use again, None unless all of them are there."""
    found = []
    for source in (data, *data.blend):
        rows = kept(_below(data, cache) / _key(source, data, tokenizer), data.length)
        if rows is None:
            return None
        found.append(rows)
    return _blended(found, data)


def _blended(sets: Sequence[StoredRows], data: DataSettings) -> Blend:
    return Blend(sets, [1.0, *(source.weight for source in data.blend)])


def _below(data: DataSettings, cache: Path) -> Path:
    return Path(data.cache) if data.cache else cache


def _plan(
    source: SourceSettings, data: DataSettings, tokenizer: Tokenizer | None, vocab_size: int | None
) -> Plan:
    return Plan(
        encode=encoder(tokenizer, source.format, data.empty_thought, vocab_size),
        length=data.length,
        cut=source.format != "chat",  # the rest of a conversation would lack what was asked
        bos=source.format == "text" and data.bos_in_every_piece,
    )


def needs_tokenizer(data: DataSettings) -> bool:
    """Whether any of a config's sources is text, or conversations: token ids are read as they are."""
    return any(source.format != "ids" for source in (data, *data.blend))


def _tokenizer(data: DataSettings, progress: Progress) -> Tokenizer | None:
    if not data.tokenizer and not needs_tokenizer(data):
        return None
    if data.kind == "stdlib" and not data.tokenizer:
        return stdlib_tokenizer(Path(data.path), data.vocab_size, progress)
    return Tokenizer.load(tokenizer_path(data))


def tokenizer_path(data: DataSettings) -> Path:
    """Returns where the tokenizer of a data config lies, or will lie once it is trained on the standard library.

    Raises: InputError when one is needed and none is named.
    """
    if data.tokenizer:
        return Path(data.tokenizer)
    if data.kind == "stdlib":
        return Path(data.path) / STDLIB_TOKENIZER
    raise InputError(
        f"data.kind={data.kind} needs data.tokenizer, a SentencePiece model or a tokenizer.json"
    )


def _key(
    source: SourceSettings,
    data: DataSettings,
    tokenizer: Tokenizer | None,
    vocab_size: int | None = None,
) -> str:
    """The name of the folder of a source's rows: a digest of all that they depend on."""
    model = hashlib.sha256(tokenizer.model).hexdigest() if tokenizer else f"ids below {vocab_size}"
    said = [_VERSION, BLOCK, fingerprint(source), model, data.length, data.empty_thought]
    if source.format == "text" and data.bos_in_every_piece:  # the others are as they always were
        said.append("bos in every piece")
    return f"{source.kind}-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}"


def _said(source: SourceSettings, rows: StoredRows) -> str:
    dropped = f", {rows.dropped} tokens too many" if rows.dropped else ""
    return f"rows of {Path(source.path).name}, {rows.efficiency:.2%} full{dropped}"


def calibration_batches(
    files: Sequence[str | Path], tokenizer: Any, *, length: int, batch_size: int
) -> Iterator[Batch]:
    """Returns shuffled batches of rows packed from text files, one pass over them; every piece begins with `bos`.

    Raises: FileNotFoundError for a missing file; InputError when there is no text in them.
    """
    source = text_source([Path(file) for file in files], pattern="**/*")
    encoded = encoder(tokenizer, "text")(list(source))
    documents = [
        behind_bos(one, length).ids for one in encoded if len(one.ids) > 2
    ]  # bos, eos, text
    if not documents:
        raise InputError(f"{files[0]}: no text to calibrate on")
    rows = pack(documents, length)
    return make_loader(rows, batch_size=min(batch_size, len(rows)), seed=0, num_epochs=1)
