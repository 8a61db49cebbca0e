"""What an output was made of, as resource descriptors of in-toto: the source and its files, and all else by hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qz import UsageError
from qz.formats.files.file_hash import sha256_in
from qz.formats.files.folder import Folder, place_of
from qz.formats.files.local_folder import LocalFolder
from qz.formats.hub.repository import HubFolder
from qz.formats.malformed import quoted

Descriptor = dict[str, Any]
OTHERS = ("importance", "scores", "config")
"""Settings that name a file by its hash."""


def materials(about: Mapping[str, Any], source: Folder | None, progress: Callable[[int], None]) -> list[Descriptor]:
    """``about``: of the record. ``source``: what it was made of, to name the hashes of its files as well.

    Raises UsageError if that is not the recorded source.
    """
    told, settings = about.get("source") or {}, about.get("settings") or {}
    commit = told.get("revision")
    name = str(told.get("location"))
    whole: Descriptor = {"name": name}
    if commit:
        whole |= {"uri": f"pkg:huggingface/{name}@{commit}", "digest": {"gitCommit": commit}}
    files = _files_on_hub(source, name, commit) if commit else _local_files(about, source, name, progress)
    others = [(key, settings[key]) for key in OTHERS if isinstance(settings.get(key), dict)]
    return [
        whole,
        *files,
        *(_adapter(lora) for lora in settings.get("loras") or ()),
        *(
            {"name": f"{key}: {each.get('file') or each.get('folder')}", "digest": {"sha256": each["sha256"]}}
            for key, each in others
        ),
    ]


def _files_on_hub(source: Folder | None, name: str, commit: str) -> Iterator[Descriptor]:
    if source is None:
        return
    if not isinstance(source, HubFolder) or source.commit != commit:
        raise UsageError(f"{source.location} is not the recorded source, {name}@{commit}. Name that.")
    for path, (algorithm, digest) in _hashes(source):
        yield {
            "name": f"{name}/{path}",
            "uri": f"pkg:huggingface/{name}@{commit}#{path}",
            "digest": {algorithm: digest},
        }


def _hashes(folder: HubFolder, depth: int = 1) -> Iterator[tuple[str, tuple[str, str]]]:
    yield from folder.hashes().items()
    for name in folder.subfolders() if depth else ():
        yield from _hashes(folder.subfolder(name), depth - 1)


def _local_files(
    about: Mapping[str, Any], source: Folder | None, location: str, progress: Callable[[int], None]
) -> Iterator[Descriptor]:
    """Without the source by name and size only: nothing is known of its content."""
    identity = about.get("identity") or {}
    for name, size in (identity.get("files") or {}).items():
        found: Descriptor = {"name": f"{location}/{name}", "annotations": {"bytes": size}}
        if source is not None:
            if not isinstance(source, LocalFolder):
                raise UsageError(f"{source.location} is not the recorded source, the folder {quoted(location)}.")
            found["digest"] = {"sha256": _sha256(source, name, size, progress)}
        yield found


def _sha256(source: LocalFolder, name: str, size: int, progress: Callable[[int], None]) -> str:
    folder, base = place_of(source, name)
    if folder.sizes().get(base) != size:
        raise UsageError(
            f"{source.location} is not the recorded source: {quoted(name)} is missing or has another size."
        )
    found = sha256_in(folder, base, size, progress)
    if folder.promised is not None:
        folder.promised.require_hash(base, found, folder.location)
    return found


def _adapter(lora: Mapping[str, Any]) -> Descriptor:
    at = f"@{lora['revision']}" if lora.get("revision") else ""
    return {
        "name": f"LoRA: {lora['location']}/{lora['file']}{at}",
        "digest": {"sha256": lora["sha256"]},
        "annotations": {"scale": lora["scale"], "config_sha256": lora.get("config_sha256")},
    }
