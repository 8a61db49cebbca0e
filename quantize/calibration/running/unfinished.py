"""What an interrupted calibration leaves for the next one: what parts of a model returned, and what was recorded.

It lies in a folder beside the output, ``OUTPUT.unfinished``, until that is written: ``journal.json`` and a safetensors
file for each part.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qz import IOFailed, MalformedInput, OutputRefused, QzError, TryAgain
from qz.counted import counted
from qz.formats.files.file_hash import sha256_of
from qz.formats.files.regular_file import read_regular
from qz.formats.malformed import quoted
from qz.formats.output.resuming.seal import is_sealed, seal, user_key
from qz.formats.output.storage.disk import Disk
from qz.formats.output.storage.whole_file import remove_remains, write_whole
from qz.quantize.calibration.running.nested import is_library_output, is_of_a_library

JOURNAL, LOCK = "journal.json", "lock"
BLOCK = re.compile(r"block-\d{5,}\.safetensors")
OWN = re.compile(rf"{LOCK}|(?:{re.escape(JOURNAL)}|{BLOCK.pattern})(?:\.[0-9a-f]{{8}}\.partial)?")
MOST_JOURNAL_BYTES = 1 << 26
"""It has all tokens of the text, and the form of what every part returned."""


@dataclass(slots=True)
class Sums:
    """What was recorded so far: see ``Recorder``; ``files`` and ``places`` of Hessians see ``HessianFiles``."""

    tokens: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    """Components of a pipeline that cannot be run block by block."""


@dataclass(slots=True)
class _Journal:
    fingerprint: Mapping[str, Any]
    rows: list[list[int]]
    blocks: list[dict[str, Any]] = field(default_factory=list)
    """Each ``part``, ``file``, ``sha256`` and ``outputs``, in the order in which the parts were finished."""
    sums: Sums = field(default_factory=Sums)
    claimed: list[str] = field(default_factory=list)
    """Files beside the output that this calibration makes, finished or not."""


class _NotPlain(TypeError):
    """Raised for an output that cannot be written."""


class Unfinished:
    """The folder of one calibration; one process at a time has it."""

    def __init__(self, output: Path, *, resume: bool) -> None:
        """Raises TryAgain where another process makes the same output, OutputRefused where something of others lies in
        the folder's place, or in it, and where the file system has no locks."""
        self._output, self.folder = output, output.with_name(f"{output.name}.unfinished")
        self._claims = re.compile(rf"{re.escape(output.stem)}\.hessians-\d{{5,}}\.safetensors")
        is_new = _make_own(self.folder)
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if not Disk().try_lock(self._lock, self.folder / LOCK):
                raise TryAgain(f"Another process makes {output}. Wait for it, or choose another file.")
        except BaseException as error:
            os.close(self._lock)
            if is_new and not isinstance(error, TryAgain):
                self.remove()
            raise
        self._resume = resume
        self._journal = _Journal({}, [])
        self._numbers: dict[str, int] = {}
        """Part → its place among the kept blocks."""
        self.count = 0
        """Parts that an earlier run finished."""
        self.keeping = True
        self.values: dict[str, NDArray[np.float64]] = {}
        """Sums of squares that were kept, by weight."""

    @property
    def rows(self) -> list[list[int]]:
        """Sequences of token ids that the interrupted run went on with; empty if there was none."""
        return self._journal.rows

    @property
    def is_empty(self) -> bool:
        return not self._journal.blocks

    @property
    def in_words(self) -> str:
        blocks = len(self._journal.blocks)
        return f"{counted(blocks, 'block')} {'is' if blocks == 1 else 'are'} kept"

    @property
    def sums(self) -> Sums:
        return self._journal.sums

    def open(self, fingerprint: Mapping[str, Any]) -> None:
        """Find what a run with the same fingerprint left; of another one nothing is kept."""
        fingerprint = json.loads(json.dumps(fingerprint))
        found = self._read() if self._resume else None
        if found is not None and found.fingerprint == fingerprint and self._is_whole(found):
            self._journal, self.count = found, len(found.blocks)
            self._numbers = {block["part"]: number for number, block in enumerate(found.blocks)}
            for file in set(found.claimed) - found.sums.files.keys():
                self._remove_claimed(file)
            for block in found.blocks:
                self._read_values(block)
            return
        self._clear(found or self._read())
        self._journal = _Journal(fingerprint, [])

    def begin(self, rows: list[list[int]]) -> None:
        """Go on with these sequences."""
        self._journal.rows = rows
        self._write_journal()

    def claim(self, file: str) -> None:
        """Note a file beside the output before it is made."""
        self._journal.claimed.append(file)
        self._write_journal()

    def find(self, part: str, device: torch.device) -> list[list[Any]] | None:
        """What an earlier run kept of a part: of each batch, what each call returned. None if there is nothing."""
        if part not in self._numbers:
            return None
        from safetensors.torch import load_file

        block = self._journal.blocks[self._numbers[part]]
        with self._reading():
            tensors = load_file(self.folder / block["file"])
            return [[_built(each, tensors, device) for each in calls] for calls in block["outputs"]]

    def keep(
        self, part: str, outputs: Sequence[Sequence[Any]], values: Mapping[str, NDArray[np.float64]], sums: Sums
    ) -> bool:
        """Keep what a part returned, as ``find`` gives it back, and what was recorded of the weights in it.

        From the first one on that cannot be written, nothing is kept, which is False: an interrupted run starts there.
        """
        if not self.keeping:
            return False
        tensors: dict[str, torch.Tensor] = {f"sum {name}": torch.from_numpy(each) for name, each in values.items()}
        try:
            told = [[_plain(each, tensors) for each in calls] for calls in outputs]
        except _NotPlain:
            self.keeping = False
            return False
        from safetensors.torch import save

        data, file = save(tensors), f"block-{len(self._journal.blocks) + 1:05}.safetensors"
        digest = write_whole(self.folder / file, [memoryview(data)])
        self._numbers[part] = len(self._journal.blocks)
        self._journal.blocks.append({"part": part, "file": file, "sha256": digest, "outputs": told})
        self._journal.sums = sums
        self._write_journal()
        return True

    def close(self) -> None:
        os.close(self._lock)

    def remove(self) -> None:
        """The output is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        remove_remains(self._output)

    def give_up(self) -> None:
        """The calibration cannot succeed: leave nothing behind."""
        self._clear(self._journal)
        self.remove()

    def _read(self) -> _Journal | None:
        """The journal, if this user wrote it, as far as that can be known."""
        key = user_key()
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            value = json.loads(read_regular(self.folder / JOURNAL, MOST_JOURNAL_BYTES))
            mark = value.pop("mark", None)
            if key is None or is_sealed(mark, key, _canonical(value)):
                found = _Journal(**{**value, "sums": Sums(**value["sums"])})
                if self._is_plausible(found):
                    return found
        return None

    def _is_plausible(self, found: _Journal) -> bool:
        """Whether the values are of the kinds that are written; where there is no key, anyone may have written them.

        Raises whatever invalid values cause.
        """
        sums, counts = found.sums, [token for row in found.rows for token in row]
        texts = [block[key] for block in found.blocks for key in ("part", "file", "sha256")]
        texts += [*sums.whole, *(text for table in (sums.first, sums.files, sums.places) for text in table.values())]
        return (
            type(found.rows) is list
            and all(self._claims.fullmatch(file) for file in (*found.claimed, *sums.files))
            and all(BLOCK.fullmatch(block["file"]) for block in found.blocks)
            and all(type(count) is int and count >= 0 for count in (*counts, *sums.tokens.values()))
            and all(isinstance(text, str) for text in texts)
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise MalformedInput for whatever comes of a journal that does not fit the files that it lists."""
        try:
            yield
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise MalformedInput(
                f"{self.folder / JOURNAL} cannot be read ({type(error).__name__}): it is not what qz wrote. Start over "
                "with --no-resume."
            ) from error

    def _is_whole(self, journal: _Journal) -> bool:
        """Whether everything that the journal lists is there, as it was written."""
        listed = {self.folder / block["file"]: block["sha256"] for block in journal.blocks}
        listed |= {self.folder.with_name(file): digest for file, digest in journal.sums.files.items()}
        try:
            return all(sha256_of(path) == digest for path, digest in listed.items())
        except QzError:
            return False

    def _read_values(self, block: Mapping[str, Any]) -> None:
        from safetensors import safe_open

        with self._reading(), safe_open(self.folder / block["file"], "np") as opened:
            for key in opened.keys():  # noqa: SIM118  it is no mapping
                if key.startswith("sum "):
                    self.values[key.removeprefix("sum ")] = opened.get_tensor(key)

    def _clear(self, journal: _Journal | None) -> None:
        for file in journal.claimed if journal is not None else ():
            self._remove_claimed(file)
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.unlink()

    def _remove_claimed(self, file: str) -> None:
        path = self.folder.with_name(file)
        path.unlink(missing_ok=True)
        remove_remains(path)

    def _write_journal(self) -> None:
        value, key = {**_fields(self._journal), "sums": _fields(self._journal.sums)}, user_key()
        if key is not None:
            value["mark"] = seal(key, _canonical(value))
        write_whole(self.folder / JOURNAL, [memoryview(json.dumps(value).encode())])


