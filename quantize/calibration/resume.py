"""What an interrupted calibration leaves for the next one: the outputs of every block that all batches went through.

They lie in a folder beside the output, ``OUTPUT.unfinished``, until that is written: ``journal.json`` and a safetensors
file for each block. The model's forward runs again, and where it comes to such a block, its outputs are given instead.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qz import OutputRefused, QzError, TryAgain
from qz.formats.file_hash import sha256_of
from qz.formats.malformed import quoted
from qz.formats.output.resuming.seal import is_sealed, seal, user_key
from qz.formats.output.storage.whole_file import write_whole
from qz.formats.regular_file import read_regular

JOURNAL, LOCK = "journal.json", "lock"
BLOCK = re.compile(r"block-\d{5,}\.safetensors")
OWN = re.compile(rf"{LOCK}|(?:{re.escape(JOURNAL)}|{BLOCK.pattern})(?:\.partial)?")
MOST_JOURNAL_BYTES = 1 << 30
"""It has all tokens of the text, and the shape of what every block returned."""


@dataclass(slots=True)
class Sums:
    """What was recorded up to a block: see ``Recorder``; ``files`` and ``places`` of Hessians see ``run``."""

    tokens: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Journal:
    fingerprint: Mapping[str, Any]
    rows: list[list[int]]
    blocks: list[dict[str, Any]] = field(default_factory=list)
    """Each ``part``, ``file``, ``sha256`` and ``outputs``, in the order in which the blocks were gone through."""
    sums: Sums = field(default_factory=Sums)
    claimed: list[str] = field(default_factory=list)
    """Files beside the output that this calibration makes, finished or not."""


class _NotPlain(TypeError):
    """Raised for an output that cannot be written."""


class BlockStore:
    """The folder of one calibration; one process at a time has it."""

    def __init__(self, output: Path, *, resume: bool) -> None:
        """Raises TryAgain where another process makes the same output, OutputRefused where something of others lies in
        the folder's place, or in it."""
        self.folder = output.with_name(f"{output.name}.unfinished")
        self._claims = re.compile(rf"{re.escape(output.stem)}\.hessians-\d{{5,}}\.safetensors")
        _make_own(self.folder)
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise TryAgain(f"Another process makes {output}. Wait for it, or choose another file.") from error
        self._resume = resume
        self._journal = _Journal({}, [])
        self._outputs: dict[int, list[Any]] = {}
        """Of the block that is gone through, by batch: one for each call of it."""
        self._batch = self._visit = 0
        self._kept = 0
        self._keeping = True
        self.values: dict[str, NDArray[np.float64]] = {}
        """Sums of squares of linears in kept blocks, by weight."""

    @property
    def rows(self) -> list[list[int]]:
        """Sequences of token ids that the interrupted run went on with; empty if there was none."""
        return self._journal.rows

    @property
    def sums(self) -> Sums:
        return self._journal.sums

    @property
    def kept(self) -> int:
        """Blocks that an earlier run finished."""
        return self._kept

    def open(self, fingerprint: Mapping[str, Any]) -> None:
        """Find what a run with the same fingerprint left; of another one nothing is kept."""
        fingerprint = json.loads(json.dumps(fingerprint))
        found = self._read() if self._resume else None
        if found is not None and found.fingerprint == fingerprint and self._is_whole(found):
            self._journal, self._kept = found, len(found.blocks)
            for file in set(found.claimed) - found.sums.files.keys():
                self.folder.with_name(file).unlink(missing_ok=True)
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

    def watch(self, blocks: Mapping[str, Any]) -> list[Any]:
        """Hooks on all parts that are kept; to be removed by the caller."""
        return [block.register_forward_hook(self._note) for block in blocks.values()]

    def entering(self, _: str, __: Any, batch: int) -> None:
        self._batch = batch

    def replay(self, part: str, device: torch.device) -> list[list[Any]] | None:
        """For each batch the outputs of a block, one for each call; None for one that is to be run."""
        if self._visit >= self._kept or self._journal.blocks[self._visit]["part"] != part:
            return None
        from safetensors.torch import load_file

        block = self._journal.blocks[self._visit]
        tensors = load_file(self.folder / block["file"])
        return [[_built(each, tensors, device) for each in calls] for calls in block["outputs"]]

    def finished(self, part: str, values: Mapping[str, NDArray[np.float64]], sums: Sums) -> None:
        """Keep a block that all batches went through, and what was recorded of the weights in it."""
        self._visit += 1
        outputs, self._outputs = self._outputs, {}
        if not self._keeping or self._visit <= self._kept:
            return
        tensors: dict[str, torch.Tensor] = {f"sum {name}": torch.from_numpy(each) for name, each in values.items()}
        try:
            told = [[_plain(each, tensors) for each in outputs[batch]] for batch in sorted(outputs)]
        except _NotPlain:
            self._keeping = False  # an interrupted run starts at the last one that could be kept
            return
        from safetensors.torch import save

        data, file = save(tensors), f"block-{self._visit:05}.safetensors"
        digest = write_whole(self.folder / file, [memoryview(data)])
        self._journal.blocks.append({"part": part, "file": file, "sha256": digest, "outputs": told})
        self._journal.sums = sums
        self._write_journal()

    def close(self) -> None:
        os.close(self._lock)

    def remove(self) -> None:
        """The output is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def give_up(self) -> None:
        """Nothing can come of it: leave nothing."""
        self._clear(self._journal)
        self.remove()

    def _note(self, _: Any, __: Any, output: Any) -> None:
        if self._keeping and self._visit >= self._kept:
            self._outputs.setdefault(self._batch, []).append(_copied(output))

    def _read(self) -> _Journal | None:
        """The journal, if this user wrote it, as far as that can be known."""
        key = user_key()
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            value = json.loads(read_regular(self.folder / JOURNAL, MOST_JOURNAL_BYTES))
            mark = value.pop("mark", None)
            if key is None or is_sealed(mark, key, _canonical(value)):
                found = _Journal(**{**value, "sums": Sums(**value["sums"])})
                if all(self._claims.fullmatch(file) for file in (*found.claimed, *found.sums.files)) and all(
                    BLOCK.fullmatch(block["file"]) for block in found.blocks
                ):
                    return found
        return None

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

        with safe_open(self.folder / block["file"], "np") as opened:
            for key in opened.keys():  # noqa: SIM118  it is no mapping
                if key.startswith("sum "):
                    self.values[key.removeprefix("sum ")] = opened.get_tensor(key)

    def _clear(self, journal: _Journal | None) -> None:
        for file in journal.claimed if journal is not None else ():
            self.folder.with_name(file).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.unlink()

    def _write_journal(self) -> None:
        value, key = asdict(self._journal), user_key()
        if key is not None:
            value["mark"] = seal(key, _canonical(value))
        write_whole(self.folder / JOURNAL, [memoryview(json.dumps(value).encode())])


def _make_own(folder: Path) -> None:
    """Make the folder; raise OutputRefused unless what is there is one that an interrupted calibration left."""
    folder.mkdir(exist_ok=True)
    strange = "a link is not" if folder.is_symlink() else None
    for entry in os.scandir(folder) if strange is None else ():
        if not (OWN.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
            strange = f"{quoted(entry.name)} in it is not"
            break
    if strange is not None:
        raise OutputRefused(
            f"{folder} is where an unfinished calibration is kept, and {strange} qz's. Move it away, or choose another "
            "file with -o/--output."
        )


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _copied(value: Any) -> Any:
    """Later blocks may write into what they are given."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if type(value) in (tuple, list):
        return type(value)(_copied(each) for each in value)
    return value


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """As JSON, its tensors under names in ``tensors``."""
    if torch.is_tensor(value):
        name = str(len(tensors))
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_plain(each, tensors) for each in value]}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise _NotPlain


def _built(told: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    ((kind, value),) = told.items()
    if kind == "tensor":
        return tensors[value].to(device, copy=True)
    if kind == "value":
        return value
    each = [_built(one, tensors, device) for one in value]
    return tuple(each) if kind == "tuple" else each
