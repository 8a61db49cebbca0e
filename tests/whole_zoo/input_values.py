"""What an argument of a model's forward is by its name, and by the sizes of the model's config."""

from __future__ import annotations

import re
from typing import Any, TypeGuard

import torch

LENGTH = 16
"""Tokens of a sequence: a square, for what is a picture of patches."""
SIDE = 4
TEXT = LENGTH - 4
"""Tokens of what stands beside a sequence."""
_PRIMES = {"encoder_hidden_states": 23, "pooled": 29, "image": 31, "audio": 37, "": 41}


def by_name(name: str, sizes: dict[str, Any], parameter: Any = None, *, known: bool = False) -> Any:
    """A value for an argument of this name; None where the name says nothing, or ``known`` to be a tensor."""
    annotation = str(parameter.annotation) if parameter is not None else ""
    axes = next((len(value) for key, value in sizes.items() if "axes" in key and isinstance(value, list | tuple)), 3)
    width = next((prime for part, prime in _PRIMES.items() if part in name))
    hidden = sizes.get("hidden_size", width)
    text = int(sizes.get("max_text_seq_length") or TEXT)
    rules: tuple[tuple[str, Any], ...] = (
        (r"timesteps?(?:_\w+)?|sigmas?|t|r|timestep_cond|\w*noise_time", lambda: torch.tensor([0.5])),
        (r"guidance(?:_scale)?|noise_level|augment_level", lambda: torch.tensor([1.0])),
        (r"(?:img|image|hidden_states)_ids", lambda: torch.zeros(LENGTH, axes)),
        (r"(?:txt|text)_ids", lambda: torch.zeros(text, axes)),
        (r"img_shapes", lambda: [[(1, SIDE, SIDE)]]),
        (r"txt_seq_lens", lambda: [text]),
        (r"\w*grid_thw", lambda: torch.tensor([[1, SIDE, SIDE]])),
        (r"target_sizes|spatial_shapes|tgt_sizes|\w*grid_hws?", lambda: torch.tensor([[SIDE, SIDE]])),
        (r"task_inputs", lambda: random_values(1, int(sizes.get("task_seq_len") or LENGTH))),
        (r"merge_sizes", lambda: torch.tensor([2])),
        (r"image_sizes", lambda: torch.tensor([[_side(sizes), _side(sizes)]])),
        (r"height|width", lambda: SIDE),
        (r"num_frames|frame_rate|fps", lambda: 1),
        (r"return_loss|return_dict|do_\w+|is_\w+", lambda: False),
        (r"class_labels|labels|lang_ids", lambda: torch.tensor([0])),
        (r"(?:image|pixel)_position_ids", lambda: torch.cartesian_prod(*[torch.arange(SIDE)] * 2).unsqueeze(0)),
        (r"\w*position_ids", lambda: torch.arange(LENGTH).unsqueeze(0)),
        (r"bbox", lambda: torch.ones(1, LENGTH, 4, dtype=torch.long)),
        (r"question_positions", lambda: torch.tensor([[1]])),
        (r"bool_masked_pos", lambda: torch.arange(_patches(sizes)).unsqueeze(0) % 2 == 0),
        (r"\w*input_ids|\w*tokens|\w*token_ids", lambda: torch.arange(5, 5 + LENGTH).unsqueeze(0)),
        (r"pixel_values\w*", lambda: random_values(1, int(sizes.get("num_channels") or 3), _side(sizes), _side(sizes))),
        (r"controlnet_cond|\w*cond_image|conditioning", lambda: random_values(1, 3, 16 * SIDE, 16 * SIDE)),
        (r"conditioning_scale", lambda: 1.0),
        (r"added_cond_kwargs", dict),
        (r"encoder_(?:hidden_states_)?(?:attention_)?mask|text_mask|encoder_hidden_states_mask",
         lambda: torch.ones(1, text, dtype=torch.long)),
        (r"past_values_padding", lambda: torch.zeros(1, past_length(sizes))),
        (r"past_observed_\w+", lambda: torch.ones(1, past_length(sizes))),
        (r"past_time_features", lambda: random_values(1, past_length(sizes), int(sizes.get("num_time_features") or 0))),
        (r"image_attention_mask", lambda: torch.ones(1, LENGTH, 2, dtype=torch.long)),
        (r"\w*mask|\w*padding", lambda: torch.ones(1, LENGTH, dtype=torch.long)),
        (r"past_values", lambda: random_values(1, past_length(sizes))),
        (r"freq", lambda: torch.zeros(1, 1, dtype=torch.long)),
        (r"visual_feats", lambda: random_values(1, TEXT, int(sizes.get("visual_feat_dim") or width))),
        (r"visual_pos", lambda: random_values(1, TEXT, 4)),
        (r"inputs_embeds", lambda: random_values(1, LENGTH, hidden if is_count(hidden) else width)),
        (r"pooled\w*|\w*pooled\w*|clip_\w+pooled|image_embeds|text_embeds", lambda: random_values(1, width)),
        (r"encoder_hidden_states\w*|\w*text\w*|\w*prompt\w*|\w*embeds?|\w*states|\w*feats?|context|cap\w*|y",
         lambda: random_values(1, text, width)),
    )  # fmt: skip
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            found = value()
            return [found[0]] if "list[" in annotation.lower() and torch.is_tensor(found) and found.ndim == 3 else found
    return random_values(1, LENGTH, width) if "Tensor" in annotation and not known else None


def past_length(sizes: dict[str, Any]) -> int:
    """Steps of a time series that a model looks back on."""
    length = sizes.get("context_length") or sizes.get("prediction_length")
    lags: list[int] = sizes.get("lags_sequence") or [0]
    return (length if is_count(length) else LENGTH) + max(lags)


def _side(sizes: dict[str, Any]) -> int:
    side = sizes.get("image_size", sizes.get("img_size", 32))
    return side if is_count(side) else 32


def _patches(sizes: dict[str, Any]) -> int:
    patch = sizes.get("patch_size")
    side = _side(sizes) // patch if is_count(patch) else SIDE
    frames = sizes.get("num_frames")
    tubelet = sizes.get("tubelet_size")
    films = frames // tubelet if is_count(frames) and is_count(tubelet) else 1
    return int(films * side * side)


def is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def random_values(*shape: int) -> torch.Tensor:
    """From 0 to 1, the same for every tensor of so many axes."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))
