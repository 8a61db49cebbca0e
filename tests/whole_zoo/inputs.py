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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import torch

from whole_zoo.diffusers_inputs import NO_FORWARD
from whole_zoo.guesses import guesses
from whole_zoo.input_values import by_name, is_count, random_values

TRIES, SECONDS = 90, 5.0
"""Attempts, and CPU time, for one model."""
OF_DTYPES = re.compile(r"dtype|[Bb][Ff]loat16|scalar type")
"""What libraries say of numbers that are too narrow for them."""
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
            return next(_floats(model.eval()(**_cast(self.values, model.dtype))))

    def all_of(self, model: Any) -> list[torch.Tensor]:
        """Every tensor of floats of such a pass, the hidden states too where the class gives them."""
        assert self.values is not None
        parameters = inspect.signature(model.forward).parameters
        taken = "output_hidden_states" in parameters or any(
            each.kind is each.VAR_KEYWORD for each in parameters.values()
        )
        more = {"output_hidden_states": True} if taken else {}
        torch.manual_seed(0)
        with torch.no_grad():
            return [*_floats(model.eval()(**_cast(self.values, model.dtype), **more))]


def inputs_that_run(model: Any) -> Inputs:
    """The first arguments that the model takes and that give an output."""
    if (why := NO_FORWARD.get(type(model).__name__)) is not None:
        return Inputs(None, f"cannot be called by itself: {why}")
    if "inference_session" in inspect.signature(model.forward).parameters:
        return Inputs(None, "cannot be called by itself: runs on a session that holds a film and what was found in it")
    if type(model).forward is torch.nn.Module.forward:
        return Inputs(None, "cannot be called by itself: has no forward of its own, only generate")
    end = time.process_time() + SECONDS
    reasons: dict[str, None] = {}
    sizes = _sizes(model)
    parameters = inspect.signature(model.forward).parameters
    for guess in islice(guesses(model, parameters, sizes), TRIES):
        values = dict(guess)
        for _ in range(MENDS):
            if time.process_time() > end:
                return Inputs(None, _told(reasons))
            try:
                Inputs(values).run(model)
                return Inputs(values)
            except Exception as error:
                last = " ".join(f"{type(error).__name__}: {error}".split())[:100]
                if OF_DTYPES.search(last):
                    reasons[last] = None  # told first: what is changed for it may end in another error
                if not _mended(values, error, parameters, sizes):
                    break
        reasons[last] = None
    return Inputs(None, _told(reasons))


def _told(reasons: Iterable[str]) -> str:
    return f"no input found: {'; '.join([*reasons][:3]) or 'none is known by the names of the arguments'}"


def _mended(
    values: dict[str, Any], error: Exception, parameters: Mapping[str, inspect.Parameter], sizes: dict[str, Any]
) -> bool:
    return (
        _with_placeholders(values, str(error), parameters, sizes)
        or _without_cache(values, error, parameters)
        or _with_missing(values, error, parameters, sizes)
        or with_width(values, str(error))
        or _with_axes(values, error)
    )


def _with_placeholders(
    values: dict[str, Any], message: str, parameters: Mapping[str, inspect.Parameter], sizes: dict[str, Any]
) -> bool:
    """Put a token into the text for each feature of a picture or sound, as the class counts them."""
    found = re.search(r"(\w+) features.* tokens.* tokens: (?P<tokens>\d+),? features:? (?P<features>\d+)", message)
    if found is None or "input_ids" not in values:
        return False
    wanted = int(found["features"])
    if int(found["tokens"]) == wanted:  # of features, it counts the numbers
        wanted //= sizes["hidden_size"]
    kinds = dict.fromkeys([found[1].lower(), "image", "audio"])
    names = [f"{kind}_{part}" for kind in kinds for part in ("token_id", "token_index")] + [
        "media_placeholder_token_id"
    ]
    token = next((sizes[name] for name in names if is_count(sizes.get(name))), None)
    if token is None:
        return False
    old = values["input_ids"]
    text, marks = old[old != token], torch.full((wanted,), token)
    ids = torch.cat([text[:2], marks, text[2:]]).unsqueeze(0)
    for name in [name for name, value in values.items() if torch.is_tensor(value) and value.shape == old.shape]:
        del values[name]  # a mask, for one; given again where it is missed
    values["input_ids"] = ids
    if "mm_token_type_ids" in parameters:
        values["mm_token_type_ids"] = (ids == token).long()
    return True


def _without_cache(values: dict[str, Any], error: Exception, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Ask for no cache where it is in the way: that of a model without a layer of attention, for one."""
    taken = "use_cache" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    frames = traceback.extract_tb(error.__traceback__)
    if "use_cache" in values or not taken or not any(frame.filename.endswith("cache_utils.py") for frame in frames):
        return False
    values["use_cache"] = False
    return True


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


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if torch.is_tensor(value):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(each, dtype) for key, each in value.items()}
    return type(value)(_cast(each, dtype) for each in value) if isinstance(value, list | tuple) else value


def _floats(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of floats in an output, the outer ones first. Raises ValueError if there are none."""
    waiting, found = [output], False
    while waiting:
        value = waiting.pop(0)
        if torch.is_tensor(value):
            if value.is_floating_point():
                found = True
                yield value
        elif isinstance(value, Mapping):
            waiting += list(value.values())
        elif isinstance(value, list | tuple):
            waiting += list(value)
        elif hasattr(value, "__dict__"):
            waiting += list(vars(value).values())
    if not found:
        raise ValueError("no tensor of floats in the output")
