"""GGUF files of the architectures that transformers reads by its own conversions, such as Qwen3.5 and LFM2.

Asked of ``transformers.integrations.gguf`` (5.23, not public): config and conversions. Where each row of a weight comes
from is found as in ``gguf``.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import transformers

from qz import Unsupported
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.importing.untrusted_config import require_plausible
from qz.quantize.libraries.transformers.gguf import (
    as_model,
    header_file,
    meta_model,
    plain_config,
)
from qz.quantize.libraries.transformers.internals import WeightConverter, WeightRenaming, rename_source_key


def reads(architecture: str) -> bool:
    """Whether the library's ``from_pretrained`` reads files of this architecture so."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        return False
    return bool(is_gguf_arch_supported(architecture))


def plain_by_conversions(checkpoint: Checkpoint, header: bytes, vocabulary: int | None) -> Checkpoint:
    """As ``gguf.plain_gguf``."""
    from transformers.integrations.gguf import get_gguf_config, get_gguf_conversion_mapping, read_gguf_metadata

    where, architecture = checkpoint.folder.location, str(checkpoint.config.get("gguf"))
    try:
        with header_file(header, len(header)) as path:
            metadata, names = read_gguf_metadata(path)
        if vocabulary is not None:
            metadata["tokenizer.ggml.tokens"] = vocabulary  # the reader counts them as well
        config = plain_config(get_gguf_config(metadata, names))
        require_plausible(config, {name: tensor.shape for name, tensor in checkpoint.tensors.items()}, where)
        model_class = getattr(transformers, config["architectures"][0])
        mapping = get_gguf_conversion_mapping(architecture, model_class.config_class.from_dict(dict(config)))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise Unsupported(
            f"{where}: transformers does not read this GGUF file of {architecture} ({type(error).__name__}: {error}). "
            "Use the model's original checkpoint."
        ) from error
    model = meta_model(config)
    conversions = _Conversions(mapping, architecture, frozenset(model.state_dict()), where)
    return as_model(checkpoint, config, model, conversions.process, conversions.place)


class _Conversions:
    """What the library does to each tensor on its own."""

    def __init__(self, mapping: Any, architecture: str, known: frozenset[str], where: str) -> None:
        """``known``: the names in the model."""
        entries = deepcopy(mapping)
        self.where, self.architecture, self.known = where, architecture, known
        self.renamings = [each for each in entries if isinstance(each, WeightRenaming)]
        self.converters = [each for each in entries if isinstance(each, WeightConverter)]
        self.by_pattern = {pattern: each for each in self.converters for pattern in each.source_patterns}

    def process(self, values: Any, name: str) -> tuple[Any, str | None]:
        """As ``gguf.Process``. Raises Unsupported for a tensor that is merged with others."""
        new_name, pattern = rename_source_key(name, self.renamings, self.converters)
        own_name = str(new_name) if new_name in self.known else None
        converter = self.by_pattern.get(pattern)
        if converter is None:
            return None, own_name
        if len(converter.source_patterns) > 1 or len(converter.target_patterns) > 1:
            raise Unsupported(
                f"{self.where}: transformers merges or splits {name} while it reads a GGUF file of "
                f"{self.architecture}, which qz does not yet. Use the model's original checkpoint."
            )
        made = torch.from_numpy(values.copy())
        try:
            for operation in converter.operations:
                [made] = operation.convert({pattern: made}, converter.source_patterns, [new_name]).values()
        except (ValueError, IndexError, RuntimeError, TypeError) as error:
            raise Unsupported(
                f"{self.where}: transformers cannot arrange {name} ({type(error).__name__}). Use the model's original "
                "checkpoint."
            ) from error
        return made.numpy(), own_name

    def place(self, small: Any, name: str) -> tuple[str, Any]:
        """As ``gguf.Place``; what else becomes a part of the parameter is zeros."""
        parameter, pattern = rename_source_key(name, self.renamings, self.converters)
        converter, own = self.by_pattern.get(pattern), torch.from_numpy(small)
        if converter is None:
            return str(parameter), own
        parts = {each: [own if each == pattern else torch.zeros_like(own)] for each in converter.source_patterns}
        for operation in converter.operations:
            parts = operation.convert(parts, converter.source_patterns, [parameter])
        [made] = parts.values()
        return str(parameter), made
