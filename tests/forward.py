"""A forward pass of each model of the zoo."""

from __future__ import annotations

from typing import Any

import torch


def transformers_output(model: Any) -> torch.Tensor:
    """A forward pass on a fixed input; the first output."""
    torch.manual_seed(1)
    tokens = torch.arange(12).reshape(2, 6) + 3
    name = type(model).__name__
    if name.startswith("Whisper"):
        output = model(input_features=torch.randn(2, 8, 40).to(model.dtype), decoder_input_ids=tokens)
    elif name.startswith("ViT"):
        output = model(pixel_values=torch.randn(2, 3, 32, 32).to(model.dtype))
    else:
        output = model(input_ids=tokens)
    first: torch.Tensor = output[0]
    return first


def diffusers_output(model: Any) -> torch.Tensor:
    """A forward pass on a fixed input."""
    torch.manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(model.dtype)

    inputs: dict[str, Any]
    time = torch.tensor([0.5, 0.5]).to(model.dtype)
    name = type(model).__name__
    if name.startswith("Flux"):
        inputs = {
            "hidden_states": noise(2, 16, 64),
            "encoder_hidden_states": noise(2, 6, 64),
            "pooled_projections": noise(2, 64),
            "timestep": time,
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(6, 3),
        }
    elif name.startswith("SD3"):
        inputs = {
            "hidden_states": noise(2, 4, 32, 32),
            "encoder_hidden_states": noise(2, 6, 64),
            "pooled_projections": noise(2, 64),
            "timestep": time,
        }
    elif name.startswith("UNet"):
        inputs = {"sample": noise(2, 4, 32, 32), "timestep": time, "encoder_hidden_states": noise(2, 6, 64)}
    elif name.startswith("Wan"):
        inputs = {
            "hidden_states": noise(2, 16, 2, 8, 8),
            "encoder_hidden_states": noise(2, 6, 64),
            "timestep": torch.tensor([1, 1]),
        }
    else:
        inputs = {
            "hidden_states": noise(2, 16, 64),
            "encoder_hidden_states": noise(2, 6, 64),
            "encoder_hidden_states_mask": torch.ones(2, 6, dtype=torch.long),
            "timestep": time,
            "img_shapes": [[(1, 4, 4)]] * 2,
        }
    output: torch.Tensor = model(**inputs, return_dict=False)[0]
    return output


def output_of(model: Any) -> torch.Tensor:
    """The first output for a fixed input, of a model of either library."""
    with torch.no_grad():
        return diffusers_output(model) if hasattr(model, "register_to_config") else transformers_output(model)
