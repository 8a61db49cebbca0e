"""docs/reference/models.md from the zoo's results."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from typing import Any

HEAD = """# Models

Model classes of the libraries, built tiny with random weights, quantized by the library and by qz, and compared, with
transformers {transformers} and diffusers {diffusers}; `make zoo` writes this page. {tried} classes
of {kinds} model types were tried.

- **identical**: every file is byte for byte the library's, loads plainly, and `qz dequantize` gives its values back.
  One forward pass gives the output of the library's quantized model, where an input was known and that model could run.
- **kept on purpose**: the same, for the skip list that qz wrote: some layers cannot work quantized, see
  [what is skipped anyway](../how-to/skip-modules.md#what-is-skipped-anyway).
- **the model's names**: the checkpoint's names would merge packed weights, and the library's own output does not load.
- **refused**: with the reason. **not built**: the zoo has no small model of the class, so nothing is known.

Classes that are identical with every method are counted, not listed.

| result, by class and method | |
|---|---|
"""


def page(rows: list[dict[str, Any]]) -> str:
    """The whole page. Rows without a word to say are counted only."""
    counts = Counter(row["result"] if not row["faults"] else "differs" for row in rows)
    tried = len({(row["kind"], row["architecture"]) for row in rows})
    kinds = len({row["kind"] for row in rows})
    text = HEAD.format(transformers=version("transformers"), diffusers=version("diffusers"), tried=tried, kinds=kinds)
    text += "".join(f"| {result} | {count:,} |\n" for result, count in counts.most_common())
    text += "\n| class | method | result | why |\n|---|---|---|---|\n"
    for row in sorted(rows, key=lambda row: (row["architecture"], row["method"])):
        if row["result"] != "identical" or row["faults"]:
            why = " ".join([row["why"], *row["faults"]]).replace("|", "\\|").replace("\n", " ").strip()
            result = "differs" if row["faults"] else row["result"]
            text += f"| {row['architecture']} | {row['method'] or '–'} | {result} | {_short(why)} |\n"
    return text


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "…"
