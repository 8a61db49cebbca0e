"""Names of files that hold weights: those that transformers and diffusers look for, and pickles."""

from __future__ import annotations

import re

STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}
PICKLED = {"model": "pytorch_model", "diffusion_pytorch_model": "diffusion_pytorch_model"}
"""Stem of the weights in safetensors → of the same in pickles, as the libraries look for them."""
PICKLE = re.compile(r"\A(?!(?:openvino_|ggml).*\.bin\Z).*\.(?:bin|pt|pth|ckpt|pkl)\Z", re.IGNORECASE)
"""Names of pickles. OpenVINO and whisper.cpp give their weights such a name, too."""


def is_weights(name: str) -> bool:
    """Whether a file of that name holds weights, in whatever format."""
    return name.endswith((".safetensors", ".gguf")) or PICKLE.search(name) is not None
