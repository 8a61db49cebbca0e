"""How a run is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from qz.cli.options.completion import complete_consumer, complete_folder
from qz.cli.options.panels import Panel

PANEL = Panel("Reports")

PictureOpt = Annotated[
    Path | None,
    PANEL.option(
        "--picture", metavar="FILE", help="Write a picture of what each block lost, as SVG, for a model card."
    ),
]
PageOpt = Annotated[
    Path | None,
    PANEL.option(
        "--page",
        metavar="FILE",
        help="Write the report as one HTML page, too: sizes, what is quantized or why not, and what each layer lost if "
        "that is measured.",
    ),
]
DryRunOpt = Annotated[
    bool, PANEL.flag("--dry-run", help="Show what would be done, with exact sizes, without doing it.")
]
JsonOpt = Annotated[
    bool,
    PANEL.flag(
        "--json",
        help="Print one JSON object on stdout, and nothing else; if the command fails, its error as the last line.",
    ),
]
QuietOpt = Annotated[bool, PANEL.flag("--quiet", "-q", help="Show no progress and no notes; warnings remain.")]
ReportOpt = Annotated[bool, PANEL.flag("--report", help="Measure the loss per layer while quantizing, and show it.")]
AgainstOpt = Annotated[
    str | None,
    PANEL.option(
        "--against",
        metavar="ORIGINAL",
        help="Compare with the original, a folder or Hub repository, and show the loss per layer.",
        autocompletion=complete_folder,
    ),
]
TensorsOpt = Annotated[bool, PANEL.flag("--tensors", help="List the tensors, similar layers grouped.")]
FilterOpt = Annotated[
    str | None,
    PANEL.option("--filter", metavar="GLOB", help="With --tensors, list each tensor whose name matches: '*.0.*'."),
]
PlanOpt = Annotated[
    bool, PANEL.flag("--plan", help="Take the estimates from the real plan, which loads the model's library (slower).")
]
ForOpt = Annotated[
    list[str] | None,
    PANEL.option(
        "--for",
        metavar="CONSUMER",
        autocompletion=complete_consumer,
        help="Say whether it loads there, and if not, what would: vllm, sglang, peft, unsloth, invokeai, comfyui, "
        "transformers, or diffusers-cpu (diffusers without a GPU). Exit code 65 if not. Repeat it for more.",
    ),
]
VerifyOpt = Annotated[
    bool, PANEL.flag("--verify", help="Read every byte and compare with the hashes that qz recorded.")
]
