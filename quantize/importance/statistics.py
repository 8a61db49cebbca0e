"""Statistics of the inputs of a model's linears: the file that calibration writes and quantization reads.

A safetensors file with ``__metadata__`` ``{"format": "qz-importance", "version": "1", …}``, and for every linear weight
of shape (out, in), by its name in the model:

- ``NAME.in_sum2``, F32 [in]: the sum over all tokens of each input's square;
- ``NAME.counts``, I64 []: how many tokens those were.

Hessians lie in files beside it, named in its metadata under ``hessians``, a JSON object: ``files`` (file → SHA-256) and
``of`` (weight → [file, tensor]; linears with the same input share a tensor). Each is ``NAME.hessian``, F32 [in, in]:
the sum over all tokens of the outer product of the input with itself. Its diagonal is ``in_sum2``.

Scores of sensitivity (``qz.quantize.calibration.scores``) are ``NAME.score``, F32 [], and in the metadata under
``scores`` a JSON object: ``method``, ``loss`` (kl, cosine or output), ``total`` and ``tokens``; of a pipeline's
denoisers such an object by the component's name, under ``components``.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from qz import MalformedInput
from qz.formats.files.file_hash import sha256_of
from qz.formats.files.folder import Folder
from qz.formats.files.links import followed
from qz.formats.files.local_folder import LocalFolder
from qz.formats.json_files import read_json
from qz.formats.malformed import quoted
from qz.formats.output.storage.whole_file import write_whole
from qz.formats.tensors.safetensors import Header, TensorInfo
from qz.formats.tensors.safetensors_layout import encode_header, layout
from qz.quantize.importance.hessian_reader import HessianPlace, HessianReader
from qz.quantize.importance.named_file import require_file_of_statistics
from qz.quantize.importance.statistics_file import header_of, malformed, read_tensor
from qz.quantize.planning.budget.sensitivity import LossName, Scores

FORMAT = "qz-importance"
VERSION = "1"
SUM2, COUNTS, HESSIAN, SCORE = ".in_sum2", ".counts", ".hessian", ".score"
MAX_TOKENS = 1 << 62
MAX_FILE_BYTES = 1 << 31
MAX_INPUTS = 1 << 20
MAX_HESSIAN_INPUTS = 1 << 16
"""The Hessian of more inputs would take 16 GiB and more."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class InputSums:
    """What was seen at the input of one linear: float32[in] sums of squares over so many tokens."""

    sum2: Floats
    tokens: int


@dataclass(frozen=True)
class Statistics:
    """A file of statistics. ``sums`` by the weights' names; Hessians are read when they are asked for."""

    location: str
    sha256: str
    """Of the file, which holds the hashes of the Hessians' files."""
    sums: Mapping[str, InputSums]
    hessians: Mapping[str, HessianPlace] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    scores: Scores | None = None
    component_scores: Mapping[str, Scores] = field(default_factory=dict)
    """Of a pipeline's denoisers, each by the weights' names in it."""
    _reader: HessianReader | None = field(default=None, compare=False)

    @property
    def tokens(self) -> int:
        """The most tokens that any linear saw."""
        return max((each.tokens for each in self.sums.values()), default=0)

    def hessian(self, name: str) -> Floats | None:
        """float32[in, in] of the weight ``name``, or None; Malformed if it does not fit its sums."""
        place = self.hessians.get(name)
        if place is None or self._reader is None:
            return None
        return self._reader.read(place, self.sums[name].sum2)


def read_statistics(path: Path) -> Statistics:
    """The statistics in the file at ``path``, read once for all who use them at a time.

    Raises MissingInput, or Malformed that says what is wrong with it.
    """
    try:
        state = path.stat()
    except OSError:  # reading it reports that
        return _read_statistics(path)
    version = path, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
    with _reading:
        found = _in_use.get(version)
        if found is None:
            found = _in_use[version] = _read_statistics(path)
        return found


_in_use: weakref.WeakValueDictionary[tuple[object, ...], Statistics] = weakref.WeakValueDictionary()
"""By the file and its state. A run of a pipeline asks for each component."""
_reading = threading.Lock()


