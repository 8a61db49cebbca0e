"""Inputs for the benchmarks: real configurations, real headers, and data that is random or all holes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qz.formats.tensors.safetensors_layout import encode_header, layout
from qz.formats.tensors.shards import file_names, index, index_name

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
LLAMA_4B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
SHARD_BYTES = 5 * 10**9


def llama(folder: Path, sizes: dict[str, int], vocabulary: int = 32_000) -> Path:
    """A bf16 Llama with normally distributed weights; TinyLlama's shape has 1.1 B parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return write(
        folder, LlamaForCausalLM, LlamaConfig(**sizes, vocab_size=vocabulary, dtype="bfloat16"), "transformers"
    )


def flux(folder: Path, *, holes: bool) -> Path:
    """FLUX.1-dev's transformer: 11.9 B parameters, 23.8 GB; with ``holes`` it takes no space and reads as zeros."""
    from diffusers import FluxTransformer2DModel

    return write(folder, FluxTransformer2DModel, {"guidance_embeds": True}, "diffusers", holes=holes)


def write(folder: Path, model_class: Any, config: Any, library: str, *, holes: bool = False) -> Path:
    """A checkpoint of a class with bf16 weights, in shards of at most 5 GB; kept if it is there already."""
    import torch

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = model_class(config) if library == "transformers" else model_class(**config)
    tensors = [(name, "BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    size = 0
    for entry in tensors:
        nbytes = 2 * int(np.prod(entry[2]))
        if size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    names = file_names(library, len(shards))
    noise = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16().view(torch.uint8)
    data = noise.numpy()
    for file, entries in zip(names, shards, strict=True):
        infos = layout(entries)
        with (folder / file).open("wb") as out:
            out.write(encode_header(infos))
            if holes:
                out.truncate(out.tell() + infos[-1].stop)
                continue
            for start in range(0, infos[-1].stop, data.nbytes):
                out.write(data[: min(data.nbytes, infos[-1].stop - start)].data)
    if len(names) > 1:
        where = {name: file for file, entries in zip(names, shards, strict=True) for name, _, _ in entries}
        total = sum(2 * int(np.prod(shape)) for _, _, shape in tensors)
        (folder / index_name(library)).write_bytes(index(where, total, None))
    if library == "transformers":
        config.architectures = [model_class.__name__]
        config.save_pretrained(folder)
    else:
        (folder / "config.json").write_text(json.dumps({"_class_name": model_class.__name__, **config}))
    return folder
