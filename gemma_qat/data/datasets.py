"""Datasets in the TensorFlow Datasets (TFDS) format: written once, read by many hosts by record number.

In ArrayRecord format any record can be read without reading the ones before. TFDS writes and reads
it without TensorFlow. What this project writes has a card beside it:

    DIRECTORY/source.json                    name, documents per split, digest, size of every file
    DIRECTORY/<name>/1.0.0/...array_record   what TFDS wrote

Source: "TFDS for Jax and PyTorch", tensorflow.org/datasets/tfless_tfds (`as_data_source`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gemma_qat.data.records import Format, Numbered, Record, Source, take
from gemma_qat.data.stdlib_corpus import Document
from gemma_qat.errors import InputError, unknown

DocumentsBySplit = Mapping[str, Sequence[Document]]

_VERSION = "1.0.0"
_CARD = "source.json"


def write_source(
    documents_by_split: DocumentsBySplit, directory: Path, name: str = "stdlib_source"
) -> Path:
    """Writes documents as a TFDS dataset in ArrayRecord format and returns `directory`.

    Documents keep their order within a split. The dataset appears under its final name only when
    complete. One that is already there is kept if its recorded digest equals that of the documents,
    else replaced.

    Raises: ValueError if there is no split, a split is empty, or `directory` holds something that
        this function did not write.
    """
    empty = [split for split, documents in documents_by_split.items() if not documents]
    if empty or not documents_by_split:
        raise InputError(f"{directory}: no documents in split {', '.join(empty) or '(none given)'}")
    card = {
        "name": name,
        "splits": {split: len(documents) for split, documents in documents_by_split.items()},
        "digest": _digest(documents_by_split),
    }
    if _holds(directory, card):
        return directory
    _refuse_foreign(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as folder:
        complete = Path(folder, "complete")
        _write_tfds(documents_by_split, complete, name)
        _write_card(complete, card)
        _put_in_place(complete, directory, Path(folder, "replaced"), card)
    return directory


def open_source(directory: Path, split: str) -> Source:
    """Returns one split of a dataset that `write_source` wrote, read record by record.

    Raises: FileNotFoundError if there is no complete dataset; ValueError for an unknown split.
    """
    card = _complete_card(directory)
    if card is None:
        raise FileNotFoundError(
            f"no dataset in {directory}: expected {_CARD} and the files it lists"
        )
    if split not in card["splits"]:
        raise unknown(f"split of {directory}", split, card["splits"])
    import tensorflow_datasets as tfds

    with _quiet():
        builder: Any = tfds.builder_from_directory(str(directory / card["name"] / _VERSION))
        return Source(items=builder.as_data_source(split), read=_decoded)


def tfds_source(
    path: Path, field: str = "text", content: Format = "text", split: str = "train"
) -> Source:
    """Returns one split of any TFDS dataset in ArrayRecord format; a record's path is `SPLIT:NUMBER`.

    `path` is the folder with `dataset_info.json`, or one above it that holds no other dataset; `split`
    may be a slice such as `train[:90%]`.

    Raises: FileNotFoundError when there is no dataset; ValueError when there are several, it is in
        another format, or has no such split or field.
    """
    import tensorflow_datasets as tfds

    found = sorted(path.glob("**/dataset_info.json"))
    if not found:
        raise FileNotFoundError(f"TFDS source {path}: expected a folder with dataset_info.json")
    if len(found) > 1:
        names = ", ".join(str(file.parent.relative_to(path)) for file in found)
        raise InputError(f"TFDS source {path}: holds several datasets, name one of {names}")
    with _quiet():
        builder: Any = tfds.builder_from_directory(str(found[0].parent))
        _check_tfds(builder, path, split, field)
        items = builder.as_data_source(split)
    return Source(items=Numbered(items), read=partial(_read_example, field, content, split))


def _check_tfds(builder: Any, path: Path, split: str, field: str) -> None:
    name = split.split("[")[0]
    if name not in builder.info.splits:
        raise unknown(f"split of {path}", name, builder.info.splits)
    if field not in builder.info.features:
        raise unknown(f"feature of {path}", field, builder.info.features)
    if builder.info.file_format.value != "array_record":
        written = builder.info.file_format.value
        raise InputError(f"TFDS source {path}: written as {written}, array_record expected")


def _read_example(field: str, content: Format, split: str, item: tuple[int, Any]) -> Record:
    index, example = item
    return take(field, content, f"{split}:{index}", example)


def _decoded(record: Mapping[str, bytes]) -> Record:
    return {name: record[name].decode("utf-8") for name in ("path", "text")}


def _digest(documents_by_split: DocumentsBySplit) -> str:
    """sha256 over the sorted (split, path, text); lengths keep neighbours from running together."""
    digest = hashlib.sha256()
    for split in sorted(documents_by_split):
        for document in sorted(documents_by_split[split], key=lambda d: (d.path, d.text)):
            for part in (split, document.path, document.text):
                data = part.encode("utf-8")
                digest.update(len(data).to_bytes(8, "big"))
                digest.update(data)
    return digest.hexdigest()


def _write_card(directory: Path, card: dict[str, Any]) -> None:
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    sizes = {file.relative_to(directory).as_posix(): file.stat().st_size for file in files}
    text = json.dumps({**card, "files": sizes}, indent=2)
    (directory / _CARD).write_text(text + "\n", encoding="utf-8")


def _complete_card(directory: Path) -> dict[str, Any] | None:
    """What the card says, or None if there is none or a file it lists is missing or cut short."""
    try:
        card = json.loads((directory / _CARD).read_text(encoding="utf-8"))
        sizes = {name: (directory / name).stat().st_size for name in card["files"]}
    except (OSError, ValueError):
        return None
    return card if sizes == card["files"] else None


def _holds(directory: Path, card: dict[str, Any]) -> bool:
    found = _complete_card(directory)
    return found is not None and card == {key: found.get(key) for key in card}


def _refuse_foreign(directory: Path) -> None:
    if not directory.exists() or (directory / _CARD).is_file():
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise InputError(f"{directory}: holds something else; give a new or empty folder")


def _put_in_place(complete: Path, directory: Path, replaced: Path, card: dict[str, Any]) -> None:
    if _holds(directory, card):  # another process was faster
        return
    if directory.exists():
        directory.rename(replaced)
    try:
        complete.rename(directory)
    except OSError:  # another process put its own there first: fine if it wrote the same
        if _holds(directory, card):
            return
        if replaced.exists() and not directory.exists():
            replaced.rename(directory)
        raise


def _write_tfds(documents_by_split: DocumentsBySplit, folder: Path, name: str) -> None:
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(
        try_download_gcs=False,  # offline: nothing to look up in TFDS's public bucket
        compute_stats=tfds.download.ComputeStatsMode.SKIP,
    )
    with _quiet():
        builder = _builder_class(documents_by_split, name)(
            data_dir=str(folder), file_format="array_record"
        )
        builder.download_and_prepare(download_dir=str(folder / "downloads"), download_config=config)
    shutil.rmtree(folder / "downloads", ignore_errors=True)


def _builder_class(documents_by_split: DocumentsBySplit, dataset_name: str) -> Any:
    """The TFDS builder of these documents; a class made here because TFDS is imported on use."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version(_VERSION)
        name = dataset_name
        # Nothing is downloaded. Without this TFDS looks for a checksum file beside this module,
        # through `importlib_resources`, which its package does not install.
        url_infos = None

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict({"path": text, "text": text})
            # Without shuffling, record i is document i.
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {split: self._generate_examples(split) for split in documents_by_split}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, Record]]:
            for index, document in enumerate(documents_by_split[split]):
                yield index, {"path": document.path, "text": document.text}

    return Builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallows what TFDS prints: banners on stdout, bars on stderr; errors still propagate."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
