"""``load``: a model or a pipeline as an object of its library."""

from __future__ import annotations

from typing import Any

from qz.api.paths import AnyPath


def load(
    source: AnyPath,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    device: str = "auto",
    **components: Any,
) -> Any:
    """A model or a pipeline from a folder, as an object of its library: what qz wrote, or ``save_pretrained``.

    Where ``from_pretrained`` loads it, that is what this calls. Besides, it loads models whose experts are quantized
    (``quantize(experts=True)``), which transformers cannot, and quantized models and pipelines of diffusers without a
    GPU, where diffusers refuses them. ``device`` is a torch device; auto takes the first GPU, if there is one.
    ``components`` of a pipeline are taken in place of its own, or where it has none, as by ``from_pretrained``.

    Raises ``qz.QzError``: MissingInput, MalformedInput, Unsupported, UsageError; and what the libraries raise.
    """
    from qz.quantize.loading.load import load as run

    return run(str(source), subfolder, variant, device, components)
