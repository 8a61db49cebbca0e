"""Inputs that a small model runs on, found by its forward's signature, its config, and what it says about wrong ones.

Sizes that a config does not tell begin as numbers that no other input has. A layer that gets the wrong width names
both, the one it got and the one it wants, so the input is known that has to change. What a class says of an input that
is missing names that input, or the line that fails does.
"""

from __future__ import annotations

import inspect
import linecache
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import torch

from whole_zoo.input_values import LENGTH, SIDE, by_name, is_count, random_values

TRIES, SECONDS = 90, 5.0
"""Attempts, and CPU time, for one model."""
MENDS = 12
"""Changes of one attempt."""
WIDTHS = (
    re.compile(r"shapes cannot be multiplied \(\d+x(?P<got>\d+) and (?P<wanted>\d+)x\d+\)"),
    re.compile(r"expected input\[[\d, ]+\] to have (?P<wanted>\d+) channels, but got (?P<got>\d+) channels"),
    re.compile(r"normalized_shape=\[(?P<wanted>\d+)\], expected .* got input of size\s?\[(?:\d+, )*(?P<got>\d+)\]"),
    re.compile(r"input has inconsistent input_size: got (?P<got>\d+) expected (?P<wanted>\d+)"),
    re.compile(r"size \((?P<wanted>\d+)\)\D*doesn't match\D*size \((?P<got>\d+)\)"),
    re.compile(r"tensor a \((?P<got>\d+)\) must match the size of tensor b \((?P<wanted>\d+)\)"),
    re.compile(r"tensor a \((?P<wanted>\d+)\) must match the size of tensor b \((?P<got>\d+)\)"),
    re.compile(r"[Ll]ast dimension\D*(?P<got>\d+) doesn't correspond to \S+ (?P<wanted>\d+)"),
    re.compile(r"sequence length \((?P<got>\d+)\) doesn't match model configuration \((?P<wanted>\d+)\)"),
    re.compile(r"length (?P<got>\d+) is not a multiple of (?P<wanted>\d+)"),
    re.compile(r"expects (?P<wanted>\d+) but received .* = (?P<got>\d+)"),
    re.compile(r"expected mel input features to be of length (?P<wanted>\d+), but found (?P<got>\d+)"),
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of ``forward``; none, and why, if none were found."""

    values: dict[str, Any] | None
    why: str = ""

    def run(self, model: Any) -> torch.Tensor:
        """The first tensor of floats that one forward pass gives, with the same random numbers every time."""
        assert self.values is not None
        torch.manual_seed(0)
        with torch.no_grad():
            return _first(model.eval()(**_cast(self.values, model.dtype)))


def inputs_that_run(model: Any) -> Inputs:
    """The first arguments that the model takes and that give an output."""
    end = time.process_time() + SECONDS
    last = "no input known"
    sizes = _sizes(model)
    parameters = inspect.signature(model.forward).parameters
    for guess in islice(_guesses(model, parameters, sizes), TRIES):
        values = dict(guess)
        for _ in range(MENDS):
            if time.process_time() > end:
                return Inputs(None, f"no input found: {last}")
            try:
                Inputs(values).run(model)
                return Inputs(values)
            except Exception as error:
                last = " ".join(f"{type(error).__name__}: {error}".split())[:100]
                if not _mended(values, error, parameters, sizes):
                    break
    return Inputs(None, f"no input found: {last}")


def _mended(
    values: dict[str, Any], error: Exception, parameters: Mapping[str, inspect.Parameter], sizes: dict[str, Any]
) -> bool:
    missing = _with_missing(values, error, parameters, sizes)
    return missing or with_width(values, str(error)) or _with_axes(values, error)


def _with_axes(values: dict[str, Any], error: Exception) -> bool:
    """Give an input that has too few axes, or too many, the shape of the first: a layer names the shape that it got,
    or the failing statement unpacks the shape of an input by its name."""
    first, *others = values
    size = re.search(r"got input of size: \[([\d, ]+)\]", str(error))
    unpacked = "values to unpack" in str(error) and re.search(
        r"= (\w+)\.shape", " ".join(failing_lines(error.__traceback__))
    )
    for name in others:
        value = values[name]
        if not torch.is_tensor(value) or not torch.is_tensor(values[first]) or value.ndim == values[first].ndim:
            continue
        shape = ", ".join(map(str, value.shape))
        if (size and size[1] == shape) or (unpacked and unpacked[1] == name):
            values[name] = values[first].clone()
            return True
    return False


def with_width(values: dict[str, Any], message: str) -> bool:
    """Give the input whose width a layer refused the width that the layer wants."""
    for pattern in WIDTHS:
        if (match := pattern.search(message)) is None:
            continue
        got, wanted = int(match["got"]), int(match["wanted"])
        for name, value in values.items():
            if not torch.is_tensor(value) or not value.is_floating_point():
                continue
            for axes in ((-1,), (1,)) if value.ndim < 4 else ((1,), (-2, -1)):
                if value.ndim > 1 and got != wanted and all(value.shape[axis] == got for axis in axes):
                    shape = list(value.shape)
                    for axis in axes:
                        shape[axis] = wanted
                    values[name] = random_values(*shape)
                    return True
    return False


def _with_missing(
    values: dict[str, Any], error: Exception, parameters: Mapping[str, inspect.Parameter], sizes: dict[str, Any]
) -> bool:
    """Give what the message names, or the lines that fail: arguments that are None there."""
    message = str(error).partition("\n")[0]
    failing = [message, *failing_lines(error.__traceback__)]
    for text in failing:
        for word in re.findall(r"\w+", text):
            if (
                word in parameters
                and word not in values
                and not word.startswith(("past_key", "labels", "use_", "output_"))
            ):
                found = by_name(word, sizes, parameters[word], known=True)
                if found is not None:
                    values[word] = found
                    return True
    return False


def failing_lines(found: TracebackType | None) -> list[str]:
    """The innermost three statements of the libraries' models and pipelines that were at work, the innermost first."""
    statements = []
    for frame in reversed(traceback.extract_tb(found)):
        if frame.lineno and (
            "/models/" in frame.filename or "/pipelines/" in frame.filename or "_utils" in frame.filename
        ):
            numbers = range(frame.lineno, (frame.end_lineno or frame.lineno) + 1)
            statements.append(" ".join(linecache.getline(frame.filename, number) for number in numbers))
    return statements[:3]


def _guesses(
    model: Any, parameters: Mapping[str, inspect.Parameter], sizes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if hasattr(model, "main_input_name"):
        yield from _of_transformers(model, parameters, required, sizes)
    else:
        yield from _of_diffusers(parameters, required, sizes)


def _sizes(model: Any) -> dict[str, Any]:
    """The numbers of a config by name, those of nested configs too where the name is not taken."""
    config = model.config
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    found: dict[str, Any] = {}
    waiting = [config]
    while waiting:
        for key, value in waiting.pop(0).items():
            if isinstance(value, dict):
                waiting.append(value)
            elif value is not None and isinstance(key, str):
                found.setdefault(key, value)
    return found


def _of_transformers(
    model: Any, parameters: Mapping[str, inspect.Parameter], required: list[str], sizes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The main input, then what there is beside it: a decoder's tokens, a text for the picture, a picture alone."""
    ids = torch.arange(5, 5 + LENGTH).unsqueeze(0) % max(min(sizes.get("vocab_size", 99), 99), 6)
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in parameters else {}
    others = {name: value for name in required if (value := by_name(name, sizes, parameters[name])) is not None}
    images = list(_images(sizes))
    sounds = list(_sounds(sizes))
    mains: list[dict[str, Any]] = (
        [{required[0]: patches} for patches in _patches(sizes)] if "grid_thw" in others else []
    )
    for name in dict.fromkeys([model.main_input_name, "input_ids", "pixel_values", "input_features", "input_values"]):
        if name not in parameters and name != model.main_input_name:
            continue
        if name.startswith("pixel_values"):
            mains += [{name: image} for image in images]
        elif name in ("input_features", "input_values", "audio_values"):
            mains += [{name: sound} for sound in sounds]
        else:
            mains.append({name: ids if "ids" in name else random_values(1, LENGTH, 23)})
    for main in mains:
        for beside in ({}, decoder) if decoder else ({},):
            yield {**others, **main, **beside}
    if {"input_ids", "pixel_values"} <= parameters.keys():
        for image in images:
            yield {**others, "input_ids": ids, "pixel_values": image, **decoder}
    if "inputs_embeds" in parameters and is_count(sizes.get("hidden_size")):
        yield {**others, "inputs_embeds": random_values(1, LENGTH, sizes["hidden_size"])}
    if {"input_ids", "bbox"} <= parameters.keys():
        yield {**others, "input_ids": ids, "bbox": torch.ones(1, LENGTH, 4, dtype=torch.long)}
    both = {"input_features", "input_values"}
    if both <= parameters.keys():
        for sound in sounds:
            for features in sounds:
                yield {**others, "input_values": sound, "input_features": features}


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


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if torch.is_tensor(value):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(each, dtype) for key, each in value.items()}
    return [_cast(each, dtype) for each in value] if isinstance(value, list) else value


def _first(output: Any) -> torch.Tensor:
    waiting = [output]
    while waiting:
        value = waiting.pop(0)
        if torch.is_tensor(value):
            if value.is_floating_point():
                return value
        elif hasattr(value, "values"):
            waiting += list(value.values())
        elif isinstance(value, list | tuple):
            waiting += list(value)
        elif hasattr(value, "__dict__"):
            waiting += list(vars(value).values())
    raise ValueError("no tensor of floats in the output")