@contextmanager
def unfinished(output: Path, *, resume: bool) -> Iterator[Unfinished]:
    """What a calibration keeps while it runs; nothing of one that fails for good, or before anything is kept.

    Those who interrupt it are told how to go on.
    """
    kept = Unfinished(output, resume=resume)
    try:
        yield kept
    except QzError as error:
        if kept.is_empty or not isinstance(error, TryAgain | IOFailed):
            kept.give_up()
        raise
    except BaseException as error:
        if kept.is_empty and not kept.rows:
            kept.give_up()
        elif not kept.is_empty:
            error.add_note(f"{kept.in_words}: run the same command again to continue, or start over with --no-resume.")
        raise
    finally:
        kept.close()


def _make_own(folder: Path) -> bool:
    """Whether the folder was made. OutputRefused unless what is there is one that an interrupted calibration left."""
    with suppress(FileExistsError):
        folder.mkdir()
        return True
    strange = "a link is not" if folder.is_symlink() else None if folder.is_dir() else "a file is not"
    for entry in os.scandir(folder) if strange is None else ():
        if not (OWN.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
            strange = f"{quoted(entry.name)} in it is not"
            break
    if strange is not None:
        raise OutputRefused(
            f"{folder} is where qz keeps an unfinished calibration, but {strange} written by qz. Move it away, or "
            "choose another file with -o/--output."
        )
    return False


def _fields(record: Any) -> dict[str, Any]:
    """Unlike ``asdict``, without a copy of all that is in them."""
    return {each.name: getattr(record, each.name) for each in fields(record)}


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """As JSON, its tensors under names in ``tensors``."""
    if torch.is_tensor(value):
        name = str(len(tensors))
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_plain(each, tensors) for each in value]}
    if is_library_output(value):
        told = {name: _plain(each, tensors) for name, each in value.items()}
        return {"output": [type(value).__module__, type(value).__qualname__, told]}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise _NotPlain


def _built(told: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    ((kind, value),) = told.items()
    if kind == "tensor":
        return tensors[value].to(device, copy=True)
    if kind == "value":
        return value
    if kind == "output":
        module, name, fields = value
        found = getattr(import_module(module), name) if is_of_a_library(module) else None
        if not (isinstance(found, type) and issubclass(found, OrderedDict)):
            raise ValueError(f"{module}.{name} is no output of a model")
        return found(**{field: _built(one, tensors, device) for field, one in fields.items()})
    each = [_built(one, tensors, device) for one in value]
    return tuple(each) if kind == "tuple" else each
