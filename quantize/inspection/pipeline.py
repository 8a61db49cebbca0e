"""What a whole diffusers pipeline is: each of its components, and the total."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from qz import QzError
from qz.formats.checkpoint.pipeline import (
    NEITHER,
    Component,
    Pipeline,
    Unread,
    as_component,
    class_in_config,
    facts_of_lacking,
    has_weights,
    lacking_components,
    named_components,
    read_index,
    require_settings,
    unclear_components,
    with_followers,
)
from qz.formats.checkpoint.problems import Problem, Problems, as_error, kind_of, worst_first
from qz.formats.files.folder import PIPELINE_INDEX, Folder
from qz.formats.malformed import quoted
from qz.formats.output.recorded.record import read_record
from qz.quantize.consumers.verdict import Verdict
from qz.quantize.inspection.companions import problems_of_settings
from qz.quantize.inspection.consumers import verdicts_on_pipeline
from qz.quantize.inspection.estimate import METHODS, Estimate
from qz.quantize.inspection.model import FolderReading, inspect_model, read_folder
from qz.quantize.inspection.report import File, Inspection, Origin, Quantization, Share, Tensor, Verified
from qz.quantize.libraries.companions.notes import require_vocabulary
from qz.quantize.libraries.diffusers.component_classes import class_notes
from qz.quantize.planning.components import choose
from qz.quantize.planning.unreadable import pickles_copied, why_kept


@dataclass(frozen=True)
class ComponentInspection:
    """One component; ``model`` is None if it has no weights: a scheduler, tokenizer or processor.

    Library and class are those of model_index.json. ``chosen``: ``qz quantize`` would quantize it by default.
    """

    name: str
    library: str
    architecture: str
    model: Inspection | None
    chosen: bool = False

    def as_json(self) -> dict[str, Any]:
        about = {"name": self.name, "library": self.library, "architecture": self.architecture, "chosen": self.chosen}
        if self.model is None:
            return about | dict.fromkeys(("format", "parameters", "bytes", "quantization", "memory_footprint"))
        told = self.model.as_json()
        del told["source"], told["verified"], told["consumers"]
        return about | told


@dataclass(frozen=True)
class PipelineInspection:
    """A pipeline. Its figures are the totals of what is known of the components."""

    source: Origin
    components: tuple[ComponentInspection, ...]
    estimates: Mapping[str, Estimate] | None
    own_problems: tuple[Problem, ...]
    verified: Verified | None = None
    consumers: Mapping[str, Verdict] = field(default_factory=dict)
    """By name, those that were asked for."""

    def with_verified(self, verified: Verified, problems: tuple[Problem, ...]) -> PipelineInspection:
        return replace(self, verified=verified, own_problems=worst_first((*self.own_problems, *problems)))

    def with_problems(self, problems: Iterable[Problem]) -> PipelineInspection:
        return replace(self, own_problems=worst_first((*self.own_problems, *problems)))

    @property
    def models(self) -> dict[str, Inspection]:
        return {each.name: each.model for each in self.components if each.model is not None}

    @property
    def parameters(self) -> int:
        return sum(model.parameters or 0 for model in self.models.values())

    @property
    def bytes(self) -> int:
        return sum(model.bytes or 0 for model in self.models.values())

    @property
    def memory_footprint(self) -> int:
        return sum(model.memory_footprint or 0 for model in self.models.values())

    @property
    def memory_footprint_exact(self) -> bool:
        return bool(self.models) and all(model.memory_footprint_exact for model in self.models.values())

    @property
    def dtypes(self) -> dict[str, Share]:
        total: dict[str, Share] = {}
        for model in self.models.values():
            for dtype, one in model.dtypes.items():
                two = total.get(dtype, Share(0, 0, 0))
                total[dtype] = Share(one.tensors + two.tensors, one.parameters + two.parameters, one.bytes + two.bytes)
        return dict(sorted(total.items(), key=lambda item: (-item[1].bytes, item[0])))

    @property
    def quantization(self) -> Quantization | None:
        """That of the component with most quantized parameters, with the sums of all."""
        found = [model.quantization for model in self.models.values() if model.quantization is not None]
        if not found:
            return None
        found.sort(key=lambda each: -(each.quantized_parameters or 0))
        return found[0]._replace(
            method="+".join(dict.fromkeys(each.method for each in found)),
            skipped=None,
            quantized_parameters=sum(each.quantized_parameters or 0 for each in found),
            quantized_tensors=sum(each.quantized_tensors or 0 for each in found),
        )

    @property
    def ties(self) -> dict[str, str]:
        return {
            f"{name}/{tied}": f"{name}/{stored}"
            for name, model in self.models.items()
            for tied, stored in model.ties.items()
        }

    @property
    def files(self) -> tuple[File, ...]:
        return tuple(
            file._replace(name=f"{name}/{file.name}") for name, model in self.models.items() for file in model.files
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(
            tensor._replace(
                name=f"{name}/{tensor.name}",
                file=f"{name}/{tensor.file}",
                part_of=tensor.part_of and f"{name}/{tensor.part_of}",
            )
            for name, model in self.models.items()
            for tensor in model.tensors
        )

    @property
    def problems(self) -> tuple[Problem, ...]:
        inside = (
            problem._replace(where=f"{name}/{problem.where}")
            for name, model in self.models.items()
            for problem in model.problems
        )
        return worst_first((*self.own_problems, *inside))

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    def as_json(self) -> dict[str, Any]:
        """The keys of a model's report, and ``components``."""
        return {
            "source": self.source,
            "format": "pipeline",
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dtypes": self.dtypes,
            "quantization": self.quantization,
            "memory_footprint": self.memory_footprint,
            "memory_footprint_exact": self.memory_footprint_exact,
            "estimates": self.estimates,
            "ties": self.ties,
            "files": self.files,
            "problems": self.problems,
            "verified": self.verified,
            "consumers": {name: verdict.as_json() for name, verdict in self.consumers.items()},
            "components": [component.as_json() for component in self.components],
        }


