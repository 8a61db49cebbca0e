"""How programs other than transformers find a module in ``llm_int8_skip_modules``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def named(module: str, skips: Sequence[str]) -> bool:
    """Whether vLLM and SGLang leave ``module`` unquantized: ``is_layer_skipped_bnb`` of vllm-bnb-plugin 0.0.3
    (quantization/utils.py) and SGLang 0.5.23 (layers/quantization/bitsandbytes.py).

    A key counts if it is one part of the path, or the path's beginning. transformers' patterns and endings do not.
    """
    parts = module.split(".")
    beginnings = {".".join(parts[: count + 1]) for count in range(len(parts))}
    return any(skip in parts or skip in beginnings for skip in skips)


def spelled_out(kept: Iterable[str], skips: Sequence[str]) -> list[str]:
    """The paths among ``kept`` that ``skips`` means by a pattern or an ending only, so that others do not see it."""
    return [path for path in kept if not named(path, skips)]
