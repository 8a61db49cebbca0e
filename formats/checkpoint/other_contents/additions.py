"""Weights that are loaded onto a pipeline, and are no model: IP-Adapters, embeddings, hypernetworks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

IP_ADAPTER = "an IP-Adapter"
EMBEDDING = "an embedding of textual inversion"

_IP_ADAPTER = re.compile(
    r"(?:image_proj|ip_adapter|ip_adapter_proj_model)\..+|double_blocks\.\d+\.processor\.ip_adapter_.+"
)
_OF_FLUX = re.compile(r"ip_adapter\.\d+\.to_k_ip\.bias|double_blocks\..+")
_TOKEN = re.compile(r"<.+>|emb_params")
"""The one name in a file of diffusers, or of A1111."""
_ENCODERS = {"clip_l": "", "text_encoders_0": "", "clip_g": "_2", "text_encoders_1": "_2"}
"""Names that ComfyUI and diffusers' training give to the embeddings of a token in several text encoders → which one."""
_HYPERNETWORK = re.compile(r"\d+\.[01]\.linear\.\d+\.(?:weight|bias)")

_KEYS = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\..+")
"""One for each block of a transformer; of a UNet one for each second layer of attention, from 1 on."""

_ONTO_QUANTIZED = "Quantize the pipeline that it was made for, and load it onto that"
_ONTO_PLAIN = (
    "diffusers (0.42) loads it onto a UNet that is not quantized only: load it onto the pipeline that it was made for, "
    "as it is"
)


def addition(location: str, file: str, names: Iterable[str], folders: Collection[str]) -> dict[str, str] | None:
    """What tensors of these names are, and how they are used; None if they are none of these.

    ``location``: of the folder that ``file`` is in; ``folders``: those inside.
    """
    names = sorted(names)
    remote = re.fullmatch(r"(.+)@[0-9a-f]{12,40}(?:/(.+))?", location)
    place, subfolder = (remote[1], remote[2] or "") if remote else (location, "")
    if not names:
        return None
    if all(map(_IP_ADAPTER.fullmatch, names)):
        encoder = "" if "image_encoder" in folders else ", image_encoder_folder=None"
        if any(map(_OF_FLUX.fullmatch, names)):
            encoder = ", image_encoder_pretrained_model_name_or_path=None"
        call = f"pipeline.load_ip_adapter({place!r}, subfolder={subfolder!r}, weight_name={file!r}{encoder})"
        places = {int(found[1]) for found in map(_KEYS.fullmatch, names) if found}
        of_unet = bool(places) and all(number % 2 for number in places)
        return {"what": IP_ADAPTER, "how": f"{_ONTO_PLAIN if of_unet else _ONTO_QUANTIZED}: `{call}`."}
    if _ENCODERS.keys() >= set(names):
        inside = f"{subfolder}/{file}".lstrip("/")
        path = f"huggingface_hub.hf_hub_download({place!r}, {inside!r})" if remote else repr(f"{place}/{file}")
        calls = [
            f"pipeline.load_textual_inversion(held[{name!r}], token='<TOKEN>', "
            f"text_encoder=pipeline.text_encoder{number}, tokenizer=pipeline.tokenizer{number})"
            for name, number in _ENCODERS.items()
            if name in names
        ]
        imports = f"import {'huggingface_hub, ' if remote else ''}safetensors.torch"
        code = "; ".join([imports, f"held = safetensors.torch.load_file({path})", *calls])
        return {"what": EMBEDDING, "how": f"{_ONTO_QUANTIZED}: `{code}`."}
    if len(names) == 1 and (_TOKEN.fullmatch(names[0]) or file.startswith("learned_embeds")):
        token = ", token='<TOKEN>'" if names[0] == "emb_params" else ""
        subfolder = f", subfolder={subfolder!r}" if subfolder else ""
        call = f"pipeline.load_textual_inversion({place!r}{subfolder}, weight_name={file!r}{token})"
        return {"what": EMBEDDING, "how": f"{_ONTO_QUANTIZED}: `{call}`."}
    if all(map(_HYPERNETWORK.fullmatch, names)):
        how = "Neither library loads one: use it with the original model, in the program that trained it."
        return {"what": "a hypernetwork", "how": how}
    return None
