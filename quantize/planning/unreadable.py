"""Components of a pipeline whose weights cannot be read: which of them stop it, and which are kept as they are."""

from __future__ import annotations

from collections.abc import Container

from qz import QzError, Unsupported
from qz.formats.checkpoint.pipeline import Component, Pipeline, as_component
from qz.formats.checkpoint.survey import Checkpoint, read_config
from qz.formats.checkpoint.weights import architecture_of, library_of
from qz.formats.files.folder import Folder
from qz.formats.output.recorded.record import read_record
from qz.formats.tensors.weight_names import PICKLE

KEPT = "kept as it is"


def kept_unread(pipeline: Pipeline, spared: Container[str] = ()) -> dict[str, str]:
    """Components whose weights are not read but copied, if there are any → why; ``spared`` are left alone as asked.

    Raises one error for all others that cannot be read: what is missing or damaged would be so in the output, too.
    """
    reasons: dict[str, str] = {}
    copied = pickles_copied(pipeline.folder)
    for component in pipeline.components:
        if component.unread is not None:
            if component.name in spared:
                reasons[component.name] = "left alone as asked"
            elif (reason := why_kept(component, copied)) is not None:
                reasons[component.name] = f"{KEPT}: {reason}"
    pipeline.require_read(spared=reasons)
    return reasons


def pickles_copied(root: Folder) -> frozenset[str]:
    """Of an output of qz, the pickles that it copied unread; none of what it did not write."""
    try:
        record = read_record(root)
    except QzError:  # reported when the record is read
        record = None
    return frozenset(file.name for file in record.files if PICKLE.search(file.name)) if record else frozenset()


def why_kept(component: Component, copied: Container[str] = ()) -> str | None:
    """Why a component that cannot be read need not stop its pipeline; None if it has to. ``copied``: see above."""
    if component.unread is None:
        return None
    if component.is_of_onnx:
        return "weights of ONNX Runtime"
    if component.unread.kinds == {"library-unknown"}:
        return f"its config.json names no class of transformers or diffusers (model_index.json: {component.class_name})"
    names = component.folder.sizes()
    weights = [name for name in names if name.endswith(".safetensors") or PICKLE.search(name)]
    if component.unread.kinds == {"pickle-only"} and all(f"{component.name}/{name}" in copied for name in weights):
        return "its weights are pickles, which were copied unread"
    if component.unread.kinds != {"weights-missing"}:
        return None
    if component.library not in ("diffusers", "transformers") and weights:
        return f"weights of {component.library}, which qz does not know"
    return None if weights else _needs_none(component)


def _needs_none(component: Component) -> str | None:
    """Why it may be right that a component has no weights: its class has no parameters, or is unknown."""
    from qz.quantize.libraries.architecture import LoadRequest
    from qz.quantize.libraries.examine import examine

    config = read_config(component.folder)
    library = library_of(config)
    if library is None:
        return None
    empty = Checkpoint(component.folder, config, library, architecture_of(config, library), None, (), {}, {})
    empty = as_component(empty, component.library, component.class_name)
    try:
        examine(empty, LoadRequest(None))
    except Unsupported:
        return f"it has no weights, and {empty.architecture} is no model class of {library}"
    except QzError:
        return None
    return f"it has no weights, and {empty.architecture} needs none"
