"""What computes, and whether it reads from the Hub cache."""

from __future__ import annotations

from typing import Annotated

from qz.cli.options.completion import complete_device
from qz.cli.options.panels import Panel
from qz.cli.options.values import parse_device, parse_threads

PANEL = Panel("Machine")

DeviceOpt = Annotated[
    str,
    PANEL.option(
        "--device",
        metavar="DEVICE",
        parser=parse_device,
        autocompletion=complete_device,
        help="What to compute on: auto (a GPU, or many cores for the same bytes), cpu, cuda, cuda:N, xpu or mps.",
    ),
]
ThreadsOpt = Annotated[
    int | None,
    PANEL.option(
        "--threads",
        metavar="N",
        parser=parse_threads,
        help="CPU threads. Default: one per core, 16 at most. The bytes do not depend on it.",
    ),
]
DownloadOpt = Annotated[
    bool,
    PANEL.flag(
        "--download", help="Fill the Hub cache and read from there, instead of streaming without a copy on disk."
    ),
]
