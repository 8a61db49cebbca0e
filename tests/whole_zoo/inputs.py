"""Inputs that a small model runs on, found by its forward's signature, its config, and what it says about wrong ones.

Sizes that a config does not tell begin as numbers that no other input has. A layer that gets the wrong width names
both, the one it got and the one it wants, so the input is known that has to change.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

TRIES, SECONDS = 90, 5.0
"""Attempts, and CPU time, for one model."""
LENGTH = 16
"""Tokens of a sequence: a square, for what is a picture of patches."""
SIDE = 4
_WIDTHS = (
    re.compile(r"shapes cannot be multiplied \(\d+x(?P<got>\d+) and (?P<wanted>\d+)x\d+\)"),
    re.compile(r"expected input\[[\d, ]+\] to have (?P<wanted>\d+) channels, but got (?P<got>\d+) channels"),
    re.compile(r"normalized_shape=\[(?P<wanted>\d+)\], expected .* got input of size\s?\[(?:\d+, )*(?P<got>\d+)\]"),
    re.compile(r"input has inconsistent input_size: got (?P<got>\d+) expected (?P<wanted>\d+)"),
    re.compile(r"size \((?P<wanted>\d+)\)\D*doesn't match\D*size \((?P<got>\d+)\)"),
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
    for guess in islice(_guesses(model), TRIES):
        values = dict(guess)
        for _ in range(10):
            if time.process_time() > end:
                return Inputs(None, f"no input found: {last}")
            try:
                Inputs(values).run(model)
                return Inputs(values)
            except Exception as error:
                last = " ".join(f"{type(error).__name__}: {error}".split())[:100]
                if not _mend(values, str(error)):
                    break
    return Inputs(None, f"no input found: {last}")


def _mend(values: dict[str, Any], message: str) -> bool:
    """Give the input whose width a layer refused the width that the layer wants."""
    for pattern in _WIDTHS:
        if (match := pattern.search(message)) is None:
            continue
        got, wanted = int(match["got"]), int(match["wanted"])
        for name, value in values.items():
            if not torch.is_tensor(value) or not value.is_floating_point():
                continue
            for axis in (-1, 1):
                if value.ndim > 1 and value.shape[axis] == got:
                    shape = list(value.shape)
                    shape[axis] = wanted
                    values[name] = _random(*shape)
                    return True
    return False


def _guesses(model: Any) -> Iterator[dict[str, Any]]:
    parameters = dict(inspect.signature(model.forward).parameters)
    sizes = _sizes(model)
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if hasattr(model, "main_input_name"):
        yield from _of_transformers(model, set(parameters), required, sizes)
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
    model: Any, known: set[str], required: list[str], sizes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The main input, then what there is beside it: a decoder's tokens, a text for the picture, a picture alone."""
    ids = torch.arange(5, 5 + LENGTH).unsqueeze(0) % max(min(sizes.get("vocab_size", 99), 99), 6)
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in known else {}
    others = {name: value for name in required if (value := _by_name(name, sizes)) is not None}
    images = list(_images(sizes))
    sounds = list(_sounds(sizes))
    mains: list[dict[str, Any]] = []
    for name in dict.fromkeys([model.main_input_name, "input_ids", "pixel_values", "input_features", "input_values"]):
        if name not in known and name != model.main_input_name:
            continue
        if name.startswith("pixel_values"):
            mains += [{name: image} for image in images]
        elif name in ("input_features", "input_values", "audio_values"):
            mains += [{name: sound} for sound in sounds]
        else:
            mains.append({name: ids if "ids" in name else _random(1, LENGTH, 23)})
    for main in mains:
        for beside in ({}, decoder) if decoder else ({},):
            yield {**others, **main, **beside}
    if {"input_ids", "pixel_values"} <= known:
        for image in images:
            yield {**others, "input_ids": ids, "pixel_values": image, **decoder}
    if "inputs_embeds" in known and _number(sizes.get("hidden_size")):
        yield {**others, "inputs_embeds": _random(1, LENGTH, sizes["hidden_size"])}
    if {"input_ids", "bbox"} <= known:
        yield {**others, "input_ids": ids, "bbox": torch.ones(1, LENGTH, 4, dtype=torch.long)}


def _images(sizes: dict[str, Any]) -> Iterator[torch.Tensor]:
    channels = next((sizes[key] for key in ("num_channels", "in_channels", "in_chans") if _number(sizes.get(key))), 3)
    given = sizes.get("image_size", sizes.get("img_size", 32))
    given = given if isinstance(given, int) else given[0] if isinstance(given, list | tuple) else 32
    frames = sizes.get("num_frames", 2)
    frames = frames if isinstance(frames, int) else 2
    for side in dict.fromkeys((given, 32, 64, 224)):
        yield _random(1, channels, side, side)
    yield _random(1, frames, channels, given, given)
    yield _random(1, 1, channels, given, given)


