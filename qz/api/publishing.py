"""``push`` and ``merge``: finished outputs to the Hub, and parts to an output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qz.api.conversions import destination
from qz.api.effects import Asked
from qz.api.paths import AnyPath
from qz.formats.global_settings import settings_restored
from qz.progress import OnProgress, Progress, ignore

if TYPE_CHECKING:
    from qz.formats.publish.destination import PushResult
    from qz.quantize.merging.merge import Merged


@settings_restored()
def push(
    folder: AnyPath,
    repo_id: str,
    *,
    subfolder: str | None = None,
    public: bool | None = None,
    branch: str = "main",
    create_pr: bool = False,
    replace: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> PushResult:
    """Publish a checkpoint on the Hub: verified first, then weights and config in one commit, with a model card.

    ``public`` True or False decides who may see a new repository (None: private); ``replace`` allows weights that qz
    did not make to be replaced. Raises ``qz.QzError``; then nothing has become visible.
    """
    on_progress(Progress("Reading headers"))
    from qz.formats.publish.destination import Destination
    from qz.formats.publish.push import push as send

    private = None if public is None else not public
    to = Destination(repo_id, subfolder or "", branch, create_pr, private, message, replace)
    return send(Path(folder), to, dry_run=dry_run, progress=on_progress)


@settings_restored()
def merge(
    output: AnyPath,
    *,
    overwrite: bool = False,
    push: str | None = None,
    push_subfolder: str | None = None,
    public: bool | None = None,
    fsync: bool = True,
    threads: int | None = None,
    on_progress: OnProgress = ignore,
) -> Merged:
    """Complete ``output`` from what ``quantize(…, part="1/N")`` to ``part="N/N"`` made, after comparing every hash.

    ``push`` publishes it. Where the parts sent their weights there (``push_only``), one commit makes all of it visible,
    and no output is here. Nothing is left of the parts. A merge that was interrupted goes on, and one that is repeated
    has nothing to do. Raises ``qz.QzError``; then the output is as it was, and the parts are kept.
    """
    asked = Asked.of(merge, locals())
    on_progress(Progress("Reading headers"))
    from qz.formats.output.storage.disk import Disk
    from qz.quantize.merging.merge import are_parts_on_hub
    from qz.quantize.merging.merge import merge as run

    asked.require(push=push is not None)
    to, disk = destination(push, push_subfolder, public), Disk(durable=fsync)
    asked.require(parts_here=not are_parts_on_hub(Path(output), disk))
    return run(Path(output), overwrite=overwrite, to=to, disk=disk, threads=threads or 0, progress=on_progress)
