"""Classes that the files beside a model name, and what those are loaded from: what transformers does not find of it, or
takes for something else without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from qz import MissingInput
from qz.formats.files.folder import PIPELINE_INDEX, Folder, read_file
from qz.formats.json_files import MAX_BYTES, read_json
from qz.formats.malformed import Malformed
from qz.formats.output.companions import Companion
from qz.quantize.libraries.class_search import LONGEST_NAME, shown
from qz.quantize.libraries.companions.named_classes import needed_packages, not_installed
from qz.quantize.libraries.companions.tokenizer_classes import (
    TokenizerClass,
    automatic_class,
    has_tokenizer_json,
    is_fast,
    tokenizer_class,
)

_CONFIG = "tokenizer_config.json"
_ANNOUNCED = (_CONFIG, "special_tokens_map.json", "added_tokens.json")
"""Files of a tokenizer that hold no vocabulary."""
_TYPES = {
    "preprocessor_config.json": ("image_processor_type", "feature_extractor_type", "processor_class"),
    "processor_config.json": ("image_processor_type", "feature_extractor_type", "video_processor_type",
                              "processor_class"),
    "video_preprocessor_config.json": ("video_processor_type",),
    _CONFIG: ("processor_class",),
}  # fmt: skip
"""The keys under which files name a class that one of the Auto classes takes."""
_AUTO = {
    "image_processor_type": "AutoImageProcessor",
    "feature_extractor_type": "AutoFeatureExtractor",
    "video_processor_type": "AutoVideoProcessor",
    "processor_class": "AutoProcessor",
}


class Note(NamedTuple):
    """``where``: a file of a model or component."""

    where: str
    told: str
    is_vocabulary: bool = False

    def as_text(self, inside: str = "") -> str:
        """``inside``: the folder of the file."""
        return f"{inside}{self.where}: {self.told}"


def notes_on_model(carried: Iterable[Companion], config: Mapping[str, Any]) -> tuple[Note, ...]:
    """Of the files that are copied with a model of ``config``, also in folders inside, which have a tokenizer each."""
    folders: dict[str, Folder] = {}
    for each in carried:
        if each.file in _TYPES or each.file in _ANNOUNCED:
            folders[each.name.removesuffix(each.file)] = each.folder
    notes: list[Note] = []
    for prefix, folder in folders.items():
        notes += (each._replace(where=prefix + each.where) for each in _of_automatic(folder, config))
    return tuple(notes)


def notes_on_component(folder: Folder, library: str, class_name: str) -> tuple[Note, ...]:
    """Of a component without weights that a pipeline's index says the class of; see ``require_vocabulary``."""
    if library != "transformers":
        return ()
    own = _own_class(folder, class_name)
    if own is not None and _is_other(class_name, own):
        told = (
            f"it is made for {shown(own)}, but {PIPELINE_INDEX} names {class_name}, by whose rules diffusers reads it: "
            "correct the one that is wrong"
        )
        return (Note(_file_of(class_name), told),)
    is_composed = class_name.endswith("Processor") and not class_name.endswith(("ImageProcessor", "VideoProcessor"))
    return tuple(_inner_classes(folder)) if is_composed else ()


def require_vocabulary(folder: Folder, library: str, class_name: str) -> None:
    """Raise MissingInput for a pipeline's tokenizer, or processor with one, without files to load it from."""
    found = None
    if library == "transformers" and class_name.endswith(("Tokenizer", "TokenizerFast")):
        found = _without_vocabulary(folder, class_name)
    elif library == "transformers" and class_name.endswith("Processor") and _CONFIG in folder.sizes():
        found = _without_vocabulary(folder, _automatic(folder, {}))
    if found is not None:
        raise MissingInput(
            f"{folder.location} has no vocabulary ({found.as_text()}), which {found.name} is loaded from. Download the "
            "whole pipeline."
        )


