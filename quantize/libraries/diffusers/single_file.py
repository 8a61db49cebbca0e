"""How diffusers reads models and pipelines from one file in the names of their own code: by its own converters.

They are run on tensors of the meta device, see ``tracing``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qz import Unsupported
from qz.quantize.libraries.architecture import TensorSpec
from qz.quantize.libraries.diffusers.internals import (
    clip_converter,
    default_pipeline,
    needs_conversion,
    single_file_classes,
    t5_converter,
)
from qz.quantize.libraries.diffusers.tracing import Converted, Trace, on_meta

PARTS = {
    "AutoencoderKLLTX2Audio": ("audio_vae.",),
    "Autoencoder": ("first_stage_model.", "vae."),
    "ControlNet": ("control_model.",),
}
"""What the names of a part begin with, by what its class's name holds; the denoiser has them with and without one."""


def default_source(tensors: Mapping[str, TensorSpec]) -> str | None:
    """The repository whose configs diffusers takes for a file with such tensors, told by names and shapes, or None."""
    return default_pipeline(on_meta(tensors))


def convert(class_name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, Converted]:
    """The tensors that diffusers' converter for a class makes of those of the file; without the others of the file.

    Raises Unsupported where the library has no converter for the class, or one that computes values.
    """
    trace = Trace(tensors)
    return trace.converted(_converted(class_name, config, trace, dict(trace.state)))


def reads_pipeline(class_name: str) -> bool:
    """Whether diffusers reads a class of pipelines from single files."""
    found = getattr(__import__("diffusers"), class_name, None)
    return isinstance(found, type) and hasattr(found, "from_single_file")


class PipelineFile:
    """The tensors of a file that holds a pipeline, of which one component after the other is taken.

    As in ``from_single_file`` a converter sees what the ones before it left; so components come in order of their
    names.
    """

    def __init__(self, tensors: Mapping[str, TensorSpec]) -> None:
        self._trace = Trace(tensors)
        self._names = tuple(tensors)

    def component(self, library: str, class_name: str, config: Mapping[str, Any]) -> dict[str, Converted] | None:
        """The tensors of a component; None if the file has none of it.

        Raises what a converter raises for a file that has not all of it, and Unsupported as ``convert`` does.
        """
        if library == "transformers":
            made = self._text_encoder(class_name, config)
        else:
            prefixes = next((own for part, own in PARTS.items() if part in class_name), ("",))
            if _converter_of(class_name) is None or not any(name.startswith(prefixes) for name in self._names):
                return None
            made = _converted(class_name, config, self._trace, self._trace.state)
        return self._trace.converted(made) if made else None

    def _text_encoder(self, class_name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
        import transformers

        model_class = getattr(transformers, class_name, None)
        for converter in (clip_converter, t5_converter):
            convert = converter(model_class, self._trace.state) if isinstance(model_class, type) else None
            if convert is not None:
                with self._trace:
                    made: dict[str, Any] | None = convert(config)
                return made
        return None


def _converter_of(class_name: str) -> Any:
    classes = single_file_classes()
    model_class = getattr(__import__("diffusers"), class_name, None)
    if class_name in classes or not isinstance(model_class, type):
        return classes.get(class_name)
    return next((classes[base.__name__] for base in model_class.__mro__ if base.__name__ in classes), None)


def _converted(class_name: str, config: Mapping[str, Any], trace: Trace, state: dict[str, Any]) -> dict[str, Any]:
    converter = _converter_of(class_name)
    model_class = getattr(__import__("diffusers"), class_name, None)
    if converter is None or model_class is None:
        raise Unsupported(
            f"diffusers reads no {class_name} from a single file, so what its tensors mean is not known. Use a "
            "repository of this model in diffusers' layout."
        )
    if not needs_conversion(model_class, config, state):
        return state
    with trace:
        made: dict[str, Any] = converter(dict(config), state)
    return made
