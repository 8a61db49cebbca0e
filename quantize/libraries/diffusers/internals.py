"""The parts of diffusers that are not public API, in one place; refused clearly where a version lacks them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from inspect import signature
from typing import Any

import diffusers

from qz import Unsupported
from qz.quantize.libraries.versions import requirement


def _unknown(error: Exception) -> Unsupported:
    return Unsupported(
        f"diffusers {diffusers.__version__} is laid out differently from the versions qz knows ({error}). "
        f"Install one that it knows: pip install '{requirement('diffusers')}', or a newer qz."
    )


def empty_model(model_class: Any, config: Mapping[str, Any]) -> Any:
    """A model whose parameters are on meta and, as in ``from_pretrained``, are not given first values."""
    from accelerate import init_empty_weights

    try:
        from diffusers.models.modeling_utils import no_init_weights
    except ImportError as error:
        raise _unknown(error) from error
    with init_empty_weights(), no_init_weights():
        return model_class.from_config(config)


def float32_modules(model: Any) -> list[str]:
    """Path segments of the modules that a class, or a model of it, keeps in float32 and never quantizes."""
    try:
        names = model._keep_in_fp32_modules
    except AttributeError as error:
        raise _unknown(error) from error
    return [names] if isinstance(names, str) else list(names or ())


def optional_components(pipeline_class: Any) -> list[str]:
    """Names of the components that a pipeline of the class does without."""
    try:
        return list(pipeline_class._optional_components)
    except AttributeError as error:
        raise _unknown(error) from error


def quantizer_of(config: Any) -> Any:
    """The library's quantizer for a checkpoint with this quantization_config."""
    try:
        from diffusers.quantizers import DiffusersAutoQuantizer
    except ImportError as error:
        raise _unknown(error) from error
    return DiffusersAutoQuantizer.from_config(config, pre_quantized=True)


def load_into_meta(model: Any, state: dict[str, Any], dtype: Any, quantizer: Any, fp32: list[str], device: str) -> None:
    """Put the tensors of a file into a model on meta; what the model does not know is left out."""
    try:
        from diffusers.models.model_loading_utils import load_model_dict_into_meta
    except ImportError as error:
        raise _unknown(error) from error
    known = model.state_dict().keys()
    try:
        load_model_dict_into_meta(
            model,
            state,
            dtype=dtype,
            hf_quantizer=quantizer,
            keep_in_fp32_modules=fp32,
            device_map={"": device},
            unexpected_keys=[name for name in state if name not in known],
        )
    except TypeError as error:
        raise _unknown(error) from error


def rename_old_keys(model: Any, state: dict[str, Any]) -> None:
    """Give the keys of a state dict the names of today; attention layers had others before diffusers 0.17."""
    try:
        model._fix_state_dict_keys_on_load(state)
    except AttributeError as error:
        raise _unknown(error) from error


def lora_mixins() -> dict[str, Any]:
    """The classes that read LoRAs of pipelines, by name."""
    try:
        from diffusers.loaders import lora_pipeline
    except ImportError as error:
        raise _unknown(error) from error
    found = {name: value for name, value in vars(lora_pipeline).items() if name.endswith("LoraLoaderMixin")}
    if not found:
        raise _unknown(ImportError("diffusers.loaders.lora_pipeline has no LoRA loaders"))
    return found


def lora_converters() -> tuple[Any, Any, Any]:
    """Functions that give the keys of a LoRA's state dict PEFT's names: of a denoiser, and in two steps those of a text
    encoder."""
    try:
        from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
        from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    except ImportError as error:
        raise _unknown(error) from error
    return convert_unet_state_dict_to_peft, convert_state_dict_to_diffusers, convert_state_dict_to_peft


def single_file_classes() -> dict[str, Any]:
    """Name of a class → what makes its state dict of a config and of the state dict of a file in other names."""
    return {name: _converter(function) for name, function in _converters().items()}