def _of_automatic(folder: Folder, config: Mapping[str, Any]) -> Iterator[Note]:
    announced = next((name for name in _ANNOUNCED if name in folder.sizes()), None)
    if announced is not None and (found := _without_vocabulary(folder, _automatic(folder, config))) is not None:
        told = (
            f"no file beside it holds the vocabulary of {found.name} ({found.as_text()}): transformers loads no "
            "tokenizer, or one that knows only its special tokens. Download it, or take the tokenizer of another model"
        )
        yield Note(announced, told, is_vocabulary=True)
    yield from _inner_classes(folder)


def _automatic(folder: Folder, config: Mapping[str, Any]) -> str | None:
    """The class that ``AutoTokenizer`` loads from a folder; None for code of its own, or what cannot be read."""
    own = _read(folder, _CONFIG)
    if own is None or "auto_map" in own:
        return None
    named, model_type = own.get("tokenizer_class") or config.get("tokenizer_class"), config.get("model_type")
    if not isinstance(named, str | None) or not isinstance(model_type, str | None):
        return None
    return automatic_class(named, model_type)


def _without_vocabulary(folder: Folder, class_name: str | None) -> TokenizerClass | None:
    """The class, if it is known, and has nothing there that it could be loaded from."""
    names = [name for name, size in folder.sizes().items() if size]
    if class_name is None or (has_tokenizer_json(names) and is_fast(class_name)):
        return None
    found = tokenizer_class(class_name)
    return found if found is not None and found.is_without(names) else None


def _inner_classes(folder: Folder) -> Iterator[Note]:
    """Classes named for one of the Auto classes that there are not, or that need a package that is not installed."""
    told: set[str] = set()
    for file, keys in _TYPES.items():
        if file not in folder.sizes() or (held := _read(folder, file)) is None:
            continue
        for each in (held, *(value for value in held.values() if isinstance(value, dict))):
            code = each.get("auto_map")
            for key in keys:
                name = each.get(key)
                if not isinstance(name, str) or (isinstance(code, dict) and _AUTO[key] in code):
                    continue
                if (why := _unloadable(name)) not in told and why is not None:
                    told.add(why)
                    yield Note(file, why)


def _unloadable(name: str) -> str | None:
    # A feature extractor of earlier versions may be an image processor of today's, of which another may do the same.
    plain = name.removesuffix("Fast")
    candidates = dict.fromkeys((plain, plain.replace("FeatureExtractor", "ImageProcessor")))
    usable = name.isidentifier() and len(name) <= LONGEST_NAME
    needed = [found for each in candidates if usable and (found := needed_packages(each)) is not None]
    if not needed:
        from importlib.metadata import version  # takes 30 ms, and only notes need it

        return f"it names {shown(name)}, which transformers {version('transformers')} does not have"
    packages = not_installed(needed[0])
    return f"{name}, which it names, can be loaded only with {packages} installed" if packages else None


def _own_class(folder: Folder, class_name: str) -> str | None:
    """The class that a component's own file names."""
    held = _read(folder, _file_of(class_name)) if _file_of(class_name) in folder.sizes() else None
    if held is None or "auto_map" in held:
        return None
    keys = ("tokenizer_class",) if "Tokenizer" in class_name else ("image_processor_type", "feature_extractor_type")
    return next((name for key in keys if isinstance(name := held.get(key), str)), None)


def _file_of(class_name: str) -> str:
    return _CONFIG if "Tokenizer" in class_name else "preprocessor_config.json"


def _is_other(named: str, own: str) -> bool:
    """Whether a class reads what another one wrote by other rules; not where either is read as it is."""
    if _todays(named) == _todays(own):
        return False
    if "Tokenizer" in named:
        first, second = tokenizer_class(named), tokenizer_class(own)
        return (
            first is not None
            and second is not None
            and first.rules != second.rules
            and "" not in (first.rules, second.rules)
        )
    return named.endswith(("ImageProcessor", "ImageProcessorFast", "FeatureExtractor"))


def _todays(name: str) -> str:
    return name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def _read(folder: Folder, file: str) -> dict[str, Any] | None:
    """An object; an empty one where there is no such file, None for what cannot be read."""
    if file not in folder.sizes():
        return {}
    with suppress(Malformed):
        return read_json(read_file(folder, file, MAX_BYTES), f"{folder.location}/{file}", nonfinite="keep")
    return None
