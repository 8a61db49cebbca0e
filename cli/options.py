"""Every argument and option of every command, declared once: names, help, choices, and how a value is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qz import UsageError, __version__
from qz.quantize.methods import full_name
from qz.quantize.settings import LEAST_SHARD_BYTES, IfExists, Layout, Rounding, Scales

MOST_THREADS = 1024

METHOD = "Method"
SELECTION = "What is read and quantized"
OUTPUT = "Output"
MACHINE = "Machine"
REPORT = "Reports"
HUB = "Hub"

UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate(("K", "M", "G", "T"), start=1)
    for suffix, base in (("B", 1000), ("IB", 1024), ("", 1000))
}


def flag(*names: str, help: str, panel: str | None = None) -> Any:  # noqa: A002  Typer's own name for it
    """A switch. The empty metavar keeps its type, which says nothing, out of the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar="")


MethodName = Literal["nf4", "fp4", "int8"]


def method_name(nf4: bool, fp4: bool, int8: bool, method: MethodName | None = None) -> MethodName:
    """The one method asked for, nf4 where none is; UsageError for two."""
    asked: list[MethodName] = [name for name, on in zip(("nf4", "fp4", "int8"), (nf4, fp4, int8), strict=True) if on]  # type: ignore[misc]
    if len(asked) > 1:
        raise UsageError(f"--{' and --'.join(asked)} exclude each other. Choose one method.")
    if method is not None and asked not in ([], [method]):
        raise UsageError(f"--{asked[0]} and --method {method} exclude each other. Choose one method.")
    return method or (asked[0] if asked else "nf4")


def existing_output(overwrite: bool, if_exists: IfExists) -> IfExists:
    """What to do with an output that is there: --overwrite is short for --if-exists overwrite."""
    if overwrite and if_exists == "skip":
        raise UsageError("--overwrite and --if-exists skip exclude each other. Choose one.")
    return "overwrite" if overwrite else if_exists


def parse_size(text: str | int) -> int:
    """Bytes of ``5GB``, ``500MB``, ``2GiB`` or a plain number, decimal and binary units as the libraries read them."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", str(text), re.ASCII)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or int(Fraction(match[1]) * unit) < 1:
        shown = str(text) if len(str(text)) <= 40 else f"{str(text)[:40]}…"
        raise typer.BadParameter(f"{shown!r} is not a size. Write it as 5GB, 500MB or 2GiB.")
    nbytes = int(Fraction(match[1]) * unit)
    if nbytes < LEAST_SHARD_BYTES:
        raise typer.BadParameter(f"{text!r} means {nbytes} bytes. Write the unit: 5GB, 500MB or 2GiB.")
    return nbytes


def parse_dtype(text: str) -> str:
    """``auto``, or torch's name of a dtype, also for a short one: ``bf16``, ``fp16``, ``half``, ``fp32``."""
    return text if text == "auto" else one_of_dtypes(text, ("auto", "float16", "bfloat16", "float32"))


def parse_compute_dtype(text: str) -> str:
    """The same without ``auto``."""
    return one_of_dtypes(text, ("bfloat16", "float16", "float32"))


def one_of_dtypes(text: str, names: tuple[str, ...]) -> str:
    """The full name of a dtype among ``names``."""
    name = full_name(text)
    if name not in names:
        listed = ", ".join(map(repr, names))
        raise typer.BadParameter(f"{text!r} is not one of {listed} (or bf16, fp16, half, fp32).")
    return name


def complete_dtype(incomplete: str) -> list[str]:
    """The names of dtypes."""
    return [name for name in ("auto", "bfloat16", "float16", "float32") if name.startswith(incomplete)]


