"""Open a checkpoint lazily: its config, its index, and the header of every shard; no weight is read.

:func:`survey` collects everything that is wrong in one pass; :func:`open_checkpoint` raises it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qz import QzError
from qz.formats.checkpoint.concurrent_reads import several_at_once
from qz.formats.checkpoint.other_contents import adapters
from qz.formats.checkpoint.other_contents.other_forms import other_forms
from qz.formats.checkpoint.other_contents.recognition import (
    Recognized,
    instead_of_config,
    recognize_file,
    recognize_folder,
)
from qz.formats.checkpoint.problems import Problem, Problems, require_none
from qz.formats.checkpoint.weights import (
    Library,
    architecture_of,
    find_weights,
    is_shard_name,
    library_of,
    unused_files,
)
from qz.formats.files.folder import Folder, place_of, read_at, read_file
from qz.formats.json_files import MAX_CONFIG_BYTES, read_json
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import Decoded, StoredTensor
from qz.formats.tensors.safetensors import Header, read_header
from qz.formats.tensors.weight_names import PICKLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from qz.formats.pickles.file import PickledFile

MAX_INDEX_BYTES = 50_000_000
MAX_SHARDS = 10_000

GGUF = "gguf"
"""What ``encoded_as`` says of GGUF files."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder's headers say. ``files`` are the weight files in order of their number, ``tensors`` in file order.

    ``variant`` names the set of weights (``fp16``; None is the plain one), ``index`` is the index file's object if the
    checkpoint is sharded, and ``header_metadata`` the ``__metadata__`` of every file. ``architecture`` is the class
    that config.json names, or model_index.json if this is a component of a pipeline; then ``class_module`` is where
    that has the class from: a library, or a module of diffusers' pipelines. ``unused`` are weight files beside the
    others that no loader reads. Where another tool quantized the weights, ``encoded_as`` says how once ``tensors`` are
    those of the plain checkpoint (see ``qz.formats.sources``), and ``left_out`` what was no weight of it. ``choices``
    say which of several things in the folder were taken where nobody asked for one.
    """

    folder: Folder
    config: dict[str, Any]
    library: Library
    architecture: str | None
    variant: str | None
    files: tuple[str, ...]
    sizes: dict[str, int]
    tensors: Mapping[str, StoredTensor | Decoded]
    index: dict[str, Any] | None = None
    header_metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    class_module: str | None = None
    unused: tuple[str, ...] = ()
    encoded_as: str | None = None
    left_out: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    original: dict[str, StoredTensor | Decoded] | None = None
    """Of a single file in other names than the library's, its tensors by those names."""
    own_code: bool = False
    """Whether ``auto_map`` named code with the class, which is never run, and was taken out of ``config``."""

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """Those of ``tensors`` that are stored as they are."""
        if set(map(type, self.tensors.values())) == {StoredTensor}:
            return self.tensors  # type: ignore[return-value]  # what no copy of hundreds of thousands is needed for
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, StoredTensor)}


def read_config(folder: Folder) -> dict[str, Any]:
    """config.json, with NaN and infinities as the library that it is of has them. Raises MissingInput or Malformed."""
    where, data = f"{folder.location}/config.json", read_file(folder, "config.json", MAX_CONFIG_BYTES)
    config = read_json(data, where, limit=MAX_CONFIG_BYTES, nonfinite="keep")
    if library_of(config) == "diffusers" or not (b"NaN" in data or b"Infinity" in data):
        return config
    return read_json(data, where, limit=MAX_CONFIG_BYTES, nonfinite="tag")


def open_checkpoint(folder: Folder, variant: str | None = None) -> Checkpoint:
    """The checkpoint in ``folder``, or one error that names everything wrong with it: MissingInput, Unsupported, …"""
    checkpoint, problems = survey(folder, variant)
    require_none(folder.location, problems, recorded=bool(folder.promised))
    assert checkpoint is not None  # otherwise an error was raised
    return checkpoint


def survey(
    folder: Folder, variant: str | None = None, names_class: Mapping[str, Any] | None = None
) -> tuple[Checkpoint | None, tuple[Problem, ...]]:
    """What could be read of the checkpoint in ``folder``, and everything that is wrong with it, worst first.

    ``variant`` names one of several sets of weights, such as ``fp16``; without it the plain one is taken, or the only
    one there is. ``names_class``: the entries of config.json that name a class, for one that has none of them. Never
    raises for a bad checkpoint, only for a folder that cannot be listed.
    """
    if any(name.lower().endswith(".gguf") for name in (*folder.sizes(), folder.named_file or "")):
        from qz.formats.checkpoint.gguf import gguf_files, survey_gguf

        if files := gguf_files(folder):
            return survey_gguf(folder, files, variant)
    found = _Survey(folder, names_class)
    checkpoint = found.run(variant)
    return checkpoint, found.problems.worst_first()


