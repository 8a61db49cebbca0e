"""The report of a conversion as dataclasses; the table and the JSON are two renderings of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qz.counted import counted
from qz.formats.checkpoint.adapter_file import CONFIG as ADAPTER_CONFIG
from qz.formats.checkpoint.adapter_file import AdapterFile
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.malformed import quoted
from qz.formats.output.companions import Companion, left_out
from qz.formats.output.file_names import INDEXES
from qz.formats.output.recorded.record import WrittenFile
from qz.quantize.consumers.planned import warnings as consumer_warnings
from qz.quantize.methods import LOW_COVERAGE
from qz.quantize.planning.budget.kept_layers import KeptLayers
from qz.quantize.planning.plan import Plan
from qz.quantize.planning.refinement import AS_THE_LIBRARIES
from qz.quantize.planning.sources import fused_parts, packed_parts
from qz.quantize.reports.of_record import kind_of
from qz.quantize.streaming.measuring.loss import Loss
from qz.quantize.streaming.measuring.not_finite import NotFinite

if TYPE_CHECKING:
    from qz.formats.output.shares import Share
    from qz.formats.publish.destination import PushResult
    from qz.quantize.reports.pipeline_summary import PipelineSummary


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from. ``revision`` is a commit on the Hub."""

    location: str
    revision: str | None
    subfolder: str | None
    library: str
    architecture: str
    module: str | None = None
    """Where the class is, if the library does not export it."""
    pipeline: str | None = None
    """The class of the pipeline that it is a component of, where that is known."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did, or with ``dry_run`` would do. Sizes in bytes."""

    act: Literal["quantize", "dequantize"]
    source: Source
    output: str
    """The folder that was written; empty if it is on the Hub only."""
    method: str
    """Of the quantized weights, those of the source when they are dequantized; more than one joined by ``+``."""
    double_quant: bool
    dtype: str
    device: str
    dry_run: bool
    parameters: int
    quantized_parameters: int
    quantized_tensors: int
    kept_tensors: int
    skipped: dict[str, str]
    """Linears left as they are → why."""
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    bytes_source: int
    bytes_output: int
    footprint_before: int
    footprint_after: int
    shards: tuple[WrittenFile, ...]
    """In a dry run with the hash left empty."""
    seconds: float
    resumed: bool = False
    bytes_read: int = 0
    """Of the source, in this run."""
    loss: Loss | None = None
    """What quantization cost, if that was measured."""
    carried: tuple[str, ...] = ()
    """Files copied unchanged: tokenizer, processor, licence."""
    left_out: tuple[str, ...] = ()
    """Files of the source that are not in the output; a folder that is not there at all ends in a slash."""
    pushed: PushResult | None = None
    """What came of publishing the output, if that was asked for."""
    share: Share | None = None
    """Which part of the output was made, if not all of it."""
    bytes_of: str = ""
    """The kind of device that writes the same bytes."""
    nonfinite: Mapping[str, NotFinite] = field(default_factory=dict)
    """Tensors that were not quantized and hold NaN or infinite values in the output."""
    refinement: Mapping[str, Any] = field(default_factory=dict)
    """How scales and codes are chosen: ``scales``, ``rounding``, ``importance``; empty if nothing is quantized."""
    loras: tuple[Mapping[str, Any], ...] = ()
    """Those that were fused into the weights, in their order, as the record lists them."""
    kept_layers: KeptLayers | None = None
    """What stays unquantized for a size or a loss."""

    @property
    def coverage(self) -> float:
        """The quantized share of the model's parameters."""
        return self.quantized_parameters / self.parameters if self.parameters else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each of the model's parameters."""
        return self.bytes_output * 8 / self.parameters if self.parameters else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should not overlook."""
        found = list(self.notes)
        if self.act == "quantize" and self.coverage < LOW_COVERAGE:
            kept = self.parameters - self.quantized_parameters
            found.append(
                f"only {self.coverage:.0%} of the parameters are quantized; {kept:,} stay in {self.dtype}: "
                "bitsandbytes quantizes linear layers only, not embeddings, convolutions or fused MoE experts"
            )
        if self.dropped:
            shown = ", ".join(self.dropped[:3]) + (" …" if len(self.dropped) > 3 else "")
            found.append(
                f"{counted(len(self.dropped), 'tensor')} not used by "
                f"{self.source.architecture} {'was' if len(self.dropped) == 1 else 'were'} left out: {shown}"
            )
        found += told_of_nonfinite(self.nonfinite, self.dtype, fused=bool(self.loras))
        if self.loss is not None and self.loss.unrelated:
            found.append(
                f"the relative error is {self.loss.total.relative_error:.2f}: the two models have nothing in common. "
                "Was it made from this original?"
            )
        return tuple(found)

    def as_json(self) -> dict[str, Any]:
        """The contract of ``--json``."""
        return {
            **report_json(self),
            "skipped": sorted(self.skipped),
            "dtype": self.dtype,
            "nonfinite": nonfinite_json(self.nonfinite),
            "loss": self.loss.as_json() if self.loss else None,
            **kept_layers_json(self),
        }


def kept_layers_json(summary: Summary | PipelineSummary) -> dict[str, Any]:
    """Told only where a size or a loss was asked for."""
    return {} if summary.kept_layers is None else {"kept_layers": summary.kept_layers.as_json()}


def nonfinite_json(nonfinite: Mapping[str, NotFinite]) -> list[dict[str, Any]]:
    """Tensors with values that are not finite, by name."""
    return [
        {"name": name, "stored": count.stored, "overflowed": count.overflowed}
        for name, count in sorted(nonfinite.items())
    ]


def told_of_nonfinite(nonfinite: Mapping[str, NotFinite], dtype: str, *, fused: bool) -> Iterator[str]:
    """A line for what overflowed on the way, and one for what was not finite to begin with."""
    overflowed = {name: count.overflowed for name, count in sorted(nonfinite.items()) if count.overflowed}
    if overflowed:
        yield (
            f"values too large for the output's dtype became infinite: {_counts(overflowed)}. "
            f"Choose a --dtype with a wider range than {dtype}{', or a smaller scale of the LoRA' if fused else ''}"
        )
    stored = {name: count.stored for name, count in sorted(nonfinite.items()) if count.stored}
    if stored:
        yield f"values that are NaN or infinite were kept as they are: {_counts(stored)}"


def _counts(counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{count:,} in {name}" for name, count in list(counts.items())[:3])
    return shown + (f" and more in {len(counts) - 3} others" if len(counts) > 3 else "")


def report_json(summary: Summary | PipelineSummary) -> dict[str, Any]:
    """What the reports of a model and of a pipeline have in common, under the keys of ``--json``."""
    source = summary.source
    report = {
        "act": summary.act,
        "source": {
            "location": source.location,
            "revision": source.revision,
            "subfolder": source.subfolder,
            "library": source.library,
            "architecture": source.architecture,
            **({"module": source.module} if source.module else {}),
            **({"pipeline": source.pipeline} if source.pipeline else {}),
        },
        "output": summary.output or None,
        "method": summary.method,
        "double_quant": summary.double_quant,
        **summary.refinement,
        **({"loras": [dict(lora) for lora in summary.loras]} if summary.loras else {}),
        "device": summary.device,
        **({"bytes_of": summary.bytes_of} if summary.bytes_of not in ("", kind_of(summary.device)) else {}),
        "dry_run": summary.dry_run,
        "parameters": {"total": summary.parameters, "quantized": summary.quantized_parameters},
        "tensors": {"quantized": summary.quantized_tensors, "kept": summary.kept_tensors},
        "bytes": {"source": summary.bytes_source, "output": summary.bytes_output},
        "bits_per_weight": round(summary.bits_per_weight, 3),
        "memory_footprint": {"before": summary.footprint_before, "after": summary.footprint_after},
        "shards": [{"name": s.name, "bytes": s.bytes, "sha256": s.sha256 or None} for s in summary.shards],
        "carried": list(summary.carried),
        "left_out": list(summary.left_out),
        "warnings": list(summary.warnings),
        "up_to_date": False,
        "resumed": summary.resumed,
        "seconds": round(summary.seconds, 3),
    }
    if summary.share is not None:
        report["part"] = summary.share.as_json()
    return report if summary.pushed is None else {**report, "push": summary.pushed.as_json()}


def summarize(
    plan: Plan,
    source: Source,
    output: str,
    *,
    device: str,
    written: Iterable[WrittenFile] = (),
    carried: Iterable[Companion] = (),
    seconds: float = 0.0,
    resumed: bool = False,
    loss: Loss | None = None,
    nonfinite: Mapping[str, NotFinite] | None = None,
) -> Summary:
    """Sum a plan up; ``written`` are the files of a finished run, none for a dry run."""
    architecture = plan.architecture
    copied = {each.name for each in carried} - plan.files.keys()
    files = tuple(file for file in written if file.name not in copied)
    names = {layout.file for layout in plan.shards}
    quantized = plan.quantized
    method, double_quant = _method(plan)
    return Summary(
        act="dequantize" if plan.method is None else "quantize",
        source=source,
        output=output,
        method=method,
        double_quant=double_quant,
        dtype=architecture.dtype,
        device=device,
        dry_run=not files,
        parameters=architecture.parameters,
        quantized_parameters=sum(weight.count for weight in quantized),
        quantized_tensors=len(quantized),
        kept_tensors=len(plan.steps) - len(quantized),
        skipped=dict(architecture.kept_linears),
        dropped=architecture.dropped,
        notes=(*_notes(plan), *code_left_out(carried), *(note for each in carried for note in each.notes)),
        bytes_source=plan.bytes_source,
        bytes_output=sum(file.bytes for file in files) if files else plan.bytes_output,
        footprint_before=architecture.footprint.before,
        footprint_after=architecture.footprint.after,
        shards=tuple(file for file in files if file.name in names)
        if files
        else tuple(WrittenFile(layout.file, layout.size, "") for layout in plan.shards),
        seconds=seconds,
        resumed=resumed,
        loss=loss,
        carried=tuple(sorted(copied)),
        left_out=left_out(plan.checkpoint.folder, {*copied, *made_from(plan.checkpoint)})
        if plan.checkpoint.folder.named_file is None
        else (),
        nonfinite=nonfinite or {},
        refinement=_refinement(plan),
        loras=tuple({**adapter.as_json(), "weights": fused_weights(plan, adapter)} for adapter in plan.adapters),
        kept_layers=plan.kept_layers,
    )


def _notes(plan: Plan) -> tuple[str, ...]:
    """What the user should know of what was planned."""
    return (
        *plan.checkpoint.choices,
        *plan.architecture.notes,
        *_encoded(plan),
        *_left_out(plan),
        *_adapter(plan),
        *consumer_warnings(plan),
        *(plan.refinement.notes if plan.refinement is not None else ()),
        *(plan.kept_layers.notes if plan.kept_layers is not None else ()),
    )


def _refinement(plan: Plan) -> Mapping[str, Any]:
    if plan.method is None:
        return {}
    return AS_THE_LIBRARIES if plan.refinement is None else plan.refinement.as_json()


def fused_weights(plan: Plan, adapter: AdapterFile) -> int:
    """How many tensors of the model a LoRA changes."""
    sources = {id(part): part for step in plan.steps for source in step.sources for part in fused_parts(source)}
    return sum(any(change.adapter is adapter for change in source.changes) for source in sources.values())


def made_from(checkpoint: Checkpoint) -> set[str]:
    """Names of the files that a converted model is made from."""
    indexes = {name for name in checkpoint.folder.sizes() if checkpoint.index is not None and INDEXES.fullmatch(name)}
    return {"config.json", "generation_config.json", *checkpoint.files, *indexes}


def _left_out(plan: Plan) -> tuple[str, ...]:
    """A note on weight files that the source's index does not list."""
    files = ", ".join(quoted(name) for name in plan.checkpoint.unused[:4])
    more = len(plan.checkpoint.unused) - 4
    if not files:
        return ()
    return (f"left out, as no loader reads it: {files}" + (f" and {more} more files" if more > 0 else ""),)


