"""A checkpoint as the plain one of its library, whatever form it is stored in."""

from __future__ import annotations

from qz import Unsupported
from qz.formats.checkpoint.gguf import joined_gguf_header
from qz.formats.checkpoint.survey import GGUF, Checkpoint
from qz.formats.sources import encoded
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.importing.boundary import library_errors
from qz.quantize.libraries.importing.isolation import isolated
from qz.quantize.libraries.importing.optional_packages import OF_TRANSFORMERS
from qz.quantize.libraries.importing.untrusted_config import parts_bounded
from qz.quantize.libraries.importing.work_bounds import work_bounded


def plain_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """As ``qz.formats.sources.encoded.plain_checkpoint``; of a GGUF file, what transformers makes of it."""
    if checkpoint.config.get("model_type") != GGUF or checkpoint.encoded_as != GGUF:
        return encoded.plain_checkpoint(checkpoint)
    where = checkpoint.folder.location
    if checkpoint.library == "diffusers":
        raise Unsupported(
            f"{where} holds a diffusion model in GGUF, which has no config: name the file itself, or add --file "
            f"{checkpoint.files[0]}, and say with --config where the config of its model is."
        )
    header, vocabulary = joined_gguf_header(checkpoint)
    lean_imports.keep(OF_TRANSFORMERS)
    with (
        lean_imports.lean_imports(),
        library_errors("transformers", "a model in GGUF", where),
        isolated(),
        parts_bounded(len(checkpoint.tensors), where),
    ):
        from qz.quantize.libraries.transformers.gguf import plain_gguf
        from qz.quantize.libraries.transformers.gguf_conversions import plain_by_conversions, reads

        plain = plain_by_conversions if reads(str(checkpoint.config.get("gguf"))) else plain_gguf
        with work_bounded({name: tensor.shape for name, tensor in checkpoint.tensors.items()}, where):
            return plain(checkpoint, header, vocabulary)
