"""What a folder holds in the place of weights that the libraries load, told by the names of its files."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from qz import QzError
from qz.counted import shown
from qz.formats.checkpoint.other_contents.additions import EMBEDDING, IP_ADAPTER
from qz.formats.malformed import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qz.formats.files.folder import Folder

MOST_LOOKED_INTO = 30
"""Folders of one without a config.json, and the folders in those, together."""
MOST_NAMED = 3
"""Forms that a message names."""

_EXPORTED = "Use the model that this was made from, with its weights in safetensors."
_ANOTHER = "Use a repository of this model that has config.json and model.safetensors."
_FOR_A_PIPELINE = "It is loaded onto a pipeline with `pipeline.{}(…)`, and there is nothing in it to quantize."


class _Form(NamedTuple):
    name: str
    sign: re.Pattern[str]
    """Of the whole name of a file, or of a folder that some programs take for a file."""
    how: str


def _form(name: str, sign: str, how: str = _EXPORTED) -> _Form:
    return _Form(name, re.compile(sign), how)


ADDITIONS = (
    _form(
        EMBEDDING,
        r"learned_embeds(?:-\w+)?\.(?:bin|safetensors)",
        _FOR_A_PIPELINE.format("load_textual_inversion"),
    ),
    _form(IP_ADAPTER, r"ip[-_]adapter.*\.(?:bin|safetensors)", _FOR_A_PIPELINE.format("load_ip_adapter")),
)
_FORMS = (
    _form("ONNX", r".*\.onnx(?:_data|\.data)?"),
    _form("OpenVINO", r"openvino_\w+\.(?:xml|bin)"),
    _form("Core ML", r".*\.(?:mlpackage|mlmodelc?)"),
    _form("TensorFlow", r".*\.h5|saved_model\.pb"),
    _form("Flax", r".*\.msgpack"),
    _form("PaddlePaddle", r".*\.pdparams"),
    _form("NeMo", r".*\.nemo"),
    _form("LiteRT", r".*\.(?:tflite|litertlm|task)"),
    _form("ExecuTorch", r".*\.pte"),
    _form("TensorRT", r".*\.(?:engine|plan)"),
    _form("CTranslate2", r"(?:shared_|source_|target_)?vocabulary\.(?:json|txt)"),
    _form("Llama's own layout", r"consolidated\.\d\d\.pth", _ANOTHER),
    _form("Mistral's own layout", r"consolidated(?:-\d{5}-of-\d{5})?\.safetensors", _ANOTHER),
    _form("OpenCLIP", r"open_clip_(?:model\.safetensors|pytorch_model\.bin)", _ANOTHER),
    _form("a static embedding of sentence-transformers", r"\d+_StaticEmbedding", "It has no layer to quantize."),
    *ADDITIONS,
)


def other_forms(folder: Folder, among: Sequence[_Form] = _FORMS) -> str | None:
    """The forms, each with a file of it, and what to do; None if there is none that is known."""
    there: dict[_Form, str] = {}
    for path in files_inside(folder):
        for form in among:
            if form.sign.fullmatch(path.rpartition("/")[2]):
                there.setdefault(form, path)
    if not there:
        return None
    told = shown([f"{form.name} ({quoted(path, 60)})" for form, path in there.items()], MOST_NAMED)
    return f"It holds {told}. {next(iter(there)).how}"


def folders_inside(folder: Folder) -> Iterator[tuple[str, Folder]]:
    """The folders in ``folder``, and then those in them, each with its path; at most ``MOST_LOOKED_INTO``."""
    left, places = MOST_LOOKED_INTO, [("", folder)]
    for prefix, place in places:
        for name in place.subfolders()[:left]:
            left -= 1
            with suppress(QzError):  # it cannot be read
                inner = place.subfolder(name)
                inner.sizes()
                if not prefix:
                    places.append((f"{name}/", inner))
                yield prefix + name, inner


def files_inside(folder: Folder) -> Iterator[str]:
    """Of the files and folders here, and of those in them, as far as they are looked into."""
    yield from sorted(folder.sizes())
    for path, inner in folders_inside(folder):
        yield path
        yield from (f"{path}/{file}" for file in sorted(inner.sizes()))
