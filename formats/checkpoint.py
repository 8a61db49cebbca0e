"""Open a checkpoint lazily: its config, its index, and the header of every shard; no weight is read.

:func:`survey` collects everything that is wrong in one pass; :func:`open_checkpoint` raises it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qz import MissingInput, QzError
from qz.formats.config import read_json
from qz.formats.malformed import UNSAFE_TEXT, quoted
from qz.formats.problems import Problem, as_error, kind_of, worst_first
from qz.formats.safetensors import Header, read_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qz.formats.folder import Folder

Library = Literal["transformers", "diffusers"]

STEMS: dict[Library, str] = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}
MAX_CONFIG_BYTES = 10_000_000
MAX_INDEX_BYTES = 50_000_000
THREADS = 8
VARIANTS = ("bf16", "fp16", "fp32")
_NUMBERED = re.compile(r"-\d{5}-of-\d{5}")
_PICKLE = re.compile(r"\.(?:bin|pt|pth|ckpt|pkl)\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and where it lies: ``offset`` counts from the start of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """What a folder's headers say. ``files`` are the weight files in order of their number, ``tensors`` in file order.

    ``variant`` names the set of weights (``fp16``; None is the plain one), ``index`` is the index file's object if the
    checkpoint is sharded, and ``header_metadata`` the ``__metadata__`` of every file.
    """

    folder: Folder
    config: dict[str, Any]
    library: Library
    architecture: str | None
    variant: str | None
    files: tuple[str, ...]
    sizes: dict[str, int]
    tensors: dict[str, StoredTensor]
    index: dict[str, Any] | None = None
    header_metadata: dict[str, dict[str, str]] = field(default_factory=dict)


def open_checkpoint(folder: Folder, variant: str | None = None) -> Checkpoint:
    """The checkpoint in ``folder``; MissingInput, MalformedInput, PermissionRefused or Unsupported names every error."""
    checkpoint, problems = survey(folder, variant)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors or checkpoint is None:
        raise as_error(folder.location, errors)
    return checkpoint


def survey(folder: Folder, variant: str | None = None) -> tuple[Checkpoint | None, tuple[Problem, ...]]:
    """What could be read of the checkpoint in ``folder``, and everything that is wrong with it, worst first.

    ``variant`` names one of several sets of weights, such as ``fp16``; without it the plain one is taken, or the only
    one there is. Never raises for a bad checkpoint, only for a folder that cannot be listed.
    """
    found = _Survey(folder)
    checkpoint = found.run(variant)
    return checkpoint, worst_first(found.problems)


def read_file(folder: Folder, file: str, limit: int) -> bytes:
    """A whole small file; of one larger than ``limit`` bytes only ``limit + 1``, which is enough to refuse it."""
    size = folder.sizes().get(file)
    if size is None:
        folder.read_into(file, 0, memoryview(bytearray(1)))  # says why it is not among the files
        raise MissingInput(f"{folder.location}/{file} is not there.")
    buffer = bytearray(min(size, limit + 1))
    folder.read_into(file, 0, memoryview(buffer))
    return bytes(buffer)


class _Survey:
    """One pass over one folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.sizes = folder.sizes()
        self.problems: list[Problem] = []

    def error(self, kind: str, where: str, message: str) -> None:
        self.problems.append(Problem("error", kind, where, message))

    def warn(self, kind: str, where: str, message: str) -> None:
        self.problems.append(Problem("warning", kind, where, message))

    def path(self, file: str) -> str:
        return f"{self.folder.location}/{file}"

    def run(self, variant: str | None) -> Checkpoint | None:
        config = self.config()
        library = _library(config)
        if config is None or library is None:
            return None
        self.code(config)
        index_name, single, variant = self.weights(library, config, variant)
        index = self.index(index_name) if index_name else None
        if index is None and single is None:
            return None
        weight_map: dict[str, str] = index["weight_map"] if index else {}
        files = tuple(sorted(set(weight_map.values()))) if single is None else (single,)
        headers = self.headers(files)
        tensors = self.tensors(files, headers, weight_map)
        if index and index_name:
            self.reconcile(index_name, weight_map, headers, tensors)
            if len(headers) == len(files):
                self.total_size(index_name, index, library, tensors)
        self.unused(STEMS[library], variant, files)
        if not tensors and len(headers) == len(files):
            self.error(
                "no-tensors", self.folder.location, f"{self.folder.location} holds no tensor. Download it again."
            )
        return Checkpoint(
            folder=self.folder,
            config=config,
            library=library,
            architecture=_architecture(config, library),
            variant=variant,
            files=files,
            sizes={file: self.sizes[file] for file in headers},
            tensors=tensors,
            index=index,
            header_metadata={file: header.metadata for file, header in headers.items()},
        )

    # The config

    def config(self) -> dict[str, Any] | None:
        """config.json, or None with the reason why there is none that can be used."""
        if "config.json" not in self.sizes and self.misplaced():
            return None
        try:
            config = read_json(read_file(self.folder, "config.json", MAX_CONFIG_BYTES), self.path("config.json"))
        except QzError as error:
            kind = kind_of(error, missing="config-missing")
            message = (
                f"{self.folder.location} has no config.json, so it is no model folder."
                if kind == "config-missing"
                else str(error)
            )
            self.error(kind, "config.json", message)
            return None
        if _library(config) is None:
            what = f"{self.path('config.json')} has neither model_type, architectures nor _class_name"
            self.error(
                "library-unknown", "config.json", f"{what}: neither transformers nor diffusers knows such a model."
            )
        return config

    def misplaced(self) -> bool:
        """Whether the folder is a well-known thing that is no model, and what to do about it."""
        location = self.folder.location
        if "model_index.json" in self.sizes:
            inside = ", ".join(self.folder.subfolders()) or "none"
            self.error(
                "pipeline-root",
                "model_index.json",
                f"{location} is a whole diffusers pipeline, not one model. Name a "
                f"component with --subfolder (there are: {inside}).",
            )
        elif "adapter_config.json" in self.sizes:
            self.error(
                "adapter-only",
                "adapter_config.json",
                f"{location} holds only an adapter, not a model. Merge it into its "
                "base model first (peft: `merge_and_unload`), then quantize that.",
            )
        elif any(name.endswith(".gguf") for name in self.sizes):
            self.error(
                "gguf-only",
                location,
                f"{location} holds GGUF files, which are quantized already. Use the original checkpoint of the model.",
            )
        else:
            return False
        return True

    def code(self, config: Mapping[str, Any]) -> None:
        scripts = sorted(name for name in self.sizes if name.endswith(".py"))
        if "auto_map" in config or scripts:
            named = f" ({', '.join(quoted(name, 40) for name in scripts[:3])})" if scripts else ""
            self.warn(
                "custom-code",
                "config.json" if "auto_map" in config else scripts[0],
                f"{self.folder.location} brings "
                f"code of its own{named}. qz never runs it: the class must be one of the installed libraries'.",
            )

    # Which files

    def weights(
        self, library: Library, config: Mapping[str, Any], variant: str | None
    ) -> tuple[str | None, str | None, str | None]:
        """The index's name or the single file's (one of them, or neither if there are no weights), and the variant."""
        stem = STEMS[library]
        singles, indexes = _candidates(stem, self.sizes)
        there = {**singles, **indexes}
        if variant not in there:
            if variant is not None:
                names = ", ".join(sorted(name for name in there if name)) or "none"
                self.error(
                    "variant-missing",
                    variant,
                    f"{self.folder.location} has no weights of the variant {quoted(variant)}. Variants there: {names}.",
                )
                return None, None, variant
            if not there:
                self.no_weights(stem, library, config)
                return None, None, None
            variant = min(
                (name for name in there if name), key=lambda name: (*(name != known for known in VARIANTS), name)
            )
            file = indexes.get(variant) or singles[variant]
            self.warn(
                "variant-only",
                file,
                f"{self.folder.location} has no plain weights; those of the variant {variant} are taken.",
            )
        index, single = indexes.get(variant), singles.get(variant)
        if index and single:
            # transformers looks for the single file first, diffusers for the index.
            taken, left = (index, single) if library == "diffusers" else (single, index)
            self.warn(
                "two-layouts",
                left,
                f"{self.folder.location} has both {single} and {index}; {taken} is taken, as "
                f"{library} does. Delete the other.",
            )
            return (index, None, variant) if library == "diffusers" else (None, single, variant)
        return index, single, variant

    def no_weights(self, stem: str, library: Library, config: Mapping[str, Any]) -> None:
        location = self.folder.location
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            try:
                read_file(self.folder, name, 1)
            except MissingInput:
                continue
            except QzError as error:  # it is there, and is no file
                self.error(kind_of(error, missing="weights-missing"), name, str(error))
                return
        shards = sorted(
            name
            for name in self.sizes
            if name.startswith(stem) and _NUMBERED.search(name) and name.endswith(".safetensors")
        )
        others = sorted(name for name in self.sizes if name.endswith(".safetensors"))
        pickles = sorted(name for name in self.sizes if _PICKLE.search(name))
        if shards:
            self.error(
                "index-missing",
                f"{stem}.safetensors.index.json",
                f"{location} has {len(shards)} shards but no "
                f"{stem}.safetensors.index.json to say what is in them. Download the index too.",
            )
        elif others:
            what = ", ".join(quoted(name, 60) for name in others[:3])
            self.error(
                "weights-missing",
                f"{stem}.safetensors",
                f"{location} has no {stem}.safetensors, which {library} loads, but "
                f"{what}. If that is the model in {library}'s own layout, rename it; if it is another tool's, convert it.",
            )
        elif pickles:
            name = _architecture(config, library) or "AutoModel"
            command = f"from {library} import {name} as M; M.from_pretrained('{location}').save_pretrained('NEW')"
            self.error(
                "pickle-only",
                pickles[0],
                f"{location} has only pickle weights ({quoted(pickles[0], 40)}), which can run code "
                f'and which qz never loads. If you trust them, convert them: python -c "{command}"',
            )
        else:
            self.error(
                "weights-missing",
                f"{stem}.safetensors",
                f"{location} has no weights ({stem}.safetensors). Download them.",
            )

    # The index and the headers

    def index(self, name: str) -> dict[str, Any] | None:
        """The index with a weight_map that is safe to follow, or None."""
        where = self.path(name)
        try:
            index = read_json(read_file(self.folder, name, MAX_INDEX_BYTES), where, limit=MAX_INDEX_BYTES)
        except QzError as error:
            self.error(kind_of(error, missing="index-missing"), name, str(error))
            return None
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            self.error("index-malformed", name, f"{where} has no weight_map that says which shard holds which tensor.")
            return None
        if not all(isinstance(file, str) for file in weight_map.values()):
            self.error("index-malformed", name, f"{where} has a weight_map whose values are not all file names.")
            return None
        unsafe = sorted({file for file in weight_map.values() if not _is_shard_name(file)})
        for file in unsafe:
            self.error(
                "unsafe-name",
                quoted(file),
                f"{where} names {quoted(file)} as a shard. A shard lies beside its index, and "
                "ends in .safetensors. Do not use this checkpoint.",
            )
        return None if unsafe else index

    def headers(self, files: Iterable[str]) -> dict[str, Header]:
        """The headers that can be read, in the order of ``files``."""
        files = list(files)
        if len(files) > 1 and not hasattr(self.folder, "path"):  # far away: waiting dominates
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(THREADS) as pool:
                found = list(pool.map(self.header, files))
        else:
            found = [self.header(file) for file in files]
        headers: dict[str, Header] = {}
        for file, header in zip(files, found, strict=True):
            if isinstance(header, Header):
                headers[file] = header
            else:
                self.error(kind_of(header, missing="shard-missing"), file, str(header))
        return headers

    def header(self, file: str) -> Header | QzError:
        def read(offset: int, length: int) -> bytes:
            buffer = bytearray(length)
            self.folder.read_into(file, offset, memoryview(buffer))
            return bytes(buffer)

        try:
            if file not in self.sizes:
                read_file(self.folder, file, 1)
            return read_header(read, self.sizes[file], self.path(file))
        except MissingInput:
            return MissingInput(f"{self.path(file)} is missing. Download it, or the whole checkpoint again.")
        except QzError as error:
            return error

    # What they say together

    def tensors(
        self, files: Iterable[str], headers: Mapping[str, Header], weight_map: Mapping[str, str]
    ) -> dict[str, StoredTensor]:
        """Every tensor; one that lies in two shards is taken from the one that the index names."""
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            if file not in headers:
                continue
            start = headers[file].data_start
            for info in headers[file].tensors.values():
                if info.name in tensors:
                    first = tensors[info.name].file
                    self.error(
                        "tensor-twice",
                        quoted(info.name),
                        f"{self.folder.location}: {quoted(info.name)} is in two shards, {first} "
                        f"and {file}. Save the checkpoint anew, or download it again.",
                    )
                    if weight_map.get(info.name) != file:
                        continue
                    del tensors[info.name]
                tensors[info.name] = StoredTensor(
                    info.name, info.dtype, info.shape, file, start + info.start, info.nbytes
                )
        return tensors

    def reconcile(
        self,
        index: str,
        weight_map: Mapping[str, str],
        headers: Mapping[str, Header],
        tensors: Mapping[str, StoredTensor],
    ) -> None:
        """The index against the headers. What is in a shard that cannot be read is not counted as absent."""
        where = self.path(index)
        for name, file in weight_map.items():
            if name in tensors:
                if (held := tensors[name].file) != file:
                    self.error(
                        "tensor-elsewhere",
                        quoted(name),
                        f"{where} places {quoted(name)} in {file}, but it is in {held}. "
                        "Download the index and the shards again, of one revision.",
                    )
            elif file in headers:
                self.error(
                    "tensor-absent",
                    quoted(name),
                    f"{where} places {quoted(name)} in {file}, which does not hold it. Download "
                    "the index and the shards again, of one revision.",
                )
        for name in tensors:
            if name not in weight_map:
                self.error(
                    "tensor-unindexed",
                    quoted(name),
                    f"{where} does not list {quoted(name)}, which is in {tensors[name].file}. "
                    "Download the index and the shards again, of one revision.",
                )

    def total_size(
        self, name: str, index: Mapping[str, Any], library: Library, tensors: Mapping[str, StoredTensor]
    ) -> None:
        metadata = index.get("metadata")
        if not isinstance(metadata, dict):
            if library == "diffusers":
                self.warn(
                    "index-metadata",
                    name,
                    f'{self.path(name)} has no "metadata", without which diffusers cannot load it.',
                )
            return
        said, held = metadata.get("total_size"), sum(tensor.nbytes for tensor in tensors.values())
        if said is not None and said != held:
            self.warn(
                "index-total-size",
                name,
                f"{self.path(name)} gives a total_size of {quoted(str(said), 30)}; the tensors have {held} bytes.",
            )

    def unused(self, stem: str, variant: str | None, files: Iterable[str]) -> None:
        """Weight files that no one will read."""
        used = set(files)
        prefix = stem + (f".{variant}" if variant else "")
        shard = re.compile(re.escape(prefix) + r"(?:-\d{5}-of-\d{5})?\.safetensors")
        for name in sorted(self.sizes):
            if name not in used and shard.fullmatch(name):
                self.warn(
                    "file-unused",
                    name,
                    f"{self.path(name)} belongs to no tensor of the checkpoint. Delete it, or "
                    "download the index again.",
                )
            elif _PICKLE.search(name) and not name.startswith(("training_args", "optimizer", "scheduler")):
                self.warn(
                    "pickle-files", name, f"{self.path(name)} is a pickle file, which can run code. qz never loads it."
                )