def _adapter(plan: Plan) -> tuple[str, ...]:
    """A note on an adapter beside the model, which transformers loads with it wherever PEFT is installed."""
    folder = plan.checkpoint.folder
    if ADAPTER_CONFIG not in folder.sizes() or folder.named_file is not None or plan.method is None or plan.adapters:
        return ()
    told = f"the adapter of {ADAPTER_CONFIG} is not in the output, which is of the model without it"
    return (f"{told}. To have it fused, run this again with `--lora` and the folder or repository of the adapter",)


def code_left_out(carried: Iterable[Companion], inside: str = "") -> tuple[str, ...]:
    """A note on code that files in the output name, and that is not copied; ``inside``: the folder of them."""
    named = ((each.name, file) for each in carried for file in each.code)
    return tuple(
        f"{inside}{name} names code in {file}, which is not copied: what needs it, needs a copy of it in the output"
        for name, file in named
    )


def _encoded(plan: Plan) -> tuple[str, ...]:
    """A note on a source that another tool quantized."""
    checkpoint = plan.checkpoint
    notes = []
    if checkpoint.encoded_as is not None:
        notes = [f"the source is quantized already, with {checkpoint.encoded_as}: its values were computed from that"]
    if checkpoint.left_out:
        what = "tensor" if checkpoint.encoded_as is not None else "value"
        why = "no weight of the model" if checkpoint.encoded_as is not None else "no tensor"
        shown = ", ".join(quoted(name) for name in checkpoint.left_out[:3])
        more = " …" if len(checkpoint.left_out) > 3 else ""
        notes.append(f"{counted(len(checkpoint.left_out), what)} left out, being {why}: {shown}{more}")
    if checkpoint.encoded_as == "gguf" and checkpoint.original is None:
        notes.append(
            "the tokenizer inside of a GGUF file is not written: take that of the original model, or load it with "
            "AutoTokenizer.from_pretrained(folder, gguf_file=…) and save it"
        )
    return tuple(notes)


def _method(plan: Plan) -> tuple[str, bool]:
    """The method that the plan quantizes with, or the one it undoes; and whether there is double quantization."""
    if plan.method is not None:
        return plan.method.name, plan.method.double_quant
    if plan.checkpoint.encoded_as is not None:
        return plan.checkpoint.encoded_as, False
    weights = [part.weight for step in plan.steps for source in step.sources for part in packed_parts(source)]
    kinds = "+".join(sorted({weight.kind for weight in weights}))
    return kinds or "none", any(weight.double_quant for weight in weights)
