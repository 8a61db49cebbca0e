"""Whole diffusers pipelines: each model by itself, then the pipeline of the library around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qz import MissingInput, Unsupported
from qz.formats.checkpoint.pipeline import Component, Pipeline
from qz.formats.files.folder import PIPELINE_INDEX
from qz.quantize.libraries.class_search import classes_in_diffusers
from qz.quantize.libraries.diffusers.component_classes import class_notes
from qz.quantize.loading.load import load_model


def load_pipeline(pipeline: Pipeline, root: Path, device: str, given: Mapping[str, Any]) -> Any:
    """The pipeline, its models on ``device`` in the dtypes they are stored in. ``given``: components as they are."""
    import diffusers

    pipeline_class: Any = getattr(diffusers, pipeline.class_name, None)
    if pipeline_class is None:
        raise Unsupported(
            f"diffusers {diffusers.__version__} has no class {pipeline.class_name}, which {root} asks for."
        )
    if notes := class_notes(pipeline.class_name, pipeline.classes):  # of components that are passed, too
        raise Unsupported(f"{root}: {'. '.join(notes)}.")
    pipeline.require_read(given)
    if lacking := [name for name in pipeline.lacking if name not in given]:
        passed = ", ".join(f"{name}={name}" for name in lacking)
        raise MissingInput(
            f"{root}/{PIPELINE_INDEX} gives no {' and no '.join(lacking)}, which {pipeline.class_name} requires. Pass "
            f"what the pipeline is to use: qz.load(…, {passed})."
        )
    models: dict[str, list[Any]] = {}
    for component in pipeline.components:
        if component.checkpoint is not None and (component.first or component.name) not in given:
            model = load_model(component.checkpoint, root / component.name, device)
            models.setdefault(component.first or component.name, []).append(model)
    whole = {each.name: _whole(each, models[each.name]) for each in pipeline.components if each.name in models}
    return pipeline_class.from_pretrained(root, **whole, **given)


def _whole(component: Component, models: list[Any]) -> Any:
    """The component: its model, or what holds the several that it is made of."""
    if not component.holds_several:
        return models[0]
    holder: Any = next(classes_in_diffusers(component.class_name, component.library), None)
    if holder is None:
        raise Unsupported(
            f"diffusers has no class {component.class_name}, of which {component.folder.location} is one."
        )
    return holder(models)