def inspect_pipeline(
    folder: Folder,
    origin: Origin,
    variant: str | None = None,
    *,
    plan: bool = False,
    consumers: Sequence[str] = (),
) -> PipelineInspection:
    """The pipeline in ``folder``. Raises only for a folder that cannot be looked into."""
    problems = Problems(folder.location)
    missing: list[Problem] = []
    class_name, entries = _index(folder, problems)
    scripts = sorted(name for name in folder.sizes() if name.endswith(".py"))
    if scripts:
        named = f" ({', '.join(quoted(name, 40) for name in scripts[:3])})"
        problems.add("custom-code", scripts[0], named=named, library="diffusers")
    looks: dict[str, FolderReading | None] = {}
    firsts: dict[str, str | None] = {}
    copied = pickles_copied(folder)
    inner: list[Folder] = []
    for name, first in with_followers(folder, entries).items():
        entries[name] = entries[first or name]
        firsts[name] = first
        try:
            inner.append(folder.subfolder(name))
            require_settings(inner[-1], *entries[name])
            require_vocabulary(inner[-1], *entries[name])
        except QzError as error:
            missing.append(_gone(name, error))
            continue
        looks[name] = _look(inner[-1], variant, entries[name], name, copied)
        if looks[name] is None:
            missing += problems_of_settings(inner[-1], name, *entries[name])
    components: list[ComponentInspection] = []
    with _examining(looks) if plan else nullcontext():
        for name, look in looks.items():
            inside = origin._replace(subfolder=f"{origin.subfolder}/{name}" if origin.subfolder else name)
            model = inspect_model(look, inside, plan=plan) if look is not None else None
            components.append(ComponentInspection(name, *entries[name], model))
    parts = {name: look.contents() for name, look in looks.items() if look is not None and look.checkpoint is not None}
    verdicts = verdicts_on_pipeline(parts, consumers)
    for each in inner:
        each.close()
    found = PipelineInspection(
        source=origin._replace(library="diffusers", architecture=class_name),
        components=_as_recorded(components, folder),
        estimates=None,
        own_problems=worst_first((*problems.worst_first(), *missing)),
        consumers=verdicts,
    )
    return found if found.errors else _with_estimates(found, folder, looks, firsts)


def _examining(looks: Mapping[str, FolderReading | None]) -> AbstractContextManager[None]:
    from qz.quantize.libraries.examine import examining

    return examining(look.checkpoint for look in looks.values() if look is not None and look.checkpoint is not None)


def _as_recorded(components: Sequence[ComponentInspection], folder: Folder) -> tuple[ComponentInspection, ...]:
    """With the footprints that qz recorded when it wrote the pipeline, where the weights are still as then."""
    try:
        record = read_record(folder)
    except QzError:
        record = None
    listed = record.about.get("components") if record is not None else None
    if record is None or not isinstance(listed, list):
        return tuple(components)
    sizes = {file.name: file.bytes for file in record.files}
    told = {each.get("name"): each.get("memory_footprint") for each in listed if isinstance(each, dict)}
    found = []
    for component in components:
        model, footprint = component.model, told.get(component.name)
        after = footprint.get("after") if isinstance(footprint, dict) else None
        if model is not None and not model.errors and type(after) is int and after >= (model.memory_footprint or 0):
            weights = [file for file in model.files if file.tensors is not None]
            if all(sizes.get(f"{component.name}/{file.name}") == file.bytes for file in weights):
                model = replace(model, memory_footprint=after, memory_footprint_exact=True)
        found.append(replace(component, model=model))
    return tuple(found)


