"""Tensors in files of statistics, which come with calibration and not with a checkpoint."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qz.formats.files.folder import Folder, read_at
from qz.formats.malformed import Malformed
from qz.formats.tensors.safetensors import Header, TensorInfo, read_header


def header_of(folder: Folder, file: str) -> Header:
    """The header of a file of statistics. Raises Malformed, with what to do."""
    size = folder.sizes().get(file)
    if size is None:
        folder.read_into(file, 0, memoryview(bytearray(1)))  # raises the reason why it is not among the files
        size = 0
    return read_header(read_at(folder, file), size, f"{folder.location}/{file}")


def read_tensor(folder: Folder, file: str, header: Header, info: TensorInfo) -> NDArray[np.uint8]:
    """The values of one of its tensors."""
    raw = np.empty(info.nbytes, np.uint8)
    folder.read_into(file, header.data_start + info.start, memoryview(raw))
    return raw


def malformed(why: str) -> Malformed:
    """The error for a file of statistics that breaks the rules."""
    return Malformed("statistics-malformed", f"{why}. Make it again with `qz calibrate`.")
