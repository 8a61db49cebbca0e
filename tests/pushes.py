"""Checkpoints to push as qz leaves them, and what a push must end with."""

from __future__ import annotations

import hashlib
import json
import random
import traceback
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from hub_server import OWNER
from qz.formats.hub.transport import session
from qz.formats.hub.transport.backoff import Retries
from qz.formats.output.recorded.record import RECORD, WrittenFile, encode_record
from qz.formats.publish.destination import Destination
from qz.formats.tensors.safetensors_layout import encode_header, layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hub_server import HubServer
    from qz import QzError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
    },
}
ABOUT: dict[str, Any] = {
    "qz": "0.1.0",
    "versions": {"torch": "2.13.0", "bitsandbytes": "0.50.2"},
    "source": {
        "location": "big/llama",
        "revision": COMMIT,
        "subfolder": None,
        "library": "transformers",
        "architecture": "LlamaForCausalLM",
    },
    "method": "nf4",
    "double_quant": False,
    "dtype": "bfloat16",
    "parameters": {"total": 1_000_000, "quantized": 900_000},
    "skipped": ["lm_head"],
    "bytes": {"source": 2_000_000, "output": 700_000},
    "memory_footprint": {"before": 2_000_100, "after": 700_200},
    "settings": {"dtype": "auto", "skips": ["proj_out"], "default_skips": True},
    "command": ["qz", "quantize", "big/llama", "--revision", COMMIT, "--nf4", "--skip", "proj_out"],
}


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no attempt wait long for the next one."""
    monkeypatch.setattr(session, "ASKING", Retries(attempts=4, first_wait=0.01))


def shard(name: str, size: int, seed: int = 0) -> bytes:
    return encode_header(layout([(name, "U8", (size,))])) + random.Random(seed).randbytes(size)


_made_before = lru_cache(maxsize=8)(shard)


def make(folder: Path, *, shards: int = 2, seed: int = 0, about: dict[str, Any] | None = None) -> Path:
    """A checkpoint as qz leaves it: shards, index, config, tokenizer and the record."""
    folder.mkdir(parents=True)
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    files = {name: _made_before(f"layer.{n}.weight", 300_000 + n * 700_000, seed + n) for n, name in enumerate(names)}
    weight_map = {f"layer.{n}.weight": name for n, name in enumerate(names)}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files["config.json"] = json.dumps(CONFIG).encode()
    files["tokenizer.json"] = b'{"version": "1.0"}'
    for name, data in files.items():
        (folder / name).write_bytes(data)
    written = [WrittenFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]
    (folder / RECORD).write_bytes(encode_record(written, ABOUT if about is None else about))
    return folder


def to(repo_id: str = "me/new", **options: Any) -> Destination:
    return Destination(repo_id, **options)


def failure(act: Callable[[], object], *kinds: type[QzError]) -> str:
    """The message of the documented error that ``act`` ends with, which holds no token, nor does the traceback."""
    with pytest.raises(kinds) as caught:
        act()
    shown = "".join(traceback.format_exception(caught.value)) + str(caught.value)
    assert OWNER not in shown
    assert "Signature=" not in shown
    return str(caught.value)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def card_of(hub: HubServer, repo_id: str = "me/new") -> tuple[dict[str, Any], str]:
    """The head and the text of a repository's card."""
    text = hub.repos[repo_id].files()["README.md"].decode()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body
