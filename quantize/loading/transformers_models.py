"""Models of transformers: by ``from_pretrained``; quantized experts are put into their places afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qz import MalformedInput
from qz.formats.checkpoint.quantization.quantized import QuantizedWeight
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.expert_layout import expert_lists
from qz.quantize.libraries.transformers.classes import ModelClass, model_class_of
from qz.quantize.loading.experts import Stack, find_stacks, pack
from qz.quantize.loading.tensors import Tensors

GENERATION_CONFIG = "generation_config.json"


def load_transformers_model(
    checkpoint: Checkpoint, root: Path, weights: Mapping[str, QuantizedWeight], device: str
) -> Any:
    """The model on ``device``, of the class that config.json names."""
    model_class = model_class_of(checkpoint)
    config = model_class.config.from_pretrained(root)
    stacks = find_stacks(model_class.model, config, weights)
    if stacks:
        return _with_experts(model_class, config, checkpoint, root, stacks, device).eval()
    model = model_class.model.from_pretrained(
        root, config=config, variant=checkpoint.variant, dtype="auto", device_map={"": device}
    )
    return model.eval()


def _with_experts(
    model_class: ModelClass, config: Any, checkpoint: Checkpoint, root: Path, stacks: Mapping[str, Stack], device: str
) -> Any:
    """The library loads all but the experts, for which it is given zeros that take no memory; then they are put in."""
    tensors = Tensors(checkpoint, root)
    lists = expert_lists(checkpoint.tensors)
    taken = {name for stack in stacks.values() for name in stack.names}
    biases = {name: singles for name, singles in lists.stacked.items() if name not in stacks}
    taken |= {name for singles in biases.values() for name in singles}
    own = {stored: name for name, stored in lists.renamed.items()}
    state = {own.get(name, name): tensors.read(name) for name in checkpoint.tensors if name not in taken}
    state |= {name: torch.stack([tensors.read(each) for each in singles]) for name, singles in biases.items()}
    for name, stack in stacks.items():
        state[name] = torch.zeros((), dtype=stack.dtype).expand(stack.shape)
    model, info = model_class.model.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype="auto",
        device_map={"": "cpu"},
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise MalformedInput(
            f"{root} lacks {', '.join(missing[:3])} of {type(model).__name__}. Quantize the original again."
        )
    for name in stacks:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, torch.nn.Parameter(torch.empty(0), requires_grad=False))
    model.to(device)
    for name, stack in stacks.items():
        pack(model, name, stack, tensors, torch.device(device))
    if (root / GENERATION_CONFIG).exists() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(root)
    return model
