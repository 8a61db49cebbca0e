"""What is copied along with a checkpoint: tokenizer, processor, licence, and a pipeline's untouched components.

One allow-list decides. Code, cards, pictures, and weights in other formats or other sets are never on it, and of
pickles only what a class needs.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qz.formats.files.folder import PIPELINE_INDEX, Folder, read_file
from qz.formats.json_files import MAX_BYTES, dump_json, read_json
from qz.formats.malformed import Malformed, quoted
from qz.formats.output.file_names import (
    CONFIGS,
    GENERATION,
    MODULE,
    NO_DATA,
    OWN_SETTINGS,
    PROCESSOR,
    PROMPTS,
    SECRET,
    SENTENCES,
    TEMPLATE,
    TEMPLATES,
    TERMS,
    TOKENIZER,
    TRAINING,
    WEIGHT_FILE,
    Names,
    is_looked_for,
)
from qz.formats.output.recorded.record import require_safe_name
from qz.formats.tensors.weight_names import PICKLED, STEMS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from qz.formats.checkpoint.survey import Checkpoint


@dataclass(frozen=True, slots=True)
class Companion:
    """A file to copy unchanged: ``file`` of ``folder`` becomes ``name``, relative to a folder of the output."""

    folder: Folder
    file: str
    name: str
    bytes: int
    code: tuple[str, ...] = ()
    """Code beside it that it names, which is not copied."""
    notes: tuple[str, ...] = ()
    """What the user should know of it."""

    def __post_init__(self) -> None:
        try:
            require_safe_name(self.name)
        except ValueError:
            raise Malformed(
                "unsafe-name",
                f"{self.folder.location} holds {quoted(self.file)}, a name that no output may have: "
                "it holds what cannot be shown, or is too long. Rename the file, or remove it.",
            ) from None


def companions(folder: Folder) -> tuple[Companion, ...]:
    """What makes the model in ``folder`` usable where its weights alone are not."""
    found = _matching(folder, (TOKENIZER, PROCESSOR, GENERATION, SENTENCES, CONFIGS, PROMPTS, TERMS))
    inside = folder.subfolders()
    if TEMPLATES in inside:
        found += _matching(folder.subfolder(TEMPLATES), (TEMPLATE,), f"{TEMPLATES}/")
    named = _named_folders(found, [name for name in inside if name != TEMPLATES])
    if any(each.name == "modules.json" for each in found):
        named.update(filter(MODULE.fullmatch, inside))
    for name in inside:
        if name == TEMPLATES or TRAINING.fullmatch(name) or name.startswith("."):
            continue
        inner = folder.subfolder(name)
        sizes = inner.sizes()
        if name in named or ("config.json" not in sizes and any(each in sizes for each in OWN_SETTINGS)):
            found += _everything(inner, f"{name}/")
    return tuple(replace(each, code=_code_named(each)) for each in found)


def beside(folder: Folder) -> tuple[Companion, ...]:
    """Files in ``folder`` itself that loaders look for, but for weights."""
    names = (name for name in folder.sizes() if not name.endswith(".safetensors") and name != PIPELINE_INDEX)
    found = [name for name in names if is_looked_for(name) and not WEIGHT_FILE.fullmatch(name)]
    return tuple(Companion(folder, name, name, folder.sizes()[name]) for name in found)


def _named_folders(found: Sequence[Companion], inside: Sequence[str]) -> set[str]:
    """Folders that a copied file names: modules of sentence-transformers, voices of a processor."""
    names = re.compile(r"modules\.json|router_config\.json|[a-z0-9_]+_path\.json")
    values = [value for each in found if inside and names.fullmatch(each.name) for value in _texts(each)]
    return {name for name in inside if any(value == name or value.startswith(f"{name}/") for value in values)}


def _code_named(companion: Companion) -> tuple[str, ...]:
    """Modules beside a file which that names a class of: in ``auto_map``, or as the type of one of ``modules.json``."""
    code = {name for name in companion.folder.sizes() if name.endswith(".py")}
    if not code or not re.fullmatch(r"(?:.*_config|modules)\.json", companion.file):
        return ()
    return tuple(sorted({f"{value.rpartition('.')[0]}.py" for value in _texts(companion)} & code))


def _texts(companion: Companion) -> list[str]:
    """All keys and texts in a JSON file; none of one that is too large or cannot be read, which is copied as it is."""
    found: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                found.append(key)
                collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)

    if companion.bytes <= MAX_BYTES:
        with suppress(Malformed):
            data = b'{"": ' + read_file(companion.folder, companion.file, MAX_BYTES) + b"}"  # modules.json is a list
            collect(read_json(data, f"{companion.folder.location}/{companion.file}", nonfinite="tag"))
    return found


def _everything(folder: Folder, prefix: str, depth: int = 2) -> list[Companion]:
    """All of a folder that is copied as a whole: settings and data, and its weights in one format.

    Of pickles, which are copied unread, only those without safetensors beside them.
    """
    sizes = folder.sizes()
    names = [name for name in sizes if _is_data(name) or name.endswith(".safetensors")]
    if not any(name.endswith(".safetensors") for name in sizes):
        names += [name for name in sizes if name.endswith(".bin") and not name.startswith("training_args")]
    found = [Companion(folder, name, prefix + name, sizes[name]) for name in names]
    for inner in folder.subfolders() if depth else ():
        if not inner.startswith("."):
            found += _everything(folder.subfolder(inner), f"{prefix}{inner}/", depth - 1)
    return found


def _is_data(name: str) -> bool:
    """Whether a loader may read this file of a folder of settings."""
    if NO_DATA.fullmatch(name):
        return False
    return is_looked_for(name) or SECRET.fullmatch(name) is None


def whole(folder: Folder) -> tuple[Companion, ...]:
    """A component that is copied unread, its weights too."""
    found = _everything(folder, "")
    return (*found, *_matching(folder, (TERMS,)))


def of_onnx(folder: Folder) -> tuple[Companion, ...]:
    """All of a component that ONNX Runtime runs: ``model.onnx``, what its weights are in beside it, and settings."""
    return (*settings(folder), *_matching(folder, (Names(r".*\.onnx"),)))


def left_out(folder: Folder, used: Collection[str], prefix: str = "", *, hidden: bool = False) -> tuple[str, ...]:
    """Files of ``folder`` that are not in ``used``; of a folder with none that is, its name with a slash.

    ``used`` may name folders, which then are not looked into. Hidden files are not the model's: they are named only if
    ``hidden``.
    """
    names = [
        prefix + name for name in folder.sizes() if prefix + name not in used and (hidden or not name.startswith("."))
    ]
    for inner in folder.subfolders():
        name = prefix + inner
        if name in used or (inner.startswith(".") and not hidden):
            continue
        if any(each.startswith(f"{name}/") for each in used):
            names += left_out(folder.subfolder(inner), used, f"{name}/", hidden=hidden)
        else:
            names.append(f"{name}/")
    return tuple(sorted(names))


def terms(folder: Folder) -> tuple[Companion, ...]:
    """The licence and notices in ``folder``."""
    return tuple(_matching(folder, (TERMS,)))


def settings(folder: Folder) -> tuple[Companion, ...]:
    """All of a component without weights, whatever its class reads: a scheduler, tokenizer, processor or guider."""
    sizes = folder.sizes()
    data = [name for name in sizes if _is_data(name) and not TERMS.fullmatch(name)]
    found = {each.name: each for each in companions(folder)}
    return (*found.values(), *(Companion(folder, name, name, sizes[name]) for name in data if name not in found))


def weights(checkpoint: Checkpoint) -> tuple[tuple[Companion, ...], dict[str, bytes]]:
    """A whole component with weights: files to copy, and an index to write where it cannot be copied.

    A variant's files get the plain names, which loaders look for by themselves, and which its index has to say. Without
    ``metadata`` no library reads an index.
    """
    folder, variant = checkpoint.folder, checkpoint.variant
    sizes = folder.sizes()
    names = [*checkpoint.files]
    documents: dict[str, bytes] = {}
    if checkpoint.index is not None:
        stem = STEMS[checkpoint.library]
        pickled = checkpoint.files[0].endswith(".bin")
        index = f"{PICKLED[stem]}.bin.index.json" if pickled else f"{stem}.safetensors.index.json"
        has_metadata = isinstance(checkpoint.index.get("metadata"), dict)
        if variant is None and has_metadata:
            names.append(index)
        else:
            places = {name: plain_name(file, variant) for name, file in checkpoint.index["weight_map"].items()}
            total = {} if has_metadata else {"metadata": {"total_size": _stored_bytes(checkpoint)}}
            documents[index] = dump_json({**checkpoint.index, **total, "weight_map": places})
    plain = [Companion(folder, name, plain_name(name, variant), sizes[name]) for name in names]
    config = _matching(folder, (Names(r"config\.json"),))
    return (*config, *companions(folder), *plain), documents


def _stored_bytes(checkpoint: Checkpoint) -> int:
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def plain_name(file: str, variant: str | None) -> str:
    """``model.fp16-00001-of-00002.safetensors`` → ``model-00001-of-00002.safetensors``."""
    return re.sub(rf"\.{re.escape(variant)}(?=[.-])", "", file, count=1) if variant else file


def _matching(folder: Folder, patterns: Iterable[Names], prefix: str = "") -> list[Companion]:
    sizes = folder.sizes()
    allowed = list(patterns)
    names = [name for name in sizes if any(pattern.fullmatch(name) for pattern in allowed)]
    return [Companion(folder, name, prefix + name, sizes[name]) for name in names]
