"""What a checkpoint is, as dataclasses that the table and the JSON are two renderings of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from qz.formats.checkpoint.problems import Problem, worst_first

if TYPE_CHECKING:
    from qz.quantize.consumers.verdict import Verdict
    from qz.quantize.inspection.estimate import Estimate


class Origin(NamedTuple):
    """What was looked at. ``revision`` is a commit on the Hub; library and class are None where no config says them."""

    location: str
    revision: str | None
    subfolder: str | None
    library: str | None = None
    architecture: str | None = None


class Share(NamedTuple):
    """What is stored in one dtype."""

    tensors: int
    parameters: int
    bytes: int


class Quantization(NamedTuple):
    """How a checkpoint is quantized. What only bitsandbytes has is None for other methods.

    ``skipped`` is None where the config leaves it to the library's defaults.
    """

    method: str
    double_quant: bool | None = None
    block_size: int | None = None
    compute_dtype: str | None = None
    storage: str | None = None
    threshold: float | None = None
    skipped: tuple[str, ...] | None = None
    quantized_parameters: int | None = None
    quantized_tensors: int | None = None


class File(NamedTuple):
    """A file of the checkpoint; ``tensors`` is None for one that is no weight file."""

    name: str
    bytes: int
    tensors: int | None = None


class Tensor(NamedTuple):
    """A stored tensor. Of a quantized weight ``quantized`` is its kind, and ``original`` the shape before."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str
    parameters: int
    """Values of the model: two for a byte of 4-bit codes, none for what belongs to a quantized weight."""
    quantized: str | None = None
    original: tuple[int, ...] | None = None
    part_of: str | None = None
    """The quantized weight that this belongs to."""


class Verified(NamedTuple):
    """What was compared with the record that qz left. ``intact``: nothing differs, nothing is missing."""

    files: int
    bytes: int
    intact: bool


@dataclass(frozen=True)
class Inspection:
    """What a model, or a single file, is. Figures that are not known are None."""

    source: Origin
    format: str | None
    parameters: int | None
    bytes: int | None
    dtypes: Mapping[str, Share]
    quantization: Quantization | None
    memory_footprint: int | None
    memory_footprint_exact: bool
    estimates: Mapping[str, Estimate] | None
    ties: Mapping[str, str]
    files: tuple[File, ...]
    problems: tuple[Problem, ...]
    tensors: tuple[Tensor, ...]
    verified: Verified | None = None
    consumers: Mapping[str, Verdict] = field(default_factory=dict)
    """By name, those that were asked for."""

    def with_verified(self, verified: Verified, problems: tuple[Problem, ...]) -> Inspection:
        return replace(self, verified=verified, problems=worst_first((*self.problems, *problems)))

    def with_problems(self, problems: Iterable[Problem]) -> Inspection:
        return replace(self, problems=worst_first((*self.problems, *problems)))

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    def as_json(self) -> dict[str, Any]:
        """The contract of ``--json``; ``tensors`` comes with ``--tensors`` only."""
        return {
            "source": self.source,
            "format": self.format,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dtypes": self.dtypes,
            "quantization": self.quantization,
            "memory_footprint": self.memory_footprint,
            "memory_footprint_exact": self.memory_footprint_exact,
            "estimates": self.estimates,
            "ties": self.ties,
            "files": self.files,
            "problems": self.problems,
            "verified": self.verified,
            "consumers": {name: verdict.as_json() for name, verdict in self.consumers.items()},
        }