def _library(config: Mapping[str, Any] | None) -> Library | None:
    if config is None:
        return None
    if isinstance(config.get("_class_name"), str):
        return "diffusers"
    if isinstance(config.get("model_type"), str) or _architecture(config, "transformers"):
        return "transformers"
    return None


def _architecture(config: Mapping[str, Any], library: Library) -> str | None:
    """The class that the config names."""
    if library == "diffusers":
        return str(config["_class_name"])
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None


def _candidates(stem: str, names: Iterable[str]) -> tuple[dict[str | None, str], dict[str | None, str]]:
    """The single files and the indexes among ``names``, by variant, in every place where the libraries put the variant."""
    variant = r"(?:\.(?P<variant>[A-Za-z0-9_]+))?"
    single = re.compile(rf"{stem}{variant}\.safetensors")
    forms = (
        r"{stem}\.safetensors\.index{variant}\.json",
        r"{stem}\.safetensors{variant}\.index\.json",
        r"{stem}{variant}\.safetensors\.index\.json",
    )
    index = [re.compile(form.format(stem=stem, variant=variant)) for form in forms]
    singles: dict[str | None, str] = {}
    indexes: dict[str | None, str] = {}
    for name in sorted(names):
        if match := single.fullmatch(name):
            singles[match["variant"]] = name
        elif match := next(filter(None, (form.fullmatch(name) for form in index)), None):
            indexes.setdefault(match["variant"], name)
    return singles, indexes


def _is_shard_name(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and "/" not in name
        and "\\" not in name
        and not UNSAFE_TEXT.search(name)
        and len(name) <= 255
    )
