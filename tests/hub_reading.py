"""Reading a small repository from a Hub of the tests, as a run does, in small steps and with little patience."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hub_server import OWNER, READER, HubServer
from qz import QzError
from qz.formats.files.folder import Range
from qz.formats.hub.opening import open_repo
from qz.formats.hub.read_ahead import Pace
from qz.formats.hub.repository import HubFolder
from qz.formats.hub.transport.backoff import Retries
from qz.formats.tensors.safetensors_layout import encode_header, layout

QUICK = Retries(attempts=3, first_wait=0.01, longest_wait=0.02, longest_asked=2)
SMALL = Pace(segment=1 << 18, window=1 << 20, connections=4, patience=0.1)
UNHURRIED = replace(SMALL, patience=600)
"""For tests that count every byte: a machine that stands still for a moment must not cost a second reading."""
MB = 1_000_000
OPENED: list[HubFolder] = []
"""What tests opened; their fixture closes it."""


def checkpoint_bytes(size: int = 3 * MB, seed: int = 0) -> bytes:
    """A safetensors file of about ``size`` bytes."""
    tensors = layout((f"layer.{n}.weight", "U8", (size // 8,)) for n in range(8))
    return encode_header(tensors) + random.Random(seed).randbytes(size // 8 * 8)


WEIGHTS = checkpoint_bytes()
CONFIG = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
FILES: dict[str, bytes | Path] = {"config.json": CONFIG, "model.safetensors": WEIGHTS}


def opened(hub: HubServer, repo_id: str = "me/model", **options: Any) -> HubFolder:
    given: dict[str, Any] = {"retries": QUICK, "pace": SMALL, **options}
    OPENED.append(open_repo(repo_id, **given))
    return OPENED[-1]


def pieces(size: int, step: int = 100_000, file: str = "model.safetensors") -> list[Range]:
    return [Range(file, start, min(start + step, size)) for start in range(0, size, step)]


def read(folder: HubFolder, part: Range) -> bytes:
    buffer = bytearray(part.stop - part.start)
    folder.read_into(part.file, part.start, memoryview(buffer))
    return bytes(buffer)


def stream(folder: HubFolder, file: str = "model.safetensors") -> bytes:
    """What a run does: announce, read everything in order, check."""
    ranges = pieces(folder.sizes()[file], file=file)
    folder.announce(ranges)
    data = b"".join(read(folder, part) for part in ranges)
    folder.check()
    return data


def failure(act: Callable[[], object], *kinds: type[QzError]) -> str:
    """The message of the documented error that ``act`` ends with, which holds no token, nor does the traceback."""
    with pytest.raises(kinds) as caught:
        act()
    shown = "".join(traceback.format_exception(caught.value)) + str(caught.value)
    assert OWNER not in shown
    assert READER not in shown
    assert "Signature=" not in shown
    assert len(str(caught.value)) < 400
    return str(caught.value)


def close_all() -> None:
    while OPENED:
        OPENED.pop().close()
