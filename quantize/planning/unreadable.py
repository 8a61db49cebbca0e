"""Components of a pipeline whose weights cannot be read: which of them stop it, and which are kept as they are."""

from __future__ import annotations

from collections.abc import Container

from qz import QzError, Unsupported
from qz.formats.checkpoint.pipeline import Component, Pipeline
from qz.formats.checkpoint.survey import Checkpoint, read_file
from qz.formats.checkpoint.weights import PICKLE, library_of
from qz.formats.json_files import MAX_BYTES, read_json

KEPT = "kept as it is"


def kept_unread(pipeline: Pipeline, spared: Container[str] = ()) -> dict[str, str]:
    """Components whose weights are not read but copied, if there are any → why; ``spared`` are left alone as asked.

    Raises one error for all others that cannot be read: what is missing or damaged would be so in the output, too.
    """
    reasons: dict[str, str] = {}
    for component in pipeline.components:
        if component.unread is not None:
            if component.name in spared:
                reasons[component.name] = "left alone as asked"
            elif (reason := why_kept(component)) is not None:
                reasons[component.name] = f"{KEPT}: {reason}"
    pipeline.require_read(spared=reasons)
    return reasons


def why_kept(component: Component) -> str | None:
    """Why a component that cannot be read need not stop its pipeline; None if it has to."""
    if component.unread is None:
        return None
    if component.is_of_onnx:
        return "weights of ONNX Runtime"
    if component.unread.kinds == {"library-unknown"}:
        return f"its config.json names no class of transformers or diffusers (model_index.json: {component.class_name})"
    names = component.folder.sizes()
    weights = [name for name in names if name.endswith(".safetensors") or PICKLE.search(name)]
    if component.unread.kinds != {"weights-missing"}:
        return None
    if component.library not in ("diffusers", "transformers") and weights:
        return f"weights of {component.library}, which qz does not know"
    return None if weights else _needs_none(component)


def _needs_none(component: Component) -> str | None:
    """Why it may be right that a component has no weights: its class has no parameters, or nobody knows it."""
    from qz.quantize.libraries.architecture import LoadRequest
    from qz.quantize.libraries.examine import examine

    where = f"{component.folder.location}/config.json"
    config = read_json(read_file(component.folder, "config.json", MAX_BYTES), where)
    library = library_of(config)
    if library is None:
        return None
    empty = Checkpoint(
        component.folder, config, library, component.class_name, None, (), {}, {}, class_module=component.library
    )
    try:
        examine(empty, LoadRequest(None))
    except Unsupported:
        return f"it has no weights, and {component.class_name} is no model class of {library}"
    except QzError:
        return None
    return f"it has no weights, and {component.class_name} needs none"
