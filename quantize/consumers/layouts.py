"""Programs that read one file in a model's original names, and those that serve no such model at all."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qz.formats.checkpoint.other_contents.original_layouts import original_layout
from qz.quantize.consumers.contents import Contents
from qz.quantize.consumers.sglang_classes import SGLANG_CLASSES
from qz.quantize.consumers.verdict import Finding
from qz.quantize.single_files.names import LAYOUTS

FLUX_NF4 = re.compile(
    r"(?:model\.diffusion_model\.)?double_blocks\.0\.img_attn\.proj\.weight",
)
"""The weight by whose quant state InvokeAI knows a FLUX.1 file in nf4."""
FLUX_INPUTS = re.compile(r"(?:model\.diffusion_model\.)?(img_in|txt_in)\.weight")
FLUX = "FluxTransformer2DModel"
T5_FILE = "bnb_llm_int8_model.safetensors"


def language_model(contents: Contents) -> Iterator[Finding]:
    """Serves models of transformers, from a folder with a config."""
    if contents.library == "diffusers":
        text = f"serves models of transformers; {contents.architecture or 'this'} is one of diffusers, which loads it."
        yield Finding("error", "library", text)
    elif contents.library is None:
        yield Finding("error", "library", "loads a folder with a config.json, not a single file.")


def diffusers_model(contents: Contents) -> Iterator[Finding]:
    """Loads models of diffusers, and the text encoders of its pipelines."""
    if contents.library is None:
        text = "loads a folder with a config.json, not a single file. Quantize the folder of the model instead."
        yield Finding("error", "library", text)


def diffusers_without_gpu(contents: Contents) -> Iterator[Finding]:
    """diffusers' quantizer refuses to load 4- and 8-bit models where there is no GPU."""
    if contents.library == "diffusers" and contents.packed:
        text = "diffusers' from_pretrained refuses quantized models without a GPU. qz.load(path) loads it there."
        yield Finding("error", "no-gpu", text)


def invokeai_flux(contents: Contents) -> Iterator[Finding]:
    """The model manager takes FLUX.1 in nf4 as one file in Black Forest Labs' names."""
    if contents.library == "transformers":
        return
    proj = [each for name, each in contents.packed.items() if FLUX_NF4.fullmatch(name)]
    if contents.library == "diffusers" or not proj:
        text = (
            "takes FLUX.1 only, as one nf4 file in Black Forest Labs' names (double_blocks.0.img_attn.proj.weight …)."
        )
        advice = " Quantize the model with --nf4 --layout single-file." if contents.architecture == FLUX else ""
        yield Finding("error", "single-file", text + advice)
    elif proj[0].kind != "nf4":
        yield Finding("error", "single-file", f"takes FLUX.1 in nf4 only, and this is {proj[0].kind}. Use --nf4.")


def invokeai_t5(contents: Contents) -> Iterator[Finding]:
    """A T5 encoder is taken in int8 only, as text_encoder_2/bnb_llm_int8_model.safetensors."""
    if contents.library != "transformers":
        return
    if contents.architecture != "T5EncoderModel" or contents.kinds != {"int8"}:
        text = "takes no quantized language model but a T5EncoderModel in int8, as text_encoder_2 of a folder."
        yield Finding("error", "t5", text)
    elif contents.files != (T5_FILE,):
        text = (
            f"looks for one file named {T5_FILE} in a folder text_encoder_2. Quantize with a --max-shard-size above "
            "the model's size, and rename model.safetensors, which nothing else finds then."
        )
        yield Finding("error", "t5", text)


def invokeai_quantizes_the_rest(contents: Contents) -> Iterator[Finding]:
    """All linear layers of the model are its nf4 layers: one that is not quantized in the file is when it goes to the
    GPU."""
    plain = _plain_linears(contents)
    if plain and contents.kinds == {"nf4"}:
        text = f"quantizes layers that are not quantized, such as {plain[0]}, to nf4 when it goes to the GPU."
        yield Finding("warning", "rest", text)


