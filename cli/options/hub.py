"""Where on the Hub an output is published, and how."""

from __future__ import annotations

from typing import Annotated

from qz.cli.options.panels import Panel

PANEL = Panel("Hub")

PushOpt = Annotated[
    str | None,
    PANEL.option("--push", metavar="REPO_ID", help="Publish the finished output on the Hub, as qz push does."),
]
IntoSubfolderOpt = Annotated[
    str | None,
    PANEL.option(
        "--push-subfolder", metavar="NAME", help="With --push, the folder inside the repository to publish into."
    ),
]
PushOnlyOpt = Annotated[
    bool, PANEL.flag("--push-only", help="With --push, keep no output here: each finished shard is sent and deleted.")
]
PublicOpt = Annotated[
    bool | None,
    PANEL.option(
        "--public/--private",
        metavar="",
        help="Who may see the repository. A new one is private by default.",
    ),
]
ReplaceOpt = Annotated[bool, PANEL.flag("--replace", help="Replace weights in the repository that are not qz's.")]
PushSubfolderOpt = Annotated[
    str | None, PANEL.option("--subfolder", metavar="NAME", help="The folder inside the repository to publish into.")
]
BranchOpt = Annotated[str, PANEL.option("--branch", "--revision", metavar="NAME", help="The branch to commit to.")]
CreatePrOpt = Annotated[bool, PANEL.flag("--create-pr", help="Open a pull request instead of committing.")]
MessageOpt = Annotated[str | None, PANEL.option("--message", "-m", metavar="TEXT", help="The commit message.")]
