"""``qz verify``: an output against its record, or against what its source becomes with the record's settings."""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from qz import MalformedInput, UsageError
from qz.formats.malformed import quoted
from qz.formats.output.recorded.record import RECORD, Record, read_record, unhashed
from qz.formats.source import OpenedSource, local_path, notes_of, opened
from qz.progress import OnProgress, ignore
from qz.quantize.inspection.verification import verify as compare_hashes
from qz.quantize.verification.report import Verification

if TYPE_CHECKING:
    from qz.formats.files.folder import Folder
    from qz.quantize.settings import Settings
    from qz.quantize.verification.recorded_settings import Given


ALLOW_PICKLE = "--allow-pickle"
GPTQ = (
    "GPTQ's sums are those of PyTorch's BLAS, so on another machine some codes may differ: that cannot be told from "
    "damage here. Verify on a machine of the kind that made it, or compare with the recorded hashes."
)


def verify_record(output: OpenedSource, progress: OnProgress = ignore) -> Verification:
    """Every byte against the hashes that were recorded when it was written."""
    begun = time.monotonic()
    verified, problems = compare_hashes(output.folder, output.root, progress)
    seconds = time.monotonic() - begun
    return Verification(output.location, None, None, verified, None, problems, notes=output.notes, seconds=seconds)


def verify_against(
    output: OpenedSource,
    location: str,
    *,
    given: Given,
    revision: str | None = None,
    file: str | None = None,
    sample: float | None = None,
    resume: bool = True,
    progress: OnProgress = ignore,
) -> Verification:
    """Every tensor and file against what the source at ``location`` becomes; ``sample``: a share of them, 0 to 1.

    ``revision``: of the source, by default the recorded commit where it has the recorded name. ``file``: the one file
    of it that was read, if that is not as recorded.
    """
    from qz.quantize.verification.recomputation import recompute
    from qz.quantize.verification.recorded_settings import recorded_settings

    if sample is not None and not 0 < sample <= 1:
        raise UsageError(f"--sample {sample:%} is not a share of more than 0 % and at most 100 %.")
    begun = time.monotonic()
    record = _record(output.folder)
    settings = recorded_settings(record.about, given)
    with _source(location, revision, file, record.about, settings) as source:
        _require_alike(record.about, source, settings)
        commit = source.folder.identity().get("commit")
        with _pickles_asked_for(output.location, location, record.about):
            found = recompute(
                output.folder,
                record,
                source,
                settings,
                sample=sample,
                seed=secrets.randbits(32),
                resume=resume,
                progress=progress,
            )
        loras = notes_of(*(lora.folder for lora in settings.loras))
        notes = (*output.notes, *source.notes, *loras, *found.notes, *_other_versions(record.about))
        if found.differences and settings.rounding == "gptq":
            notes = (*notes, GPTQ)
    return Verification(
        output.location,
        location,
        commit,
        None,
        found,
        unhashed(record),
        sample,
        recorded_device=str(record.about.get("bytes_of") or record.about.get("device", "")),
        notes=notes,
        seconds=time.monotonic() - begun,
    )


def _record(folder: Folder) -> Record:
    record = read_record(folder)
    if record is None:
        raise MalformedInput(
            f"{folder.location} has no {RECORD}, so how it was made is not known. Only what qz wrote can be recomputed."
        )
    return record


def _source(
    location: str, revision: str | None, file: str | None, about: Mapping[str, Any], settings: Settings
) -> AbstractContextManager[OpenedSource]:
    told = about.get("source") or {}
    if revision is None and told.get("location") == location:
        revision = told.get("revision")
    path = local_path(location)
    if file is None and (path is None or path.is_dir()):
        file = settings.file
    # Not held to its own record: the comparison finds what differs, and a sample reads little.
    allow_pickle = settings.allow_pickle
    return opened(location, told.get("subfolder"), revision, allow_pickle=allow_pickle, file=file, held=False)


@contextmanager
def _pickles_asked_for(output: str, source: str, about: Mapping[str, Any]) -> Iterator[None]:
    """Where pickles are refused, as nobody allowed them here: say so if they were when the output was made."""
    try:
        yield
    except MalformedInput as error:
        if ALLOW_PICKLE not in (about.get("command") or ()) or ALLOW_PICKLE not in str(error):
            raise
        command = shlex.join(["qz", "verify", output, "--against", source, ALLOW_PICKLE])
        raise MalformedInput(
            f"{source} has only pickle weights, which can run code, and {output} was made of them with {ALLOW_PICKLE}. "
            f"qz reads them, and runs nothing of them, if you say so here, too: `{command}`."
        ) from error


def _require_alike(about: Mapping[str, Any], source: OpenedSource, settings: Settings) -> None:
    """Raise UsageError for a folder where a single file was read, or the other way round."""
    name = str((about.get("source") or {}).get("location"))
    given = source.file or source.folder.named_file
    if given is None and name.endswith((".safetensors", ".gguf")):
        raise UsageError(f"It was made from a single file, {quoted(name)}. Name that file, or add --file NAME.")
    if settings.config is not None and source.file is None:
        raise UsageError("--config says what a single file is a model of. Name such a file, or leave it out.")


def _other_versions(about: Mapping[str, Any]) -> tuple[str, ...]:
    """What of the libraries is not as it was."""
    from qz import __version__
    from qz.quantize.libraries.examine import library_versions

    then = {"qz": about.get("qz"), **(about.get("versions") or {})}
    now = {"qz": __version__, **library_versions()}
    unlike = [f"{name} {then.get(name)} → {version}" for name, version in now.items() if then.get(name) != version]
    return (f"it was made with other versions: {', '.join(unlike)}",) if unlike else ()
