"""The model classes of transformers: two for each model type, the one with its main head and another."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from qz.quantize.libraries.transformers.internals import auto_class_names, no_init_weights
from whole_zoo.case import Case, NotBuilt
from whole_zoo.tiny import tiny_configs

MOST_PARAMETERS = 8_000_000
HEADS = 2


def cases() -> Iterator[Case]:
    """Every type that an Auto class knows, in an order that is the same on every day and no alphabet."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for model_type in sorted(CONFIG_MAPPING_NAMES, key=lambda name: zlib.crc32(name.encode())):
        names = auto_class_names(model_type)
        first = [name for name in names if "For" in name or "LMHead" in name][:1]
        for name in dict.fromkeys([*first, *names[-1:]][:HEADS]):
            yield Case("transformers", model_type, name, _builder(model_type, name))


def _builder(model_type: str, name: str) -> Any:
    def build() -> tuple[Any, Any]:
        model_class = getattr(transformers, name, None)
        if not isinstance(model_class, type) or type(model_class).__name__ == "DummyObject":
            raise NotBuilt("needs a package that is not installed")
        last = "no tiny config found"
        for config in tiny_configs(model_type):
            try:
                with torch.device("meta"), no_init_weights():
                    count = sum(parameter.numel() for parameter in model_class(config).parameters())
                if count > MOST_PARAMETERS:
                    last = f"no tiny config found: {count:,} parameters"
                    continue
                return model_class(config), inputs_of
            except Exception as error:  # a class may raise anything for a config that it does not like
                last = f"no tiny config found: {type(error).__name__}: {str(error).strip()[:80]}"
        raise NotBuilt(last)

    return build


def inputs_of(model: Any) -> dict[str, torch.Tensor] | None:
    """An input that the model may take; None for kinds that cannot be guessed."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    generator = torch.Generator().manual_seed(0)
    image = getattr(getattr(model.config, "vision_config", model.config), "image_size", 32)
    size = image if isinstance(image, int) else 32
    return {
        "input_ids": {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})},
        "pixel_values": {"pixel_values": torch.rand(1, 3, size, size, generator=generator)},
        "input_values": {"input_values": torch.rand(1, 4000, generator=generator)},
    }.get(model.main_input_name)
