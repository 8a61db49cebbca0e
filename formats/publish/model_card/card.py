"""The model card of a converted checkpoint: where it comes from, what was done, and how to load it.

What qz writes stands between two comments, one pair for each folder of the repository; all other text is kept. The YAML
head gets the keys that it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCard

from qz import MalformedInput
from qz.formats.publish.model_card.card_facts import BITS, HUB, CardFacts
from qz.formats.publish.model_card.escaping import LONGEST_TEXT, code, fenced, markdown, shell
from qz.formats.publish.model_card.snippet import OnHub, snippet

LISTED = 30
"""Modules that are named, at most: those that were skipped, and those that lost most."""


def write_card(facts: CardFacts, repo_id: str, folder: str = "", existing: str | None = None) -> str:
    """The README.md of ``repo_id`` whose ``folder`` holds the checkpoint; ``existing`` is the text that is there.

    Raises MalformedInput if the YAML front matter of the existing text cannot be read.
    """
    begin, end = (f"<!-- qz:{word}{' ' + folder if folder else ''} -->" for word in ("begin", "end"))
    section = f"{begin}\n{_section(facts, repo_id, folder)}\n{end}"
    if existing is None or not existing.strip():
        name = facts.base_model.split("/")[-1] if facts.base_model else repo_id.split("/")[-1]
        title = f"# {markdown(name)}, {in_words(facts)}"
        card = ModelCard(f"---\n{yaml.safe_dump({'library_name': facts.library})}---\n\n{title}\n\n{section}\n")
    else:
        try:
            card = ModelCard(existing)
        except Exception as error:  # noqa: BLE001  of no foreseeable kind: RecursionError too
            first = str(error).split("\n", 1)[0] or type(error).__name__
            raise MalformedInput(
                f"The README.md of {repo_id} has YAML front matter that cannot be read ({first}). "
                "Repair it, then push again."
            ) from None
        text = card.text
        if begin in text and end in text[text.index(begin) :]:
            start = text.index(begin)
            stop = text.index(end, start) + len(end)
            card.text = text[:start] + section + text[stop:]
        else:
            card.text = text.rstrip() + f"\n\n{section}\n"
    _complete(card.data, facts)
    return str(card)


def _complete(data: CardData, facts: CardFacts) -> None:
    """Add to the head what it does not say yet."""
    wanted: dict[str, Any] = {**facts.inherited, "library_name": facts.library}
    if facts.base_model:
        wanted["base_model"] = facts.base_model
        if facts.methods:
            wanted["base_model_relation"] = "quantized"
    licensed = data.get("license") is not None
    for key, value in wanted.items():
        foreign = (key.startswith("license") and licensed) or (
            key == "base_model_relation" and data.get("base_model") != facts.base_model
        )
        if data.get(key) is None and not foreign:
            data[key] = value
    if facts.methods:
        tags = [str(tag) for tag in data.get("tags") or ()]
        new = ["bitsandbytes", *(tag for name in facts.methods for tag in (f"{BITS[name]}-bit", name))]
        data["tags"] = tags + [tag for tag in dict.fromkeys(new) if tag not in tags]


def _section(facts: CardFacts, repo_id: str, folder: str) -> str:
    parts = [
        _introduction(facts),
        _sizes(facts),
        _loras(facts),
        _refinement(facts),
        _skips(facts),
        _page(facts, folder),
        "## Use",
        fenced("python", snippet(facts, OnHub(repo_id, folder))),
    ]
    if facts.loads_in:
        rows = [
            (markdown(name), "yes" if loads else "no", markdown(why, LONGEST_TEXT))
            for name, loads, why in facts.loads_in
        ]
        parts += [
            "## Loads in",
            "By rules from the code of these programs (`qz inspect --for`); they were not run on this checkpoint.",
            _table(rows, "program", "", "to know", align="---"),
        ]
    if facts.losses:
        parts += ["## Loss", _told_of_loss(facts), _losses(facts)]
    if facts.command or facts.versions:
        parts.append("## How it was made")
        parts.append(fenced("sh", shell(facts.command)) if facts.command else "")
        parts.append(", ".join(markdown(f"{name} {version}") for name, version in facts.versions.items()))
    return "\n\n".join(part for part in parts if part)


def _introduction(facts: CardFacts) -> str:
    base = facts.base_model
    link = f"[{markdown(base)}]({HUB}/{base})" if base else ""
    model = link or "a model"
    if facts.source and facts.source != base:
        model = markdown(facts.source) + (f" (from {link})" if link else "")
    of = f"the {code(facts.subfolder)} of {model}" if facts.subfolder else model
    at = f" (commit {code(facts.commit[:12])})" if facts.commit else ""
    done = "converted back to" if facts.method == "none" else "quantized to"
    what = markdown(facts.dtype or "floats") if facts.method == "none" else in_words(facts)
    return f"This is {of}{at}, {done} {what} with [qz](https://pypi.org/project/qz-cli/)."


def in_words(facts: CardFacts) -> str:
    """The method as a title has it."""
    if not facts.methods:
        return markdown(facts.dtype or "as it is")
    names = {"nf4": "NF4 (4 bit)", "fp4": "FP4 (4 bit)", "int8": "LLM.int8() (8 bit)"}
    more = " with double quantization" if facts.double_quant else ""
    return " and ".join(names[name] + (more if BITS[name] == 4 else "") for name in facts.methods)


def _refinement(facts: CardFacts) -> str:
    """How scales and codes were chosen, where it was not as the libraries do."""
    if facts.scales == "absmax":
        return ""
    told = [f"scales: {markdown(facts.scales)}"]
    if facts.importance:
        told.append(f"importance: {code(facts.importance[0])} (SHA-256 {code(facts.importance[1])})")
    if facts.rounding != "nearest":
        told.append(f"rounding: {markdown(facts.rounding)}")
    return f"Better than by absmax, in the same format and size ({', '.join(told)})."


def _loras(facts: CardFacts) -> str:
    """What was fused into the weights before they were quantized."""
    told = [f"{code(place)} × {scale:g} (SHA-256 {code(sha256)})" for place, scale, sha256 in facts.loras]
    return f"LoRAs fused into the weights: {', '.join(told)}." if told else ""


def _sizes(facts: CardFacts) -> str:
    if facts.components:
        parts = [
            (code(c.name), markdown(c.architecture), markdown(c.method), *map(_size, c.bytes)) for c in facts.components
        ]
        return _table(parts, "component", "class", "method", "before", "after") + "\n\n" + _totals(facts)
    return _totals(facts)


def _totals(facts: CardFacts) -> str:
    rows = [
        (label, *map(_size, pair))
        for label, pair in (("weights on disk", facts.bytes), ("memory footprint", facts.footprint))
        if pair
    ]
    parts = [_table(rows, "", "before", "after")] if rows else []
    if facts.parameters and facts.methods:
        total, quantized = facts.parameters
        rest = f"; all else is {markdown(facts.dtype)}." if facts.dtype else "."
        parts.append(f"{quantized / max(total, 1):.1%} of {total:,} parameters are quantized{rest}")
    return "\n\n".join(parts)


def _skips(facts: CardFacts) -> str:
    if not facts.skipped:
        return ""
    names = ", ".join(code(name) for name in facts.skipped[:LISTED])
    more = f" and {len(facts.skipped) - LISTED} more" if len(facts.skipped) > LISTED else ""
    return f"Linear layers left as they are: {names}{more}."


def _told_of_loss(facts: CardFacts) -> str:
    total = f"Of all together: {facts.loss:.4f}. " if facts.loss is not None else ""
    count = len(facts.losses) + facts.losses_left_out
    listed = f"the {LISTED} largest of {count:,}" if count > LISTED else "largest first"
    return f"Relative error of the quantized weights (Frobenius norm). {total}By module, {listed}:"


def _losses(facts: CardFacts) -> str:
    return _table([(code(name), f"{loss:.4f}") for name, loss in facts.losses[:LISTED]], "module", "error")


def _page(facts: CardFacts, folder: str) -> str:
    if facts.page is None:
        return ""
    place = f"{folder}/{facts.page}" if folder else facts.page
    return f"[{facts.page}](<{place}>) has the sizes, what is quantized and why not, and what each layer lost."


def _size(count: int) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.3g} {unit}"
    return f"{count} bytes"


def _table(rows: Sequence[tuple[str, ...]], *head: str, align: str = "---:") -> str:
    lines = [head, ("---", *[align] * (len(head) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
