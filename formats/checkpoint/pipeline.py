"""A diffusers pipeline: model_index.json, and a folder for each component that it names."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qz import MissingInput, QzError, Unsupported
from qz.formats.checkpoint.pipeline_class import arguments_of, is_pair
from qz.formats.checkpoint.problems import WARNINGS, as_error
from qz.formats.checkpoint.quantization.quantization_config import stated_quantization
from qz.formats.checkpoint.survey import Checkpoint, survey
from qz.formats.files.folder import PIPELINE_INDEX, Folder, is_pipeline, read_file, read_text
from qz.formats.json_files import MAX_BYTES, read_json
from qz.formats.malformed import Malformed, quoted
from qz.formats.tensors.weight_names import PICKLE

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping


_NAME = re.compile(r"[A-Za-z0-9_]+")
SCHEDULER_CONFIG = "scheduler_config.json"
_SEVERAL = re.compile(r"Multi[A-Z]")
"""Classes of diffusers that hold several nets of another class: MultiControlNetModel, MultiAdapter, …"""
_OF_TWO_REPOSITORIES = re.compile(r"Kandinsky(?:V22)?(?:Img2Img|Inpaint|Controlnet|Pipeline)|StableCascade|Wuerstchen")
"""Pipelines whose combined class loads the other half from the repository that the card's head names (``prior``)."""
_PRIOR = re.compile(r"\A---\n(?:(?!---).*\n)*?prior:\s*(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)")


NEITHER = "it gives {} as something else than its library and class, or [null, null]"


@dataclass(frozen=True, slots=True)
class Unread:
    """Why a component's weights could not be read: ``kinds`` of problems, and the error that they are."""

    kinds: frozenset[str]
    error: QzError


@dataclass(frozen=True)
class Component:
    """One part of a pipeline. ``checkpoint`` is None if it has no weights: a scheduler, tokenizer or processor."""

    name: str
    library: str
    """As model_index.json has it: diffusers, transformers, or a module of diffusers' pipelines."""
    class_name: str
    folder: Folder
    checkpoint: Checkpoint | None = None
    first: str | None = None
    """The component that this one follows: ``controlnet`` of ``controlnet_1``, which the index does not name."""
    unread: Unread | None = None
    """Why there is no checkpoint, though there should be one."""

    @property
    def holds_several(self) -> bool:
        """Whether its class holds nets of another class, each of which lies in a folder of its own."""
        return _SEVERAL.search(self.class_name) is not None

    @property
    def is_of_onnx(self) -> bool:
        """Whether ONNX Runtime runs it, from a file of its own."""
        return self.class_name == "OnnxRuntimeModel"

    @property
    def parameters(self) -> int:
        """Values of all stored tensors; of 4-bit weights, their packed bytes."""
        if self.checkpoint is None:
            return 0
        return sum(_count(tensor.shape) for tensor in self.checkpoint.tensors.values())

    @property
    def in_other_file(self) -> bool:
        """Whether its weights lie in a file of a whole pipeline, in other names."""
        return self.checkpoint is not None and self.checkpoint.folder is not self.folder

    @property
    def bytes(self) -> int:
        return sum(self.checkpoint.sizes.values()) if self.checkpoint is not None else 0

    @property
    def convolutional_share(self) -> float:
        """Of the values, how many lie in convolutions: weights of three and more dimensions."""
        if self.checkpoint is None:
            return 0.0
        tensors = self.checkpoint.tensors.values()
        kernels = (each for each in tensors if len(each.shape) > 2 and each.name.endswith(".weight"))
        return sum(_count(tensor.shape) for tensor in kernels) / max(self.parameters, 1)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization_config, if it is quantized."""
        config = stated_quantization(self.checkpoint.config) if self.checkpoint is not None else None
        return config if isinstance(config, dict) else None


@dataclass(frozen=True)
class Pipeline:
    """What model_index.json says, and the components that are there, in its order."""

    folder: Folder
    class_name: str
    components: tuple[Component, ...]
    index: bytes | None = None
    """model_index.json, where it is another one than the folder's."""
    file_folder: Folder | None = None
    """Where the one file of weights lies that its components were found in."""
    notes: tuple[str, ...] = ()
    """What the user should know of where its parts come from."""
    lacking: tuple[str, ...] = ()
    """Components that its class requires, and that the index does not give: who loads it passes them."""

    @property
    def classes(self) -> dict[str, tuple[str, str]]:
        """Library and class of each component that the index names."""
        return {each.name: (each.library, each.class_name) for each in self.components if each.first is None}

    def require_read(self, spared: Container[str] = ()) -> None:
        """Raise one error for all components whose weights could not be read, but for those in ``spared``."""
        errors = {each.name: each.unread.error for each in self.components if each.unread and each.name not in spared}
        if errors:
            raise _joined(self.folder, errors)

    def check(self) -> None:
        """After the last read: raise MalformedInput if something changed meanwhile, or is not what it has to be."""
        for folder in (self.folder, self.file_folder, *(component.folder for component in self.components)):
            if folder is not None:
                folder.check()

    def close(self) -> None:
        for component in self.components:
            component.folder.close()
        self.folder.close()


