"""Which files of a folder are the checkpoint's own: verified by its record, or by its headers if it has none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qz import MalformedInput, MissingInput
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.json_files import read_json
from qz.formats.output.record import RECORD, Record, read_record, verify_record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from qz.formats.folder import LocalFolder

README = "README.md"
_BESIDE = re.compile(
    r"(model_index|config|[a-z_]+_config|special_tokens_map|added_tokens|tokenizer|vocab|chat_template)\.json"
    r"|(vocab|merges)\.txt|chat_template\.jinja|[\w.-]*\.tiktoken|(spiece|tokenizer|sentencepiece[\w.-]*)\.model"
)
"""What transformers and diffusers save beside the weights."""
_LEGAL = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY)[\w.-]*", re.IGNORECASE)
_MOST_BYTES = 50_000_000
"""Of a file that is not weights."""


@dataclass(frozen=True, slots=True)
class OwnFile:
    """``name`` is relative to the folder, with slashes. ``sha256`` is known if there is a record of it."""

    name: str
    path: Path
    bytes: int
    sha256: str | None = None


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


def own_files(folder: LocalFolder, progress: Callable[[int], None] | None = None) -> OwnFiles:
    """Verify the checkpoint in ``folder`` and list its files; ``progress`` gets the bytes of each piece read.

    With a record, every byte is compared with it; without, the headers are checked, of each component if the folder is
    a pipeline. Raises MalformedInput naming what is wrong, and MissingInput if there is no checkpoint.
    """
    record = read_record(folder)
    if record is not None:
        errors = [problem.message for problem in verify_record(folder, progress) if problem.severity == "error"]
        if errors:
            more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
            raise MalformedInput(f"{folder.location} is not what was written: {' '.join(errors[:3])}{more}")
        known = {
            file.name: OwnFile(file.name, folder.path / file.name, file.bytes, file.sha256) for file in record.files
        }
        known[RECORD] = OwnFile(RECORD, folder.path / RECORD, folder.sizes()[RECORD])
    else:
        known = _checked(folder, "")
        if "model_index.json" in known:
            for part in folder.subfolders():
                known |= _checked(folder.subfolder(part), f"{part}/")
    sizes = folder.sizes()
    known |= {name: OwnFile(name, folder.path / name, sizes[name]) for name in sizes if _LEGAL.fullmatch(name)}
    left_out = [name for name in sizes if name not in known and name != README]
    left_out += [f"{part}/" for part in folder.subfolders() if not any(name.startswith(f"{part}/") for name in known)]
    files = tuple(known[name] for name in sorted(known))
    return OwnFiles(files, tuple(sorted(left_out)), record, _config(folder, known))


def _checked(folder: LocalFolder, prefix: str) -> dict[str, OwnFile]:
    """The files of one component that qz has not recorded."""
    sizes = folder.sizes()
    own = {name for name in sizes if _BESIDE.fullmatch(name) and sizes[name] <= _MOST_BYTES}
    if "model_index.json" not in sizes and (not prefix or any(name.endswith(".safetensors") for name in sizes)):
        checkpoint = open_checkpoint(folder)
        own |= set(checkpoint.files)
        if checkpoint.index is not None:
            own |= {name for name in sizes if name.endswith(".json") and ".safetensors.index" in name}
    return {prefix + name: OwnFile(prefix + name, folder.path / name, sizes[name]) for name in own}


def _config(folder: LocalFolder, known: Mapping[str, OwnFile]) -> Mapping[str, Any]:
    """The config of the model; of a pipeline's first quantized component, if it is one."""
    found: Mapping[str, Any] = {}
    for name in sorted(known, key=lambda name: (name.count("/"), name)):
        if name.rpartition("/")[2] != "config.json":
            continue
        inner = folder.subfolder(name.rpartition("/")[0]) if "/" in name else folder
        data = bytearray(inner.sizes()["config.json"])
        inner.read_into("config.json", 0, memoryview(data))
        config = read_json(bytes(data), f"{folder.location}/{name}")
        found = found or config
        if "quantization_config" in config:
            return config
    if not found:
        raise MissingInput(f"{folder.location} holds no config.json, so it is no model folder.")
    return found
