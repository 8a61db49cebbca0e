"""A model in one file, in the names of its own code or of ComfyUI, as a checkpoint in diffusers' names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz import Unsupported
from qz.formats.checkpoint.other_contents.original_layouts import OF_PIPELINES
from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.importing.boundary import CONVERTER_ERRORS, describe
from qz.quantize.libraries.importing.isolation import isolated
from qz.quantize.libraries.importing.untrusted_config import require_plausible, without_code
from qz.quantize.single_files.configs import denoiser_config
from qz.quantize.single_files.tensors import require_one_prefix

if TYPE_CHECKING:
    from qz.formats.files.folder import Folder
    from qz.quantize.single_files.tensors import OriginalFile

ORDER = (
    "q, k and v of {} are taken to lie one after the other, as in published single files; a file that was merged from "
    "shards in which they alternate by heads looks the same, and becomes a model that computes nonsense"
)
"""What diffusers' converter leaves to its caller; by default it does the same."""


def model_of(file: OriginalFile, configs: Folder) -> Checkpoint:
    """The checkpoint of the diffusers class that ``file`` holds the weights of, with its config from ``configs``.

    Raises Unsupported for a file that diffusers does not read, and MalformedInput for one that breaks the rules.
    """
    config = denoiser_config(configs)
    class_name = str(config["_class_name"])
    harmless, _ = without_code(config)
    require_plausible(harmless, {name: tensor.shape for name, tensor in file.tensors.items()}, configs.location)
    with lean_imports.lean_imports(), isolated():
        from qz.quantize.libraries.diffusers import single_file
        from qz.quantize.libraries.diffusers.internals import assumes_an_order

        choices = (ORDER.format(file.location),) if assumes_an_order(class_name) else ()
        try:
            made = single_file.convert(class_name, harmless, file.specs)
        except CONVERTER_ERRORS as error:
            raise Unsupported(
                f"{file.location} cannot be read as a {class_name}, of which {configs.location} is: {describe(error)}. "
                "Name the folder or repository of the right model with --config."
            ) from error
    require_one_prefix(class_name, made, file.location)
    left = file.unused(made.values())
    elsewhere = sorted({name.split(".")[0] for name in left if name.startswith(OF_PIPELINES)})
    if elsewhere:
        raise Unsupported(
            f"{file.location} holds a whole pipeline ({', '.join(elsewhere)}), and {configs.location} has the config "
            "of one model. Name the folder or repository of the pipeline with --config."
        )
    own = {name: file.stored_as(name, each) for name, each in made.items()}
    return Checkpoint(
        folder=file.folder,
        config=config,
        library="diffusers",
        architecture=class_name,
        variant=None,
        files=(file.name,),
        sizes={file.name: file.folder.sizes()[file.name]},
        tensors={**{name: file.tensors[name] for name in left}, **own},  # what the class does not use is reported later
        header_metadata={file.name: dict(file.metadata)},
        encoded_as=file.encoded_as,
        left_out=file.left_out,
        choices=choices,
        original=dict(file.tensors),
    )
