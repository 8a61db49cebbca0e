"""The parts of transformers that are not public API, in one place; refused clearly where a version lacks them.

Names at save, and the steps of loading that renames and merges take, have no public form in transformers 5.
"""

from __future__ import annotations

import transformers

from qz import Unsupported

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        build_glob_alternation,
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import remove_tied_weights_from_state_dict
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION, get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module
except ImportError as error:
    raise Unsupported(
        f"transformers {transformers.__version__} is laid out differently from the versions qz knows ({error}). "
        "Install one that it knows: pip install 'transformers>=5.17,<5.24'."
    ) from error

__all__ = [
    "MODULES_TO_PATCH_FOR_QUANTIZATION",
    "Conv1D",
    "WeightConverter",
    "WeightRenaming",
    "build_glob_alternation",
    "dot_natural_key",
    "get_keys_to_not_convert",
    "get_model_conversion_mapping",
    "no_init_weights",
    "remove_tied_weights_from_state_dict",
    "rename_source_key",
    "revert_weight_conversion",
    "should_convert_module",
]
