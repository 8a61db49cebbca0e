"""The report of a whole pipeline: a row for each component, and the total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qz.formats.output.recorded.record import WrittenFile
from qz.quantize.reports.summary import Source, Summary, kept_layers_json, nonfinite_json, report_json
from qz.quantize.streaming.measuring.loss import Loss, joined

if TYPE_CHECKING:
    from qz.formats.output.shares import Share
    from qz.formats.publish.destination import PushResult
    from qz.quantize.planning.budget.component_sizes import Combination
    from qz.quantize.planning.budget.kept_layers import KeptLayers


@dataclass(frozen=True, slots=True)
class ComponentSummary:
    """One component: converted, as ``model`` says, written in another dtype or with LoRAs in it, as ``cast`` says, or
    carried over unchanged."""

    name: str
    library: str
    architecture: str | None
    reason: str
    parameters: int
    """Stored values."""
    bytes: int
    """Of the weight files in the source."""
    footprint: int
    """``get_memory_footprint()`` if it is carried over; 0 if it has no weights."""
    model: Summary | None = None
    cast: Summary | None = None
    left_out: tuple[str, ...] = ()
    """Files of its folder that are not in the output."""

    @property
    def method(self) -> str:
        """That it is quantized with, or was before it was dequantized; none if it is carried over."""
        return self.model.method if self.model is not None else "none"

    @property
    def converted(self) -> bool:
        return self.model is not None

    @property
    def written(self) -> Summary | None:
        """What was written anew; None if it is carried over."""
        return self.model or self.cast

    @property
    def bytes_output(self) -> int:
        return self.written.bytes_output if self.written is not None else self.bytes

    @property
    def footprint_before(self) -> int:
        return self.model.footprint_before if self.model is not None else self.footprint

    @property
    def footprint_after(self) -> int:
        return self.written.footprint_after if self.written is not None else self.footprint

    @property
    def warnings(self) -> tuple[str, ...]:
        written = self.written
        return tuple(f"{self.name}: {text}" for text in (written.warnings if written is not None else ()))

    def as_json(self) -> dict[str, Any]:
        model = self.model
        return {
            "name": self.name,
            "library": self.library,
            "architecture": self.architecture,
            "converted": self.converted,
            "reason": self.reason,
            "method": self.method,
            "double_quant": model.double_quant if model is not None else False,
            **(model.refinement if model is not None else {}),
            "dtype": self.written.dtype if self.written is not None else None,
            "loss": model.loss.as_json() if model is not None and model.loss is not None else None,
            "parameters": {
                "total": model.parameters if model is not None else self.parameters,
                "quantized": model.quantized_parameters if model is not None else 0,
            },
            "skipped": sorted(model.skipped) if model is not None else [],
            **(kept_layers_json(model) if model is not None else {}),
            "bytes": {"source": self.bytes, "output": self.bytes_output},
            "memory_footprint": {"before": self.footprint_before, "after": self.footprint_after},
        }


@dataclass(frozen=True, slots=True)
class PipelineSummary:
    """What a conversion of a pipeline did, or with ``dry_run`` would do. Sizes in bytes."""

    source: Source
    output: str
    device: str
    dry_run: bool
    components: tuple[ComponentSummary, ...]
    carried: tuple[str, ...]
    bytes_all: int
    """Of every file of the output."""
    shards: tuple[WrittenFile, ...]
    """All weight files; in a dry run with the hash left empty."""
    seconds: float
    resumed: bool = False
    bytes_read: int = 0
    """Of the source, in this run."""
    notes: tuple[str, ...] = ()
    """What the user should know about the device that was chosen."""
    pushed: PushResult | None = None
    """What came of publishing the output, if that was asked for."""
    share: Share | None = None
    """Which part of the output was made, if not all of it."""
    bytes_of: str = ""
    """The kind of device that writes the same bytes."""
    lacking: tuple[str, ...] = ()
    """Components that who loads the output passes: its class requires them, and model_index.json does not give them."""
    left_out_of_root: tuple[str, ...] = ()
    loras: tuple[Mapping[str, Any], ...] = ()
    """Those that were fused, as the record lists them; ``weights`` counts those of all components."""
    combinations: tuple[Combination, ...] = ()
    """Methods of the components that were chosen from, for a size."""
    kept_layers: KeptLayers | None = None
    """Of all components together, for a loss."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Files of the source that are not in the output; a folder that is not there at all ends in a slash."""
        inside = (f"{component.name}/{name}" for component in self.components for name in component.left_out)
        return (*self.left_out_of_root, *inside)

    @property
    def models(self) -> tuple[Summary, ...]:
        return tuple(component.model for component in self.components if component.model is not None)

    @property
    def loss(self) -> Loss | None:
        """Of all components together, if that was measured."""
        found = {c.name: c.model.loss for c in self.components if c.model is not None and c.model.loss is not None}
        return joined(found) if found else None

    @property
    def act(self) -> str:
        """quantize or dequantize."""
        return self.models[0].act

    @property
    def method(self) -> str:
        """Of the converted components; more than one joined by ``+``, that of most parameters first."""
        shares: dict[str, int] = {}
        for model in self.models:
            shares[model.method] = shares.get(model.method, 0) + model.quantized_parameters
        return "+".join(sorted(shares, key=lambda method: (-shares[method], method)))

    @property
    def double_quant(self) -> bool:
        return any(model.double_quant for model in self.models)

    @property
    def refinement(self) -> Mapping[str, Any]:
        """How scales and codes are chosen: as in the component that is refined most; each tells its own."""
        found = [model.refinement for model in self.models if model.refinement]
        return next((each for each in found if each["scales"] == "search"), found[0] if found else {})

    @property
    def parameters(self) -> int:
        return sum(c.model.parameters if c.model is not None else c.parameters for c in self.components)

    @property
    def quantized_parameters(self) -> int:
        return sum(model.quantized_parameters for model in self.models)

    @property
    def bytes_source(self) -> int:
        return sum(component.bytes for component in self.components)

    @property
    def bytes_output(self) -> int:
        if self.share is not None:
            return sum(shard.bytes for shard in self.shards)
        return sum(component.bytes_output for component in self.components)

    @property
    def footprint_before(self) -> int:
        return sum(component.footprint_before for component in self.components)

    @property
    def footprint_after(self) -> int:
        return sum(component.footprint_after for component in self.components)

    @property
    def bits_per_weight(self) -> float:
        return self.bytes_output * 8 / self.parameters if self.parameters else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*(text for component in self.components for text in component.warnings), *self.notes)

    @property
    def quantized_tensors(self) -> int:
        return sum(model.quantized_tensors for model in self.models)

    @property
    def kept_tensors(self) -> int:
        return sum(model.kept_tensors for model in self.models)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Linears left as they are, as ``COMPONENT/PATH``."""
        return tuple(f"{c.name}/{path}" for c in self.components if c.model is not None for path in c.model.skipped)

    def as_json(self) -> dict[str, Any]:
        """The contract of ``--json``: the keys of a single model's report, and ``components``."""
        report = report_json(self)
        return {
            **report,
            "skipped": sorted(self.skipped),
            "nonfinite": nonfinite_json(
                {f"{c.name}/{name}": n for c in self.components if c.written for name, n in c.written.nonfinite.items()}
            ),
            "loss": self.loss.as_json() if self.loss is not None else None,
            "components": [component.as_json() for component in self.components],
            "bytes": {**report["bytes"], "all_files": self.bytes_all},
            **kept_layers_json(self),
            **({"lacking": list(self.lacking)} if self.lacking else {}),
            **({"combinations": [each.as_json() for each in self.combinations]} if self.combinations else {}),
        }
