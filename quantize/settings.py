"""How to convert: everything the user may choose that decides what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qz import UsageError
from qz.formats.tensors.shards import DEFAULT_SHARD_BYTES
from qz.quantize.methods import COMPUTE_DTYPES, Int8, Method, full_name

if TYPE_CHECKING:
    from qz.formats.checkpoint.adapter_file import AdapterFile

LEAST_SHARD_BYTES = 1000
"""With a smaller one, a unit was forgotten."""
IfExists = Literal["error", "skip", "overwrite"]
"""What to do where the output exists: refuse, leave one that is up to date, or replace it."""

Layout = Literal["diffusers", "single-file"]
Scales = Literal["absmax", "search"]
Rounding = Literal["nearest", "gptq"]
INT8_HAS_NO_SEARCH = (
    "--scales search is for nf4 and fp4. int8 has a scale for each row, where a search was measured to lower the "
    "error by 1 %, and the error is a tenth of nf4's as it is. Leave it out, or use --nf4."
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to convert. ``threads`` 0 means one for each CPU that may be used."""

    method: Method | None
    dtype: str = "auto"
    skips: tuple[str, ...] = ()
    default_skips: bool = True
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    device: str = "auto"
    threads: int = 0
    keep_nonfinite: bool = False
    """Leave weights that hold NaN or infinite values unquantized, instead of refusing them."""
    weights_only: bool = False
    """Write the model alone, without tokenizer, processor, licence and the like."""
    components: tuple[str, ...] | None = None
    """Of a pipeline, what to quantize; None to choose what is worth it."""
    component_methods: Mapping[str, Method | None] = field(default_factory=dict)
    """Of a pipeline, components with a method of their own; None for one that stays as it is."""
    scales: Scales = "absmax"
    """How the scale of a 4-bit block is found: as the libraries do, or searched for a smaller error."""
    importance: Path | None = None
    """What is known of the model's inputs: see ``qz.quantize.calibration``. Needs searched scales."""
    rounding: Rounding = "nearest"
    """Of each value to the nearest level, or so that errors cancel in the layer's output, which needs Hessians."""

    target_size: int | None = None
    """Bytes in memory that the model may take: its most sensitive linears stay unquantized until it is full."""
    max_loss: float | None = None
    """What the model may lose, in the unit of the scores: as many linears stay unquantized as that needs."""
    scores: Path | None = None
    """How sensitive each linear is, as ``qz calibrate --scores`` found; None for those of ``importance``, or a rule."""
    split_groups: bool = False
    """Choose linears one by one, also those that serving engines load as one."""

    experts: bool = False
    """Quantize the experts of MoE models, too, which transformers leaves alone and cannot load."""
    variant: str | None = None
    """Of the weight files that are read."""
    layout: Layout = "diffusers"
    """In which names weights are written: the library's, or those of the single file that is read."""
    file: str | None = None
    """The one file of a repository or folder that is read."""
    config: str | None = None
    """The folder or repository of the config of a model that comes in one file."""
    allow_pickle: bool = False
    """Read pickled weights where there are no others."""
    loras: tuple[AdapterFile, ...] = ()
    """Fused into the weights, in this order, before they are quantized."""

    def __post_init__(self) -> None:
        """Raises UsageError for choices that exclude each other, or that make no sense."""
        object.__setattr__(self, "dtype", full_name(self.dtype))
        if self.dtype not in ("auto", *COMPUTE_DTYPES):
            raise UsageError(f"dtype {self.dtype!r} is not one of auto, {', '.join(COMPUTE_DTYPES)}.")
        if self.max_shard_bytes < LEAST_SHARD_BYTES:
            raise UsageError(f"A weight file of at most {self.max_shard_bytes} bytes is too small. Did you mean GB?")
        if self.importance is not None and self.scales != "search":
            raise UsageError("--importance weighs what a search of scales loses: leave out --scales absmax.")
        if self.rounding == "gptq" and self.importance is None:
            raise UsageError(
                "--rounding gptq needs the Hessians of the model's inputs: make them with `qz calibrate --hessians`, "
                "and name the file with --importance."
            )
        self._check_kept()
        if self.experts and isinstance(self.method, Int8):
            raise UsageError("--experts is for nf4 and fp4: nobody loads experts in int8. Use --nf4.")
        if self.experts and self.chooses_layers:
            raise UsageError("--experts quantizes all experts of a layer: leave out --target-size and --max-loss.")
        methods = [self.method, *self.component_methods.values()]
        if self.scales == "search" and all(method is None or isinstance(method, Int8) for method in methods):
            raise UsageError(INT8_HAS_NO_SEARCH)

    def _check_kept(self) -> None:
        if self.max_loss is not None and not 0 <= self.max_loss < float("inf"):
            raise UsageError(f"--max-loss {self.max_loss} is not a finite number ≥ 0.")
        if self.chooses_layers:
            return
        for option, given in (("--scores", self.scores is not None), ("--split-groups", self.split_groups)):
            if given:
                raise UsageError(f"{option} is for --target-size and --max-loss: add one of them, or leave it out.")

    @property
    def chooses_layers(self) -> bool:
        """Whether some linears stay unquantized for a size or a loss."""
        return self.target_size is not None or self.max_loss is not None