def _plain_linears(contents: Contents) -> list[str]:
    """Weights of linear layers in a single file that are not quantized."""
    if contents.library is not None:
        return []
    return [name for name, shape in contents.plain.items() if name.endswith(".weight") and len(shape) == 2]


def comfyui(contents: Contents) -> Iterator[Finding]:
    """The NF4 nodes (and Forge) load one file of a diffusion model in its original names, in nf4 or fp4."""
    if contents.library is not None or original_layout(contents.packed) is None:
        text = (
            "has nodes for one file in the original names of a diffusion model (double_blocks.0 …), not for a folder "
            "of transformers or diffusers."
        )
        how = f"{'--nf4 ' if contents.is_int8 else ''}--layout single-file"
        advice = f" Quantize the model with {how}." if contents.architecture in LAYOUTS else ""
        yield Finding("error", "single-file", text + advice)
    elif contents.is_int8:
        yield Finding("error", "int8", "has nodes for nf4 and fp4, not for int8. Use --nf4.")


def comfyui_shapes(contents: Contents) -> Iterator[Finding]:
    """ComfyUI takes the width of a FLUX model from the shapes of img_in and txt_in, which packed codes do not have."""
    packed = [match[1] for name in contents.packed if (match := FLUX_INPUTS.fullmatch(name))]
    if packed and any(FLUX_NF4.fullmatch(name) for name in (*contents.packed, *contents.plain)):
        text = (
            f"takes the model's width from the shape of {' and '.join(sorted(packed))}, which packed codes do not "
            "have. Quantize again with --skip x_embedder --skip context_embedder."
        )
        yield Finding("error", "shapes", text)


def comfyui_quantizes_the_rest(contents: Contents) -> Iterator[Finding]:
    """A linear layer that the file has not quantized is quantized on the GPU, to the type that is chosen in the node;
    with its "default" that fails."""
    plain = _plain_linears(contents)
    if plain and contents.packed and not contents.is_int8:
        kind = next(iter(contents.kinds))
        text = (
            f"quantizes layers that are not quantized in the file, such as {plain[0]}, when it goes to the GPU: "
            f"choose {kind} as the node's bnb_dtype, because the default fails then."
        )
        yield Finding("note", "rest", text)


def unsloth_int8(contents: Contents) -> Iterator[Finding]:
    """unsloth's kernels are for nf4 and fp4; int8 checkpoints are loaded as transformers does."""
    if contents.is_int8:
        yield Finding("note", "int8", "has no kernels of its own for int8: it runs as in transformers.")


def sglang_class(contents: Contents) -> Iterator[Finding]:
    """Only model classes with a ``bitsandbytes_stacked_params_mapping`` take bitsandbytes weights."""
    if contents.library == "transformers" and contents.architecture not in SGLANG_CLASSES:
        text = f"has no class for {contents.architecture or 'it'} that takes bitsandbytes weights."
        yield Finding("error", "class", text)


def conv1d(contents: Contents) -> Iterator[Finding]:
    """GPT-2's weights are transposed when they are loaded, which does not work on packed codes."""
    if contents.config.get("model_type") == "gpt2" and contents.packed:
        yield Finding(
            "error", "conv1d", "transposes GPT-2's weights when it loads them, which does not work on packed codes."
        )


def needs_gpu(contents: Contents) -> Iterator[Finding]:
    """Runs on a GPU only."""
    if contents.packed:
        yield Finding("note", "gpu", "runs on a GPU only.")


def vllm_plugin(contents: Contents) -> Iterator[Finding]:
    """From vLLM 0.28 on bitsandbytes is a plugin of its own."""
    if contents.packed:
        yield Finding("note", "plugin", "needs `pip install vllm-bnb-plugin` from vLLM 0.28 on.")


def vllm_eager(contents: Contents) -> Iterator[Finding]:
    """int8 layers cannot be captured in a CUDA graph."""
    if contents.is_int8:
        yield Finding("note", "int8-eager", "runs int8 with enforce_eager only.")
