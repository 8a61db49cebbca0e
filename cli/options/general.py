"""Options of ``qz`` itself."""

from __future__ import annotations

from typing import Annotated

import typer

from qz import __version__
from qz.cli.options.panels import Panel


def show_version(asked: bool) -> None:
    """Print the version and end, if it was asked for."""
    if asked:
        typer.echo(f"qz {__version__}")
        raise typer.Exit


VersionOpt = Annotated[
    bool, typer.Option("--version", metavar="", help="Show the version of qz.", callback=show_version, is_eager=True)
]
DebugOpt = Annotated[bool, Panel().flag("--debug", help="Show the traceback of an error. Works anywhere on the line.")]
