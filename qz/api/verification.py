"""``verify``: whether an output is what its record says, or what its source becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qz.api.effects import Asked
from qz.api.paths import AnyPath
from qz.formats.global_settings import settings_restored
from qz.progress import OnProgress, ignore

if TYPE_CHECKING:
    from qz.quantize.verification.report import Verification


@settings_restored()
def verify(
    output: AnyPath,
    against: AnyPath | None = None,
    *,
    revision: str | None = None,
    file: str | None = None,
    config: AnyPath | None = None,
    lora: Sequence[str] = (),
    importance: AnyPath | None = None,
    allow_pickle: bool = False,
    sample: float | None = None,
    resume: bool = True,
    statement: AnyPath | None = None,
    public_key: AnyPath | None = None,
    device: str = "auto",
    threads: int | None = None,
    on_progress: OnProgress = ignore,
) -> Verification:
    """Compare what qz wrote, a folder or a repository, with the hashes in its record, or with its source.

    With ``against``, every tensor is computed once more from that source, at ``revision``, with the recorded settings,
    and compared; nothing is written. ``sample`` 0.05 takes weights at random until they have 5 % of the bytes. What an
    interrupted comparison found equal is not compared again unless ``resume`` is false.
    ``importance``, ``lora``, ``config`` and ``file`` name what was used, if it was, and ``allow_pickle`` is that of
    ``quantize``. ``statement`` names an in-toto statement whose hashes count instead of the record's, ``public_key``
    the key that the folder has to be signed by. What differs is part of the value (``intact``), not raised.
    """
    asked = Asked.of(verify, locals())
    from qz.formats.source import local_path, opened, opened_loras
    from qz.quantize.verification.attested import verify_stated, with_signature
    from qz.quantize.verification.recorded_settings import Given
    from qz.quantize.verification.verify import verify_against, verify_record

    asked.require(against=against is not None, files=against is None)
    if against is not None:
        replace(asked, source=str(against)).require(hub=local_path(str(against)) is None)
    with opened(str(output), held=False) as found:
        if against is None:
            stated = Path(statement) if statement is not None else None
            done = verify_record(found, on_progress) if stated is None else verify_stated(found, stated, on_progress)
            return done if public_key is None else with_signature(done, found, Path(public_key))
        with opened_loras(lora) as loras:
            given = Given(
                importance=Path(importance) if importance is not None else None,
                loras=loras,
                config=str(config) if config is not None else None,
                allow_pickle=allow_pickle,
                device=device,
                threads=threads or 0,
            )
            return verify_against(
                found,
                str(against),
                given=given,
                revision=revision,
                file=file,
                sample=sample,
                resume=resume,
                progress=on_progress,
            )
