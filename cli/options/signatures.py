"""Statements of an output, and who signed them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from qz.cli.options.completion import complete_folder
from qz.cli.options.panels import Panel

PANEL = Panel("Statements and signatures")

MaterialsOpt = Annotated[
    str | None,
    PANEL.option(
        "--source",
        metavar="SOURCE",
        help="What it was made of: the hash of each of its files is stated, too. A local one is read for that.",
        autocompletion=complete_folder,
    ),
]
SignKeyOpt = Annotated[
    Path | None,
    PANEL.option(
        "--sign-key",
        metavar="FILE",
        help="Sign the folder with this elliptic-curve key (PEM), with the OpenSSF's model-signing: model.sig.",
    ),
]
StatementOpt = Annotated[
    Path | None,
    PANEL.option(
        "--statement", metavar="FILE", help="Compare OUTPUT with this in-toto statement instead of its own record."
    ),
]
PublicKeyOpt = Annotated[
    Path | None,
    PANEL.option(
        "--public-key",
        metavar="FILE",
        help="Check with model-signing that model.sig in OUTPUT was made with this key (PEM).",
    ),
]
