"""Which packages a class of transformers needs, by its name in a file: read from the text of the installed library, as
importing it takes seconds. What transformers 5.23 finds in ``_LazyModule``; what a text leaves open counts as found.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from qz.quantize.libraries.source_code.defining_files import defining_file
from qz.quantize.libraries.source_code.installed import folder_of, text_of

_MODULES = {
    "mistral-common": "mistral_common",
    "onnx": "onnxruntime",
    "opencv": "cv2",
    "protobuf": "google.protobuf",
    "vision": "PIL",
}
"""What the libraries call a package → what is imported of it, where these differ."""


def needed_packages(class_name: str) -> tuple[str, ...] | None:
    """None for a class that there is not. Names of earlier versions stand for today's classes."""
    root = folder_of("transformers")
    fast = class_name.endswith(("TokenizerFast", "ImageProcessorFast"))
    name = class_name.removesuffix("Fast") if fast else class_name
    for stem in dict.fromkeys((name, class_name)):
        if (path := defining_file(stem)) is not None:
            slow = path.parent / path.name.replace("image_processing_", "image_processing_pil_")
            return _needed(path, stem, instead=not fast and slow.is_file())
    aliases = folder_of("diffusers") / "utils" / "deprecation_utils.py"
    named = (root / "__init__.py", root / "convert_slow_tokenizer.py", aliases)
    return () if any(f'"{each}"' in text_of(path) for path in named for each in (class_name, name)) else None


def not_installed(packages: tuple[str, ...]) -> str:
    """Those of them, for a message; empty if there are all."""
    missing = (each for each in packages if not _is_installed(_MODULES.get(each, each)))
    return " and ".join("Pillow" if each == "vision" else each for each in missing)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it lies in
        return False


def _needed(path: Path, name: str, *, instead: bool) -> tuple[str, ...]:
    """``instead``: where torchvision is missing, the library takes another class."""
    text = text_of(path)
    stated = re.search(rf"^@requires\(backends=\(([^)]*)\)\)\n(?:@.*\n)*class {name}\b", text, re.MULTILINE)
    init = rf"^class {name}\b(?:(?!^class ).)*?def __init__(?:(?!\n    def ).)*?"
    asked = re.search(rf"{init}requires_backends\(self, ([^)]*)", text, re.MULTILINE | re.DOTALL)
    needed = [each for found in (stated, asked) if found for each in re.findall(r'"([^"]+)"', found[1])]
    if path.name.startswith("video_processing_") or re.search(r"def __init__\([^)]*\bvideo_processor\b", text):
        needed += ["vision", "torchvision"]
    elif path.name.startswith("image_processing_"):
        needed += ["vision", *(["torchvision"] if "(TorchvisionBackend" in text and not instead else [])]
    return tuple(dict.fromkeys(needed))