def _gone(name: str, error: QzError) -> Problem:
    """A component that model_index.json names, but whose folder cannot be entered."""
    return Problem("error", kind_of(error, "component-missing"), name, f"{PIPELINE_INDEX} names {name}. {error}")


def _index(folder: Folder, problems: Problems) -> tuple[str | None, dict[str, tuple[str, str]]]:
    """The pipeline's class, and its components' libraries and classes by name."""
    try:
        index = read_index(folder)
    except QzError as error:
        problems.add_error(error, PIPELINE_INDEX, missing="config-missing", instead="Download that too.")
        return None, {}
    class_name = index.get("_class_name")
    if isinstance(class_name, list) and class_name:  # [module, class]: code in the repository
        problems.add("custom-code", PIPELINE_INDEX, named="", library="diffusers")
        class_name = class_name[-1]
    if not isinstance(class_name, str):
        problems.add("index-malformed", PIPELINE_INDEX, why="it has no _class_name, so it is not a pipeline")
        class_name = None
    entries: dict[str, tuple[str, str]] = {}
    unsafe: list[str] = []
    for name, entry in named_components(index, folder).items():
        if name.isidentifier() and name.isascii():
            entries[name] = entry
        else:
            unsafe.append(name)
    for name in unsafe:
        problems.add("unsafe-name", PIPELINE_INDEX, name=quoted(name))
    for name in unclear_components(index):
        problems.add("index-malformed", PIPELINE_INDEX, why=NEITHER.format(name))
    if class_name is not None and entries and (lacking := lacking_components(index)):
        problems.add("component-null", PIPELINE_INDEX, **facts_of_lacking(class_name, lacking))
    for told in class_notes(class_name, entries) if class_name is not None else ():
        problems.add("component-class", PIPELINE_INDEX, told=told)
    if class_name is not None and not entries and not unsafe:
        problems.add("index-malformed", PIPELINE_INDEX, why="it names no component")
    return class_name, entries


def _look(
    folder: Folder, variant: str | None, entry: tuple[str, str], name: str, copied: Container[str]
) -> FolderReading | None:
    """What is in a component's folder, None if it is one without weights that qz reads.

    As diffusers does, the ``variant`` is taken of those that have it, and the class is the one of its ``entry`` in the
    index. ``copied``: pickles that are there since qz copied them.
    """
    sizes = folder.sizes()
    if not has_weights(sizes):
        return None
    has_variant = any(f".{variant}." in file or f".{variant}-" in file for file in sizes)
    look = read_folder(folder, variant if has_variant else None, class_in_config(*entry))
    errors = [problem for problem in look.problems if problem.severity == "error"]
    if errors:
        unread = Unread(frozenset(problem.kind for problem in errors), as_error(folder.location, errors))
        if why_kept(Component(name, *entry, folder, unread=unread), copied) is not None:
            return None
    return look._replace(checkpoint=as_component(look.checkpoint, *entry)) if look.checkpoint is not None else look


def _with_estimates(
    found: PipelineInspection,
    folder: Folder,
    looks: Mapping[str, FolderReading | None],
    firsts: Mapping[str, str | None],
) -> PipelineInspection:
    """What ``qz quantize`` would make of the pipeline: components that are worth it, the others as they are."""
    parts = []
    for component in found.components:
        look = looks[component.name]
        held = look.checkpoint if look is not None else None
        inner = look.folder if look is not None else folder
        first = firsts[component.name]
        parts.append(Component(component.name, component.library, component.architecture, inner, held, first))
    pipeline = Pipeline(folder, found.source.architecture or "", tuple(parts))
    estimates: dict[str, Estimate] = {}
    chosen: set[str] = set()
    for name, method in METHODS.items():
        try:
            chosen = {choice.name for choice in choose(pipeline, method) if choice.method is not None}
        except QzError:  # nothing worth quantizing, or quantized already
            return found
        estimates[name] = _total(found, chosen, name)
    marked = tuple(replace(component, chosen=component.name in chosen) for component in found.components)
    return replace(found, components=marked, estimates=estimates)


def _total(found: PipelineInspection, chosen: set[str], method: str) -> Estimate:
    nbytes = footprint = quantized = 0
    exact = True
    for name, model in found.models.items():
        if name in chosen and model.estimates is not None:
            one = model.estimates[method]
            nbytes, footprint, quantized = (
                nbytes + one.bytes,
                footprint + one.memory_footprint,
                quantized + one.quantized_parameters,
            )
            exact = exact and one.exact
        else:
            nbytes, footprint = nbytes + (model.bytes or 0), footprint + (model.memory_footprint or 0)
            exact = exact and model.memory_footprint_exact
    return Estimate(nbytes, footprint, quantized, exact)
