"""How other tools name the tensors of a model, and which class of diffusers can read such a file.

Names alone decide nothing where a config names a class: JoyImage's own names look like Black Forest Labs' for FLUX. So
a layout is looked for only in the classes that it is another layout of. Learned from ``loaders/single_file_utils.py``
of diffusers 0.42.1.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from qz.formats.malformed import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable

OF_PIPELINES = ("first_stage_model.", "cond_stage_model.", "conditioner.embedders.", "text_encoders.")
"""Prefixes that only files of whole pipelines have."""
_COMFY = r"(?:model\.diffusion_model\.)?"


class _Layout(NamedTuple):
    """A name that shows it, whose it is, the class that reads it, and others that it is another layout of."""

    sign: str
    """A pattern for the start of a name."""
    tool: str
    loader: str | None
    classes: str = ""
    """A pattern for the names of the classes beside ``loader``'s."""


def _layout(sign: str, tool: str, loader: str | None, classes: str = "") -> _Layout:
    return _Layout(_COMFY + sign, tool, loader, classes)


# The first that has a name in the file: those of one model before those of many.
_LAYOUTS = (
    _layout(r"distilled_guidance_layer\.(?:norms\.\d+\.scale|layers\.\d+\.(?:in|out)_layer\.)",
            "Chroma's own code (or ComfyUI)", "ChromaTransformer2DModel"),
    _layout(r"txt_in\.individual_token_refiner\.blocks\.", "HunyuanVideo's own code (or ComfyUI)",
            "HunyuanVideoTransformer3DModel"),
    _layout(r"(?:double|single)_stream_modulation(?:_\w+)?\.lin\.",
            "Black Forest Labs' own code for FLUX.2 (or ComfyUI)", "Flux2Transformer2DModel"),
    _layout(r"(?:head\.modulation|blocks\.\d+\.self_attn\.[qkvo]\.)", "Wan's own code (or ComfyUI)",
            "WanTransformer3DModel", r"Wan(?!Animate2)\w*Transformer3DModel|SkyReelsV2\w*|ChronoEdit\w*"),
    _layout(r"av_ca_a2v_gate_adaln_single\.", "LTX-2's own code (or ComfyUI)", "LTX2VideoTransformer3DModel"),
    _layout(r"patchify_proj\.", "LTX-Video's own code (or ComfyUI)", "LTXVideoTransformer3DModel"),
    _layout(r"joint_blocks\.\d+\.", "Stability's own code (or ComfyUI)", "SD3Transformer2DModel"),
    _layout(r"double_blocks\.\d+\.img_attn\.(?:qkv|norm|proj)\.", "Black Forest Labs' own code (or ComfyUI)",
            "FluxTransformer2DModel", r"Flux\w*|Chroma\w*|HunyuanVideo\w*"),
    _layout(r"single_blocks\.\d+\.(?:linear1|linear2|modulation)\.", "Black Forest Labs' own code (or ComfyUI)",
            "FluxTransformer2DModel", r"Flux\w*|Chroma\w*|HunyuanVideo\w*"),
    _Layout(r"model\.diffusion_model\.(?:input|middle|output)_blocks?\.",
            "an original Stable Diffusion checkpoint (or ComfyUI)", "StableDiffusionPipeline", r"\w+"),
    _Layout(r"(?:first_stage_model|cond_stage_model|conditioner\.embedders)\.",
            "an original Stable Diffusion checkpoint (or ComfyUI)", "StableDiffusionPipeline", r"\w+"),
    _Layout(r"model\.diffusion_model\.", "ComfyUI", None, r"\w+"),
)  # fmt: skip


def original_layout(names: Iterable[str], class_name: str | None = None) -> dict[str, str] | None:
    """Whether tensors are named as another tool names them: the tool, an example, and what to do.

    ``class_name``: of the config beside them, if there is one. A layout of other classes is then none of this one.
    """
    names = list(names)
    for layout in _LAYOUTS:
        if class_name is not None and class_name != layout.loader and not re.fullmatch(layout.classes, class_name):
            continue
        sign = re.compile(layout.sign)
        example = next((name for name in names if sign.match(name)), None)
        if example is not None:
            loader = class_name if class_name and layout.loader and "Pipeline" not in layout.loader else layout.loader
            once = (
                f"open it there once with diffusers' {loader}.from_single_file(), save it with save_pretrained(), and "
                "use that folder."
            )
            if any(name.endswith(".absmax") for name in names):
                how = "It is quantized already: `qz inspect FILE.safetensors --for comfyui` says who loads it."
            elif loader is None:
                how = "Use a repository of this model in diffusers' layout."
            else:
                what = "makes a pipeline of it" if any(name.startswith(OF_PIPELINES) for name in names) else "reads it"
                how = f"Name the file itself: `qz quantize FILE.safetensors` {what}. Or {once}"
            return {"tool": layout.tool, "example": quoted(example), "library": "diffusers", "how": how}
    return None
