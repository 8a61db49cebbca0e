"""Which files of a folder are the checkpoint's own: verified by its record, or by its headers if it has none."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qz import MalformedInput, MissingInput, OutputRefused
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.folder import PIPELINE_INDEX, place_of, read_file
from qz.formats.json_files import MAX_BYTES, read_json
from qz.formats.output.companions import companions, left_out, settings, terms
from qz.formats.output.recorded.record import RECORD, Record, read_record, verify_record
from qz.formats.output.recorded.statement import BESIDE, STATEMENT, read_statement
from qz.formats.publish.verified_file import VerifiedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from qz.formats.files.folder import Folder
    from qz.formats.files.local_folder import LocalFolder

README = "README.md"
PAGE = "report.html"
"""What `--page` wrote beside the checkpoint, if it did; the card links to it."""
OWN_PAGE = b'<meta name="generator" content="qz '
"""In its head, which tells it from anyone else's page."""
MAX_CARD_BYTES = 10_000_000
IN_MEMORY = 5_000_000
"""Bytes of a file beside the weights that is kept as it was verified, to be sent from memory."""


@dataclass(frozen=True, slots=True)
class OwnFile:
    """``name`` is relative to the folder, with slashes. ``sha256`` is known for all but weights without a record."""

    name: str
    file: VerifiedFile
    sha256: str | None = None
    data: bytes | None = None
    """All of it, if it is small and no weights."""

    @property
    def bytes(self) -> int:
        return self.file.size


@dataclass(frozen=True)
class OwnFiles:
    """The files that make the checkpoint, and those that lie there as well. ``config``: the model's config.json."""

    files: tuple[OwnFile, ...]
    left_out: tuple[str, ...]
    record: Record | None
    config: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def require_stated(self) -> None:
        """Raise MalformedInput if there is a statement, and it is of other files than these."""
        statement = next((file for file in self.files if file.name == STATEMENT), None)
        if statement is None:
            return
        if statement.data is None:
            raise MalformedInput(f"{statement.file.path} has {statement.bytes:,} bytes, too many for a statement.")
        stated = {name: sha256 for name, (sha256, _) in read_statement(statement.data, STATEMENT).subjects.items()}
        later = BESIDE if PAGE in stated else {*BESIDE, PAGE}  # a page may be written after the statement
        mine = {file.name: file.sha256 for file in self.files if file.name not in later}
        if stated != mine:
            unlike = next(name for name in sorted(stated.keys() | mine.keys()) if stated.get(name) != mine.get(name))
            raise MalformedInput(
                f"{STATEMENT} describes other files: {unlike} differs. Make it again with `qz attest`."
            )

    def require_same(self) -> None:
        """Raise OutputRefused if a file is not what was verified any more."""
        for each in self.files:
            each.file.require_same()


def own_files(folder: LocalFolder, progress: Callable[[int], None] | None = None) -> OwnFiles:
    """Verify the checkpoint in ``folder`` and list its files; ``progress`` gets the bytes of each piece read.

    With a record, every byte is compared with it; without, the headers are checked, of each component if the folder is
    a pipeline. Raises MalformedInput naming what is wrong, and MissingInput if there is no checkpoint.
    """
    found = _identified(folder)  # before the first byte is read
    record = read_record(folder)
    hashes = {file.name: file.sha256 for file in record.files} if record is not None else {}
    if record is not None:
        found |= {name: VerifiedFile.of(folder.path / name) for name in hashes if os.path.exists(folder.path / name)}
        errors = [problem.message for problem in verify_record(folder, progress) if problem.severity == "error"]
        if errors:
            more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
            raise MalformedInput(f"{folder.location} is not what was written: {' '.join(errors[:3])}{more}")
        names = {RECORD, *hashes}
    else:
        names = _named(folder, "")
        if PIPELINE_INDEX in names:
            for part in folder.subfolders():
                names |= _named(folder.subfolder(part), f"{part}/")
    names |= {each.name for each in terms(folder)} | (folder.sizes().keys() & BESIDE if record is not None else set())
    if PAGE in found and OWN_PAGE in found[PAGE].head(1000):
        names.add(PAGE)
    files = tuple(_own_file(name, found[name], hashes.get(name)) for name in sorted(names))
    return OwnFiles(files, left_out(folder, {*names, README}, hidden=True), record, _config(folder, names))


def _identified(folder: LocalFolder, prefix: str = "", depth: int = 2) -> dict[str, VerifiedFile]:
    """Every file that may belong to the checkpoint, by its name."""
    found = {prefix + name: VerifiedFile.of(folder.path / name) for name in folder.sizes()}
    for part in folder.subfolders() if depth else ():
        found |= _identified(folder.subfolder(part), f"{prefix}{part}/", depth - 1)
    return found


def _own_file(name: str, file: VerifiedFile, sha256: str | None) -> OwnFile:
    """The file with its hash, and its content if it is small; OutputRefused if it is not what was verified any more."""
    if name.endswith(".safetensors"):
        return OwnFile(name, file, sha256)
    if file.size > IN_MEMORY:
        return OwnFile(name, file, sha256 or file.hashed())
    data = file.read()
    found = hashlib.sha256(data).hexdigest()
    if sha256 not in (None, found):
        raise OutputRefused(f"{file.path} changed during the push. Nothing was committed; push again.")
    return OwnFile(name, file, found, data)


def _named(folder: LocalFolder, prefix: str) -> set[str]:
    """The files of one component that qz has not recorded."""
    sizes = folder.sizes()
    weightless = prefix and not any(name.endswith(".safetensors") for name in sizes)
    carried = settings(folder) if weightless else companions(folder)
    own = {each.name for each in carried} | sizes.keys() & {PIPELINE_INDEX, "config.json"}
    if PIPELINE_INDEX not in sizes and (not prefix or any(name.endswith(".safetensors") for name in sizes)):
        checkpoint = open_checkpoint(folder)
        own |= set(checkpoint.files)
        if checkpoint.index is not None:
            own |= {name for name in sizes if name.endswith(".json") and ".safetensors.index" in name}
    return {prefix + name for name in own}


def require_model(folder: LocalFolder) -> None:
    """Raise MissingInput for a folder in which nothing is of a model, by its names alone."""
    if folder.sizes().keys().isdisjoint((RECORD, "config.json", PIPELINE_INDEX)):
        raise _no_model(folder)


def _config(folder: LocalFolder, names: Iterable[str]) -> Mapping[str, Any]:
    found = config_here(folder, names)
    if not found:
        raise _no_model(folder)
    return found


def _no_model(folder: LocalFolder) -> MissingInput:
    return MissingInput(
        f"{folder.location} has no config.json, so it is not a model folder. Name the folder that qz wrote."
    )


def config_here(folder: Folder, names: Iterable[str]) -> Mapping[str, Any]:
    """``config_among`` the files of a folder."""
    return config_among(names, lambda name: read_file(*place_of(folder, name), MAX_BYTES), f"{folder.location}/")


def config_among(names: Iterable[str], read: Callable[[str], bytes], where: str = "") -> Mapping[str, Any]:
    """The config of the model; of a pipeline's first quantized component, if it is one. Empty if there is none.

    ``read`` gives what a file of ``names`` holds. ``where``: what messages name before the file.
    """
    found: Mapping[str, Any] = {}
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        if name.rpartition("/")[2] == "config.json":
            config = read_json(read(name), where + name, nonfinite="tag")
            found = found or config
            if "quantization_config" in config:
                return config
    return found