def _read_statistics(path: Path) -> Statistics:
    require_file_of_statistics(path)
    folder = LocalFolder(path.parent, shared_links=True)
    if path.name not in folder.sizes():  # a link to another name: the user named it, so it is followed
        path = followed(path)
        folder = LocalFolder(path.parent)
    size = folder.sizes().get(path.name, 0)
    header = header_of(folder, path.name)
    if header.metadata.get("format") != FORMAT:
        raise malformed(f"{path} is not a file of input statistics (its format is not {FORMAT})")
    if header.metadata.get("version") != VERSION:
        version = quoted(header.metadata.get("version", ""))
        raise malformed(f"{path} has version {version} of its format, and this qz reads {VERSION}")
    if size > MAX_FILE_BYTES:
        raise malformed(f"{path} is {size:,} bytes long, which is too large for such a file")
    sums: dict[str, InputSums] = {}
    for info in header.tensors.values():
        name, suffix = info.name.rpartition(".")[::2]
        if f".{suffix}" == SUM2:
            sums[name] = _sums(folder, path, header, info, header.tensors.get(name + COUNTS))
        elif f".{suffix}" not in (COUNTS, SCORE) or name + SUM2 not in header.tensors:
            raise malformed(f"{path} contains {quoted(info.name)}, which is not a statistic")
    if not sums:
        raise malformed(f"{path} contains no statistics")
    hessians, files = _places(header.metadata, path, sums)
    missing = sorted(set(files) - folder.sizes().keys())
    if missing:
        raise malformed(f"{path} needs {missing[0]} beside it, which is missing")
    scores = _scores(folder, path, header)
    own = scores.pop("", None)
    reader = HessianReader(str(path), folder, files)
    return Statistics(str(path), sha256_of(path), sums, hessians, header.metadata, own, scores, reader)


def write_statistics(
    path: Path,
    sums: Mapping[str, InputSums],
    metadata: Mapping[str, str],
    hessians: Mapping[str, HessianPlace] | None = None,
    hessian_files: Mapping[str, str] | None = None,
    scores: Scores | None = None,
    component_scores: Mapping[str, Scores] | None = None,
) -> None:
    """Write the file at ``path``, replacing one that is there, at once. ``hessian_files``: name → SHA-256.

    ``metadata`` says how the statistics were made; nothing private belongs there. Raises MalformedInput for sums that
    are not finite.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for name, each in sums.items():
        if not np.isfinite(each.sum2).all():
            raise MalformedInput(
                f"The inputs of {quoted(name)} become NaN or infinite when the model runs: its weights, or the range "
                "of the numbers, do not allow it. It can be quantized with --scales search, which needs no calibration."
            )
        tensors[name + SUM2] = np.ascontiguousarray(each.sum2, np.float32)
        tensors[name + COUNTS] = np.array(each.tokens, np.int64)
    told = {"format": FORMAT, "version": VERSION, **metadata}
    if hessians:
        places = {name: [place.file, place.tensor] for name, place in sorted(hessians.items())}
        told["hessians"] = json.dumps({"files": dict(sorted((hessian_files or {}).items())), "of": places})
    if scores is not None:
        tensors |= {name + SCORE: np.array(score, np.float32) for name, score in scores.of.items()}
        told["scores"] = json.dumps(scores.about())
    elif component_scores:
        for component, own in component_scores.items():
            tensors |= {f"{component}/{name}{SCORE}": np.array(score, np.float32) for name, score in own.of.items()}
        about = {component: each.about() for component, each in component_scores.items()}
        told["scores"] = json.dumps({"components": about})
    _write(path, tensors, told)


def write_hessians(path: Path, hessians: Mapping[str, Floats]) -> str:
    """Write a file of Hessians, by the name of the (first) weight they belong to; its SHA-256."""
    return _write(path, {name + HESSIAN: np.ascontiguousarray(values, np.float32) for name, values in hessians.items()})


def _write(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> str:
    dtypes = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}
    infos = layout((name, dtypes[values.dtype], values.shape) for name, values in tensors.items())
    header = encode_header(infos, metadata or {"format": "pt"})
    pieces: Iterable[memoryview] = (
        memoryview(header),
        *(memoryview(tensors[info.name].reshape(-1)).cast("B") for info in infos if info.nbytes),
    )
    return write_whole(path, pieces)


def _sums(folder: Folder, path: Path, header: Header, info: TensorInfo, counts: TensorInfo | None) -> InputSums:
    if info.dtype != "F32" or len(info.shape) != 1 or not 0 < info.shape[0] <= MAX_INPUTS:
        raise malformed(f"{path}: {quoted(info.name)} is {info.dtype} {list(info.shape)}, not F32 [inputs]")
    if counts is None or counts.dtype != "I64" or counts.shape not in ((), (1,)):
        raise malformed(f"{path}: {quoted(info.name)} comes without the I64 number of its tokens ({COUNTS})")
    values = read_tensor(folder, path.name, header, info).view(np.float32)
    tokens = int(read_tensor(folder, path.name, header, counts).view(np.int64)[0])
    check_sums(values, tokens, f"{path}: {quoted(info.name)}")
    return InputSums(values, tokens)


def _scores(folder: Folder, path: Path, header: Header) -> dict[str, Scores]:
    """The file's scores by component, those of one model under "". Raises Malformed for any that are none."""
    infos = {name.removesuffix(SCORE): info for name, info in header.tensors.items() if name.endswith(SCORE)}
    if "scores" not in header.metadata:
        if infos:
            raise malformed(f"{path} has scores, and does not say of what")
        return {}
    told = read_json(header.metadata["scores"].encode(), f"{path}: scores")
    components = told.get("components")
    parts = components if isinstance(components, dict) else {"": told}
    found: dict[str, dict[str, float]] = {component: {} for component in parts}
    for name, info in infos.items():
        if info.dtype != "F32" or info.shape not in ((), (1,)):
            raise malformed(f"{path}: the score of {quoted(name)} is {info.dtype} {list(info.shape)}, not F32 []")
        score = float(read_tensor(folder, path.name, header, info).view(np.float32)[0])
        if not 0 <= score < float("inf"):
            raise malformed(f"{path}: the score of {quoted(name)} is {score}")
        component, _, weight = name.partition("/") if parts is components else ("", "", name)
        if component not in found:
            raise malformed(f"{path} does not say of what the score of {quoted(name)} is")
        found[component][weight] = score
    return {component: _told_scores(of, parts[component], path) for component, of in found.items()}


