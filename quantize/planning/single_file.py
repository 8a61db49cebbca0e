"""A model in one file, in the names of its own code or of ComfyUI, as a checkpoint in diffusers' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qz import HubUnreachable, MissingInput, PermissionRefused, Unsupported, UsageError
from qz.formats.checkpoint.layouts import original_layout
from qz.formats.checkpoint.problems import require_none
from qz.formats.checkpoint.survey import Checkpoint, StoredTensor, survey_file
from qz.formats.decoded import CODES, Decoded, Joined, Strided, joined_part
from qz.formats.folder import Folder, read_file
from qz.formats.json_files import MAX_BYTES, read_json
from qz.formats.safetensors import BITS
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES, TensorSpec, torch_name
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.importing.boundary import describe
from qz.quantize.libraries.importing.isolation import isolated
from qz.quantize.libraries.importing.untrusted_config import without_code

if TYPE_CHECKING:
    from qz.quantize.libraries.diffusers.single_file import Converted

OpenConfig = Callable[[str], Folder]
DENOISERS = ("transformer", "unet")
_ELSEWHERE = ("first_stage_model.", "cond_stage_model.", "conditioner.embedders.", "text_encoders.")


def open_single_file(folder: Folder, file: str, config_from: str | None, open_config: OpenConfig) -> Checkpoint:
    """The checkpoint of the diffusers class that ``file`` holds the weights of.

    ``config_from`` names the folder or repository of the model's config, or of its pipeline; without it the one that
    diffusers takes for such a file is opened by ``open_config``. Raises MissingInput where there is no config,
    Unsupported for a file that diffusers does not read, and MalformedInput for one that breaks the rules.
    """
    stored, metadata, problems = survey_file(folder, file)
    require_none(folder.location, problems, but=("original-layout",))
    tensors = {name: tensor for name, tensor in stored.items() if isinstance(tensor, StoredTensor)}
    where = f"{folder.location}/{file}"
    specs = {name: TensorSpec(_torch_name(tensor), tensor.shape) for name, tensor in tensors.items()}
    with lean_imports.lean_imports(), isolated():
        from qz.quantize.libraries.diffusers import single_file

        named = config_from
        if named is None:
            try:
                named = single_file.default_source(specs)
            except (LookupError, ValueError, AttributeError, IndexError) as error:
                raise Unsupported(f"{where} is not a file that diffusers knows ({describe(error)}).") from error
    if named is None:
        layout = original_layout(tensors)
        tool = f" names its tensors as {layout['tool']} does, but" if layout is not None else ""
        raise Unsupported(
            f"{where}{tool} is no single file in which diffusers can tell the model. Name the folder or repository of "
            "its config with --config."
        )
    config = _config(named, open_config, asked=config_from is not None)
    class_name = str(config["_class_name"])
    harmless, _ = without_code(config)
    with lean_imports.lean_imports(), isolated():
        try:
            made = single_file.convert(class_name, harmless, specs)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
            raise Unsupported(
                f"{where} cannot be read as a {class_name}, of which {named} is: {describe(error)}. Name the folder or "
                "repository of the right model with --config."
            ) from error
    own = {name: _tensor(name, each, tensors) for name, each in made.items()}
    used = {name for each in made.values() for name in _sources(each)}
    left = sorted(set(tensors) - used)
    elsewhere = sorted({name.split(".")[0] for name in left if name.startswith(_ELSEWHERE)})
    if elsewhere:
        raise Unsupported(
            f"{where} holds a whole pipeline ({', '.join(elsewhere)}), not one model. Open it once with diffusers' "
            "from_single_file(), save it with save_pretrained(), and use that folder."
        )
    return Checkpoint(
        folder=folder,
        config=config,
        library="diffusers",
        architecture=class_name,
        variant=None,
        files=(file,),
        sizes={file: folder.sizes()[file]},
        tensors={**{name: tensors[name] for name in left}, **own},  # what the class has no use for will be told
        header_metadata={file: dict(metadata)},
        original=tensors,
    )


def _config(named: str, open_config: OpenConfig, *, asked: bool) -> dict[str, Any]:
    """The config.json of the denoiser in what ``named`` names: a folder of one model, or of a pipeline."""
    try:
        raw, where = read_config(named, open_config)
    except (MissingInput, HubUnreachable, PermissionRefused) as error:
        if asked:
            raise
        raise type(error)(
            f"{error} The config of the model comes from there, as in diffusers: name another folder or repository of "
            "the same model with --config."
        ) from error
    config = read_json(raw, where)
    if not isinstance(config.get("_class_name"), str):
        raise UsageError(f"{where} names no class of diffusers. Name another with --config.")
    return config


def read_config(named: str, open_config: OpenConfig) -> tuple[bytes, str]:
    """The config.json of a denoiser, as it is stored, and where that is."""
    folder = open_config(named)
    try:
        if "config.json" not in folder.sizes():
            inside = next((name for name in DENOISERS if name in folder.subfolders()), None)
            if inside is None:
                raise MissingInput(
                    f"{folder.location} has no config.json, and no {' or '.join(DENOISERS)} with one. Name the folder "
                    "of the model, or of its pipeline, with --config."
                )
            folder = folder.subfolder(inside)
        return read_file(folder, "config.json", MAX_BYTES), f"{folder.location}/config.json"
    finally:
        folder.close()


_FLOATS_8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


def _torch_name(tensor: StoredTensor) -> str:
    return _FLOATS_8.get(tensor.dtype) or torch_name(tensor.dtype, tensor.name)


def _tensor(name: str, converted: Converted, tensors: Mapping[str, StoredTensor]) -> StoredTensor | Decoded:
    """A tensor of the model as it lies in the file."""
    dtype = {name: own for own, name in _FLOATS_8.items()}.get(converted.dtype) or SAFETENSORS_NAMES[converted.dtype]
    width = BITS[dtype] // 8
    if not isinstance(converted.content, tuple):
        view = converted.content
        source = tensors[view.source]
        begin = view.start * width
        whole = source._replace(offset=source.offset + begin, nbytes=source.nbytes - begin, shape=())
        return Decoded(name, dtype, converted.shape, {CODES: whole}, Strided(view.strides))
    parts = [
        tensors[piece.source]._replace(
            offset=tensors[piece.source].offset + piece.start * width, nbytes=piece.count * width, shape=(piece.count,)
        )
        for piece in converted.content
    ]
    if len(parts) == 1:
        return StoredTensor(name, dtype, converted.shape, parts[0].file, parts[0].offset, parts[0].nbytes)
    return Decoded(name, dtype, converted.shape, {joined_part(n): part for n, part in enumerate(parts)}, Joined())


def _sources(converted: Converted) -> tuple[str, ...]:
    """The tensors of the file that one of the model is made of."""
    content = converted.content
    return tuple(piece.source for piece in content) if isinstance(content, tuple) else (content.source,)
