"""Which files of a folder hold the weights, by the names under which transformers and diffusers look for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qz import MissingInput, QzError
from qz.counted import counted
from qz.formats.checkpoint.other_contents.other_forms import other_forms
from qz.formats.malformed import UNSAFE_TEXT, quoted
from qz.formats.tensors.weight_names import PICKLE, PICKLED, STEMS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from qz.formats.checkpoint.problems import Problems
    from qz.formats.files.folder import Folder

Library = Literal["transformers", "diffusers"]

VARIANTS = ("bf16", "fp16", "fp32")
"""Which variant to take if there are no plain weights: the first of these, else the first by name."""

_NUMBERED = re.compile(r"-\d{5}-of-\d{5}.*\.safetensors")
_VARIANT = r"(?:\.(?P<variant>[A-Za-z0-9_]+))?"


@dataclass(frozen=True, slots=True)
class Weights:
    """Either an ``index`` or a ``single`` file, by name, and the ``variant`` that they are of."""

    index: str | None
    single: str | None
    variant: str | None


def find_weights(folder: Folder, library: Library, variant: str | None, problems: Problems) -> Weights | None:
    """The weights that ``library`` would load, or None with the reason among ``problems``."""
    sizes = folder.sizes()
    singles, indexes = _candidates(STEMS[library], sizes)
    if not singles and not indexes and folder.allow_pickle:
        singles, indexes = _candidates(PICKLED[STEMS[library]], sizes, "bin")
    there = {**singles, **indexes}
    if variant not in there:
        if variant is not None:
            known = ", ".join(sorted(name for name in there if name)) or "none"
            problems.add("variant-missing", variant, name=quoted(variant), there=known)
            return None
        if not there:
            _no_weights(folder, library, problems)
            return None
        variant = min((name for name in there if name), key=_preference)
        problems.add("variant-only", there[variant], variant=variant)
    index, single = indexes.get(variant), singles.get(variant)
    if index and single:
        # diffusers looks for the index first, transformers for the single file.
        taken, left = (index, single) if library == "diffusers" else (single, index)
        problems.add("two-layouts", left, taken=taken, left=left, library=library)
        index, single = (index, None) if library == "diffusers" else (None, single)
    return Weights(index, single, variant)


def _preference(variant: str) -> tuple[int, str]:
    return VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS), variant


def _candidates(
    stem: str, names: Iterable[str], suffix: str = "safetensors"
) -> tuple[dict[str | None, str], dict[str | None, str]]:
    """The single files and the indexes among ``names``, by variant, wherever a library has ever put the variant."""
    single = re.compile(rf"{stem}{_VARIANT}\.{suffix}")
    index = [
        re.compile(rf"{stem}\.{suffix}\.index{_VARIANT}\.json"),
        re.compile(rf"{stem}\.{suffix}{_VARIANT}\.index\.json"),
        re.compile(rf"{stem}{_VARIANT}\.{suffix}\.index\.json"),
    ]
    singles: dict[str | None, str] = {}
    indexes: dict[str | None, str] = {}
    for name in sorted(names):
        if match := single.fullmatch(name):
            singles[match["variant"]] = name
        elif match := next(filter(None, (form.fullmatch(name) for form in index)), None):
            indexes.setdefault(match["variant"], name)
    return singles, indexes


def _no_weights(folder: Folder, library: Library, problems: Problems) -> None:
    """Say what is there instead."""
    stem = STEMS[library]
    name = f"{stem}.safetensors"
    for expected in (name, f"{name}.index.json"):
        try:
            folder.read_into(expected, 0, memoryview(bytearray(1)))
        except MissingInput:
            continue
        except QzError as error:  # something exists, but is not a file
            problems.add_error(error, expected, missing="weights-missing")
            return
    names = sorted(folder.sizes())
    shards = [each for each in names if each.startswith(stem) and _NUMBERED.search(each)]
    others = [each for each in names if each.endswith(".safetensors")]
    pickles = [each for each in names if PICKLE.search(each)]
    if shards:
        index = f"{name}.index.json"
        problems.add("index-missing", index, name=index, shards=counted(len(shards), "shard"))
    elif others:
        found = ", ".join(quoted(each, 60) for each in others[:3])
        instead = f", but {found}. Rename it if it is in {library}' own layout; convert it if it is another tool's"
        problems.add("weights-missing", name, name=name, library=library, instead=instead)
    elif pickles:
        how = _conversion(stem, pickles, folder.location)
        problems.add("pickle-only", pickles[0], name=quoted(pickles[0], 40), how=how)
    elif (forms := other_forms(folder)) is not None:
        problems.add("weights-missing", name, name=name, library=library, instead=f". {forms.removesuffix('.')}")
    else:
        problems.add("weights-missing", name, name=name, library=library, instead=", nor other weights. Download them")


def _conversion(stem: str, pickles: Sequence[str], location: str) -> str:
    """How to turn pickles into safetensors. It will be pasted into a shell: only plain names get into it."""
    binary = PICKLED[stem]
    if not any(re.fullmatch(rf"{binary}(?:-\d{{5}}-of-\d{{5}})?\.bin", name) for name in pickles):
        return f"No loader reads files of these names: a checkpoint has {stem}.safetensors (or {binary}.bin)."
    remote = re.fullmatch(r"(.+)@[0-9a-f]{12,40}(/.+)?", location)
    folder = f"NEW{remote[2] or ''}" if remote else location
    plain = re.fullmatch(r"[A-Za-z0-9_./@ -]*", location)
    glob = f"{folder if plain else 'FOLDER'}/{binary}*.bin"
    code = (
        "import glob, torch; from safetensors.torch import save_file; "
        f"held = {{name: part for file in sorted(glob.glob('{glob}')) "
        "for name, part in torch.load(file, map_location='cpu', weights_only=True).items()}; "
        f"save_file({{name: part.clone().contiguous() for name, part in held.items()}}, "
        f"'{folder if plain else 'FOLDER'}/{stem}.safetensors', {{'format': 'pt'}})"
    )
    fetch = f"hf download {remote[1]} --local-dir NEW && " if remote and plain else ""
    again = "use NEW" if remote else "run this again"
    return (
        "With --allow-pickle qz reads them, and runs nothing of them. Or, if you trust them, convert them, then "
        f'{again}: {fetch}python -c "{code}"'
    )


def unused_files(
    folder: Folder, library: Library, variant: str | None, used: Iterable[str], problems: Problems
) -> tuple[str, ...]:
    """Weight files of this set that nothing refers to, which are returned, and pickles."""
    used = set(used)
    sizes = folder.sizes()
    singles, indexes = _candidates(STEMS[library], sizes)
    others = "|".join(re.escape(name) for name in (singles | indexes).keys() - {variant, None} if name)
    of_another_variant = re.compile(rf".*\.(?:{others})[-.].*" if others else r"(?!)")
    prefix = STEMS[library] + (f".{variant}" if variant else "")
    weights = re.compile(re.escape(prefix) + r"(?:[-_.].*)?\.safetensors")
    unused = []
    for name in sorted(sizes):
        if name not in used and weights.fullmatch(name) and not of_another_variant.fullmatch(name):
            problems.add("file-unused", name)
            unused.append(name)
        elif PICKLE.search(name) and name not in used:
            problems.add("pickle-files", name)
    return tuple(unused)


def is_shard_name(name: Any, library: Library, suffix: str = ".safetensors") -> bool:
    """Whether a shard may have this name: a plain one or, for transformers, one in a folder inside."""
    if not isinstance(name, str) or not name.endswith(suffix) or len(name.encode("utf-8", "replace")) > 255:
        return False
    if "\\" in name or UNSAFE_TEXT.search(name):
        return False
    *folders, _ = name.split("/")
    return not folders or (library == "transformers" and all(each not in ("", ".", "..") for each in folders))


def library_of(config: Mapping[str, Any]) -> Library | None:
    """The library whose config.json this is."""
    if isinstance(config.get("_class_name"), str):
        return "diffusers"
    if isinstance(config.get("model_type"), str) or architecture_of(config, "transformers"):
        return "transformers"
    return None


def architecture_of(config: Mapping[str, Any], library: Library) -> str | None:
    """The class that the config names."""
    named = config.get("_class_name") if library == "diffusers" else config.get("architectures")
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) else None
