"""docs/reference/models.md from the zoo's results."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

HEAD = """# Models

What qz does with the model classes of transformers {transformers} and diffusers {diffusers}, and with pipelines of
diffusers: each is built small with random weights, quantized by the library and by qz, and compared. `make zoo` writes
this page; nothing in it is written by hand. {cases:,} classes of {kinds:,} kinds were tried with nf4 and int8, some
with fp4 and double quantization too.

- **identical**: every file has the library's bytes, the output loads plainly with the values it was made of,
  `qz inspect` finds nothing, and `qz dequantize` gives its values back. Of a pipeline, every quantized component has
  the library's tensors, and all other files are unchanged.
- **kept on purpose**: the same, with the skip list that qz wrote: some layers cannot work quantized, see
  [what is skipped anyway](../how-to/skip-modules.md#what-is-skipped-anyway).
- **the model's names**: under the checkpoint's names the library's own output would not load; the model's are written.
- **known difference**: understood, and told below.
- **the library fails**: it cannot quantize or save the class; qz's output loads.
- **nothing to quantize**: no linear layer that bitsandbytes would quantize; qz refuses the class and says so.
- **no class of its own**: no Auto class loads the type: it is the config of a part of other models.
- **refused**: for the reason given. **not built**: the zoo has no small model of it, so nothing is known.
- **differs**: for no reason that is known.
"""
ORDER = ("identical", "kept on purpose", "the model's names", "known difference", "the library fails",
         "nothing to quantize", "no class of its own", "refused", "not built", "differs")  # fmt: skip
RUNS = {
    "equal": "equal to the library's quantized model",
    "near": "equal to it, and near the original, with layers kept on purpose",
    "library": "not compared: the library's quantized model fails on this CPU",
    "none": "not compared: no call, for the reasons below",
}
TITLES = {"transformers": "Models of transformers", "diffusers": "Models of diffusers",
          "diffusers pipeline": "Pipelines of diffusers"}  # fmt: skip


def page(rows: list[dict[str, Any]]) -> str:
    """The whole page."""
    cases = {(row["library"], row["kind"], row["architecture"]) for row in rows if row["method"]}
    text = HEAD.format(
        transformers=version("transformers"),
        diffusers=version("diffusers"),
        cases=len(cases),
        kinds=len({case[:2] for case in cases}),
    )
    for library, title in TITLES.items():
        text += _section(title, [row for row in rows if row["library"] == library])
    return text


def _section(title: str, rows: list[dict[str, Any]]) -> str:
    counts = Counter(_result(row) for row in rows)
    text = f"\n## {title}\n\n| result | rows, one for each class and method |\n|---|---|\n"
    text += "".join(f"| {result} | {counts[result]:,} |\n" for result in ORDER if counts[result])
    tried = [row for row in rows if row["method"] and _result(row) not in ("refused", "nothing to quantize")]
    runs = Counter(_ran(row) for row in tried)
    text += "\n| one run of what is not refused | rows |\n|---|---|\n"
    text += "".join(f"| {RUNS[how]} | {runs[how]:,} |\n" for how in RUNS if runs[how])
    classes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        classes[row["kind"], row["architecture"]].add(_result(row))
    text += _names("Identical", (name for name, results in classes.items() if results == {"identical"}))
    text += _names(
        "Nothing to quantize", (name for name, results in classes.items() if results == {"nothing to quantize"})
    )
    text += _names(
        "No class of its own", (name for name, results in classes.items() if results == {"no class of its own"})
    )
    told: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        if (result := _result(row)) not in ("identical", "nothing to quantize", "no class of its own"):
            told[row["architecture"], _kind(row), result, _why(row)].append(row["method"] or "all")
    if told:
        text += "\n### Others\n\n| class | method | result | why |\n|---|---|---|---|\n"
    for (name, kind, result, why), methods in sorted(told.items()):
        text += f"| {name}{kind} | {', '.join(methods)} | {result} | {why} |\n"
    return text + _not_called([row for row in tried if _ran(row) == "none"])


def _not_called(rows: list[dict[str, Any]]) -> str:
    told: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        told[row["architecture"], _kind(row), _shown(row["ran"])].append(row["method"])
    if not told:
        return ""
    text = "\n### Not called\n\n| class | method | why |\n|---|---|---|\n"
    return text + "".join(
        f"| {name}{kind} | {', '.join(methods)} | {why} |\n" for (name, kind, why), methods in sorted(told.items())
    )


def _names(title: str, classes: Iterable[tuple[str, str]]) -> str:
    names = sorted({architecture for _, architecture in classes}, key=str.lower)
    if not names:
        return ""
    listed = textwrap.fill(", ".join(names), 118, break_long_words=False, break_on_hyphens=False)
    return f"\n### {title}\n\n{listed}.\n"


def _result(row: dict[str, Any]) -> str:
    if row["faults"]:
        return "differs"
    nothing = row["why"] == "no linear layer" or "nothing of" in row["why"] or "nothing to quantize" in row["why"]
    return "nothing to quantize" if nothing and row["result"] in ("refused", "not built") else str(row["result"])


def _ran(row: dict[str, Any]) -> str:
    if row["ran"] in ("equal", "near"):
        return str(row["ran"])
    return "library" if row["ran"].startswith("the library") else "none"


def _kind(row: dict[str, Any]) -> str:
    return f" ({row['kind']})" if row["library"] == "transformers" else ""


def _why(row: dict[str, Any]) -> str:
    return _shown(" ".join([row["why"], *row["faults"]]))


def _shown(text: str) -> str:
    text = text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").strip()
    return text if len(text) <= 200 else text[:197] + "…"