def survey_file(
    folder: Folder, file: str
) -> tuple[dict[str, StoredTensor | Decoded], dict[str, str], tuple[Problem, ...]]:
    """One .safetensors file by itself: its tensors, its metadata, and what is wrong with it."""
    found = _Survey(folder)
    headers = found.headers([file])
    tensors = found.tensors([file], headers, {})
    found.add(recognize_file(folder, file, tensors))
    if headers and not tensors:
        found.problems.add("no-tensors", file, location=found.path(file))
    header = headers.get(file)
    return tensors, header.metadata if isinstance(header, Header) else {}, found.problems.worst_first()


def _stored(header: Header | PickledFile, file: str) -> Iterator[StoredTensor | Decoded]:
    if not isinstance(header, Header):
        yield from header.tensors.values()
        return
    for info in header.tensors.values():
        offset = header.data_start + info.start
        yield StoredTensor(info.name, info.dtype, info.shape, file, offset, info.stop - info.start)


class _Survey:
    """One pass over one folder."""

    def __init__(self, folder: Folder, names_class: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.names_class = names_class or {}
        self.sizes = folder.sizes()
        self.problems = Problems(folder.location)

    def path(self, file: str) -> str:
        return f"{self.folder.location}/{file}"

    def run(self, variant: str | None) -> Checkpoint | None:
        config = self.config()
        library = library_of(config) if config is not None else None
        if config is None or library is None:
            return None
        architecture = architecture_of(config, library)
        self.code(config, library)
        weights = find_weights(self.folder, library, variant, self.problems)
        index = self.index(weights.index, library) if weights and weights.index else None
        if weights is None or (index is None and weights.single is None):
            return None
        weight_map: dict[str, str] = index["weight_map"] if index else {}
        files = tuple(sorted(set(weight_map.values()))) if weights.single is None else (weights.single,)
        headers = self.headers(files)
        tensors = self.tensors(files, headers, weight_map)
        if index and weights.index:
            self.reconcile(weights.index, weight_map, headers, tensors, library)
            if len(headers) == len(files):
                self.metadata(weights.index, index, library, tensors)
        unused = unused_files(self.folder, library, weights.variant, files, self.problems)
        if not tensors and len(headers) == len(files):
            self.problems.add("no-tensors", files[0])
        if library == "diffusers" or adapters.is_adapter(tensors):
            self.add(recognize_file(self.folder, files[0], tensors, architecture))
        if (name := adapters.unmerged(tensors)) is not None:
            how = adapters.HOW_UNMERGED[library]
            self.problems.add("adapter-unmerged", tensors[name].file, name=quoted(name), library=library, how=how)
        return Checkpoint(
            folder=self.folder,
            config=config,
            library=library,
            architecture=architecture,
            variant=weights.variant,
            files=files,
            sizes={file: self.sizes[file] for file in headers},
            tensors=tensors,
            index=index,
            header_metadata={file: each.metadata for file, each in headers.items() if isinstance(each, Header)},
            unused=unused,
            left_out=tuple(name for each in headers.values() if not isinstance(each, Header) for name in each.left_out),
            choices=self.problems.choices(),
        )

    def config(self) -> dict[str, Any] | None:
        """config.json, or None with the reason why there is none that can be used."""
        if "config.json" not in self.sizes and self.is_no_model():
            return None
        try:
            config = read_config(self.folder)
        except QzError as error:
            instead = "" if "config.json" in self.sizes else instead_of_config(self.folder)
            self.problems.add_error(error, "config.json", missing="config-missing", instead=instead)
            return None
        if "model_type" not in config and "pretrained_cfg" in config:  # of timm; as transformers reads it
            config = config | {"model_type": "timm_wrapper"}
        if library_of(config) is None:
            config = config | dict(self.names_class)
        if library_of(config) is None:
            instead = other_forms(self.folder) or "Use the config.json that belongs to the model."
            self.problems.add("library-unknown", "config.json", instead=instead)
        return config

    def is_no_model(self) -> bool:
        """Whether a folder without config.json is something well known that is not a model."""
        found = recognize_folder(self.folder, self.names_in)
        self.add(found)
        return found is not None

    def names_in(self, file: str) -> Iterable[str]:
        """Of the tensors; none if the file cannot be read."""
        header = self.header(file)
        return header.tensors if isinstance(header, Header) else ()

    def add(self, found: Recognized | None) -> None:
        if found is not None:
            self.problems.add(found.kind, found.where, **found.facts)

    def code(self, config: Mapping[str, Any], library: Library) -> None:
        scripts = sorted(name for name in self.sizes if name.endswith(".py"))
        if "auto_map" in config or scripts:
            named = f" ({', '.join(quoted(name, 40) for name in scripts[:3])})" if scripts else ""
            where = "config.json" if "auto_map" in config else scripts[0]
            self.problems.add("custom-code", where, named=named, library=library)

    def index(self, name: str, library: Library) -> dict[str, Any] | None:
        """The index with a weight_map that is safe to follow, or None."""
        try:
            index = read_json(read_file(self.folder, name, MAX_INDEX_BYTES), self.path(name), limit=MAX_INDEX_BYTES)
        except QzError as error:
            self.problems.add_error(error, name, missing="index-missing", name=name, shards="its shards")
            return None
        weight_map = index.get("weight_map")
        why = None
        if not isinstance(weight_map, dict) or not weight_map:
            why = "it has no weight_map that says which shard holds which tensor"
        elif not all(isinstance(file, str) for file in weight_map.values()):
            why = "its weight_map holds something else than file names"
        elif len(set(weight_map.values())) > MAX_SHARDS:
            why = f"it names more than {MAX_SHARDS} shards"
        if why:
            self.problems.add("index-malformed", name, why=why)
            return None
        suffix = ".bin" if ".bin." in name else ".safetensors"
        files = sorted(set(index["weight_map"].values()))
        unsafe = [file for file in files if not is_shard_name(file, library, suffix)]
        for file in unsafe:
            self.problems.add("unsafe-name", name, name=quoted(file))
        if unsafe:
            return None
        for parent, inside in groupby(files, lambda file: file.rpartition("/")[0]):
            if parent:
                with suppress(QzError):  # which reading a header raises, too
                    self.folder.include(parent, [file.rpartition("/")[2] for file in inside])
        self.sizes = self.folder.sizes()
        return index

    def headers(self, files: Sequence[str]) -> dict[str, Header | PickledFile]:
        """The headers that can be read, in the order of ``files``."""
        found = several_at_once(self.folder, self.header, files)
        headers: dict[str, Header | PickledFile] = {}
        for file, header in zip(files, found, strict=True):
            if isinstance(header, QzError):
                self.problems.add_error(header, file, missing="shard-missing")
            else:
                headers[file] = header
        return headers

    def header(self, file: str) -> Header | PickledFile | QzError:
        read = read_at(self.folder, file)
        try:
            if file not in self.sizes:
                read_file(*place_of(self.folder, file), 1)
            if self.folder.allow_pickle and PICKLE.search(file):
                from qz.formats.pickles.file import read_pickled

                return read_pickled(read, self.sizes[file], file, self.path(file))
            return read_header(read, self.sizes[file], self.path(file))
        except QzError as error:
            return error

    def tensors(
        self, files: Iterable[str], headers: Mapping[str, Header | PickledFile], weight_map: Mapping[str, str]
    ) -> dict[str, StoredTensor | Decoded]:
        """Every tensor; one that lies in two shards is taken from the one that the index names."""
        tensors: dict[str, StoredTensor | Decoded] = {}
        for file in files:
            found = {tensor.name: tensor for tensor in _stored(headers[file], file)} if file in headers else {}
            if tensors.keys().isdisjoint(found):
                tensors |= found
                continue
            for name, tensor in found.items():
                if name in tensors:
                    self.problems.add(
                        "tensor-twice", quoted(name), name=quoted(name), first=tensors[name].file, second=file
                    )
                    if weight_map.get(name) != file:
                        continue
                    del tensors[name]
                tensors[name] = tensor
        return tensors

    def reconcile(
        self,
        index: str,
        weight_map: Mapping[str, str],
        headers: Mapping[str, Header | PickledFile],
        tensors: Mapping[str, StoredTensor | Decoded],
        library: Library,
    ) -> None:
        """The index against the headers. What is in a shard that cannot be read is not counted as absent.

        transformers takes all that is in the shards, whichever of them the index names for a tensor.
        """
        if len(weight_map) == len(tensors) and all(weight_map.get(name) == held.file for name, held in tensors.items()):
            return
        where, taken = self.path(index), library == "transformers"
        for name, file in weight_map.items():
            found = tensors.get(name)
            if found is None and file in headers:
                self.problems.add("tensor-absent", quoted(name), where=where, name=quoted(name), file=file)
            elif found is not None and found.file != file:
                facts = {"where": where, "name": quoted(name), "file": file, "held": found.file}
                self.problems.add("index-differs" if taken else "tensor-elsewhere", quoted(name), **facts)
        for name, held in tensors.items():
            if name not in weight_map:
                facts = {"where": where, "name": quoted(name), "held": held.file}
                self.problems.add("index-differs" if taken else "tensor-unindexed", quoted(name), **facts)

    def metadata(
        self, name: str, index: Mapping[str, Any], library: Library, tensors: Mapping[str, StoredTensor | Decoded]
    ) -> None:
        metadata = index.get("metadata")
        if isinstance(metadata, dict):
            said, held = metadata.get("total_size"), sum(tensor.nbytes for tensor in tensors.values())
            if said is not None and said != held:
                self.problems.add("index-total-size", name, said=quoted(str(said), 30), held=held)
        else:
            self.problems.add("index-metadata", name, library=library)
