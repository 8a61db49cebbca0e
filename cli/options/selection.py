"""What is read, and what of it is quantized."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from qz import UsageError
from qz.cli.options.completion import complete_folder, complete_subfolder
from qz.cli.options.panels import Panel
from qz.cli.options.values import parse_share

PANEL = Panel("Input")

SubfolderOpt = Annotated[
    str | None,
    PANEL.option(
        "--subfolder",
        metavar="NAME",
        help="The component of a pipeline to work on, such as transformer.",
        autocompletion=complete_subfolder,
    ),
]
RevisionOpt = Annotated[
    str | None,
    PANEL.option(
        "--revision",
        metavar="REV",
        help="A branch, tag or commit of the Hub repository. Resolved to a commit once, and recorded.",
    ),
]
VariantOpt = Annotated[
    str | None, PANEL.option("--variant", metavar="NAME", help="Read the weight files of this variant, such as fp16.")
]
AllowPickleOpt = Annotated[
    bool,
    PANEL.flag(
        "--allow-pickle",
        help="Read pickled weights (.bin) where there are no others. Nothing in them is run; anything but tensors "
        "and containers is refused.",
    ),
]
SkipOpt = Annotated[
    list[str] | None,
    PANEL.option(
        "--skip",
        metavar="PATTERN",
        help="A module to leave unquantized, matched by the library's own rules. COMPONENT/PATTERN applies to one "
        "component of a pipeline. Repeat it for more.",
    ),
]
ExpertsOpt = Annotated[
    bool,
    PANEL.flag(
        "--experts",
        help="Quantize the experts of MoE models, too (nf4, fp4). qz.load loads that, and unsloth and vLLM most of it; "
        "plain transformers does not.",
    ),
]
NoDefaultSkipsOpt = Annotated[
    bool,
    PANEL.flag(
        "--no-default-skips",
        help="Skip only what --skip names, and not what the library leaves alone (lm_head, tied weights).",
    ),
]
ComponentsOpt = Annotated[
    str | None,
    PANEL.option(
        "--components",
        metavar="NAMES",
        help="The components of a pipeline to quantize: transformer,text_encoder_2. Default: the large ones.",
    ),
]
ComponentOpt = Annotated[
    list[str] | None,
    PANEL.option(
        "--component",
        metavar="NAME=METHOD",
        help="Another method for one component of a pipeline: text_encoder_2=int8, or none. Repeat it for more.",
    ),
]
FileOpt = Annotated[
    str | None,
    PANEL.option(
        "--file",
        metavar="NAME",
        help="The one .safetensors or .gguf file of a repository or folder to read, in a model's original names or "
        "ComfyUI's.",
    ),
]
ConfigOpt = Annotated[
    str | None,
    PANEL.option(
        "--config",
        metavar="SOURCE",
        help="The folder or repository that has the config of a single file's model, or of its pipeline. Default: what "
        "diffusers takes.",
        autocompletion=complete_folder,
    ),
]
LoraOpt = Annotated[
    list[str] | None,
    PANEL.option(
        "--lora",
        metavar="LORA[:SCALE]",
        help="Fuse a LoRA into the weights first: a file, a folder or a repository, and how much of it counts "
        "(default: 1). Repeat it for more.",
    ),
]
KeepNonfiniteOpt = Annotated[
    bool,
    PANEL.flag(
        "--keep-nonfinite", help="Leave weights that hold NaN or Inf unquantized. By default such weights are an error."
    ),
]
TextOpt = Annotated[
    Path | None,
    PANEL.option(
        "--text",
        metavar="FILE",
        help="What the model reads: plain text in UTF-8. Default: a few pages that come with qz. For a pipeline: "
        "prompts, one a line. Default: 16 that come with qz.",
    ),
]
StepsOpt = Annotated[
    int | None,
    PANEL.option("--steps", metavar="N", help="For a pipeline: denoising steps for each prompt.", show_default="4"),
]
ResolutionOpt = Annotated[
    int | None,
    PANEL.option(
        "--resolution",
        metavar="PIXELS",
        help="For a pipeline: width and height of what it generates.",
        show_default="256, or what it is made for if that is less",
    ),
]
SeedOpt = Annotated[
    int | None,
    PANEL.option(
        "--seed",
        metavar="N",
        help="For a pipeline: the seed of the noise that it begins with.",
        show_default="0 to calibrate, 1000000 to compare",
    ),
]
GenerateOpt = Annotated[
    bool,
    PANEL.flag(
        "--generate",
        help="Let the model write the text that it reads, sampled at temperature 1. The whole model is in "
        "memory meanwhile.",
    ),
]
TokensOpt = Annotated[
    int | None,
    PANEL.option(
        "--tokens",
        metavar="N",
        help="How many tokens of the text to read.",
        show_default="1024 to calibrate, with --hessians 16384; 2048 to compare",
    ),
]
SourceOpt = Annotated[
    str | None,
    PANEL.option(
        "--against",
        metavar="SOURCE",
        help="Make every tensor again from this source, with the recorded settings, and compare. Nothing is written.",
        autocompletion=complete_folder,
    ),
]
SourceRevisionOpt = Annotated[
    str | None,
    PANEL.option("--revision", metavar="REV", help="The revision of SOURCE on the Hub. Default: the recorded commit."),
]
UsedImportanceOpt = Annotated[
    Path | None,
    PANEL.option(
        "--importance",
        metavar="FILE",
        help="The importance file that OUTPUT was made with, if any; its hash is compared.",
    ),
]
SampleOpt = Annotated[
    float | None,
    PANEL.option(
        "--sample",
        metavar="SHARE",
        parser=parse_share,
        help="With --against, look at weights chosen at random, until they make up this share of the bytes: 5%.",
    ),
]


def parse_components(text: str | None) -> tuple[str, ...] | None:
    """The names in ``transformer,text_encoder_2``; None where the option was not given."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if not all(re.fullmatch(r"[A-Za-z0-9_]+", name) for name in names):
        raise UsageError(f"--components {text!r} is not a list of names such as transformer,text_encoder_2.")
    return names


def parse_component_methods(pairs: list[str] | None) -> dict[str, str]:
    """``{"text_encoder_2": "int8"}`` of ``text_encoder_2=int8``; a method is nf4, fp4, int8 or none."""
    methods: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, method = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_]+", name) or method not in ("nf4", "fp4", "int8", "none"):
            raise UsageError(f"--component {pair!r} is not NAME=METHOD, where METHOD is nf4, fp4, int8 or none.")
        if methods.get(name, method) != method:
            raise UsageError(f"--component names {name} twice, with {methods[name]} and {method}. Choose one.")
        methods[name] = method
    return methods
