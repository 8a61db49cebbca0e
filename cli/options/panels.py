"""A panel of a command's help, and how the options in it are declared."""

from __future__ import annotations

from typing import Any, NamedTuple

import typer


class Panel(NamedTuple):
    """Declares options under one title; without a title, they stand under "Options"."""

    title: str | None = None

    def option(self, *names: str, metavar: str, help: str, **more: Any) -> Any:  # noqa: A002  Typer's own name for it
        """An option with a value. ``more`` is what Typer takes besides, such as ``parser``."""
        return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=self.title, **more)

    def flag(self, *names: str, help: str) -> Any:  # noqa: A002  Typer's own name for it
        """A switch. The empty metavar keeps its type, which says nothing, out of the help."""
        return self.option(*names, metavar="", help=help)
