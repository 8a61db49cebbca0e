"""What a shell completes behind an option: dtypes, devices, consumers, local folders, and components of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer


def complete_dtype(incomplete: str) -> list[str]:
    """The names of dtypes."""
    return [name for name in ("auto", "bfloat16", "float16", "float32") if name.startswith(incomplete)]


def complete_device(incomplete: str) -> list[str]:
    """What ``--device`` takes: the GPUs of this machine by number, without asking PyTorch for them."""
    gpus = [f"cuda:{number}" for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    return [name for name in ("auto", "cpu", "cuda", *gpus, "xpu", "mps") if name.startswith(incomplete)]


def complete_consumer(incomplete: str) -> list[str]:
    """What ``--for`` takes."""
    from qz.quantize.consumers.registry import CONSUMERS

    return [name for name in CONSUMERS if name.startswith(incomplete)]


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


def complete_subfolder(ctx: typer.Context, incomplete: str) -> list[str]:
    """The components of the local SOURCE that is already on the line."""
    # Parsing stops at the option that has no value yet, and leaves the words before it unclaimed.
    words = [ctx.params.get("source"), *ctx.args]
    source = next((word for word in words if word), None)
    if source is None:
        return []
    return [name for name in folders_with_config(Path(str(source)).expanduser()) if name.startswith(incomplete)]


def folders_with_config(folder: Path) -> Iterator[str]:
    """Names of the folders inside ``folder`` that hold a model or a part of a pipeline."""
    try:
        yield from sorted(p.name for p in folder.iterdir() if p.is_dir() and (p / "config.json").is_file())
    except OSError:
        return
