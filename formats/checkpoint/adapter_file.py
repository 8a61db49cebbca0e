"""A LoRA as people publish it: one .safetensors file, alone, in a folder or in a repository, opened by its header."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qz import MissingInput, Unsupported, UsageError
from qz.formats.checkpoint.problems import require_none
from qz.formats.checkpoint.survey import survey_file
from qz.formats.files.file_hash import sha256_in
from qz.formats.files.folder import Folder, read_file
from qz.formats.files.local_folder import LocalFolder
from qz.formats.json_files import MAX_BYTES, read_json
from qz.formats.malformed import quoted, quoted_names
from qz.formats.tensors.decoded import StoredTensor
from qz.formats.tensors.weight_names import PICKLE

CONFIG = "adapter_config.json"
PREFERRED = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What PEFT and diffusers call the file; any other name is taken where there is one file only."""
NAMES_ALONE = ("adapter-only", "original-layout")
"""Problems that say no more than that these are no weights of a model."""
MAX_REMOTE_BYTES = 8 << 30
_SCALE = re.compile(r"(?P<location>.+):(?P<scale>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """An opened LoRA. ``scale`` multiplies what it adds, beside the adapter's own alpha."""

    location: str
    """As a record may tell it: a repository's id, or the name of the local file or folder."""
    file: str
    revision: str | None
    sha256: str
    scale: float
    config_sha256: str | None = None
    tensors: Mapping[str, StoredTensor] = field(repr=False, compare=False)
    metadata: Mapping[str, str] = field(repr=False, compare=False)
    """``__metadata__`` of the file."""
    config: Mapping[str, Any] | None = field(repr=False, compare=False)
    """PEFT's adapter_config.json, if there is one."""
    folder: Folder = field(repr=False, compare=False)
    data: memoryview | None = field(repr=False, compare=False)
    """The whole file, compared with the hash that the Hub lists, where it comes from there."""

    @property
    def where(self) -> str:
        """The file in a message."""
        return f"{self.folder.location}/{self.file}"

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """Bytes of one of its tensors, from byte ``start`` of it."""
        offset = tensor.offset + start
        if self.data is None:
            self.folder.read_into(self.file, offset, buffer)
        else:
            buffer.cast("B")[:] = self.data[offset : offset + buffer.nbytes]

    def check(self) -> None:
        """Raise MalformedInput if the file has changed since it was opened."""
        if self.data is None:
            self.folder.check()

    def as_json(self) -> dict[str, Any]:
        """What the report and the record say of it; nothing private, so no local path."""
        return {
            "location": self.location,
            "revision": self.revision,
            "file": self.file,
            "sha256": self.sha256,
            "config_sha256": self.config_sha256,
            "scale": self.scale,
        }


def parse_scale(text: str, *, exists: bool) -> tuple[str, float]:
    """``LOCATION[:SCALE]``; the whole is the location if it ``exists``. UsageError for a scale that adds nothing."""
    match = None if exists else _SCALE.fullmatch(text)
    if match is None:
        return text, 1.0
    scale = float(match["scale"])
    if not math.isfinite(scale) or scale == 0:
        raise UsageError(f"--lora {text}: {match['scale']} is not a usable scale. Give a number such as 0.8.")
    return match["location"], scale


def open_adapter(folder: Folder, file: str | None, location: str, scale: float) -> AdapterFile:
    """The LoRA in ``folder``: ``file``, or the one that is there.

    Raises MissingInput where there is none, UsageError where there are several, MalformedInput for a file that breaks
    the rules, and Unsupported for a pickle.
    """
    file = file or _only_file(folder, location)
    if not file.endswith(".safetensors"):
        pickle = ", and reading a pickle may run code" if PICKLE.search(file) else ", as a LoRA has to be"
        raise Unsupported(
            f"{folder.location}/{file} is not a .safetensors file{pickle}. Save the LoRA with save_pretrained() of its "
            "library, or use a repository that has it as .safetensors."
        )
    tensors, metadata, problems = survey_file(folder, file)
    require_none(folder.location, problems, but=NAMES_ALONE)
    config = config_sha256 = None
    if CONFIG in folder.sizes():
        raw = read_file(folder, CONFIG, MAX_BYTES)
        config, config_sha256 = read_json(raw, f"{folder.location}/{CONFIG}"), hashlib.sha256(raw).hexdigest()
    data, sha256 = _content(folder, file)
    return AdapterFile(
        location=location,
        file=file,
        revision=folder.identity().get("commit"),
        sha256=sha256,
        scale=scale,
        config_sha256=config_sha256,
        tensors={name: tensor for name, tensor in tensors.items() if isinstance(tensor, StoredTensor)},
        metadata=metadata,
        config=config,
        folder=folder,
        data=data,
    )


def _only_file(folder: Folder, location: str) -> str:
    names = folder.sizes()
    for name in PREFERRED:
        if name in names:
            return name
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"{location} holds {len(found)} .safetensors files: {quoted_names(found)}. "
            f"Name one: --lora {location}/{found[0]}."
        )
    pickles = sorted(name for name in names if PICKLE.search(name))
    if pickles:
        raise Unsupported(
            f"{location} holds its weights as a pickle only ({quoted(pickles[0])}), and reading one may run code. "
            f"If you trust it, convert it in a local copy, and name that: {_conversion(pickles[0])}"
        )
    there = quoted_names(sorted(names)) or "none"
    raise MissingInput(f"{location} has no .safetensors file, so it is not a LoRA. Files there: {there}.")


def _conversion(pickle: str) -> str:
    """How to make safetensors of it, in its folder. It will be pasted into a shell: only a plain name gets into it."""
    name = pickle if re.fullmatch(r"[A-Za-z0-9_.-]+", pickle) else "FILE.bin"
    made = f"{name.rpartition('.')[0]}.safetensors"
    return (
        'python -c "import torch; from safetensors.torch import save_file; '
        f"held = torch.load('{name}', map_location='cpu', weights_only=True); "
        f"save_file({{key: part.contiguous() for key, part in held.items()}}, '{made}')\""
    )


def _content(folder: Folder, file: str) -> tuple[memoryview | None, str]:
    """The file of a repository, at once, which compares it with its hash there; of a local file only the SHA-256."""
    size = folder.sizes()[file]
    if isinstance(folder, LocalFolder):
        return None, sha256_in(folder, file, size)
    if size > MAX_REMOTE_BYTES:
        raise Unsupported(
            f"{folder.location}/{file} has {size:,} bytes, too many for a LoRA. Name another file, or download it "
            "and name the local one."
        )
    whole = memoryview(bytearray(size))
    folder.read_into(file, 0, whole)
    return whole, hashlib.sha256(whole).hexdigest()
