"""Which components of a pipeline diffusers' from_pretrained cannot load by what model_index.json names, and why.

Read from the texts of the installed libraries, as importing them takes seconds: what diffusers 0.42 finds in
``get_class_obj_and_candidates``. What a text leaves open counts as found.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from qz.counted import shown as few
from qz.quantize.libraries.class_search import LONGEST_NAME, shown
from qz.quantize.libraries.companions.named_classes import needed_packages, not_installed
from qz.quantize.libraries.source_code.installed import folder_of, text_of

_LIBRARIES = ("diffusers", "transformers", "onnxruntime.training")
"""Where diffusers looks for classes of components, beside the folders of its pipelines."""
_AUTO = re.compile(r"Auto(?:Tokenizer|\w*Processor|FeatureExtractor|Model\w*|Pipeline\w*)")
"""Classes that find another one: diffusers does not take them for a tokenizer, processor or model."""
_text = cache(text_of)


class Unloadable(NamedTuple):
    """Why a class is not loaded: ``packages`` if it is only that these are not installed."""

    why: str
    packages: str = ""


def class_notes(pipeline_class: str, classes: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    """Notes on what from_pretrained does not find of a pipeline: its own class, or one of its components'.

    ``classes``: of each component that model_index.json names, the library and the class.
    """
    exported = _text(folder_of("diffusers") / "__init__.py")
    if '"DiffusionPipeline"' not in exported:
        return ()
    notes = []
    if f'"{pipeline_class}"' not in exported:
        notes.append(
            f"diffusers {_version('diffusers')} has no pipeline class {shown(pipeline_class)}, which "
            "model_index.json names: it loads the output only if a newer version has it, or with the code of the "
            "class: custom_pipeline=…, trust_remote_code=True"
        )
    lost: list[str] = []
    needing: dict[str, list[str]] = defaultdict(list)
    for name, named in classes.items():
        found = _unloadable(*named)
        if found is not None and found.packages:
            needing[found.packages].append(name)
        elif found is not None:
            lost.append(f"{name}: {found.why}")
    if lost:
        notes.append(
            f"diffusers {_version('diffusers')} does not find what model_index.json names, so that from_pretrained "
            f"loads the pipeline neither quantized nor before ({few(lost, 5)}): install versions that have it, or "
            f"load each component by itself, and make {shown(pipeline_class)}(…) of them"
        )
    notes += [f"{few(names)} can be loaded only with {needed} installed" for needed, names in needing.items()]
    return tuple(notes)


@cache
def _unloadable(library: str, class_name: str) -> Unloadable | None:
    if library not in (*_LIBRARIES, *os.listdir(folder_of("diffusers") / "pipelines")):
        return Unloadable(f"{shown(library)} is no library that it loads {shown(class_name)} from")
    if library == "onnxruntime.training":
        return None
    if _AUTO.fullmatch(class_name):
        return Unloadable(f"{class_name} only finds other classes")
    needed = None
    if class_name.isidentifier() and len(class_name) <= LONGEST_NAME:
        needed = _of_library(library, class_name)
    if needed is None:
        owner = "transformers" if library == "transformers" else "diffusers"
        inside = "" if library in _LIBRARIES else f" in its {library}"
        return Unloadable(f"{owner} {_version(owner)} has no {shown(class_name)}{inside}")
    packages = not_installed(needed)
    return Unloadable("", packages) if packages else None


def _of_library(library: str, class_name: str) -> tuple[str, ...] | None:
    """The packages that a class needs; None for one that there is not."""
    if library == "transformers":
        return needed_packages(class_name)
    if library == "diffusers":
        return _of_diffusers(class_name)
    folder = folder_of("diffusers") / "pipelines" / library
    return () if any(class_name in _text(path) for path in sorted(folder.rglob("*.py"))) else None


def _of_diffusers(class_name: str) -> tuple[str, ...] | None:
    """By the stand-ins that diffusers exports where a package is missing."""
    root = folder_of("diffusers")
    if f'"{class_name}"' not in _text(root / "__init__.py"):
        return None
    stand_in = re.compile(rf"^class {class_name}\(.*\n    _backends = \[(.*)\]", re.MULTILINE)
    for path in sorted((root / "utils").glob("dummy_*_objects.py")):
        if found := stand_in.search(_text(path)):
            return tuple(re.findall(r'"([^"]+)"', found[1]))
    return ()


def _version(library: str) -> str:
    from importlib.metadata import version  # takes 30 ms, and only notes need it

    return version(library)
