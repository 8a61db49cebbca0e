"""A whole pipeline in one file, as CivitAI, Stability and ComfyUI have them, as the one that diffusers makes of it.

As ``from_single_file``: each component that is in the file by the library's own converters; settings, tokenizers and
schedulers from the folder or repository of the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qz import MalformedInput, MissingInput, QzError, Unsupported
from qz.counted import counted, shown
from qz.formats.checkpoint.other_contents.original_layouts import OF_PIPELINES
from qz.formats.checkpoint.pipeline import (
    Component,
    Pipeline,
    component_in,
    facts_of_lacking,
    has_weights,
    is_component,
    lacking_components,
    read_index,
)
from qz.formats.checkpoint.problems import WARNINGS
from qz.formats.checkpoint.survey import Checkpoint, read_config
from qz.formats.checkpoint.weights import library_of
from qz.formats.files.folder import PIPELINE_INDEX, Folder
from qz.formats.files.local_folder import LocalFolder
from qz.formats.json_files import dump_json
from qz.formats.malformed import Malformed, quoted, quoted_names
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.importing.boundary import CONVERTER_ERRORS, describe
from qz.quantize.libraries.importing.isolation import isolated
from qz.quantize.libraries.importing.optional_packages import OF_TRANSFORMERS
from qz.quantize.libraries.importing.untrusted_config import parts_bounded, require_plausible, without_code
from qz.quantize.single_files.tensors import prefix_of, require_one_prefix

if TYPE_CHECKING:
    from qz.quantize.libraries.diffusers.single_file import PipelineFile
    from qz.quantize.libraries.diffusers.tracing import Converted
    from qz.quantize.single_files.tensors import OriginalFile

LEFT_OUT = ("safety_checker",)
"""Components that diffusers does not load from a single file."""
UNUSED = ("", "model_ema.")
"""Prefixes of what may be left over: schedules of noise, averages of the weights, buffers."""
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def has_more_than_a_denoiser(file: OriginalFile) -> bool:
    """Whether tensors lie under prefixes of a VAE or of text encoders."""
    denoisers = ("", "model.diffusion_model.", "model_ema.", "control_model.")
    return any(prefix_of(name) not in denoisers for name in file.tensors)


def pipeline_of(file: OriginalFile, configs: Folder, *, weights_too: bool) -> Pipeline | None:
    """The pipeline in ``file``, with all else from ``configs``, and ``weights_too`` of the components it lacks.

    None for a denoiser with a VAE, as of LTX-Video, where the text encoders are nowhere: one model is all it is. Raises
    MalformedInput for parts that are mixed, incomplete or unlike the config, and Unsupported for a class of pipelines
    that diffusers does not read from single files.
    """
    index = read_index(configs)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise Malformed(
            "index-malformed", f"{configs.location}/{PIPELINE_INDEX} has no _class_name: it is not a pipeline."
        )
    lean_imports.keep(OF_TRANSFORMERS)
    with lean_imports.lean_imports(), isolated(), parts_bounded(len(file.tensors), configs.location):
        from qz.quantize.libraries.diffusers.single_file import PipelineFile, reads_pipeline

        if not reads_pipeline(class_name):
            raise Unsupported(
                f"{file.location} holds more than one model, and diffusers reads no {class_name}, of which "
                f"{configs.location} is, from a single file. Use a repository of it in diffusers' layout."
            )
        found = _Found(file, configs, PipelineFile(file.specs))
        for name, value in sorted(index.items()):
            if is_component(name, value) and name not in LEFT_OUT:
                found.add(name, *value)
    return found.pipeline(class_name, index, weights_too=weights_too)


class _Found:
    """Components as they are found."""

    def __init__(self, file: OriginalFile, configs: Folder, contents: PipelineFile) -> None:
        self.file, self.configs, self.contents = file, configs, contents
        self.inside: dict[str, Component] = {}
        self.missing: dict[str, tuple[str, str]] = {}
        self.settings: dict[str, Component] = {}
        self.made: dict[str, Mapping[str, Converted]] = {}

    def add(self, name: str, library: str, class_name: str) -> None:
        """Take one component from the file, if it has it; MissingInput if the config has no folder for it."""
        folder = self.configs.subfolder(name)
        if not has_weights(folder.sizes()):
            self.settings[name] = Component(name, library, class_name, folder)
            return
        config = read_config(folder)
        harmless, _ = without_code(config)
        shapes = {each: tensor.shape for each, tensor in self.file.tensors.items()}
        require_plausible(harmless, shapes, folder.location)
        try:
            made = self.contents.component(library, class_name, harmless)
        except QzError:
            raise
        except CONVERTER_ERRORS as error:
            raise MalformedInput(
                f"{self.file.location}: {name} is not a whole {class_name} as {folder.location}/config.json describes "
                f"it: {describe(error)}. Get a complete file, or name the right model with --config."
            ) from error
        if made is None:
            self.missing[name] = (library, class_name)
            folder.close()
            return
        require_one_prefix(name, made, self.file.location)
        self.made[name] = made
        checkpoint = self._checkpoint(config, library, class_name, made)
        self.inside[name] = Component(name, library, class_name, folder, checkpoint)

    def _checkpoint(
        self, config: dict[str, Any], library: str, class_name: str, made: Mapping[str, Converted]
    ) -> Checkpoint:
        tensors = {name: self.file.stored_as(name, each) for name, each in made.items()}
        known = library_of(config)
        dtype = next((_FLOATS[each.dtype] for each in tensors.values() if each.dtype in _FLOATS), None)
        if known == "transformers" and dtype is not None:  # as saved, not that of the config's own weights
            config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
        file = self.file
        return Checkpoint(
            folder=file.folder,
            config=config,
            library=known or "diffusers",
            architecture=class_name,
            variant=None,
            files=(file.name,),
            sizes={file.name: sum(each.nbytes for each in tensors.values())},
            tensors=tensors,
            header_metadata={file.name: dict(file.metadata)},
            class_module=library,
            encoded_as=file.encoded_as,
            original=dict(file.tensors),
        )

    def pipeline(self, class_name: str, index: Mapping[str, Any], *, weights_too: bool) -> Pipeline | None:
        """All of them, in the order of the index."""
        elsewhere: dict[str, Component] = {}
        for name, (library, own_class) in self.missing.items() if weights_too else ():
            component = component_in(self.configs, name, library, own_class)
            if component.checkpoint is not None:
                elsewhere[name] = component
            elif component.unread is not None and component.unread.kinds != {"weights-missing"}:
                raise component.unread.error
        lacking = sorted(self.missing.keys() - elsewhere.keys())
        left = self.file.unused(each for made in self.made.values() for each in made.values())
        if lacking and not any(name.startswith(OF_PIPELINES) for name in self.file.tensors):
            return None
        self._require_all(lacking)
        self._require_used(left)
        every = {**self.inside, **elsewhere, **self.settings}
        dropped = [name for name in LEFT_OUT if is_component(name, index.get(name))]
        notes = [f"{name} is not read from a single file, as in diffusers: it is left out" for name in dropped]
        configs = self.configs
        place = configs.path.name if isinstance(configs, LocalFolder) else configs.location
        notes += [f"{name} is not in the file: taken from {place}" for name in elsewhere]
        notes.append(f"settings, tokenizers and configs come from {place}")
        if unused := [*left, *self.file.left_out]:
            notes.append(f"{counted(len(unused), 'tensor')} of the file not used: {shown(map(quoted, unused))}")
        made = {**index, **{name: [None, None] for name in dropped}}
        if null := lacking_components(made):
            where = f"{configs.location}/{PIPELINE_INDEX}"
            notes.append(WARNINGS["component-null"].format(where=where, **facts_of_lacking(class_name, null)))
        return Pipeline(
            self.configs,
            class_name,
            tuple(every[name] for name in index if name in every),
            index=dump_json(made),
            file_folder=self.file.folder,
            notes=tuple(notes),
            lacking=null,
        )

    def _require_all(self, lacking: list[str]) -> None:
        if lacking:
            raise MissingInput(
                f"{self.file.location} has {', '.join(sorted(self.inside))}, but no {' and no '.join(lacking)}, which "
                f"{self.configs.location} has in its {PIPELINE_INDEX}. Name a folder or repository that has the "
                "weights of that, too, with --config, or one whose index has null for it."
            )

    def _require_used(self, left: list[str]) -> None:
        used = {prefix_of(name) for made in self.made.values() for each in made.values() for name in each.sources}
        whole = sorted({prefix_of(name) for name in left} - used - set(UNUSED))
        if whole:
            raise Unsupported(
                f"{self.file.location} has tensors under {quoted_names(whole)} that no component of "
                f"{self.configs.location} uses. Name the folder or repository of the right pipeline with --config."
            )
