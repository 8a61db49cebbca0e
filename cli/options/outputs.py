"""What is written, and where to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from qz import UsageError
from qz.cli.options.completion import complete_dtype
from qz.cli.options.methods import MethodName
from qz.cli.options.panels import Panel
from qz.cli.options.values import parse_dtype, parse_size
from qz.quantize.settings import IfExists, Layout

PANEL = Panel("Output")

LayoutOpt = Annotated[
    Layout,
    PANEL.option(
        "--layout",
        metavar="CHOICE",
        help="diffusers, or single-file: one file in the names of the model's original code, for ComfyUI, Forge and "
        "InvokeAI. For nf4 and fp4.",
    ),
]
OutputOpt = Annotated[
    Path | None,
    PANEL.option(
        "--output",
        "-o",
        metavar="DIR",
        help="Where the result goes. Default: a new folder here, named after the source and the method.",
    ),
]
DTypeOpt = Annotated[
    str,
    PANEL.option(
        "--dtype",
        metavar="DTYPE",
        parser=parse_dtype,
        autocompletion=complete_dtype,
        help="The dtype of everything that is not quantized: auto (the checkpoint's own), float16, bfloat16 or "
        "float32.",
    ),
]
TargetDTypeOpt = Annotated[
    str,
    PANEL.option(
        "--dtype",
        metavar="DTYPE",
        parser=parse_dtype,
        autocompletion=complete_dtype,
        help="The dtype of all weights: auto (as before quantization), float16, bfloat16 or float32.",
    ),
]
MaxShardSizeOpt = Annotated[
    int | None,
    PANEL.option(
        "--max-shard-size",
        metavar="SIZE",
        parser=parse_size,
        help="The maximum size of a weight file: 5GB, 500MB, 2GiB.",
        show_default="1GB",
    ),
]
WeightsOnlyOpt = Annotated[
    bool,
    PANEL.flag("--weights-only", help="Leave out tokenizer, processor, chat template, generation config and license."),
]
OverwriteOpt = Annotated[bool, PANEL.flag("--overwrite", help="Short for --if-exists overwrite.")]
ReplaceOutputOpt = Annotated[bool, PANEL.flag("--overwrite", help="Replace an existing output.")]
IfExistsOpt = Annotated[
    IfExists,
    PANEL.option(
        "--if-exists",
        metavar="CHOICE",
        help="If the output exists: error (exit code 73), overwrite, or skip: exit code 0 if it was made from the "
        "same source and settings and is complete, 73 if not.",
    ),
]
ResumeOpt = Annotated[
    bool, PANEL.flag("--resume/--no-resume", help="Continue an interrupted run of the same command, or start over.")
]
PartOpt = Annotated[
    str | None,
    PANEL.option(
        "--part",
        metavar="I/N",
        help="Make one of N parts, beside the output in DIR.parts; `qz merge DIR` puts them together. auto, auto/N: "
        "the number comes from the array job of Slurm, Kubernetes and others.",
    ),
]
FsyncOpt = Annotated[
    bool,
    PANEL.flag(
        "--fsync/--no-fsync",
        help="Wait until the disk has stored everything, or leave that to the kernel, as cp and the libraries do: "
        "faster, and complete, but a power cut soon afterwards may damage the output.",
    ),
]
StatisticsOpt = Annotated[
    Path,
    PANEL.option("--output", "-o", metavar="FILE", help="The file to write, such as my-model.statistics.safetensors."),
]
RecordExpertsOpt = Annotated[
    bool,
    PANEL.flag("--experts", help="Record the inputs of an MoE model's experts too, for `qz quantize --experts`."),
]
HessiansOpt = Annotated[
    bool,
    PANEL.flag(
        "--hessians",
        help="Record Hessians too, for --rounding gptq, in files beside the output; large. A language model needs "
        "--text, to which qz adds a quarter of text of many kinds, or --generate.",
    ),
]
ScoresOpt = Annotated[
    bool,
    PANEL.flag(
        "--scores", help="Score how sensitive each linear is to being quantized, for --target-size and --max-loss."
    ),
]
ScoredMethodOpt = Annotated[
    MethodName | None,
    PANEL.option("--method", metavar="NAME", help="The method to score for: nf4, fp4 or int8.", show_default="nf4"),
]


def existing_output(overwrite: bool, if_exists: IfExists) -> IfExists:
    """What to do with an existing output: --overwrite is short for --if-exists overwrite."""
    if overwrite and if_exists == "skip":
        raise UsageError("--overwrite and --if-exists skip exclude each other. Choose one.")
    return "overwrite" if overwrite else if_exists
