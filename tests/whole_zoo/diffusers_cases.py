"""The model classes of diffusers with a linear layer, built from their constructors' defaults made small by name."""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from whole_zoo.case import Case, NotBuilt, model_rows

MOST_PARAMETERS = 4_000_000
_LAYERS = re.compile(r"(?:.*_)?(?:n_)?(?:num_)?(?:\w+_)?(?:layers?|blocks|depth|nlayers)")
_HEADS = re.compile(r"(?:\w+_)?(?:num_|n_)?(?:\w+_)?n?heads?")
_WIDTH = re.compile(
    r".*(?:dim|size|channels|width|features|d_model|d_ff)|d_\w+|dim|inner_\w+|joint_\w+|cross_\w+|hidden\w*|n_embd"
)
_LEFT = re.compile(
    r"in_channels|out_channels|patch|sample|rope|axes|kernel|image|vocab|latent|kv|spatial|temporal|groups"
)
_DEFINITION = re.compile(r"^class (\w+)\(([^)]*\bModelMixin\b[^)]*)\)", re.MULTILINE)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "in_channels": 4,
                               "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
                               "axes_dims_rope": (4, 4, 8)},
    "FluxControlNetModel": {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
                            "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
                            "in_channels": 16},
    "SD3Transformer2DModel": {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4, "in_channels": 4,
                              "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32,
                              "sample_size": 16, "out_channels": 4},
    "QwenImageTransformer2DModel": {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
                                    "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8), "in_channels": 16,
                                    "out_channels": 4},
    "PRXTransformer2DModel": {"patch_size": 1, "in_channels": 4, "context_in_dim": 8, "hidden_size": 16, "num_heads": 2,
                              "depth": 1, "axes_dim": [4, 4]},
    "ReduxImageEncoder": {"redux_dim": 16, "txt_in_features": 32},
    "T5FilmDecoder": {"input_dims": 8, "targets_length": 8, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8,
                      "d_ff": 64},
    "WuerstchenPrior": {"c_in": 4, "c": 32, "c_cond": 16, "c_r": 16, "depth": 1, "nhead": 2},
    "MLPNeRSTFModel": {"d_hidden": 16, "n_hidden_layers": 3, "insert_direction_at": 2},
}  # fmt: skip
"""Where defaults made small by name do not fit each other."""


def cases() -> Iterator[Case]:
    """Every class that subclasses ``ModelMixin`` by its source, in an order that is the same on every day."""
    found = {name: module for module, name in _definitions()}
    for name in sorted(found, key=lambda name: zlib.crc32(name.encode())):
        yield Case("diffusers", name, name, model_rows(_builder(found[name], name)))


def _definitions() -> Iterator[tuple[str, str]]:
    import diffusers

    root = Path(diffusers.__file__).parent
    for room in ("models", "pipelines"):
        for path in sorted((root / room).rglob("*.py")):
            for match in _DEFINITION.finditer(path.read_text("utf-8")):
                if not match[1].startswith("Multi"):  # holds several nets of another class
                    yield ".".join(("diffusers", *path.relative_to(root).with_suffix("").parts)), match[1]


def _builder(module: str, name: str) -> Any:
    def build() -> Any:
        try:
            model_class = getattr(import_module(module), name)
        except ImportError as error:
            raise NotBuilt(f"needs a package that is not installed: {error}") from None
        last = "no small arguments found"
        for arguments in [ARGUMENTS[name]] if name in ARGUMENTS else _small(model_class):
            try:
                with torch.device("meta"):
                    model = model_class(**arguments)
            except Exception as error:  # a class may raise anything for arguments that do not fit each other
                last = f"no small arguments found: {type(error).__name__}: {str(error).strip()[:80]}"
                continue
            count = sum(parameter.numel() for parameter in model.parameters())
            if count > MOST_PARAMETERS:
                last = f"no small arguments found: {count:,} parameters"
            elif not any(isinstance(each, torch.nn.Linear) for each in model.modules()):
                raise NotBuilt("no linear layer")
            else:
                return model_class(**arguments)
        raise NotBuilt(last)

    return build


def _small(model_class: Any) -> Iterator[dict[str, Any]]:
    """Arguments of the constructor, all made small, then fewer of them."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model_class.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    for kinds in ((_LAYERS, _HEADS, _WIDTH), (_LAYERS, _HEADS), (_LAYERS,)):
        yield {name: small for name, value in defaults.items() if (small := _made_small(name, value, kinds)) != value}


def _made_small(name: str, value: Any, kinds: tuple[re.Pattern[str], ...]) -> Any:
    if type(value) is not int or _LEFT.search(name):
        return value
    if _LAYERS.fullmatch(name) and _LAYERS in kinds:
        return min(value, 1)
    if _HEADS.fullmatch(name) and _HEADS in kinds:
        return min(value, 2)
    return min(value, 64) if _WIDTH.fullmatch(name) and _WIDTH in kinds and value > 64 else value
