"""A checkpoint as the plain one of its library, whatever form it is stored in."""

from __future__ import annotations

from qz.formats.checkpoint.gguf import joined_gguf_header
from qz.formats.checkpoint.survey import GGUF, Checkpoint
from qz.formats.sources import encoded
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.importing.boundary import library_errors
from qz.quantize.libraries.importing.isolation import isolated
from qz.quantize.libraries.importing.optional_packages import OF_TRANSFORMERS
from qz.quantize.libraries.importing.untrusted_config import parts_bounded


def plain_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """As ``qz.formats.sources.encoded.plain_checkpoint``; of a GGUF file, what transformers makes of it."""
    if checkpoint.config.get("model_type") != GGUF or checkpoint.encoded_as != GGUF:
        return encoded.plain_checkpoint(checkpoint)
    header = joined_gguf_header(checkpoint)
    where = checkpoint.folder.location
    if lean_imports.is_allowed():
        lean_imports.keep(OF_TRANSFORMERS)
    with (
        lean_imports.lean_imports(),
        library_errors("transformers", "a model in GGUF", where),
        isolated(),
        parts_bounded(len(checkpoint.tensors), where),
    ):
        from qz.quantize.libraries.transformers.gguf import plain_gguf

        return plain_gguf(checkpoint, header)
