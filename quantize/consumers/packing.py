"""How packed weights must be stored and shaped for loaders that slice and concatenate them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from qz.counted import shown
from qz.quantize.consumers.contents import Contents
from qz.quantize.consumers.verdict import Finding


def storage(contents: Contents) -> Iterator[Finding]:
    """4-bit codes must be stored as uint8: another bnb_4bit_quant_storage is refused."""
    wrong = [name for name, each in contents.packed.items() if each.kind != "int8" and each.stored != "U8"]
    said = contents.settings.storage
    if wrong or (said != "uint8" and not contents.is_int8):
        dtype = contents.packed[wrong[0]].stored if wrong else said
        text = f"reads 4-bit codes stored as uint8 only, and these are {dtype}. Quantize the original again with qz."
        yield Finding("error", "storage", text)


def odd_sizes(contents: Contents) -> Iterator[Finding]:
    """Weights are placed by whole bytes of two values: one with an odd number of values does not fit."""
    odd = [
        name
        for name, each in contents.packed.items()
        if each.kind != "int8" and each.elements is not None and each.elements % 2
    ]
    if odd:
        text = f"cannot place 4-bit weights with an odd number of values: {shown(odd)}. Leave them out with --skip."
        yield Finding("error", "odd-size", text)


def int8_capitals(contents: Contents) -> Iterator[Finding]:
    """The names of int8 scales are lower-cased, so that those of a module with capital letters are lost."""
    names = [name for name, each in contents.packed.items() if each.kind == "int8" and name != name.lower()]
    if names:
        text = f"loses the int8 scales of modules with capital letters in their path: {shown(names)}. Use --nf4."
        yield Finding("error", "int8-capitals", text)


def ending_names(contents: Contents) -> Iterator[Finding]:
    """The companions of a 4-bit weight are found by its name anywhere in theirs: those of a weight whose name ends in
    another's are taken, too, and two quant states are refused."""
    turned = sorted(name[::-1] for name, each in contents.packed.items() if each.kind != "int8")
    pairs = [(two[::-1], one[::-1]) for one, two in pairwise(turned) if two.startswith(one)]
    if pairs:
        longer, shorter = pairs[0]
        text = (
            f"cannot tell the scales of {shorter} from those of {longer}, with the same ending. Skip one with --skip."
        )
        yield Finding("error", "ending-names", text)


def tensor_parallel(contents: Contents) -> Iterator[Finding]:
    """Weights that are quantized already cannot be split between GPUs (tensor parallelism)."""
    if contents.packed:
        text = (
            "refuses tensor parallelism for weights that are quantized already: use one GPU, or pipeline parallelism."
        )
        yield Finding("note", "tensor-parallel", text)


def stray_files(contents: Contents) -> Iterator[Finding]:
    """Every .safetensors file of the folder is read, also one that the index does not list."""
    if contents.others:
        yield Finding(
            "error", "stray-files", f"also reads {shown(contents.others)}. Remove files that are not part of the model."
        )


def stray_files_without_index(contents: Contents) -> Iterator[Finding]:
    """Every .safetensors file of the folder is read, unless there is an index."""
    if not contents.has_index:
        yield from stray_files(contents)
