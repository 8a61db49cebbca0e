"""How the text of an option is read: sizes, dtypes, devices, numbers of threads, and shares.

What a value is read with is imported then: most commands declare such options and are run without them.
"""

from __future__ import annotations

import re

import typer

MOST_THREADS = 1024
UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate(("K", "M", "G", "T"), start=1)
    for suffix, base in (("B", 1000), ("IB", 1024), ("", 1000))
}


def parse_size(text: str | int) -> int:
    """Bytes of ``5GB``, ``500MB``, ``2GiB`` or a plain number, decimal and binary units as the libraries read them."""
    from fractions import Fraction

    from qz.quantize.settings import LEAST_SHARD_BYTES

    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", str(text), re.ASCII)
    unit = UNITS.get(match[2].upper()) if match else None
    nbytes = int(Fraction(match[1]) * unit) if match is not None and unit is not None else 0
    if nbytes < 1:
        shown = str(text) if len(str(text)) <= 40 else f"{str(text)[:40]}…"
        raise typer.BadParameter(f"{shown!r} is not a size. Write it as 5GB, 500MB or 2GiB.")
    if nbytes < LEAST_SHARD_BYTES:
        raise typer.BadParameter(f"{text!r} means {nbytes} bytes. Write the unit: 5GB, 500MB or 2GiB.")
    return nbytes


def parse_dtype(text: str) -> str:
    """``auto``, or torch's name of a dtype, also for a short one: ``bf16``, ``fp16``, ``half``, ``fp32``."""
    return text if text == "auto" else one_of_dtypes(text, ("auto", "float16", "bfloat16", "float32"))


def parse_compute_dtype(text: str) -> str:
    """torch's name of a dtype that 4-bit layers compute in."""
    return one_of_dtypes(text, ("bfloat16", "float16", "float32"))


def one_of_dtypes(text: str, names: tuple[str, ...]) -> str:
    """The full name of a dtype among ``names``."""
    from qz.quantize.methods import full_name

    name = full_name(text)
    if name not in names:
        listed = ", ".join(map(repr, names))
        raise typer.BadParameter(f"{text!r} is not one of {listed} (or bf16, fp16, half, fp32).")
    return name


def parse_device(text: str) -> str:
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``xpu``, ``xpu:N`` or ``mps``."""
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", text):
        raise typer.BadParameter(f"{text!r} is not one of auto, cpu, cuda, cuda:N, xpu, xpu:N, mps.")
    return text


def parse_threads(text: str | int) -> int:
    """A number of threads, 1 to 1024."""
    if not re.fullmatch(r"\s*0*[1-9]\d{0,3}\s*", str(text)) or int(text) > MOST_THREADS:
        raise typer.BadParameter(f"{text!r} is not a number of threads from 1 to {MOST_THREADS}.")
    return int(text)


def parse_share(text: str | float) -> float:
    """``5%`` or ``0.05``, more than nothing and at most all."""
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,9})?|\.\d{1,9})\s*(%?)\s*", str(text), re.ASCII)
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise typer.BadParameter(f"{text!r} is not a share of more than 0% and at most 100%. Write it as 5%.")
    return share
