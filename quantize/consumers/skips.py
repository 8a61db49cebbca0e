"""Linear layers that are not quantized, as vLLM and SGLang see them: by config.json alone, and fused into groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qz.counted import shown
from qz.quantize.consumers.contents import EXPERT, Contents
from qz.quantize.consumers.verdict import Finding
from qz.quantize.libraries.skip_names import named
from qz.quantize.planning.budget.fused_groups import SGLANG, VLLM, Groups


def split_groups(
    packed: Iterable[str], plain: Iterable[str], groups: Groups
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Fused groups of which some members are quantized and some are not: the path of the fused layer, and both.

    ``packed`` and ``plain`` are the paths of linear layers. Experts are no such groups: they are fused otherwise.
    """
    quantized = {path for path in packed if not EXPERT.fullmatch(f"{path}.weight")}
    parents = dict.fromkeys(path.rpartition(".")[0] for path in plain)
    others = set(plain)
    for parent in parents:
        prefix = f"{parent}." if parent else ""
        for members, fused in groups.items():
            paths = [prefix + member for member in members]
            inside = [path for path in paths if path in quantized]
            left = [path for path in paths if path in others]
            if inside and left:
                yield prefix + fused, inside, left


def _kept(contents: Contents) -> list[str]:
    """Kept linears, experts aside."""
    return [path for path in contents.kept_linears if not EXPERT.fullmatch(f"{path}.weight")]


def _splits(contents: Contents, groups: Groups) -> list[tuple[str, list[str], list[str]]]:
    packed = [name.removesuffix(".weight") for name in contents.packed]
    return list(split_groups(packed, _kept(contents), groups))


def _told(splits: list[tuple[str, list[str], list[str]]]) -> tuple[str, str, str]:
    """Of split groups, where they are; and of the first, which members are quantized, and which are not."""
    _, inside, left = splits[0]
    return shown(fused for fused, _, _ in splits), _leaves(inside), _leaves(left)


def _leaves(paths: Iterable[str]) -> str:
    return shown(path.rpartition(".")[2] for path in paths)


def split_group_vllm(contents: Contents) -> Iterator[Finding]:
    """vLLM fuses q/k/v, gate/up and others. Of a group that is quantized in part it quantizes the rest, too, to nf4
    with double quantization; in int8 it reads the rest's values as codes."""
    found = _splits(contents, VLLM)
    if not found:
        return
    places, inside, left = _told(found)
    how = f"Skip {inside} too, or do not skip {left}."
    if contents.is_int8:
        text = f"fuses {places}, of which {left} is not quantized: its values would be read as int8 codes. {how}"
        yield Finding("error", "split-group", text)
    else:
        text = f"fuses {places}, and quantizes the part that is not ({left}) to nf4 when it loads. {how}"
        yield Finding("warning", "split-group", text)


def split_group_sglang(contents: Contents) -> Iterator[Finding]:
    """SGLang fuses q/k/v and gate/up, and has one packed parameter for a group: a part of it that is not quantized does
    not fit."""
    found = _splits(contents, SGLANG)
    if found:
        places, inside, left = _told(found)
        text = (
            f"fuses {places} into one packed parameter, where {left}, which is not quantized, does not fit. "
            f"Skip {inside} too, or do not skip {left}."
        )
        yield Finding("error", "split-group", text)


def unlisted(contents: Contents, groups: Groups) -> list[str]:
    """Kept linears that ``llm_int8_skip_modules`` does not name so that vLLM and SGLang find it, but for output layers,
    which both leave alone, and for members of split groups.

    Only layers whose name is quantized elsewhere count: those are linear layers there for certain.
    """
    in_groups = {path for _, _, left in _splits(contents, groups) for path in left}
    leaves = {name.removesuffix(".weight").rpartition(".")[2] for name in contents.packed}
    skips = contents.settings.skipped or ()
    return [
        path
        for path in _kept(contents)
        if path.rpartition(".")[2] in leaves and path not in in_groups and not named(path, skips)
    ]


def unlisted_vllm(contents: Contents) -> Iterator[Finding]:
    """vLLM takes a layer for quantized unless config.json's llm_int8_skip_modules names it or a part of its path: it
    quantizes it when it loads, to nf4 with double quantization; in int8 it reads the values as codes."""
    if paths := unlisted(contents, VLLM):
        what = "would read as int8 codes" if contents.is_int8 else "quantizes to nf4 when it loads"
        text = (
            f"{what} what llm_int8_skip_modules does not name by a part of its path: {shown(paths)}. "
            "Quantize again, with --skip and such names."
        )
        yield Finding("error" if contents.is_int8 else "warning", "unlisted-skip", text)


def unlisted_sglang(contents: Contents) -> Iterator[Finding]:
    """SGLang has a packed parameter for every layer that config.json's llm_int8_skip_modules does not name: values that
    are not quantized do not fit."""
    if paths := unlisted(contents, SGLANG):
        text = (
            "has no place for unquantized layers that llm_int8_skip_modules does not name by a part of their path: "
            f"{shown(paths)}. Quantize again, with --skip and such names."
        )
        yield Finding("error", "unlisted-skip", text)
