"""Values that need no conversion are taken without pydantic, which Typer converts with and which imports slowly."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from typer.core import TyperCommand, TyperGroup


class LeanCommand(TyperCommand):
    """A command that leaves to Typer what must be converted, and what is wrong: the messages are Typer's."""

    def get_params(self, ctx: Any) -> Any:
        return lean(super().get_params(ctx))


class LeanGroup(TyperGroup):
    """A group that does so with the options before the command."""

    def get_params(self, ctx: Any) -> Any:
        return lean(super().get_params(ctx))


def lean(params: list[Any]) -> list[Any]:
    """``params``, each of which looks at its value before Typer does."""
    for param in params:
        if is_described(param) and not isinstance(param.process_value, partial):
            param.process_value = partial(process_value, param, param.process_value)
    return params


def is_described(param: Any) -> bool:
    """Whether Typer, from 0.29 on, tells what this module reads about an option; else its values are left to Typer."""
    descriptor = getattr(param, "type_descriptor", None)
    return hasattr(descriptor, "annotation") and hasattr(getattr(descriptor, "parameter_info", None), "parser")


def process_value(param: Any, typers_own: Callable[..., Any], context: Any, value: Any) -> Any:
    """What ``typers_own(context, value)`` returns or raises."""
    try:
        converted = as_it_stands(param, value)
    except ValueError:
        return typers_own(context, value)
    return converted if param.callback is None else param.callback(context, param, converted)


def as_it_stands(param: Any, value: Any) -> Any:
    """The value for the command; ValueError if it needs more than a look, or if the option's parser refuses it."""
    annotation, info = param.type_descriptor.annotation, param.type_descriptor.parameter_info
    if value is None and not param.required:
        return () if param.multiple else None
    if value is not None and info.parser is not None and not param.multiple:
        return info.parser(value)
    if annotation in (bool, str, int, float) and type(value) is annotation:
        return value
    if annotation in (int, float) and is_plain_number(value) and info.min is info.max is None:
        return annotation(value)
    if annotation == list[str] and isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return list(value)
    if get_origin(annotation) is Literal and value in get_args(annotation):
        return value
    if annotation is Path and isinstance(value, str) and not is_examined(value, info):
        return Path(value)
    raise ValueError


def is_plain_number(value: Any) -> bool:
    """Whether it is a text of digits, with a point or without, which Typer and Python read alike."""
    return isinstance(value, str) and re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", value) is not None


def is_examined(path: str, info: Any) -> bool:
    """Whether Typer has more to do with a path than to make it one, or something to say against it."""
    any_kind = info.file_okay and info.dir_okay and not (info.exists or info.writable or info.resolve_path)
    return not any_kind or (os.path.exists(path) and not os.access(path, os.R_OK))
