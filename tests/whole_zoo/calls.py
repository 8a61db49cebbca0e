"""A call that a small pipeline answers, found by its signature and by what it says about wrong ones."""

from __future__ import annotations

import inspect
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from PIL import Image

from whole_zoo.input_values import random_values
from whole_zoo.inputs import MENDS, WIDTHS, failing_lines, with_width
from whole_zoo.pipeline_needs import arguments_needed

SECONDS, OF_ONE = 15, 8
"""CPU time for finding a call, and for one attempt."""
SIDES = (64, 32, 128)
_GIVEN = re.compile(
    r"prompt|source_prompt|height|width|(?:\w+_)?num_inference_steps|output_type|max_sequence_length|num_frames|processing_resolution|"
    r"_auto_resize|use_resolution_binning|max_area|audio_(?:length|end)_in_s|text_encoder_out_layers"
)
"""Given wherever a pipeline takes them: they keep a call small."""
_NEVER = re.compile(r"(?:negative_)?ip_adapter\w*|callback\w*|\w*generator|\w*latents|\w+_kwargs|self|return_dict")


def call(pipeline: Any, arguments: Mapping[str, Any]) -> Any:
    """The output as a tuple, with the same random numbers every time."""
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    generator = {"generator": torch.Generator().manual_seed(0)} if "generator" in _parameters(pipeline) else {}
    with torch.no_grad():
        output = pipeline(**arguments, **generator)
    return output.to_tuple() if hasattr(output, "to_tuple") else output


def call_that_runs(pipeline: Any) -> tuple[dict[str, Any] | None, str]:
    """Arguments of a call that gives an output, or why there are none."""
    parameters = _parameters(pipeline)
    end = time.process_time() + SECONDS
    reasons: list[str] = []
    for arguments in _attempts(parameters, arguments_needed(type(pipeline).__name__)):
        side = int(arguments.pop("side"))
        for _ in range(MENDS):
            try:
                with _cpu_time(OF_ONE):
                    call(pipeline, arguments)
                return arguments, ""
            except Exception as error:
                last = " ".join(f"no call found: {type(error).__name__}: {error}".split())
                if time.process_time() > end:
                    return None, _told([*reasons, last])
                if not (_with_missing(arguments, error, parameters, side) or with_width(arguments, str(error))):
                    break
        reasons.append(last)
    return None, _told(reasons)


def _told(reasons: list[str]) -> str:
    """The first that names sizes, or the first."""
    return next((text for text in reasons if any(pattern.search(text) for pattern in WIDTHS)), reasons[0])


def _attempts(parameters: Mapping[str, inspect.Parameter], needed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    names = [name for name in parameters if name in required or _GIVEN.fullmatch(name)]
    pictures = [name for name in ("image", "control_image") if name in parameters and name not in names]
    for side in SIDES:
        for more in ([], pictures) if pictures else ([],):
            values = {name: _value(name, side) for name in [*names, *more]}
            given = {name: value for name, value in values.items() if value is not None}
            given |= {
                name: value(side) if callable(value) else value for name, value in needed.items() if name in parameters
            }
            yield {"side": side, **given}
            if "output_type" in given:
                yield {"side": side, **given, "output_type": "pt"}


def _value(name: str, side: int) -> Any:
    image = Image.fromarray(numpy.full((side, side, 3), 128, dtype=numpy.uint8))
    mask = Image.fromarray(numpy.full((side, side), 255, dtype=numpy.uint8))
    rules: tuple[tuple[str, Any], ...] = (
        (r"batch_size|num_\w+_per_prompt|frame_rate", 1),
        (r"(?:\w+_)?prompt|text", "a cat"),
        (r"height|width", side),
        (r"(?:\w+_)?num_inference_steps", 2),
        (r"output_type", "latent"),
        (r"max_sequence_length", 16),
        (r"num_frames|video_length", 5),
        (r"processing_resolution|control_mode", 0),
        (r"_auto_resize|use_resolution_binning", False),
        (r"max_area", side * side),
        (r"text_encoder_out_layers", (0, 1, 1)),
        (r"audio_(?:length|end)_in_s", 0.1),
        (r"class_labels|token_indices", [1]),
        (r"\w*mask\w*", mask),
        (r"\w*video\w*", [image] * 5),
        (r"(?:\w+_)?images?", image),
        (r"gligen_phrases", ["a cat"]),
        (r"gligen_boxes", [[0.1, 0.1, 0.9, 0.9]]),
        (r"\w*image_embeds|\w*image_embeddings", random_values(1, 41)),
        (r"strength|noise_level", 0),
    )
    return next((value for pattern, value in rules if re.fullmatch(pattern, name)), None)


def _with_missing(
    arguments: dict[str, Any], error: Exception, parameters: Mapping[str, inspect.Parameter], side: int
) -> bool:
    """Give what the message names, or the lines that fail, and was not given."""
    for text in [str(error), *failing_lines(error.__traceback__)]:
        for word in re.findall(r"\w+", text):
            if word not in parameters or word in arguments or _NEVER.fullmatch(word):
                continue
            if (found := _value(word, side)) is not None:
                arguments[word] = found
                return True
    return False


@contextmanager
def _cpu_time(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside, after so much CPU time."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(pipeline.__call__).parameters)
