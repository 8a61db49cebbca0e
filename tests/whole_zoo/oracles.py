"""What the libraries themselves make of a model: quantized, saved and loaded by their own code. Not a line of qz."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from reference import config_of, diffusers_model, raw, tensors_of, transformers_model


class Transformers:
    """By the Auto class that serves a class under the config's model type, or by the class where none does."""

    def __init__(self, model_class: Any, source: Path) -> None:
        self._class = model_class
        loader = auto_class(model_class.__name__, config_of(source).get("model_type"))
        # Evolla's are served under a config that is not theirs
        self._loader = loader if loader and model_class.config_class in loader._model_mapping else model_class

    def quantized(self, source: Path, method: str, skips: list[str] | None = None) -> Any:
        return transformers_model(self._loader, source, method, skips=skips)

    def save(self, model: Any, folder: Path, *, own_names: bool = False) -> None:
        model.save_pretrained(folder, save_original_format=not own_names)

    def loaded(self, folder: Path) -> tuple[Any, dict[str, list[str]]]:
        """The model, and what loading left over or missed."""
        if hasattr(self._class, "load_speakers"):  # Qwen2.5-Omni: it takes the pair for a model, and saves no voices
            torch.save({}, folder / "spk_dict.pt")
            return self._loader.from_pretrained(str(folder)), {}
        model, info = self._loader.from_pretrained(str(folder), output_loading_info=True)
        left = {key: sorted(map(str, names))[:3] for key, names in info.items() if names and key != "error_msgs"}
        return model, left


class Diffusers:
    """By the class, in bfloat16, or in float32 where all of the source is."""

    def __init__(self, model_class: Any, source: Path) -> None:
        self._class = model_class
        dtypes = {tensor.dtype for tensor in tensors_of(source).values() if tensor.is_floating_point()}
        self._dtype = torch.float32 if dtypes == {torch.float32} else torch.bfloat16

    def quantized(self, source: Path, method: str, skips: list[str] | None = None) -> Any:
        kept = self._class._keep_in_fp32_modules or []  # the library adds them to the list by itself
        named = [skip for skip in skips if skip not in kept] if skips is not None else None
        return diffusers_model(self._class, source, method, self._dtype, skips=named)

    def save(self, model: Any, folder: Path, *, own_names: bool = False) -> None:
        model.save_pretrained(folder)

    def loaded(self, folder: Path) -> tuple[Any, dict[str, list[str]]]:
        if "quantization_config" not in config_of(folder):
            return self._class.from_pretrained(folder), {}
        return diffusers_model(self._class, folder, None, self._dtype), {}


def without_limits_of_cpus() -> None:
    """Let the libraries' quantized models run on any CPU: bitsandbytes' packed AVX-512 kernel takes some shapes only,
    its int8 linears take three axes at most, diffusers asks for a GPU before it loads, without AVX-512 convolutions in
    bfloat16 take fifty times as long as in float32, and torch's grid_sample gives another output every time in bfloat16
    where its grid is not contiguous. Nothing else is taken out.
    """
    import bitsandbytes
    from bitsandbytes.nn import modules
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    modules.has_avx512bf16 = lambda: False
    of_axes = bitsandbytes.nn.Linear8bitLt.forward

    def forward(self: Any, x: torch.Tensor) -> Any:
        return of_axes(self, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    bitsandbytes.nn.Linear8bitLt.forward = forward
    for name in (
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "grid_sample",
    ):
        setattr(torch.nn.functional, name, _in_float32(getattr(torch.nn.functional, name)))
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        quantizer.validate_environment = lambda *_, **__: None
        quantizer.update_device_map = lambda _, device_map: device_map or {"": "cpu"}


def _in_float32(operation: Any) -> Any:
    def computed_in_float32(x: Any, weight: Any, *others: Any, **options: Any) -> Any:
        if x.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
            return operation(x, weight, *others, **options)
        given = [each.float() if torch.is_tensor(each) else each for each in others]
        named = {name: each.float() if torch.is_tensor(each) else each for name, each in options.items()}
        return operation(x.float(), weight.float(), *given, **named).bfloat16()

    return computed_in_float32


class Library(Protocol):
    """One of the two."""

    def quantized(self, source: Path, method: str, skips: list[str] | None = None) -> Any: ...

    def save(self, model: Any, folder: Path, *, own_names: bool = False) -> None: ...

    def loaded(self, folder: Path) -> tuple[Any, dict[str, list[str]]]: ...


LIBRARIES: dict[str, Callable[[Any, Path], Library]] = {"transformers": Transformers, "diffusers": Diffusers}


def loads_back(library: Library, model: Any, folder: Path, *, own_names: bool = False) -> bool:
    """Whether what the library writes of a quantized model loads as that model."""
    try:
        if not folder.exists():
            library.save(model, folder, own_names=own_names)
        loaded, left = library.loaded(folder)
        return not left and not differing_values(model, loaded)
    except Exception:
        return False


def differing_values(wanted: Any, found: Any) -> list[str]:
    """Names in the state dict of a model whose values are not the same bits in another's."""
    held = found.state_dict()
    return [name for name, value in wanted.state_dict().items() if name not in held or not _same(held[name], value)]


def differ_in_dtype_only(wanted: Any, found: Any, names: list[str]) -> bool:
    """Whether each of these values is the other one, cast."""
    mine, theirs = wanted.state_dict(), found.state_dict()
    return all(
        name in theirs
        and mine[name].shape == theirs[name].shape
        and torch.equal(mine[name].to(theirs[name].dtype), theirs[name])
        for name in names
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two entries of a state dict are the same bits, or what tensors have beside them."""
    if not torch.is_tensor(one) or not torch.is_tensor(other):
        return type(one) is type(other)
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def auto_class(name: str, model_type: str | None) -> Any:
    """The Auto class that loads a class for a model type."""
    import transformers
    from transformers.models.auto import modeling_auto

    for auto_name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, auto_name), "_model_mapping", None)
        if not auto_name.startswith("AutoModel") or mapping is None or not hasattr(transformers, auto_name):
            continue
        served = mapping._model_mapping.get(model_type, ())
        if name == served or (not isinstance(served, str) and name in served):
            return getattr(transformers, auto_name)
    return None
