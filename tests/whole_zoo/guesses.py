"""First guesses of a forward's arguments, from its signature and its model's config; those of the most inputs first."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from whole_zoo.diffusers_inputs import inputs_of_class
from whole_zoo.input_values import LENGTH, SIDE, by_name, is_count, past_length, random_values
from whole_zoo.known_inputs import known_inputs


def guesses(model: Any, parameters: Mapping[str, inspect.Parameter], sizes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if (given := known_inputs(model, sizes)) is not None:
        yield given
    if hasattr(model, "main_input_name"):
        yield from _of_transformers(model, parameters, required, sizes)
    else:
        known = inputs_of_class(type(model).__name__)
        yield from _of_diffusers(parameters, required, sizes) if known is None else [known]


def _of_transformers(
    model: Any, parameters: Mapping[str, inspect.Parameter], required: list[str], sizes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A text with each picture or sound, then one of them alone, with a decoder's tokens too where there are any."""
    ids = torch.arange(5, 5 + LENGTH).unsqueeze(0) % max(min(sizes.get("vocab_size", 99), 99), 6)
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in parameters else {}
    others = {name: value for name in required if (value := by_name(name, sizes, parameters[name])) is not None}
    first = model.main_input_name if isinstance(model.main_input_name, str) else model.main_input_name[0]
    names = [name for name in (first, *_MEDIA) if name in parameters or name == first]
    media = [medium for name in dict.fromkeys(names) for medium in _media(name, parameters, sizes)]
    if "input_ids" in parameters:
        for medium in media:
            yield {**others, "input_ids": ids, **medium, **decoder}
    if "grid_thw" in others:
        for patches in _patches(sizes):
            yield {**others, required[0]: patches}
    mains = [] if "input_ids" not in parameters else [{"input_ids": ids}]
    if first != "input_ids" and not any(first in medium for medium in media):
        mains.insert(0, {first: random_values(1, LENGTH, 23)})
    for main in [*media, *mains] if any(first in medium for medium in media) else [*mains, *media]:
        for beside in ({}, decoder) if decoder else ({},):
            yield {**others, **main, **beside}
    if "inputs_embeds" in parameters and is_count(sizes.get("hidden_size")):
        yield {**others, "inputs_embeds": random_values(1, LENGTH, sizes["hidden_size"])}
    if {"input_ids", "bbox"} <= parameters.keys():
        yield {**others, "input_ids": ids, "bbox": torch.ones(1, LENGTH, 4, dtype=torch.long)}
    if {"input_features", "input_values"} <= parameters.keys():
        for sound in _sounds(sizes):
            for features in _sounds(sizes):
                yield {**others, "input_values": sound, "input_features": features}


_MEDIA = ("pixel_values", "input_features", "input_values", "audio_values", "past_values", "flattened_patches")
_GRID = re.compile(r"(?:image_)?grid_(?:thw|hws?)|spatial_shapes|tgt_sizes|target_sizes|(?:image|pixel)_position_ids")