def pipeline_class(folder: Folder) -> str | None:
    """The class that a pipeline's model_index.json names; None for a folder that is no pipeline."""
    if not is_pipeline(folder):
        return None
    index = read_index(folder)
    name = index.get("_class_name")
    return name if isinstance(name, str) else None


def read_index(folder: Folder) -> dict[str, Any]:
    """model_index.json. Raises MissingInput or Malformed."""
    data = read_file(folder, PIPELINE_INDEX, MAX_BYTES)
    return read_json(data, f"{folder.location}/{PIPELINE_INDEX}", nonfinite="keep")


def open_pipeline(folder: Folder, variant: str | None = None) -> Pipeline:
    """The pipeline in ``folder`` with the headers of its weights. Of each component the ``variant`` is taken if it has
    one, as diffusers does. Components whose weights cannot be read are among them: see ``Pipeline.require_read``.

    Raises MissingInput, MalformedInput or Unsupported (code of its own).
    """
    where = f"{folder.location}/{PIPELINE_INDEX}"
    index = read_index(folder)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        if isinstance(class_name, list):
            raise Unsupported(
                f"{where} names a pipeline with code of its own ({quoted(str(class_name))}), which qz neither runs nor "
                "copies. Quantize its components one by one with --subfolder."
            )
        raise Malformed("index-malformed", f"{where} has no _class_name, so it is not a pipeline. Download it again.")
    if unclear := unclear_components(index):
        raise Malformed("index-malformed", f"{where}: {NEITHER.format(unclear[0])}. Correct it, or download it again.")
    entries = named_components(index, folder)
    unsafe = [name for name in entries if not _NAME.fullmatch(name)]
    if unsafe:
        raise Malformed(
            "unsafe-name",
            f"{where} names a component {quoted(unsafe[0])}, which is not a plain folder name. Do not use "
            "this pipeline.",
        )
    missing = sorted(entries.keys() - set(folder.subfolders()))
    if missing:
        raise MissingInput(
            f"{where} names {', '.join(missing)}, but there is no such folder. Download the whole pipeline; one that "
            "may be left out, such as a safety checker, is [null, null] there."
        )
    components: list[Component] = []
    try:
        for name, first in with_followers(folder, entries).items():
            components.append(component_in(folder, name, *entries[first or name], variant, first))
        if variant is not None and not any(
            each.checkpoint and each.checkpoint.variant == variant for each in components
        ):
            raise MissingInput(f"No component of {folder.location} has weights of the variant {quoted(variant)}.")
    except BaseException:
        for component in components:
            component.folder.close()
        raise
    notes, lacking = _prior_of(folder, class_name), lacking_components(index)
    if lacking:
        notes += (WARNINGS["component-null"].format(where=where, **facts_of_lacking(class_name, lacking)),)
    return Pipeline(folder, class_name, tuple(components), notes=notes, lacking=lacking)


