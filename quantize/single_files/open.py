"""Open a file in other names than the library's: as one model, or as the pipeline that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.formats.files.folder import is_pipeline
from qz.quantize.single_files.configs import OpenConfig, open_configs
from qz.quantize.single_files.model import model_of
from qz.quantize.single_files.pipeline import has_more_than_a_denoiser, pipeline_of
from qz.quantize.single_files.tensors import read_original

if TYPE_CHECKING:
    from qz.formats.checkpoint.pipeline import Pipeline
    from qz.formats.checkpoint.survey import Checkpoint
    from qz.formats.files.folder import Folder


def open_single_file(
    folder: Folder, name: str, config_from: str | None, open_config: OpenConfig
) -> Checkpoint | Pipeline:
    """What ``name`` in ``folder`` holds: a pipeline where it has more than a denoiser, and the config is a pipeline's.

    ``config_from`` names the folder or repository of the config; without it the one that diffusers takes for such a
    file is opened by ``open_config``. Raises MissingInput where there is no config, Unsupported for a file that
    diffusers does not read, and MalformedInput for one that breaks the rules.
    """
    file = read_original(folder, name)
    several = has_more_than_a_denoiser(file)
    configs = open_configs(file, config_from, open_config)
    try:
        if several and is_pipeline(configs):
            pipeline = pipeline_of(file, configs, weights_too=config_from is not None)
            if pipeline is not None:
                return pipeline
        model = model_of(file, configs)
    except BaseException:
        configs.close()
        raise
    configs.close()
    return model
