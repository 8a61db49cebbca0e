"""How weights are quantized: the method, its settings, and how scales, codes and layers are chosen."""

from __future__ import annotations

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
    str,
    PANEL.option(
        "--compute-dtype",
        metavar="DTYPE",
        parser=parse_compute_dtype,
        autocompletion=complete_dtype,
        help="What 4-bit layers compute in, written to the config: bfloat16, float16 or float32.",
    ),
]
ThresholdOpt = Annotated[
    float,
    PANEL.option(
        "--threshold",
        metavar="NUMBER",
        help="Activations above this magnitude are computed in fp16 by --int8 layers; written to the config.",
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
        help="The most memory that the model may take (get_memory_footprint()), as 16GB: its most sensitive linears "
        "stay unquantized until it is full; of a pipeline, each component's method is chosen too.",
    ),
]
MaxLossOpt = Annotated[
    float | None,
    PANEL.option(
        "--max-loss",
        metavar="NUMBER",
        help="The most that may be lost, in the unit of the scores (KL divergence, or 1 − cosine): as many linears "
        "stay unquantized as that needs. Needs scores.",
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


def method_name(nf4: bool, fp4: bool, int8: bool, method: MethodName | None = None) -> MethodName:
    """The one method asked for, nf4 where none is; UsageError for two."""
    asked: list[MethodName] = [name for name, on in zip(("nf4", "fp4", "int8"), (nf4, fp4, int8), strict=True) if on]  # type: ignore[misc]
    if len(asked) > 1:
        raise UsageError(f"--{' and --'.join(asked)} exclude each other. Choose one method.")
    if method is not None and asked not in ([], [method]):
        raise UsageError(f"--{asked[0]} and --method {method} exclude each other. Choose one method.")
    return method or (asked[0] if asked else "nf4")


def chosen_method(name: str, double_quant: bool, compute_dtype: str, threshold: float) -> Method:
    """The method with its settings; UsageError for a setting that the method does not have."""
    if name == "int8":
        if double_quant:
            raise UsageError("--double-quant belongs to the 4-bit methods; int8 has no block statistics to quantize.")
        return Int8(threshold)
    return FourBit("fp4" if name == "fp4" else "nf4", double_quant, compute_dtype)