def assumes_an_order(class_name: str) -> bool:
    """Whether the converter of a class asks its caller in which order fused rows lie, which no file tells."""
    converter = _converters().get(class_name)
    return converter is not None and "qkv_layout" in signature(converter).parameters


def _converters() -> dict[str, Any]:
    try:
        from diffusers.loaders import single_file_model

        known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
        return {name: entry["checkpoint_mapping_fn"] for name, entry in known.items()}
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise _unknown(error) from error


def _converter(function: Any) -> Any:
    return lambda config, state: function(config=config, checkpoint=state)


def needs_conversion(model_class: Any, config: Any, state: dict[str, Any]) -> bool:
    """Whether the library would convert the state dict of a file; not if it has the class's own names already."""
    return _own_names(model_class, json.dumps(dict(config), sort_keys=True)) != set(state)


@lru_cache(maxsize=16)
def _own_names(model_class: Any, config: str) -> frozenset[str]:
    """Of the tensors of a model; remembered, since a file is looked at several times, and building takes a while."""
    return frozenset(empty_model(model_class, json.loads(config)).state_dict())


def default_pipeline(state: dict[str, Any]) -> str | None:
    """The repository whose configs the library takes for such a state dict; None if it cannot tell the model.

    The library itself takes whatever it does not know for Stable Diffusion 1.
    """
    try:
        from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type
    except ImportError as error:
        raise _unknown(error) from error
    if infer_diffusers_model_type(state) == "v1" and not any("input_blocks.0." in name for name in state):
        return None
    return str(fetch_diffusers_config(state)["pretrained_model_name_or_path"])


def clip_converter(model_class: Any, state: dict[str, Any]) -> Any:
    """What makes the state dict of a CLIP text encoder of its config, if the library finds one in a file; or None.

    It gives None where the file has another one than the config describes.
    """
    try:
        from diffusers.loaders import single_file_utils as library

        there, create = library.is_clip_model_in_single_file, library.create_diffusers_clip_model_from_ldm
    except (ImportError, AttributeError) as error:
        raise _unknown(error) from error

    def convert(config: Any) -> dict[str, Any] | None:
        try:
            return _captured(create, model_class, config, state)
        except ValueError as error:
            if "valid CLIP model" in str(error):
                return None
            raise

    return convert if there(model_class, state) else None


def t5_converter(model_class: Any, state: dict[str, Any]) -> Any:
    """As ``clip_converter``, of a T5."""
    try:
        from diffusers.loaders import single_file_utils as library

        there, create = library.is_t5_in_single_file, library.create_diffusers_t5_model_from_checkpoint
    except (ImportError, AttributeError) as error:
        raise _unknown(error) from error
    return (lambda config: _captured(create, model_class, config, state)) if there(state) else None


class _CapturedError(Exception):
    """Carries the state dict that the library was about to load."""


def _captured(create: Any, model_class: Any, config: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict that ``create`` loads into the model that it builds, which it does not give away."""
    from diffusers.loaders import single_file_utils as library

    from qz.quantize.libraries.transformers.internals import no_init_weights

    class Model:
        """Stands for the class: its config is given, not read from a folder."""

        class config_class:  # noqa: N801 - the library's name
            @staticmethod
            def from_pretrained(*_: Any, **__: Any) -> Any:
                return model_class.config_class.from_dict(dict(config))

        def __new__(cls, built: Any) -> Any:
            with no_init_weights():  # of which none is looked at, and which take longer than all the rest
                return model_class(built)

    def capture(_: Any, loaded: dict[str, Any], **__: Any) -> None:
        raise _CapturedError(loaded)

    try:
        loading = library.load_model_dict_into_meta
        library.load_model_dict_into_meta = capture
    except AttributeError as error:
        raise _unknown(error) from error
    try:
        create(Model, checkpoint=state, config="the one that is given")
    except _CapturedError as captured:
        found: dict[str, Any] = captured.args[0]
        return found
    finally:
        library.load_model_dict_into_meta = loading
    raise _unknown(AttributeError(f"{create.__name__} loads no state dict"))
