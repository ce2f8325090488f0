"""What belongs to a model and travels with it: tokenizer, chat template, generation config, and where its towers are.

A foreign checkpoint has the small files beside its arrays. Ours keep them in a folder `beside`: a checkpoint's own, or
that of the run it is a save of (`<run>/beside`, `<run>/checkpoints/<step>`). The tensors of other models that came in
the same files (vision, audio) are large: they stay where they are, and `beside/towers.json` says where that is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma_qat.checkpoint.store import read_manifest, write_json
from gemma_qat.errors import InputError

FOLDER = "beside"
CARRIED = "carried.safetensors"
"""Where a converted checkpoint has the tensors of other models."""

HUB_FORMATS = ("safetensors", "gemma", "compressed-tensors")
"""Formats whose tensors have the names that a hub directory has."""

_TOWERS = "towers.json"

_BESIDE = (
    "config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "tokenizer*.json",
    "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "*processor_config.json",
)  # fmt: skip


def beside(*directories: Path) -> tuple[Path, ...]:
    """Returns the small files of a model in `directories`, each name once, the first directory's first."""
    found: dict[str, Path] = {}
    for directory in directories:
        for pattern in _BESIDE:
            for path in sorted(directory.glob(pattern)):
                if path.is_file() and stays_inside(path, directory):
                    found.setdefault(path.name, path)
    return tuple(found[name] for name in sorted(found))


def stays_inside(path: Path, directory: Path) -> bool:
    """Returns whether a file lies in `directory` once symbolic links are followed.

    A snapshot in a Hugging Face cache is links into the `blobs` beside the snapshots, which count as inside.
    """
    real, root = _real(path), _real(directory)
    roots = [root]
    for above in (root, *root.parents):
        if above.parent.name == "snapshots":
            roots.append(above.parent.parent / "blobs")
            break
    return any(real.is_relative_to(allowed) for allowed in roots)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # where links go in a circle, Path.resolve raises


def refuse_outside(tree: Path, directory: Path) -> None:
    """Refuses a tree of files, in a directory that a person gave, of which not all lie in that directory.

    The person may give a link; below it links to files inside are followed. Links to directories are not, since nothing
    here looks at what is in those.
    Raises: InputError naming the first link that leads outside or to a directory, or what is no file: a pipe, a device.
    """
    if not stays_inside(tree, directory):
        raise InputError(f"{tree}: a link to {_real(tree)}, outside the directory; give that one")
    for path in sorted(tree.rglob("*")):
        if path.is_symlink() and not stays_inside(path, directory):
            raise InputError(f"{path}: a link to {_real(path)}, outside the directory")
        if path.is_symlink() and path.is_dir():
            raise InputError(f"{path}: a link to a directory, the directory itself expected")
        if not path.is_file() and not path.is_dir():
            raise InputError(f"{path}: neither a file nor a directory")


def run_of(checkpoint: Path) -> Path | None:
    """Returns the run that a checkpoint is a save of, None when it stands alone."""
    above = checkpoint.resolve().parent
    return above.parent if above.name == "checkpoints" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Towers:
    """Tensors of other models, under the names they have on the hub, and where they can be read."""

    path: str
    """A hub directory, or a converted checkpoint that carries them."""
    left: Mapping[str, str]
    """What each is, by its name: vision, audio."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """What travels with a checkpoint."""

    files: tuple[Path, ...] = ()
    made: Mapping[str, Callable[[], bytes]] = dataclasses.field(default_factory=dict)
    """Contents that are no files yet, by name."""
    towers: Towers | None = None

    def keep(self, directory: Path) -> None:
        """Copies the files into the folder `beside` of a checkpoint or run of ours, and notes where the towers are."""
        folder = directory / FOLDER
        folder.mkdir(exist_ok=True)
        for file in self.files:
            shutil.copyfile(file, folder / file.name)
        for name, content in self.made.items():
            (folder / name).write_bytes(content())
        if self.towers is not None:
            write_json(folder / _TOWERS, dataclasses.asdict(self.towers))


def native_beside(checkpoint: Path) -> Beside:
    """Returns what travels with a checkpoint of our own: its own files before its run's.

    Raises: InputError for a broken manifest or towers.json.
    """
    run = run_of(checkpoint)
    folders = [checkpoint / FOLDER, *([run / FOLDER] if run else [])]
    return Beside(files=beside(*folders), towers=_carried(checkpoint) or _noted(folders))


def _carried(checkpoint: Path) -> Towers | None:
    if not (checkpoint / CARRIED).is_file():
        return None
    origin = read_manifest(checkpoint).origin
    if origin is None or origin.format not in HUB_FORMATS:
        return None
    towers = {name: what for name, what in origin.left.items() if what in ("vision", "audio")}
    return Towers(path=str(checkpoint.resolve()), left=towers)


def _noted(folders: Iterable[Path]) -> Towers | None:
    file = next((folder / _TOWERS for folder in folders if (folder / _TOWERS).is_file()), None)
    if file is None:
        return None
    try:
        raw: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return Towers(path=str(raw["path"]), left=dict(raw["left"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a note of where towers are ({error})") from None


def chat_template(files: Iterable[Path]) -> str | None:
    """Returns the chat template among a model's small files: a file of its own, or part of the tokenizer's config.

    Raises: InputError for a config that is not JSON.
    """
    named = {file.name: file for file in files}
    if "chat_template.jinja" in named:
        try:
            return named["chat_template.jinja"].read_text("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{named['chat_template.jinja']}: not UTF-8 ({error})") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if name not in named:
            continue
        try:
            said = json.loads(named[name].read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{named[name]}: not JSON ({error})") from None
        template = said.get("chat_template") if isinstance(said, dict) else None
        if isinstance(
            template, list
        ):  # several by name: `default` is the one that is taken unasked
            by_name = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = by_name.get("default")
        if isinstance(template, str):
            return template
    return None
