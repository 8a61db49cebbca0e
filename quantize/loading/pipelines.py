"""Whole diffusers pipelines: each model by itself, then the pipeline of the library around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qz import Unsupported
from qz.formats.checkpoint.pipeline import Pipeline
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
    models: dict[str, Any] = {}
    for component in pipeline.components:
        if component.checkpoint is not None:
            models[component.name] = load_model(component.checkpoint, root / component.name, device)
    return pipeline_class.from_pretrained(root, **models)
