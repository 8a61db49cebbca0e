"""The plan: which tensor becomes what, and where it goes. Pure; no weight has been read when it is complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qz.formats.checkpoint.adapter_file import AdapterFile
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.output.shards.shard_layout import ShardLayout
from qz.formats.tensors import shards
from qz.formats.tensors.safetensors_layout import encode_header, layout
from qz.quantize.libraries.architecture import Architecture, Saved, Weight
from qz.quantize.methods import Method
from qz.quantize.planning.budget.kept_layers import KeptLayers
from qz.quantize.planning.computable import require_computable
from qz.quantize.planning.refinement import Refinement
from qz.quantize.planning.sources import Source, is_quantized, part_of

Act = Literal["keep", "quantize", "dequantize"]


@dataclass(frozen=True, slots=True)
class Step:
    """One weight: read its sources, dequantizing those that are quantized, cast, quantize or keep, and write."""

    weight: Weight
    sources: tuple[Source, ...]
    outputs: tuple[Saved, ...]
    shard: int
    """Position of the outputs' shard in ``Plan.shards``; -1 where the outputs are spread, see ``shard_of``."""

    @property
    def name(self) -> str:
        """The weight's name in the output."""
        return next(saved.name for saved in self.outputs if saved.part in ("", "weight"))

    @property
    def act(self) -> Act:
        if self.weight.quantized:
            return "quantize"
        return "dequantize" if any(map(is_quantized, self.sources)) else "keep"


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be read, computed and written."""

    checkpoint: Checkpoint
    architecture: Architecture
    method: Method | None
    steps: tuple[Step, ...]
    """In the order of the source's bytes, so that a remote source can be streamed."""
    shards: tuple[ShardLayout, ...]
    shard_of: Mapping[str, int]
    """Output tensor → position in ``shards``."""
    files: Mapping[str, bytes]
    """Small files written beside the shards: index, config.json, generation_config.json."""
    adapters: tuple[AdapterFile, ...] = ()
    """LoRAs that are fused into the weights."""
    refinement: Refinement | None = None
    """How 4-bit weights are quantized better than by absmax; None for the libraries' own bytes."""
    kept_layers: KeptLayers | None = None
    """What stays unquantized for a size or a loss; None where neither was asked for."""

    @property
    def bytes_output(self) -> int:
        """Bytes of all shards and files; under double quantization an upper bound, by up to 25 bytes a weight."""
        return sum(shard.size for shard in self.shards) + sum(len(data) for data in self.files.values())

    @property
    def bytes_source(self) -> int:
        return sum(self.checkpoint.sizes[file] for file in self.checkpoint.files)

    @property
    def quantized(self) -> tuple[Weight, ...]:
        """The weights that are quantized: in the output, or in a source that is dequantized."""
        if self.method is not None:
            return tuple(step.weight for step in self.steps if step.weight.quantized)
        return tuple(step.weight for step in self.steps if step.act == "dequantize")


def make_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    method: Method | None,
    max_shard_bytes: int,
    sources: Mapping[str, Source] | None = None,
) -> Plan:
    """Lay the architecture's tensors out in shards and order the work. ``sources``: by name, if not all are stored."""
    grouped = checkpoint.library == "diffusers"
    items = [
        shards.Item(
            saved.name, saved.nbytes, id(saved.weight) if grouped and saved.part else saved.storage or -number - 1
        )
        for number, saved in enumerate(architecture.saved)
    ]
    names = shards.split(items, max_shard_bytes)
    files = shards.file_names(checkpoint.library, len(names))
    by_name = {saved.name: saved for saved in architecture.saved}
    layouts = tuple(
        shard_layout(file, [by_name[name] for name in members]) for file, members in zip(files, names, strict=True)
    )
    shard_of = {name: number for number, members in enumerate(names) for name in members}
    documents = dict(architecture.documents)
    if len(files) > 1:
        total_parameters = architecture.counted_parameters if checkpoint.library == "transformers" else None
        total = sum(saved.nbytes for saved in architecture.saved)
        weight_map = {name: files[shard_of[name]] for name in by_name}
        documents[shards.index_name(checkpoint.library)] = shards.index(weight_map, total, total_parameters)
    steps = _steps(checkpoint, architecture, shard_of, sources or checkpoint.tensors)
    require_computable(steps, checkpoint.folder.location)
    return Plan(checkpoint, architecture, method, steps, layouts, shard_of, documents)


def shard_layout(file: str, members: list[Saved]) -> ShardLayout:
    """Where each tensor lies in its file: ``save_file``'s order, except that tensors of variable length come last."""
    fixed = layout((saved.name, saved.dtype, saved.shape) for saved in members if not saved.variable)
    end = fixed[-1].stop if fixed else 0
    variable = layout((saved.name, saved.dtype, saved.shape) for saved in members if saved.variable)
    tensors = (*fixed, *(info._replace(start=info.start + end, stop=info.stop + end) for info in variable))
    return ShardLayout(file, tensors, len(encode_header(tensors)), frozenset(info.name for info in variable))


def _steps(
    checkpoint: Checkpoint, architecture: Architecture, shard_of: Mapping[str, int], stored: Mapping[str, Source]
) -> tuple[Step, ...]:
    outputs: dict[int, list[Saved]] = {}
    for saved in architecture.saved:
        outputs.setdefault(id(saved.weight), []).append(saved)
    steps = []
    for group in outputs.values():
        weight = group[0].weight
        sources = tuple(
            stored[name] if weight.index is None else part_of(stored[name], weight.index) for name in weight.sources
        )
        homes = {shard_of[saved.name] for saved in group}
        steps.append(Step(weight, sources, tuple(group), homes.pop() if len(homes) == 1 else -1))
    order = {file: number for number, file in enumerate(checkpoint.files)}
    return tuple(sorted(steps, key=lambda step: (order[step.sources[0].file], step.sources[0].offset)))
