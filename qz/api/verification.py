"""``verify``: whether an output is what its record says, or what its source becomes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qz import UsageError
from qz.api.paths import AnyPath
from qz.formats.borrowed import settings_given_back
from qz.progress import OnProgress, ignore

if TYPE_CHECKING:
    from qz.quantize.verification.report import Verification


@settings_given_back()
def verify(
    output: AnyPath,
    against: AnyPath | None = None,
    *,
    revision: str | None = None,
    importance: AnyPath | None = None,
    allow_pickle: bool = False,
    sample: float | None = None,
    device: str = "auto",
    threads: int | None = None,
    on_progress: OnProgress = ignore,
) -> Verification:
    """Compare what qz wrote, a folder or a repository, with the hashes in its record, or with its source.

    With ``against``, every tensor is computed once more from that source, at ``revision``, with the recorded settings,
    and compared; nothing is written. ``sample`` 0.05 takes weights at random until they have 5 % of the bytes.
    ``importance`` names the file that was used, if one was; ``allow_pickle`` is that of ``quantize``. What differs is
    part of the value (``intact``), not raised.
    """
    from qz.formats.source import opened
    from qz.quantize.verification.verify import verify_against, verify_record

    if against is None and (sample, importance, revision) != (None, None, None):
        raise UsageError("--sample, --importance and --revision belong to --against SOURCE.")
    with opened(str(output)) as found:
        if against is None:
            return verify_record(found, on_progress)
        return verify_against(
            found,
            str(against),
            revision=revision,
            importance=Path(importance) if importance is not None else None,
            allow_pickle=allow_pickle,
            sample=sample,
            device=device,
            threads=threads or 0,
            progress=on_progress,
        )
