"""What commands take without the name of an option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qz.cli.options.completion import complete_folder

SourceArg = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A local folder, a repository on the Hub such as black-forest-labs/FLUX.1-dev, or one .safetensors or "
        ".gguf file.",
        autocompletion=complete_folder,
    ),
]
OriginalArg = Annotated[
    str,
    typer.Argument(
        metavar="ORIGINAL",
        help="The model before it was quantized: a local folder, or a repository on the Hub.",
        autocompletion=complete_folder,
    ),
]
OtherArg = Annotated[
    str,
    typer.Argument(
        metavar="OTHER", help="The same model, quantized with bitsandbytes.", autocompletion=complete_folder
    ),
]
FolderArg = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER",
        help="The folder to publish: what qz quantize or qz dequantize wrote.",
        autocompletion=complete_folder,
    ),
]
VerifiedArg = Annotated[
    str,
    typer.Argument(
        metavar="OUTPUT",
        help="What qz wrote: a local folder, or a repository on the Hub.",
        autocompletion=complete_folder,
    ),
]
AttestedArg = Annotated[
    Path, typer.Argument(metavar="OUTPUT", help="A folder that qz wrote.", autocompletion=complete_folder)
]
MergedArg = Annotated[
    Path,
    typer.Argument(
        metavar="OUTPUT",
        help="The output that the parts belong to: what -o/--output named when they were made.",
        autocompletion=complete_folder,
    ),
]
RepoArg = Annotated[
    str,
    typer.Argument(
        metavar="REPO_ID", help="The repository to publish to: USER/NAME. It is created if it does not exist."
    ),
]
