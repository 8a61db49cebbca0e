"""Hessians from the files beside a file of statistics."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qz.formats.files.file_hash import sha256_of
from qz.formats.files.folder import Folder
from qz.formats.malformed import quoted
from qz.quantize.importance.statistics_file import header_of, malformed, read_tensor

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class HessianPlace:
    """Where a weight's Hessian lies: a file beside the statistics, and a tensor in it."""

    file: str
    tensor: str


class HessianReader:
    """Weights with the same inputs share an array while one of them uses it; the one read last is kept.

    ``hashes``: file → its SHA-256, compared when it is first read. From any thread.
    """

    def __init__(self, statistics: str, folder: Folder, hashes: Mapping[str, str]) -> None:
        self.statistics, self.folder, self.hashes = statistics, folder, hashes
        self._compared: set[str] = set()
        self._in_use: weakref.WeakValueDictionary[HessianPlace, Floats] = weakref.WeakValueDictionary()
        self._last: Floats | None = None
        self._locks: dict[str | HessianPlace, threading.Lock] = {}

    def read(self, place: HessianPlace, in_sum2: Floats) -> Floats:
        """float32[in, in], not to be written to; Malformed if its diagonal is not ``in_sum2``."""
        with self._locks.setdefault(place, threading.Lock()):
            found = self._in_use.get(place)
            if found is None:
                found = self._in_use[place] = self._read(place, in_sum2)
            self._last = found
            return found

    def _read(self, place: HessianPlace, in_sum2: Floats) -> Floats:
        where = f"{self.folder.location}/{place.file}"
        self._compare(place.file, where)
        header = header_of(self.folder, place.file)
        info, inputs = header.tensors.get(place.tensor), in_sum2.size
        if info is None or info.dtype != "F32" or info.shape != (inputs, inputs):
            found = f"{info.dtype} {list(info.shape)}" if info else "missing"
            raise malformed(f"{where}: {quoted(place.tensor)} is {found}, not F32 [{inputs}, {inputs}]")
        values = read_tensor(self.folder, place.file, header, info).view(np.float32).reshape(inputs, inputs)
        if not np.allclose(values.diagonal(), in_sum2, rtol=1e-2, atol=1e-6 * float(values.max(initial=0))):
            raise malformed(f"{where}: the diagonal of {quoted(place.tensor)} is not what {self.statistics} says it is")
        return values

    def _compare(self, file: str, where: str) -> None:
        """Raise Malformed for a file of Hessians that is not the one that was written with the statistics."""
        with self._locks.setdefault(file, threading.Lock()):
            if file not in self._compared and sha256_of(Path(where)) != self.hashes[file]:
                raise malformed(f"{where} is not the file that {self.statistics} was written with: its hash differs")
            self._compared.add(file)