def _sounds(sizes: dict[str, Any]) -> Iterator[torch.Tensor]:
    mels = next((sizes[key] for key in ("num_mel_bins", "n_mels", "feature_size", "input_size") if key in sizes), 29)
    mels = mels if isinstance(mels, int) else 29
    positions = sizes.get("max_source_positions")
    if isinstance(positions, int):
        yield _random(1, mels, 2 * positions)
    yield _random(1, 4000)
    yield _random(1, 1, 4000)
    yield _random(1, 64, mels)
    yield _random(1, mels, 64)
    yield _random(1, 1, 64, mels)
    yield _random(1, 1, 1024, mels)


def _of_diffusers(
    parameters: dict[str, inspect.Parameter], required: list[str], sizes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A picture, a film, a sequence as the first input, and for the others what their names say."""
    first, *_ = [*required, *parameters]
    channels = next(
        (
            sizes[key]
            for key in ("in_channels", "in_visual_dim", "audio_in_channels", "c_in")
            if _number(sizes.get(key))
        ),
        5,
    )
    side = sizes.get("sample_size")
    side = side if isinstance(side, int) and side <= 64 else 2 * SIDE
    shapes = [(1, LENGTH, channels), (1, channels, side, side), (1, channels, 2, side, side), (1, channels, LENGTH),
              (1, channels, 1, side, side), (1, 5, channels, side, side), (1, channels)]  # fmt: skip
    common = [name for name in parameters if name not in required and _COMMON.fullmatch(name)]
    plain = [name for name in common if name != "guidance" and "mask" not in name]
    listed = "list" in str(parameters[first].annotation).lower()
    for shape in shapes:
        main = _random(*shape)
        for names in dict.fromkeys(map(tuple, (required, [*required, *plain], [*required, *common]))):
            values = {name: _by_name(name, sizes, parameters[name]) for name in names if name != first}
            known = {name: value for name, value in values.items() if value is not None}
            yield {first: [main[0]] if listed else main, **known}


_COMMON = re.compile(
    r"timesteps?|sigma|guidance|encoder_hidden_states\w*|pooled_projections|(?:img|txt|text|image)_ids|\w*attention_mask|"
    r"encoder_hidden_states_mask|img_shapes|txt_seq_lens|class_labels|height|width|num_frames|controlnet_cond|cap_feats"
)
_PRIMES = {"encoder_hidden_states": 23, "pooled": 29, "image": 31, "audio": 37, "": 41}


def _by_name(name: str, sizes: dict[str, Any], parameter: Any = None) -> Any:
    """A value for an argument of this name; None where the name says nothing."""
    text = LENGTH - 4
    annotation = str(parameter.annotation) if parameter is not None else ""
    axes = next((len(value) for key, value in sizes.items() if "axes" in key and isinstance(value, list | tuple)), 3)
    width = next((prime for part, prime in _PRIMES.items() if part in name))
    rules: tuple[tuple[str, Any], ...] = (
        (r"timesteps?(?:_\w+)?|sigmas?|t|r|timestep_cond", lambda: torch.tensor([0.5])),
        (r"guidance(?:_scale)?|noise_level|augment_level", lambda: torch.tensor([1.0])),
        (r"(?:img|image|hidden_states)_ids", lambda: torch.zeros(LENGTH, axes)),
        (r"(?:txt|text)_ids", lambda: torch.zeros(text, axes)),
        (r"img_shapes", lambda: [[(1, SIDE, SIDE)]]),
        (r"txt_seq_lens", lambda: [text]),
        (r"height|width", lambda: SIDE),
        (r"num_frames|frame_rate|fps", lambda: 1),
        (r"class_labels|labels", lambda: torch.tensor([0])),
        (r"\w*position_ids", lambda: torch.arange(LENGTH).unsqueeze(0)),
        (r"bbox", lambda: torch.ones(1, LENGTH, 4, dtype=torch.long)),
        (r"\w*input_ids|\w*tokens|\w*token_ids", lambda: torch.arange(5, 5 + LENGTH).unsqueeze(0)),
        (r"controlnet_cond|\w*cond_image|conditioning", lambda: _random(1, 3, 16 * SIDE, 16 * SIDE)),
        (r"conditioning_scale", lambda: 1.0),
        (r"added_cond_kwargs", dict),
        (r"encoder_(?:hidden_states_)?(?:attention_)?mask|text_mask|encoder_hidden_states_mask",
         lambda: torch.ones(1, text, dtype=torch.long)),
        (r"\w*mask", lambda: torch.ones(1, LENGTH, dtype=torch.long)),
        (r"pooled\w*|\w*pooled\w*|clip_\w+pooled|image_embeds|text_embeds", lambda: _random(1, width)),
        (r"encoder_hidden_states\w*|\w*text\w*|\w*prompt\w*|\w*embeds?|\w*states|\w*feats?|context|cap\w*|y",
         lambda: _random(1, text, width)),
    )  # fmt: skip
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            found = value()
            return [found[0]] if "list[" in annotation.lower() and torch.is_tensor(found) and found.ndim == 3 else found
    return _random(1, LENGTH, width) if "Tensor" in annotation else None


def _number(value: Any) -> bool:
    return type(value) is int and value > 0


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


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
    raise ValueError("no tensor of floats in the output")
