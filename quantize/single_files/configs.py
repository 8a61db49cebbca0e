"""Where the configs of a file's models come from: a folder or repository of one model, or of a pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qz import HubUnreachable, MissingInput, PermissionRefused, Unsupported, UsageError
from qz.formats.checkpoint.other_contents.original_layouts import original_layout
from qz.formats.checkpoint.survey import read_config
from qz.formats.files.folder import PIPELINE_INDEX, Folder, is_pipeline, read_file
from qz.formats.json_files import MAX_BYTES
from qz.formats.output.companions import settings
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.importing.boundary import describe
from qz.quantize.libraries.importing.isolation import isolated

if TYPE_CHECKING:
    from qz.quantize.single_files.tensors import OriginalFile

OpenConfig = Callable[[str], Folder]
DENOISERS = ("transformer", "unet")


def open_configs(file: OriginalFile, config_from: str | None, open_config: OpenConfig) -> Folder:
    """The folder or repository that ``config_from`` names; without it the one that diffusers takes for such a file.

    Raises MissingInput where there is none, and Unsupported for a file that diffusers does not know.
    """
    if config_from is not None:
        return open_config(config_from)
    named = _default(file)
    try:
        return open_config(named)
    except (MissingInput, HubUnreachable, PermissionRefused) as error:
        raise type(error)(
            f"{error} The config of the model comes from there, as in diffusers: name another folder or repository of "
            "the same model with --config."
        ) from error


def _default(file: OriginalFile) -> str:
    with lean_imports.lean_imports(), isolated():
        from qz.quantize.libraries.diffusers import single_file

        try:
            named = single_file.default_source(file.specs)
        except (LookupError, ValueError, AttributeError) as error:
            raise Unsupported(
                f"{file.location} is not a file that diffusers knows ({describe(error)}). Name the folder or "
                "repository of its config with --config."
            ) from error
    if named is None:
        layout = original_layout(file.tensors)
        tool = f" names its tensors as {layout['tool']} does, but" if layout is not None else ""
        raise Unsupported(
            f"{file.location}{tool} is no single file in which diffusers can tell the model. If it is one of the files "
            "of a model's folder, name the folder; if not, the folder or repository of its config with --config."
        )
    return named


def denoiser_config(folder: Folder) -> dict[str, Any]:
    """The config.json of the denoiser in a folder of one model, or of a pipeline."""
    folder = _denoiser(folder)
    config = read_config(folder)
    if not isinstance(config.get("_class_name"), str):
        raise UsageError(
            f"{folder.location}/config.json names no class of diffusers, and only its models are read from single "
            "files. Name the folder of a transformers model as the source; for another model, its config with --config."
        )
    return config


def config_digest(folder: Folder) -> str:
    """The SHA-256 of a model's config.json; of a pipeline's folder, of all the settings that are taken from it."""
    if not is_pipeline(folder):
        return hashlib.sha256(read_file(_denoiser(folder), "config.json", MAX_BYTES)).hexdigest()
    digest = hashlib.sha256()
    for name in ("", *folder.subfolders()):
        inner = folder.subfolder(name) if name else folder
        for each in sorted({PIPELINE_INDEX, *(found.file for found in settings(inner))} & inner.sizes().keys()):
            digest.update(f"{name}/{each} {inner.sizes()[each]}\n".encode() + read_file(inner, each, MAX_BYTES))
    return digest.hexdigest()


def _denoiser(folder: Folder) -> Folder:
    if "config.json" in folder.sizes():
        return folder
    inside = next((name for name in DENOISERS if name in folder.subfolders()), None)
    if inside is None:
        raise MissingInput(
            f"{folder.location} has no config.json, and no {' or '.join(DENOISERS)} with one. Name the folder of the "
            "model, or of its pipeline, with --config."
        )
    return folder.subfolder(inside)
