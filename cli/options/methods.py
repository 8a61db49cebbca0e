"""How weights are quantized: the method, its settings, and how scales, codes and layers are chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from qz import UsageError
from qz.cli.options.completion import complete_dtype
from qz.cli.options.panels import Panel
from qz.cli.options.values import parse_compute_dtype, parse_size
from qz.quantize.methods import FourBit, Int8, Method
from qz.quantize.settings import Rounding, Scales

MethodName = Literal["nf4", "fp4", "int8"]

PANEL = Panel("Method")

Nf4Opt = Annotated[bool, PANEL.flag("--nf4", help="4-bit NormalFloat, the best of the 4-bit types. The default.")]
Fp4Opt = Annotated[bool, PANEL.flag("--fp4", help="4-bit floating point.")]
Int8Opt = Annotated[bool, PANEL.flag("--int8", help="8-bit LLM.int8(): twice the size of 4 bit, nearly no loss.")]
MethodOpt = Annotated[
    MethodName | None,
    PANEL.option("--method", metavar="NAME", help="nf4, fp4 or int8: the same as --nf4, --fp4 and --int8."),
]
DoubleQuantOpt = Annotated[
    bool, PANEL.flag("--double-quant", help="Quantize the scales of 4-bit blocks too: 0.4 bits per parameter less.")
]
ComputeDTypeOpt = Annotated[
    str | None,
    PANEL.option(
        "--compute-dtype",
        metavar="DTYPE",
        parser=parse_compute_dtype,
        autocompletion=complete_dtype,
        help="What 4-bit layers compute in, written to the config: bfloat16, float16 or float32.",
        show_default="bfloat16",
    ),
]
ThresholdOpt = Annotated[
    float | None,
    PANEL.option(
        "--threshold",
        metavar="NUMBER",
        help="Activations above this magnitude are computed in fp16 by --int8 layers; written to the config.",
        show_default="6.0",
    ),
]
ScalesOpt = Annotated[
    Scales | None,
    PANEL.option(
        "--scales",
        metavar="CHOICE",
        help="Scales of 4-bit blocks: absmax, the libraries' own bytes and the default, or search: the same format and "
        "size, loaded in the same way, with a smaller error.",
    ),
]
ImportanceOpt = Annotated[
    Path | None,
    PANEL.option(
        "--importance",
        metavar="FILE",
        help="How much each input of each layer matters: what `qz calibrate` wrote, or an imatrix of llama.cpp. "
        "Implies --scales search.",
    ),
]
RoundingOpt = Annotated[
    Rounding,
    PANEL.option(
        "--rounding",
        metavar="CHOICE",
        help="nearest, or gptq: errors cancel in each layer's output. Needs an --importance FILE with Hessians.",
    ),
]
TargetSizeOpt = Annotated[
    int | None,
    PANEL.option(
        "--target-size",
        metavar="SIZE",
        parser=parse_size,
        help="The most memory that the model may take (get_memory_footprint()), such as 16GB: its most sensitive "
        "linears stay unquantized until it is full; for a pipeline, each component's method is chosen too.",
    ),
]
MaxLossOpt = Annotated[
    float | None,
    PANEL.option(
        "--max-loss",
        metavar="NUMBER",
        help="The most that may be lost, in the unit of the scores (KL divergence, or 1 − cosine; for a pipeline the "
        "squared relative error of its denoisers' output): as many linears stay unquantized as that needs. Needs "
        "scores.",
    ),
]
ScoresFileOpt = Annotated[
    Path | None,
    PANEL.option(
        "--scores",
        metavar="FILE",
        help="How sensitive each linear is, from `qz calibrate --scores`. Default: the scores in the --importance "
        "file, else a rule by names and places.",
    ),
]
SplitGroupsOpt = Annotated[
    bool,
    PANEL.flag(
        "--split-groups",
        help="Keep linears one by one, instead of whole q/k/v and gate/up groups, which vLLM and SGLang need.",
    ),
]


def method_name(nf4: bool, fp4: bool, int8: bool, method: MethodName | None = None) -> MethodName | None:
    """The one method asked for, if one is; UsageError for two."""
    asked: list[MethodName] = [name for name, on in zip(("nf4", "fp4", "int8"), (nf4, fp4, int8), strict=True) if on]  # type: ignore[misc]
    if len(asked) > 1:
        raise UsageError(f"--{' and --'.join(asked)} exclude each other. Choose one method.")
    if method is not None and asked not in ([], [method]):
        raise UsageError(f"--{asked[0]} and --method {method} exclude each other. Choose one method.")
    return method or (asked[0] if asked else None)


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """Settings of methods, each for those that have it; None and False where it was not given."""

    double_quant: bool = False
    compute_dtype: str | None = None
    threshold: float | None = None

    def method(self, name: str) -> Method:
        """The method of that name with its settings."""
        if name == "int8":
            return Int8() if self.threshold is None else Int8(self.threshold)
        return FourBit("fp4" if name == "fp4" else "nf4", self.double_quant, self.compute_dtype or "bfloat16")

    def require_method(self, names: Iterable[str]) -> None:
        """Raise UsageError for a setting that none of these methods has."""
        there = set(names)
        if self.double_quant and not there & {"nf4", "fp4"}:
            raise UsageError("--double-quant belongs to the 4-bit methods; int8 has no block statistics to quantize.")
        if self.compute_dtype is not None and not there & {"nf4", "fp4"}:
            raise UsageError("--compute-dtype belongs to the 4-bit methods; int8 has no such setting. Leave it out.")
        if self.threshold is not None and "int8" not in there:
            raise UsageError("--threshold belongs to int8. Add --int8 or --component NAME=int8, or leave it out.")