def parse_device(text: str) -> str:
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``xpu``, ``xpu:N`` or ``mps``."""
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", text):
        raise typer.BadParameter(f"{text!r} is not one of auto, cpu, cuda, cuda:N, xpu, xpu:N, mps.")
    return text


def parse_threads(text: str | int) -> int:
    """A number of threads, 1 to 1024."""
    if not re.fullmatch(r"\s*0*[1-9]\d{0,3}\s*", str(text)) or int(text) > MOST_THREADS:
        raise typer.BadParameter(f"{text!r} is not a number of threads from 1 to {MOST_THREADS}.")
    return int(text)


def parse_share(text: str | float) -> float:
    """``5%`` or ``0.05``, more than nothing and at most all."""
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,9})?|\.\d{1,9})\s*(%?)\s*", str(text), re.ASCII)
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise typer.BadParameter(f"{text!r} is not a share of more than 0% and at most 100%. Write it as 5%.")
    return share


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


def folders_with_config(folder: Path) -> Iterator[str]:
    """Names of the folders inside ``folder`` that hold a model or a part of a pipeline."""
    try:
        yield from sorted(p.name for p in folder.iterdir() if p.is_dir() and (p / "config.json").is_file())
    except OSError:
        return


def complete_subfolder(ctx: typer.Context, incomplete: str) -> list[str]:
    """The components of the local SOURCE that is already on the line."""
    # Parsing stops at the option that has no value yet, and leaves the words before it unclaimed.
    words = [ctx.params.get("source"), *ctx.args]
    source = next((word for word in words if word), None)
    if source is None:
        return []
    return [name for name in folders_with_config(Path(str(source)).expanduser()) if name.startswith(incomplete)]


def complete_folder(incomplete: str) -> list[str]:
    """Local folders, one level at a time, as the shell would."""
    parent = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent).expanduser()
    head = incomplete[: incomplete.rfind("/") + 1]
    tail = incomplete[len(head) :]
    try:
        names = sorted(p.name for p in parent.iterdir() if p.is_dir())
    except OSError:
        return []
    return [head + name for name in names if name.startswith(tail) and (tail or not name.startswith("."))]


SourceArg = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A local folder, a repository on the Hub such as black-forest-labs/FLUX.1-dev, or one .safetensors file.",
        autocompletion=complete_folder,
        show_default=False,
    ),
]
OriginalArg = Annotated[
    str,
    typer.Argument(
        metavar="ORIGINAL",
        help="The model before it was quantized: a local folder, or a repository on the Hub.",
        autocompletion=complete_folder,
        show_default=False,
    ),
]
OtherArg = Annotated[
    str,
    typer.Argument(
        metavar="OTHER",
        help="The same model, quantized with bitsandbytes.",
        autocompletion=complete_folder,
        show_default=False,
    ),
]
FolderArg = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER",
        help="The folder to publish: what qz quantize or qz dequantize wrote.",
        autocompletion=complete_folder,
        show_default=False,
    ),
]
VerifiedArg = Annotated[
    str,
    typer.Argument(
        metavar="OUTPUT",
        help="What qz wrote: a local folder, or a repository on the Hub.",
        autocompletion=complete_folder,
        show_default=False,
    ),
]
MergedArg = Annotated[
    Path,
    typer.Argument(
        metavar="OUTPUT",
        help="The output that the parts are of: what -o/--output named when they were made.",
        autocompletion=complete_folder,
        show_default=False,
    ),
]
RepoArg = Annotated[
    str,
    typer.Argument(metavar="REPO_ID", help="Where to: USER/NAME. It is made if it does not exist.", show_default=False),
]

Nf4Opt = Annotated[
    bool, flag("--nf4", help="4-bit NormalFloat, the best of the 4-bit types. The default.", panel=METHOD)
]
Fp4Opt = Annotated[bool, flag("--fp4", help="4-bit floating point.", panel=METHOD)]
Int8Opt = Annotated[
    bool, flag("--int8", help="8-bit LLM.int8(): twice the size of 4 bit, nearly no loss.", panel=METHOD)
]
MethodOpt = Annotated[
    MethodName | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="nf4, fp4 or int8: the same as --nf4, --fp4 and --int8.",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
DoubleQuantOpt = Annotated[
    bool,
    flag("--double-quant", help="Quantize the scales of 4-bit blocks too: 0.4 bits per parameter less.", panel=METHOD),
]
ComputeDTypeOpt = Annotated[
    str,
    typer.Option(
        "--compute-dtype",
        metavar="DTYPE",
        parser=parse_compute_dtype,
        autocompletion=complete_dtype,
        help="What 4-bit layers compute in, written to the config: bfloat16, float16 or float32.",
        rich_help_panel=METHOD,
    ),
]
ThresholdOpt = Annotated[
    float,
    typer.Option(
        "--threshold",
        metavar="NUMBER",
        help="Activations above this magnitude are computed in fp16 by --int8 layers; written to the config.",
        rich_help_panel=METHOD,
    ),
]
ScalesOpt = Annotated[
    Scales | None,
    typer.Option(
        "--scales",
        metavar="CHOICE",
        help="Scales of 4-bit blocks: absmax, the libraries' own bytes and the default, or search: the same format and "
        "size, loaded in the same way, with a smaller error.",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
ImportanceOpt = Annotated[
    Path | None,
    typer.Option(
        "--importance",
        metavar="FILE",
        help="How much each input of each layer matters: what `qz calibrate` wrote, or an imatrix of llama.cpp. "
        "Implies --scales search.",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
RoundingOpt = Annotated[
    Rounding,
    typer.Option(
        "--rounding",
        metavar="CHOICE",
        help="nearest, or gptq: errors cancel in each layer's output. Needs an --importance FILE with Hessians.",
        rich_help_panel=METHOD,
    ),
]
TargetSizeOpt = Annotated[
    int | None,
    typer.Option(
        "--target-size",
        metavar="SIZE",
        parser=parse_size,
        help="The most memory that the model may take (get_memory_footprint()), as 16GB: its most sensitive linears "
        "stay unquantized until it is full; of a pipeline, each component's method is chosen too.",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
MaxLossOpt = Annotated[
    float | None,
    typer.Option(
        "--max-loss",
        metavar="NUMBER",
        help="The most that may be lost, in the unit of the scores (KL divergence, or 1 − cosine): as many linears "
        "stay unquantized as that needs. Needs scores.",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
ScoresFileOpt = Annotated[
    Path | None,
    typer.Option(
        "--scores",
        metavar="FILE",
        help="How sensitive each linear is, from `qz calibrate --scores`. Default: the scores in the --importance "
        "file, else a rule by names and places.",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
SplitGroupsOpt = Annotated[
    bool,
    flag(
        "--split-groups",
        help="Keep linears one by one, instead of whole q/k/v and gate/up groups, which vLLM and SGLang need.",
        panel=METHOD,
    ),
]

SubfolderOpt = Annotated[
    str | None,
    typer.Option(
        "--subfolder",
        metavar="NAME",
        help="The component of a pipeline to work on, such as transformer.",
        autocompletion=complete_subfolder,
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
RevisionOpt = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REV",
        help="A branch, tag or commit of the Hub repository. Resolved to a commit once, and recorded.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
VariantOpt = Annotated[
    str | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        help="Read the weight files of this variant, such as fp16.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
AllowPickleOpt = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read pickled weights (.bin) where there are no others. Nothing in them is run; what is not tensors and "
        "containers is refused.",
        rich_help_panel=SELECTION,
    ),
]
SkipOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        metavar="PATTERN",
        help="A module to leave unquantized, matched by the library's own rules. COMPONENT/PATTERN applies to one "
        "component of a pipeline. Repeat it for more.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
ExpertsOpt = Annotated[
    bool,
    flag(
        "--experts",
        help="Quantize the experts of MoE models, too (nf4, fp4). qz.load loads that, and unsloth and vLLM most of it; "
        "plain transformers does not.",
        panel=SELECTION,
    ),
]
NoDefaultSkipsOpt = Annotated[
    bool,
    flag(
        "--no-default-skips",
        help="Skip only what --skip names, not also what the library leaves alone (lm_head, tied weights).",
        panel=SELECTION,
    ),
]
ComponentsOpt = Annotated[
    str | None,
    typer.Option(
        "--components",
        metavar="NAMES",
        help="Of a whole pipeline, quantize these: transformer,text_encoder_2. Default: the large ones.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
ComponentOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--component",
        metavar="NAME=METHOD",
        help="Another method for one component of a pipeline: text_encoder_2=int8, or none. Repeat it for more.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
FileOpt = Annotated[
    str | None,
    typer.Option(
        "--file",
        metavar="NAME",
        help="Of a repository or folder, the one .safetensors file to read, in a model's original names or ComfyUI's.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
ConfigOpt = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="SOURCE",
        help="The folder or repository that has the config of a single file's model. Default: what diffusers takes.",
        autocompletion=complete_folder,
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
LayoutOpt = Annotated[
    Layout,
    typer.Option(
        "--layout",
        metavar="CHOICE",
        help="diffusers, or single-file: one file in the names of the single file that is read, for ComfyUI, Forge and "
        "InvokeAI. For nf4 and fp4.",
        rich_help_panel=OUTPUT,
    ),
]
LoraOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="LORA[:SCALE]",
        help="Fuse a LoRA into the weights first: a file, a folder or a repository, and how much of it counts "
        "(default: 1). Repeat it for more.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
KeepNonfiniteOpt = Annotated[
    bool,
    flag(
        "--keep-nonfinite",
        help="Leave weights that hold NaN or Inf unquantized. By default such weights are an error.",
        panel=SELECTION,
    ),
]

OutputOpt = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Where the result goes. Default: a new folder here, named after the source and the method.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
DTypeOpt = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        parser=parse_dtype,
        autocompletion=complete_dtype,
        help="Of everything that is not quantized: auto (the checkpoint's own), float16, bfloat16 or float32.",
        rich_help_panel=OUTPUT,
    ),
]
TargetDTypeOpt = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        parser=parse_dtype,
        autocompletion=complete_dtype,
        help="Of all weights: auto (as before quantization), float16, bfloat16 or float32.",
        rich_help_panel=OUTPUT,
    ),
]
MaxShardSizeOpt = Annotated[
    int,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        parser=parse_size,
        help="The largest weight file: 5GB, 500MB, 2GiB.",
        show_default="5GB",
        rich_help_panel=OUTPUT,
    ),
]
WeightsOnlyOpt = Annotated[
    bool,
    flag(
        "--weights-only",
        help="Leave out tokenizer, processor, chat template, generation config and license.",
        panel=OUTPUT,
    ),
]
OverwriteOpt = Annotated[bool, flag("--overwrite", help="Short for --if-exists overwrite.", panel=OUTPUT)]
ReplaceOutputOpt = Annotated[bool, flag("--overwrite", help="Replace an output that is there.", panel=OUTPUT)]
IfExistsOpt = Annotated[
    IfExists,
    typer.Option(
        "--if-exists",
        metavar="CHOICE",
        help="When the output is there: error (exit code 73), overwrite, or skip: exit code 0 if it was made from the "
        "same source and settings and is complete, 73 if not.",
        rich_help_panel=OUTPUT,
    ),
]
ResumeOpt = Annotated[
    bool,
    flag("--resume/--no-resume", help="Continue an interrupted run of the same command, or start over.", panel=OUTPUT),
]
PartOpt = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="I/N",
        help="Make one of N parts, beside the output in DIR.parts; `qz merge DIR` puts them together. auto, auto/N: as "
        "the array job of Slurm, Kubernetes and others says.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
FsyncOpt = Annotated[
    bool,
    flag(
        "--fsync/--no-fsync",
        help="Wait until the disk has stored everything, or leave that to the kernel, as cp and the libraries do: "
        "faster, and complete, but a power cut soon afterwards may damage the output.",
        panel=OUTPUT,
    ),
]

StatisticsOpt = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="The file to write, such as my-model.statistics.safetensors.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
TextOpt = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="What the model reads: plain text in UTF-8. Default: a few pages that come with qz.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
PictureOpt = Annotated[
    Path | None,
    typer.Option(
        "--picture",
        metavar="FILE",
        help="Write a picture of what each block lost, as SVG, for a model card.",
        rich_help_panel=REPORT,
        show_default=False,
    ),
]
GenerateOpt = Annotated[
    bool,
    flag(
        "--generate",
        help="Let the model write the text that it reads, sampled at temperature 1. All of it is in memory meanwhile.",
        panel=SELECTION,
    ),
]
TokensOpt = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        metavar="N",
        help="How many tokens of it are read.",
        show_default="1024 to calibrate, with --hessians 16384; 2048 to compare",
        rich_help_panel=SELECTION,
    ),
]
HessiansOpt = Annotated[
    bool,
    flag(
        "--hessians",
        help="Record Hessians too, for --rounding gptq, in files beside the output; large. Needs --text.",
        panel=OUTPUT,
    ),
]
ScoresOpt = Annotated[
    bool,
    flag(
        "--scores",
        help="Score how sensitive each linear is to being quantized, for --target-size and --max-loss.",
        panel=OUTPUT,
    ),
]
ScoredMethodOpt = Annotated[
    MethodName | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="What it is scored for: nf4, fp4 or int8.",
        rich_help_panel=OUTPUT,
        show_default="nf4",
    ),
]

DeviceOpt = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        parser=parse_device,
        help="What computes: auto (a GPU if there is one), cpu, cuda, cuda:N, xpu or mps.",
        rich_help_panel=MACHINE,
    ),
]
ThreadsOpt = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        parser=parse_threads,  # a range that Typer checks would import pydantic, a third of the time of `qz inspect`
        help="CPU threads. Default: one per core. The bytes do not depend on it.",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
DownloadOpt = Annotated[
    bool,
    flag(
        "--download",
        help="Fill the Hub cache and read from there, instead of streaming without a copy on disk.",
        panel=MACHINE,
    ),
]

DryRunOpt = Annotated[
    bool, flag("--dry-run", help="Show what would be done, with exact sizes, and do none of it.", panel=REPORT)
]
JsonOpt = Annotated[bool, flag("--json", help="One JSON object on stdout, and nothing else there.", panel=REPORT)]
QuietOpt = Annotated[bool, flag("--quiet", "-q", help="No progress and no notes; warnings remain.", panel=REPORT)]
ReportOpt = Annotated[
    bool, flag("--report", help="Measure the loss per layer while quantizing, and show it.", panel=REPORT)
]
AgainstOpt = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="ORIGINAL",
        help="Compare with the original, a folder or Hub repository, and show the loss per layer.",
        autocompletion=complete_folder,
        rich_help_panel=REPORT,
        show_default=False,
    ),
]
SourceOpt = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="SOURCE",
        help="Make every tensor again from this source, with the recorded settings, and compare. Nothing is written.",
        autocompletion=complete_folder,
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
SourceRevisionOpt = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REV",
        help="Of SOURCE on the Hub. Default: the recorded commit.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
UsedImportanceOpt = Annotated[
    Path | None,
    typer.Option(
        "--importance",
        metavar="FILE",
        help="The file of importance that OUTPUT was made with, if it was; its hash is compared.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
SampleOpt = Annotated[
    float | None,
    typer.Option(
        "--sample",
        metavar="SHARE",
        parser=parse_share,
        help="With --against, look at weights chosen at random, as many as this share of the bytes: 5%.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]
TensorsOpt = Annotated[bool, flag("--tensors", help="List the tensors, similar layers grouped.", panel=REPORT)]
FilterOpt = Annotated[
    str | None,
    typer.Option(
        "--filter",
        metavar="GLOB",
        help="With --tensors, list each tensor whose name matches: '*.attn.*'.",
        rich_help_panel=REPORT,
        show_default=False,
    ),
]
PlanOpt = Annotated[
    bool, flag("--plan", help="Estimates from the real plan, which loads the model's library (slower).", panel=REPORT)
]
ForOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--for",
        metavar="CONSUMER",
        help="Whether it loads there, and what would: vllm, sglang, peft, unsloth, invokeai, comfyui, transformers, or "
        "diffusers-cpu (diffusers without a GPU). Exit code 65 if not. Repeat it for more.",
        rich_help_panel=REPORT,
        show_default=False,
    ),
]
VerifyOpt = Annotated[
    bool, flag("--verify", help="Read every byte and compare with the hashes that qz recorded.", panel=REPORT)
]

PushOpt = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="REPO_ID",
        help="Publish the finished output on the Hub, as qz push does.",
        rich_help_panel=HUB,
        show_default=False,
    ),
]
IntoSubfolderOpt = Annotated[
    str | None,
    typer.Option(
        "--push-subfolder",
        metavar="NAME",
        help="With --push, the folder inside the repository to publish into.",
        rich_help_panel=HUB,
        show_default=False,
    ),
]
PushOnlyOpt = Annotated[
    bool,
    flag("--push-only", help="With --push, keep no output here: each finished shard is sent and deleted.", panel=HUB),
]
PublicOpt = Annotated[
    bool | None,
    typer.Option(
        "--public/--private",
        metavar="",
        help="Who may see the repository. A new one is private unless it is to be public.",
        rich_help_panel=HUB,
        show_default=False,
    ),
]
ReplaceOpt = Annotated[
    bool,
    flag("--replace", help="Replace weights in the repository that are not qz's.", panel=HUB),
]
PushSubfolderOpt = Annotated[
    str | None,
    typer.Option(
        "--subfolder",
        metavar="NAME",
        help="The folder inside the repository to publish into.",
        rich_help_panel=HUB,
        show_default=False,
    ),
]
BranchOpt = Annotated[
    str,
    typer.Option(
        "--branch",
        "--revision",
        metavar="NAME",
        help="The branch to commit to.",
        rich_help_panel=HUB,
    ),
]
CreatePrOpt = Annotated[bool, flag("--create-pr", help="Open a pull request instead of committing.", panel=HUB)]
MessageOpt = Annotated[
    str | None,
    typer.Option(
        "--message", "-m", metavar="TEXT", help="The commit message.", rich_help_panel=HUB, show_default=False
    ),
]


def show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qz {__version__}")
        raise typer.Exit


VersionOpt = Annotated[
    bool,
    typer.Option(
        "--version",
        metavar="",
        help="Show the version of qz.",
        callback=show_version,
        is_eager=True,
    ),
]
DebugOpt = Annotated[bool, flag("--debug", help="Show the traceback of an error. Works anywhere on the line.")]