def unclear_components(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Those that the index gives as something that no loader understands; see ``NEITHER``."""
    arguments = arguments_of(str(index.get("_class_name")))
    return arguments.unclear(index) if arguments is not None else ()


def lacking_components(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Those that the class of a pipeline requires, and that its index does not give."""
    arguments = arguments_of(str(index.get("_class_name")))
    return arguments.lacking(index) if arguments is not None else ()


def facts_of_lacking(class_name: str, names: Iterable[str]) -> dict[str, str]:
    """What the text of the problem ``component-null`` names."""
    passed = ", ".join(f"{name}=…" for name in names)
    return {"class_name": class_name, "names": " and no ".join(names), "arguments": passed}


def _prior_of(folder: Folder, class_name: str) -> tuple[str, ...]:
    """What is lost with the card of a pipeline that is one of two: its head says where the other is."""
    size = folder.sizes().get("README.md", MAX_BYTES)
    if size >= MAX_BYTES or not _OF_TWO_REPOSITORIES.match(class_name):
        return ()
    card = read_text(folder, "README.md", MAX_BYTES)
    if (found := _PRIOR.search(card.replace("\r\n", "\n"))) is None:
        return ()
    note = (
        f"diffusers' combined pipeline loads {found[1]}, too, which README.md names as the prior: copy README.md into "
        "the output; the card that qz push writes says it, too, where the source is on the Hub"
    )
    return (note,)


def with_followers(folder: Folder, entries: Mapping[str, tuple[str, str]]) -> dict[str, str | None]:
    """The components that the index names, each followed by those that its class has beside it, with its name.

    diffusers saves several nets under one name of the index: the first in ``controlnet``, the others in
    ``controlnet_1``, ``controlnet_2`` and so on, as long as there is such a folder (``MultiControlNetModel``,
    ``MultiAdapter``).
    """
    there = set(folder.subfolders())
    found: dict[str, str | None] = {}
    for name, (_, class_name) in entries.items():
        found[name] = None
        follower = f"{name}_1"
        while _SEVERAL.search(class_name) and follower in there and follower not in entries:
            found[follower] = name
            follower = f"{name}_{int(follower.rpartition('_')[2]) + 1}"
    return found


def named_components(index: Mapping[str, Any], folder: Folder) -> dict[str, tuple[str, str]]:
    """Name → library and class of what the index names, without settings that look like it: what has no folder, and
    is no component for the pipeline's class."""
    arguments = arguments_of(str(index.get("_class_name")))
    there = folder.subfolders()

    def is_setting(name: str) -> bool:
        known = arguments is None or name in arguments.components or name in there
        return not known and _NAME.fullmatch(name) is not None

    components = {name: value for name, value in index.items() if is_component(name, value)}
    return {name: (value[0], value[1]) for name, value in components.items() if not is_setting(name)}


def is_component(name: str, value: Any) -> bool:
    """Whether an entry of the index looks like a component: library and class, which are null for one left out."""
    return is_pair(value) and not name.startswith("_")


def component_in(
    root: Folder, name: str, library: str, class_name: str, variant: str | None = None, first: str | None = None
) -> Component:
    """The component in the folder ``name`` of a pipeline; ``unread`` says why it has no checkpoint."""
    folder = root.subfolder(name)
    sizes = folder.sizes()
    if f"{library}.py" in sizes or f"{library}.py" in root.sizes():
        raise Unsupported(
            f"{folder.location} is a {class_name} with code of its own ({library}.py), which qz neither runs nor "
            "copies. Quantize the other components one by one with --subfolder."
        )
    require_settings(folder, library, class_name)
    if not has_weights(sizes):
        return Component(name, library, class_name, folder, first=first)
    has_variant = any(f".{variant}." in file or f".{variant}-" in file for file in sizes)
    checkpoint, problems = survey(folder, variant if has_variant else None, class_in_config(library, class_name))
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors or checkpoint is None:
        unread = Unread(
            frozenset(problem.kind for problem in errors),
            as_error(folder.location, errors, recorded=bool(folder.promised)),
        )
        return Component(name, library, class_name, folder, first=first, unread=unread)
    if variant is not None and not has_variant:
        other = f"{folder.location} has no weights of the variant {quoted(variant)}; the plain ones are taken"
        checkpoint = replace(checkpoint, choices=(*checkpoint.choices, other))
    return Component(name, library, class_name, folder, as_component(checkpoint, library, class_name), first)


def require_settings(folder: Folder, library: str, class_name: str) -> None:
    """Raise MissingInput for a component's folder in which there is nothing, or not what its class is loaded from."""
    sizes = folder.sizes()
    if not sizes and not folder.subfolders():
        raise MissingInput(f"{folder.location} is empty. Download the whole pipeline.")
    needed = _settings_of(library, class_name)
    if needed and sizes.keys().isdisjoint(needed):
        raise MissingInput(
            f"{folder.location} has no {needed[0]}, which {class_name} is loaded from. Download the whole pipeline."
        )


def _settings_of(library: str, class_name: str) -> tuple[str, ...]:
    """The files, of which a class without weights needs one; none where it is loaded without, or from others."""
    if library == "diffusers" and class_name.endswith("Scheduler"):
        return (SCHEDULER_CONFIG,)
    if library == "diffusers" and class_name.endswith("Guidance"):
        return ("guider_config.json",)
    if library == "transformers" and class_name.removesuffix("Fast").endswith(("ImageProcessor", "FeatureExtractor")):
        return ("preprocessor_config.json", "processor_config.json")
    return ()


def class_in_config(library: str, class_name: str) -> dict[str, Any]:
    """How a component's config.json would name the class that model_index.json does; empty where that is not told."""
    if _SEVERAL.search(class_name):  # its nets are of another class
        return {}
    if library == "diffusers":
        return {"_class_name": class_name}
    return {"architectures": [class_name]} if library == "transformers" else {}


def as_component(checkpoint: Checkpoint, library: str, class_name: str) -> Checkpoint:
    """The checkpoint as one of the class that model_index.json names; diffusers goes by that, not by config.json.

    Of a class that holds several nets, each is of the class that its own config.json names.
    """
    if _SEVERAL.search(class_name) and checkpoint.architecture:
        return checkpoint
    return replace(checkpoint, architecture=class_name, class_module=library)


def has_weights(names: Iterable[str]) -> bool:
    """Whether a component should have weights, even if they are missing: it has a config.json, and of no other kind."""
    names = set(names)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) or PICKLE.search(name) for name in names):
        return True
    return "config.json" in names and not any(
        name.endswith("_config.json") for name in names - {"generation_config.json"}
    )


def _joined(folder: Folder, errors: dict[str, QzError]) -> QzError:
    first = next(iter(errors.values()))
    if len(errors) == 1:
        return first
    lines = [_first_problem(error) for error in errors.values()]
    more = [f"Also: {', '.join(list(errors)[3:])}."] if len(lines) > 3 else []
    kind = next(kind for kind in type(first).__mro__ if kind.__module__ == "qz")
    error: QzError = kind(f"{folder.location} has {len(errors)} components with problems:", *lines[:3], *more)
    return error


def _first_problem(error: QzError) -> str:
    """In one line: what is wrong with a component, or the first of several such things."""
    head, *problems = str(error).splitlines()
    return f"{head[:-1]}, the first: {problems[0].strip()}" if problems and head.endswith(":") else head


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
