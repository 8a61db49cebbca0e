"""The model classes of transformers: two for each model type, the one with its main head and another."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from qz.quantize.libraries.transformers.internals import auto_class_names, no_init_weights
from whole_zoo.case import Case, NotBuilt, model_rows, not_tried
from whole_zoo.tiny import tiny_configs

MOST_PARAMETERS = 25_000_000
HEADS = 2


def cases() -> Iterator[Case]:
    """Every type, in an order that is the same on every day and no alphabet."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for model_type in sorted(CONFIG_MAPPING_NAMES, key=lambda name: zlib.crc32(name.encode())):
        names = auto_class_names(model_type)
        if not names:
            yield Case("transformers", model_type, model_type, not_tried("no class of its own", ""))
        first = [name for name in names if "For" in name or "LMHead" in name][:1]
        for name in dict.fromkeys([*first, *names[-1:]][:HEADS]):
            yield Case("transformers", model_type, name, model_rows(partial(small_models, model_type, name)))


def small_models(kind: Any, name: str, found: Any = None) -> Iterator[Any]:
    """Small models of a class and a model type, or a config class, the smallest first; ``found`` is the class, where
    transformers has it under no such name. Raises NotBuilt if there is none.
    """
    import transformers

    model_class: Any = found or getattr(transformers, name, None)
    if model_class is None:
        raise NotBuilt(f"transformers {transformers.__version__} names the class, and does not have it")
    if type(model_class).__name__ == "DummyObject":
        raise NotBuilt(f"needs {needed(model_class)}")
    reasons: list[Exception] = []
    built = False
    config_class = transformers.CONFIG_MAPPING[kind] if isinstance(kind, str) else kind
    for config in tiny_configs(config_class, kind if isinstance(kind, str) else config_class.model_type):
        if isinstance(config, Exception):
            reasons.append(config)
            continue
        try:
            if model_class.config_class in config.sub_configs.values():  # as the Auto classes do
                config = config.get_text_config(decoder=True)
            with torch.device("meta"), no_init_weights():
                count = sum(parameter.numel() for parameter in model_class(config).parameters())
            if count > MOST_PARAMETERS:
                raise NotBuilt(f"{count:,} parameters")
            model = model_class(config)
        except Exception as error:  # a class may raise anything for a config that it does not like
            reasons.append(error)
            continue
        built = True
        yield model
    if not built:
        raise NotBuilt(f"no small config found: {told(reasons)}")


def needed(dummy: Any) -> str:
    """What stands in for a class whose packages are not installed names them."""
    absent = [name for name in dummy._backends if find_spec(name) is None]
    return f"{', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed"


def told(reasons: list[Exception]) -> str:
    """What went wrong, each thing once; what is not installed is reason enough."""
    missing = [error for error in reasons if isinstance(error, ImportError)]
    texts = dict.fromkeys(f"{type(error).__name__}: {str(error).strip()}" for error in missing[:1] or reasons)
    return "; ".join(" ".join(text.split())[:120] for text in texts)