def _told_scores(of: Mapping[str, float], told: Any, path: Path) -> Scores:
    values = told if isinstance(told, dict) else {}
    method, loss, total, tokens = (values.get(key) for key in ("method", "loss", "total", "tokens"))
    known = method in ("nf4", "fp4", "int8") and loss in get_args(LossName) and type(tokens) is int
    if not known or not isinstance(total, int | float) or not 0 <= total < float("inf"):
        raise malformed(f"{path} does not say of what its scores are")
    return Scores(of, str(method), cast("LossName", loss), float(total), int(str(tokens)))


def check_sums(values: NDArray[np.floating[Any]], tokens: float, where: str) -> None:
    """Raise Malformed unless these are sums of squares over a number of tokens."""
    if not np.isfinite(values).all() or (values < 0).any():
        raise malformed(f"{where} contains values that are not sums of squares (negative, NaN or infinite)")
    if not 0 <= tokens < MAX_TOKENS:  # nor NaN
        raise malformed(f"{where} was summed over {tokens} tokens")


def _places(
    metadata: Mapping[str, str], path: Path, sums: Mapping[str, InputSums]
) -> tuple[dict[str, HessianPlace], Mapping[str, str]]:
    if "hessians" not in metadata:
        return {}, {}
    told = read_json(metadata["hessians"].encode(), f"{path}: hessians")
    files, places = told.get("files"), told.get("of")
    if not isinstance(files, dict) or not isinstance(places, dict):
        raise malformed(f"{path}: its list of Hessians has no files")
    found = {}
    for name, place in places.items():
        fits = isinstance(place, list) and len(place) == 2 and all(isinstance(part, str) for part in place)
        if not fits or place[0] not in files or name not in sums or sums[name].sum2.size > MAX_HESSIAN_INPUTS:
            raise malformed(f"{path}: the Hessian of {quoted(name)} is listed without its file, or without its sums")
        found[name] = HessianPlace(*place)
    return found, files
