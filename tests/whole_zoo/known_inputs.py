"""Inputs that neither a signature nor a config tells, by model type: shapes as the family's processor makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from whole_zoo.input_values import LENGTH, random_values


def known_inputs(model: Any, sizes: dict[str, Any]) -> dict[str, Any] | None:
    """What a model of this type takes; None for a type that says it by itself."""
    make = _INPUTS.get(getattr(model.config, "model_type", ""))
    if make is not None:
        return make(sizes)
    if type(model).__name__.endswith("ForMultipleChoice"):
        return {"input_ids": _ids().unsqueeze(0)}
    return None


def _ids() -> torch.Tensor:
    return torch.arange(5, 5 + LENGTH).unsqueeze(0)


def _ones() -> torch.Tensor:
    return torch.ones(1, LENGTH, dtype=torch.long)


def _film() -> torch.Tensor:
    """Two pictures of the one size that a vision transformer of timm takes."""
    return random_values(1, 2, 3, 336, 336)


def _painted(sizes: dict[str, Any]) -> dict[str, Any]:
    """A picture and the one that shows the task, which the model puts above each other."""
    height, width = sizes["image_size"]
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return dict.fromkeys(names, random_values(1, 3, height // 2, width))


def _kosmos(sizes: dict[str, Any]) -> dict[str, Any]:
    """A text that has a place for each of the image's latent queries."""
    queries = int(sizes["latent_query_num"])
    ids = torch.full((1, queries + LENGTH), 7)
    places = torch.zeros_like(ids)
    places[:, 1 : 1 + queries] = 1
    side = int(sizes["image_size"])
    return {
        "pixel_values": random_values(1, 3, side, side),
        "input_ids": ids,
        "image_embeds_position_mask": places,
        "attention_mask": torch.ones_like(ids),
    }


def _decisions(sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "states": random_values(1, LENGTH, sizes["state_dim"]),
        "actions": random_values(1, LENGTH, sizes["act_dim"]),
        "rewards": random_values(1, LENGTH, 1),
        "returns_to_go": random_values(1, LENGTH, 1),
        "timesteps": torch.arange(LENGTH).unsqueeze(0),
        "attention_mask": _ones(),
    }


def _pi0(sizes: dict[str, Any]) -> dict[str, Any]:
    """A state of the robot and the pictures of one camera."""
    side, patch = int(sizes["image_size"]), int(sizes["patch_size"])
    mark = next(int(sizes[name]) for name in ("image_token_id", "image_token_index") if name in sizes)
    marks = torch.full((1, (side // patch) ** 2), mark)
    ids = torch.cat([marks, _ids()], dim=1)
    return {
        "state": random_values(1, sizes["max_state_dim"]),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": random_values(1, 1, 3, side, side),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
    }


_INPUTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "blip_2_qformer": lambda sizes: {
        "query_embeds": random_values(1, LENGTH, sizes["hidden_size"]),
        "encoder_hidden_states": random_values(1, LENGTH, sizes["encoder_hidden_size"]),
    },
    "bros": lambda sizes: {"input_ids": _ids(), "bbox": random_values(1, LENGTH, sizes["dim_bbox"])},
    "decision_transformer": _decisions,
    "depth_pro": lambda _: {"pixel_values": random_values(1, 3, 64, 64)},
    "efficientloftr": lambda _: {"pixel_values": random_values(1, 2, 3, 64, 64)},
    "gemma3n_audio": lambda sizes: {
        "audio_mel": random_values(1, 64, sizes["input_feat_size"]),
        "audio_mel_mask": torch.zeros(1, 64, dtype=torch.bool),
    },
    "inkling2_vision": lambda sizes: {
        "pixel_values": random_values(LENGTH, (2 * sizes["patch_size"]) ** 2, 3),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    },
    "kosmos-2": _kosmos,
    "pe_audio_video_encoder": lambda _: {"input_values": random_values(1, 1, 4000), "pixel_values_videos": _film()},
    "pe_video": lambda _: {"input_ids": _ids(), "pixel_values_videos": _film()},
    "pe_video_encoder": lambda _: {"pixel_values_videos": _film()},
    "omdet-turbo": lambda _: {
        "pixel_values": random_values(1, 3, 64, 64),
        "classes_input_ids": _ids().expand(2, -1),
        "classes_attention_mask": _ones().expand(2, -1),
        "tasks_input_ids": _ids(),
        "tasks_attention_mask": _ones(),
        "classes_structure": torch.tensor([2]),
    },
    "pi0": _pi0,
    "pp_ocrv5_mobile_rec": lambda _: {"pixel_values": random_values(1, 3, 96, 320)},
    "qwen3_asr_encoder": lambda sizes: {
        "input_features": random_values(1, sizes["num_mel_bins"], 2 * sizes["n_window"]),
        "input_features_mask": torch.ones(1, 2 * sizes["n_window"], dtype=torch.long),
    },
    "seggpt": _painted,
    "speecht5": lambda sizes: {
        "input_values": random_values(1, LENGTH, sizes["hidden_size"]),
        "decoder_input_values": random_values(1, LENGTH, sizes["hidden_size"]),
    },
    "vibevoice_acoustic_tokenizer_encoder": lambda _: {"hidden_states": random_values(1, 1, 6400)},
    "voxtral_realtime": lambda sizes: {
        "input_ids": _ids(),
        "input_features": random_values(1, sizes["num_mel_bins"], 8 * LENGTH),
    },
    "xcodec2": lambda _: {
        "input_values": random_values(1, 1, 320 * LENGTH),
        "input_features": random_values(1, LENGTH, 160),
        "input_features_mask": _ones(),
    },
}
