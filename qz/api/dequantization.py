"""``dequantize``: options in, the report of the run out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from qz import UsageError
from qz.api.conversions import ConversionRequest, once_more_if_lost, published
from qz.api.effects import Asked
from qz.api.paths import AnyPath
from qz.formats.global_settings import settings_restored
from qz.formats.tensors.shards import DEFAULT_SHARD_BYTES
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.settings import IfExists, Settings

if TYPE_CHECKING:
    from qz.api.conversions import Converted, Publishing
    from qz.quantize.conversion import Conversion


@settings_restored()
@once_more_if_lost
def dequantize(
    source: AnyPath,
    output: AnyPath | None = None,
    *,
    file: str | None = None,
    config: AnyPath | None = None,
    lora: Sequence[str] = (),
    dtype: str = "auto",
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    against: AnyPath | None = None,
    max_shard_bytes: int | None = None,
    weights_only: bool = False,
    if_exists: IfExists = "error",
    resume: bool = True,
    fsync: bool = True,
    device: str = "auto",
    threads: int | None = None,
    download: bool = False,
    push: str | None = None,
    push_subfolder: str | None = None,
    push_only: bool = False,
    public: bool | None = None,
    part: str | None = None,
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> Converted:
    """Turn a quantized model or pipeline back into an ordinary one.

    ``against`` names the original: what quantization lost is measured and becomes part of the summary. ``lora`` names
    LoRAs to fuse into the dequantized weights. The other arguments are those of ``quantize``. Raises ``qz.QzError`` as
    ``quantize`` does.
    """
    asked = Asked.of(dequantize, locals())
    on_progress(Progress("Reading headers"))
    from qz.formats.output.storage.beside import reachable

    if lora and against is not None:
        raise UsageError("--against measures what quantization lost, and --lora changes the weights. Use one of them.")
    settings = Settings(
        None,
        dtype,
        max_shard_bytes=DEFAULT_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes,
        device=device,
        threads=threads or 0,
        weights_only=weights_only,
        variant=variant,
        file=file,
        config=str(config) if config is not None else None,
        allow_pickle=allow_pickle,
    )
    request = ConversionRequest(
        source=str(source),
        subfolder=subfolder,
        revision=revision,
        lora=lora,
        output=reachable(Path(output)) if output is not None else None,
        if_exists=if_exists,
        resume=resume,
        fsync=fsync,
        download=download,
        push=push,
        push_subfolder=push_subfolder,
        push_only=push_only,
        public=public,
        part=part,
        measured=against is not None,
        dry_run=dry_run,
        on_progress=on_progress,
    )
    with request.opened(asked, settings) as (conversion, publishing):
        return _dequantized(conversion, publishing, asked, against)


def _dequantized(
    conversion: Conversion, publishing: Publishing | None, asked: Asked, against: AnyPath | None
) -> Converted:
    """The report of the conversion, compared with ``against``, and published."""
    from qz.formats.files.folder import is_pipeline
    from qz.formats.source import opened
    from qz.quantize.pipelines.plan import plan_way_back

    source = conversion.source
    if is_pipeline(source.folder):
        return published(conversion.pipeline(plan_way_back), conversion, publishing)
    from qz.quantize.planning.dequantization import plan_dequantization
    from qz.quantize.streaming.measuring.measure import AgainstOriginal, original_checkpoint

    allow_pickle = conversion.settings.allow_pickle
    with nullcontext() if against is None else opened(str(against), allow_pickle=allow_pickle) as original:
        measure = (
            (lambda checkpoint: AgainstOriginal(original_checkpoint(original.folder, checkpoint, source.subfolder)))
            if original is not None
            else None
        )
        if source.file is None:
            done: Converted = conversion.model(plan_dequantization, measure)
        else:
            done = conversion.file(
                plan_dequantization,
                plan_way_back,
                measure,
                require=lambda several: asked.require(one_inside=not several),
            )
        return published(done, conversion, publishing, original)
