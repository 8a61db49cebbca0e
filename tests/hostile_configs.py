"""Configs that would have a library take all memory or time there is: each number is one that some model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BOMBS: dict[str, dict[str, Any]] = {
    "a table made in a loop": {
        "architectures": ["MarianModel"],
        "model_type": "marian",
        "max_position_embeddings": 10**8,
    },
    "a table made at once": {"head_dim": 10**9},
    "lists of counts, each plausible": {
        "architectures": ["ConvNextModel"],
        "model_type": "convnext",
        "depths": [99_999] * 2000,
        "hidden_sizes": [8] * 2000,
    },
    "the size of a picture": {"_class_name": "PixArtTransformer2DModel", "sample_size": 20_000, "patch_size": 1},
    "a product of small sizes": {"_class_name": "PixArtTransformer2DModel", "sample_size": 3_000, "patch_size": 1},
    "keys by the ten thousand": {f"key_{number}": "x" * 80 for number in range(80_000)},
    "keys by the hundred thousand": {f"key_{number}": "x" * 20 for number in range(149_000)},
    "numbers by the hundred thousand": {"spare": [number + 0.5 for number in range(149_000)]},
    "a text of eight megabytes": {"spare": "x" * 7_900_000},
    "counts within a part": {
        "architectures": ["ClapModel"],
        "model_type": "clap",
        "audio_config": {"depths": [99_999] * 1000, "window_size": 10**5, "spec_size": 10**6},
    },
    "positions of a recurrent model": {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "attention_hidden_size": 10**9,
    },
}


def configure(source: Path, config: dict[str, Any]) -> None:
    """Change the config of a model of transformers, or make it one of diffusers where ``config`` is that."""
    own = json.loads((source / "config.json").read_text())
    if "_class_name" in config:
        (source / "model.safetensors").rename(source / "diffusion_pytorch_model.safetensors")
        own = {}
    (source / "config.json").write_text(json.dumps(own | config))
