"""Whole diffusers pipelines: each model by itself, then the pipeline of the library around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qz import Unsupported
from qz.formats.checkpoint.pipeline import Component, Pipeline
from qz.quantize.libraries.class_search import classes_in_diffusers
from qz.quantize.loading.load import load_model


def load_pipeline(pipeline: Pipeline, root: Path, device: str) -> Any:
    """The pipeline, its models on ``device`` in the dtypes they are stored in."""
    import diffusers

    pipeline_class: Any = getattr(diffusers, pipeline.class_name, None)
    if pipeline_class is None:
        raise Unsupported(
            f"diffusers {diffusers.__version__} has no class {pipeline.class_name}, which {root} asks for."
        )
    pipeline.require_read()
    models: dict[str, list[Any]] = {}
    for component in pipeline.components:
        if component.checkpoint is not None:
            model = load_model(component.checkpoint, root / component.name, device)
            models.setdefault(component.first or component.name, []).append(model)
    whole = {each.name: _whole(each, models[each.name]) for each in pipeline.components if each.name in models}
    return pipeline_class.from_pretrained(root, **whole)


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
