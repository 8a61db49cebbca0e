"""The model classes of diffusers with a linear layer, built from their constructors' defaults made small by name."""

from __future__ import annotations

import inspect
import json
import re
import zlib
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from whole_zoo.case import Case, NotBuilt, model_rows, not_tried

MOST_PARAMETERS = 25_000_000
_LAYERS = re.compile(r"(?:.*_)?(?:n_)?(?:num_)?(?:\w+_)?(?:layers?|blocks|depth|nlayers)")
_HEADS = re.compile(r"(?:\w+_)?(?:num_|n_)?(?:\w+_)?n?heads?")
_WIDTH = re.compile(
    r".*(?:dim|size|channels|width|features|d_model|d_ff)|d_\w+|dim|inner_\w+|joint_\w+|cross_\w+|hidden\w*|n_embd"
)
_LEFT = re.compile(
    r"in_channels|out_channels|patch|sample|rope|axes|kernel|image|vocab|latent|kv|spatial|temporal|groups"
)
_WIDTHS = re.compile(r"\w*(?:channels|dims|hidden_size|c_hidden|channel_list)")
_AXES = re.compile(r"(?:rope_)?axes_dims?(?:_rope)?|rope_dim_list")
"""Of a head's 32."""
_DEFINITION = re.compile(r"^class (\w+)\(([^)]*\bModelMixin\b[^)]*)\)", re.MULTILINE)
ARGUMENTS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("diffusers_arguments.json").read_text(encoding="utf-8")
)
"""Where defaults made small by name do not fit each other."""


def cases() -> Iterator[Case]:
    """Every class that subclasses ``ModelMixin`` by its source, in an order that is the same on every day."""
    found = {name: module for module, name in _definitions()}
    for name in sorted(found, key=lambda name: zlib.crc32(name.encode())):
        if "Multi" in name and "MultiView" not in name:
            yield Case(
                "diffusers", name, name, not_tried("not built", "holds nets of another class, in folders of their own")
            )
        else:
            yield Case("diffusers", name, name, model_rows(partial(small_models, found[name], name)))


def _definitions() -> Iterator[tuple[str, str]]:
    import diffusers

    root = Path(diffusers.__file__).parent
    for room in ("models", "pipelines"):
        for path in sorted((root / room).rglob("*.py")):
            for match in _DEFINITION.finditer(path.read_text("utf-8")):
                yield ".".join(("diffusers", *path.relative_to(root).with_suffix("").parts)), match[1]


def small_models(module: str, name: str, *, any_layer: bool = False) -> Iterator[Any]:
    """Small models of a class; raises NotBuilt if there is none, and for one without a linear unless ``any_layer``."""
    try:
        model_class = getattr(import_module(module), name)
    except ImportError as error:
        raise NotBuilt(f"needs a package that is not installed: {error}") from None
    last, built = "", False
    for arguments in [ARGUMENTS[name]] if name in ARGUMENTS else _small(model_class):
        try:
            with torch.device("meta"):
                model = model_class(**arguments)
        except Exception as error:  # a class may raise anything for arguments that do not fit each other
            last = f"{type(error).__name__}: {str(error).strip()[:80]}"
            continue
        count = sum(parameter.numel() for parameter in model.parameters())
        if count > MOST_PARAMETERS:
            last = f"{count:,} parameters"
            continue
        if not any_layer and not any(isinstance(each, torch.nn.Linear) for each in model.modules()):
            raise NotBuilt("no linear layer")
        built = True
        yield model_class(**arguments)
    if not built:
        raise NotBuilt(f"no small arguments found: {last}")


def _small(model_class: Any) -> Iterator[dict[str, Any]]:
    """Arguments of the constructor, all made small, then fewer of them."""
    defaults = {
        name: None if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(model_class.__init__).parameters.items()
        if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    for kinds in ((_LAYERS, _HEADS, _WIDTH), (_LAYERS, _HEADS), (_LAYERS,)):
        small = {name: _made_small(name, value, kinds) for name, value in defaults.items()}
        known = {name: value for name, value in small.items() if value is not None}
        yield known | {name: _UNSET[name] for name, value in small.items() if value is None and name in _UNSET}
        yield known


_UNSET = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "sample_size": 8,
          "cross_attention_dim": 64, "caption_channels": 64, "num_layers": 1, "patch_size": 2}  # fmt: skip


def _made_small(name: str, value: Any, kinds: tuple[re.Pattern[str], ...]) -> Any:
    if name.endswith("_layers") and isinstance(value, list | tuple) and all(type(each) is int for each in value):
        return [0] if len(value) > 4 else [min(each, 1) for each in value]
    if _AXES.fullmatch(name) and isinstance(value, list | tuple) and _WIDTH in kinds:
        return {2: (16, 16), 3: (8, 12, 12), 4: (8, 8, 8, 8)}.get(len(value), value)
    if isinstance(value, list | tuple) and _WIDTHS.fullmatch(name) and all(type(each) is int for each in value):
        return [32 if each == min(value) else 64 for each in value] if min(value, default=0) >= 32 else value
    if type(value) is int and re.fullmatch(r"\w*(?:kv|key_value)_heads", name) and _HEADS in kinds:
        return min(value, 2)
    if type(value) is not int or _LEFT.search(name):
        return value
    if _LAYERS.fullmatch(name) and _LAYERS in kinds:
        return min(value, 1)
    if _HEADS.fullmatch(name) and _HEADS in kinds:
        return min(value, 2)
    if name == "attention_head_dim" and _HEADS in kinds and value > 32:
        return 32
    return min(value, 64) if _WIDTH.fullmatch(name) and _WIDTH in kinds and value > 64 else value
