"""The command line that makes an output again, for its record: the options that decide bytes, in one spelling."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from qz.quantize.methods import FourBit, Int8, Method
from qz.quantize.settings import Settings


def command(act: str, source: Mapping[str, Any], settings: Settings) -> list[str]:
    """Its words: ``source`` at the commit that was read, or by its name alone, and what is not as by default."""
    words = ["qz", act, source["location"]]
    for option in ("subfolder", "revision"):
        if source.get(option):
            words += [f"--{option}", source[option]]
    return [*words, *_method(settings), *_selection(settings), *_output(settings)]


def _method(settings: Settings) -> Iterator[str]:
    methods: list[Method | None] = [settings.method, *settings.component_methods.values()]
    if settings.method is not None:
        yield f"--{settings.method.name}"
    four_bit = next((each for each in methods if isinstance(each, FourBit)), None)
    if four_bit is not None and four_bit.double_quant:
        yield "--double-quant"
    if four_bit is not None and four_bit.compute_dtype != FourBit("nf4").compute_dtype:
        yield from ("--compute-dtype", four_bit.compute_dtype)
    int8 = next((each for each in methods if isinstance(each, Int8)), None)
    if int8 is not None and int8.threshold != Int8().threshold:
        yield from ("--threshold", str(int8.threshold))
    if settings.importance is not None:
        yield from ("--importance", settings.importance.name)
    else:
        yield from _unless_default(settings, "scales")
    yield from _unless_default(settings, "rounding")


def _selection(settings: Settings) -> Iterator[str]:
    yield from _unless_default(settings, "file")
    yield from _unless_default(settings, "layout")
    if settings.config is not None:
        yield from (
            "--config",
            os.path.basename(settings.config) if os.path.exists(settings.config) else settings.config,
        )
    for lora in settings.loras:
        yield from lora_option(lora.location, lora.file, lora.revision, lora.scale)
    yield from _unless_default(settings, "variant")
    if settings.allow_pickle:
        yield "--allow-pickle"
    for skip in settings.skips:
        yield from ("--skip", skip)
    if not settings.default_skips:
        yield "--no-default-skips"
    if settings.components is not None:
        yield from ("--components", ",".join(settings.components))
    for name, own in settings.component_methods.items():
        yield from ("--component", f"{name}={own.name if own is not None else 'none'}")
    yield from _unless_default(settings, "target_size", "--target-size")
    yield from _unless_default(settings, "max_loss", "--max-loss")
    if settings.scores is not None:
        yield from ("--scores", settings.scores.name)
    if settings.split_groups:
        yield "--split-groups"
    if settings.keep_nonfinite:
        yield "--keep-nonfinite"
    if settings.experts:
        yield "--experts"


def lora_option(location: str, file: str, revision: str | None, scale: float) -> tuple[str, str]:
    """The two words that name a LoRA again; ``location`` is a repository, or the name of a local file or folder."""
    place = location if location.endswith(file) else f"{location}/{file}"
    at = f"@{revision}" if revision else ""
    return "--lora", f"{place}{at}" + (f":{scale:g}" if scale != 1 else "")


def _output(settings: Settings) -> Iterator[str]:
    yield from _unless_default(settings, "dtype")
    yield from _unless_default(settings, "max_shard_bytes", "--max-shard-size")
    if settings.weights_only:
        yield "--weights-only"


def _unless_default(settings: Settings, name: str, option: str = "") -> Iterator[str]:
    value = getattr(settings, name)
    if value != getattr(DEFAULT, name):
        yield from (option or f"--{name}", str(value))


DEFAULT = Settings(None)
