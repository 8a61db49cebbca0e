"""``attest``: what can be said of a finished output to others."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qz.api.effects import Asked
from qz.api.paths import AnyPath
from qz.formats.global_settings import settings_restored
from qz.progress import OnProgress, Progress, ignore

if TYPE_CHECKING:
    from qz.formats.attestation.attest import Attested


@settings_restored()
def attest(
    output: AnyPath,
    source: AnyPath | None = None,
    *,
    revision: str | None = None,
    sign_key: AnyPath | None = None,
    on_progress: OnProgress = ignore,
) -> Attested:
    """Write ``qz.statement.json`` beside a finished output: an in-toto statement of its files and of how it was made.

    ``source`` is what it was made of, to state the hashes of its files too; a repository on the Hub is read at the
    recorded commit, unless ``revision`` says otherwise. ``sign_key`` names an elliptic-curve key by which model-signing
    signs the folder.
    Raises ``qz.QzError``, as where the output is not as qz wrote it.
    """
    asked = Asked.of(attest, locals())
    on_progress(Progress("Reading headers"))
    from qz.formats.attestation.attest import attest as state
    from qz.formats.files.local_folder import LocalFolder
    from qz.formats.output.recorded.record import read_record
    from qz.formats.source import local_path, opened

    asked.require(named=source is not None)
    if source is not None:
        replace(asked, source=str(source)).require(hub=local_path(str(source)) is None)
    record = read_record(LocalFolder(Path(output)))
    told = (record.about.get("source") or {}) if record is not None else {}
    opening = (
        nullcontext()
        if source is None
        else opened(str(source), told.get("subfolder"), revision or told.get("revision"), allow_pickle=True)
    )
    with opening as found:
        key = Path(sign_key) if sign_key is not None else None
        return state(Path(output), found.folder if found is not None else None, key, on_progress)