def _media(name: str, parameters: Mapping[str, inspect.Parameter], sizes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Pictures, films, sounds and series of the shapes that models take under this name."""
    if name.startswith("pixel_values"):
        if grid := next((each for each in parameters if _GRID.fullmatch(each)), None):
            for patches in _patches(sizes):
                yield {name: patches, grid: by_name(grid, sizes)}
        for image in _images(sizes):
            yield {name: image}
    elif name == "flattened_patches":
        yield {name: random_values(1, LENGTH, 3 * int(sizes.get("patch_size") or 16) ** 2 + 2)}
    elif name == "past_values":
        for series in _series(sizes):
            yield {name: series}
    elif name in _MEDIA:
        for sound in _sounds(sizes):
            yield {name: sound}


def _series(sizes: dict[str, Any]) -> Iterator[torch.Tensor]:
    length = past_length(sizes)
    if is_count(channels := sizes.get("num_input_channels")):
        yield random_values(1, length, channels)
    yield random_values(1, length)


def _images(sizes: dict[str, Any]) -> Iterator[torch.Tensor]:
    channels = next((sizes[key] for key in ("num_channels", "in_channels", "in_chans") if is_count(sizes.get(key))), 3)
    given = sizes.get("image_size", sizes.get("img_size", 32))
    if isinstance(given, list | tuple) and len(given) == 2:
        yield random_values(1, channels, *given)
    given = given if isinstance(given, int) else given[0] if isinstance(given, list | tuple) else 32
    frames = sizes.get("num_frames", 2)
    frames = frames if isinstance(frames, int) else 2
    for side in dict.fromkeys((given, 32, 64, 224)):
        yield random_values(1, channels, side, side)
    for count in dict.fromkeys((frames, 1, 2)):
        yield random_values(1, count, channels, given, given)
    yield random_values(1, 1, 1, channels, given, given)
    for side in (32, 64):
        yield random_values(1, 3, side, side)


def _patches(sizes: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The pixels of a picture's patches, a row for each."""
    channels = next((sizes[key] for key in ("in_channels", "num_channels", "in_chans") if is_count(sizes.get(key))), 3)
    patch, films = int(sizes.get("patch_size") or 14), int(sizes.get("temporal_patch_size") or 1)
    yield random_values(SIDE * SIDE, channels * films * patch * patch)
    yield random_values(SIDE * SIDE, channels, patch, patch)
    yield random_values(1, SIDE * SIDE, channels * patch * patch)


def _sounds(sizes: dict[str, Any]) -> Iterator[torch.Tensor]:
    mels = next((sizes[key] for key in ("num_mel_bins", "n_mels", "feature_size", "input_size") if key in sizes), 29)
    mels = mels if isinstance(mels, int) else 29
    positions = sizes.get("max_source_positions")
    if isinstance(positions, int):
        yield random_values(1, mels, 2 * positions)
    yield random_values(1, 4000)
    yield random_values(1, 1, 4000)
    yield random_values(1, 64, mels)
    yield random_values(1, mels, 64)
    yield random_values(1, 1, 64, mels)
    length = sizes.get("max_length", 1024)
    yield random_values(1, length if isinstance(length, int) else 1024, mels)
    yield random_values(1, 1, 1024, mels)
    yield random_values(1, 6400)


def _of_diffusers(
    parameters: Mapping[str, inspect.Parameter], required: list[str], sizes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A picture, a film, a sequence as the first input, and for the others what their names say."""
    first, *_ = [*required, *parameters]
    channels = next(
        (
            sizes[key]
            for key in ("in_channels", "in_visual_dim", "audio_in_channels", "c_in", "patch_latent_dim", "latent_dim")
            if is_count(sizes.get(key))
        ),
        5,
    )
    side = sizes.get("sample_size")
    side = side if isinstance(side, int) and side <= 64 else 2 * SIDE
    shapes = [(1, LENGTH, channels), (1, channels, side, side), (1, channels, 2, side, side), (1, channels, LENGTH),
              (1, channels, 1, side, side), (1, 5, channels, side, side), (1, channels), (LENGTH, channels),
              (1, channels, 2 * SIDE, 2 * SIDE), (1, 3, 32, 32), (1, 3, 1, 32, 32), (1, 3, 9, 32, 32)]  # fmt: skip
    common = [name for name in parameters if name not in required and _COMMON.fullmatch(name)]
    plain = [name for name in common if name != "guidance" and "mask" not in name]
    listed = "list" in str(parameters[first].annotation).lower()
    for shape in shapes:
        main = random_values(*shape)
        for names in dict.fromkeys(map(tuple, (required, [*required, *plain], [*required, *common]))):
            values = {name: by_name(name, sizes, parameters[name]) for name in names if name != first}
            known = {name: value for name, value in values.items() if value is not None}
            yield {first: [main[0]] if listed else main, **known}


_COMMON = re.compile(
    r"timesteps?|sigma|guidance|encoder_hidden_states\w*|pooled_projections|(?:img|txt|text|image)_ids|\w*attention_mask|"
    r"encoder_hidden_states_mask|img_shapes|txt_seq_lens|class_labels|height|width|num_frames|controlnet_cond|cap_feats"
)
