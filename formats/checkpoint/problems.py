"""What can be wrong with a checkpoint: every kind of problem and its text, and how several become one error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from qz import HubUnreachable, IOFailed, MalformedInput, MissingInput, PermissionRefused, QzError, TryAgain, Unsupported
from qz.counted import counted
from qz.formats.malformed import Malformed

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

Severity = Literal["error", "warning"]

LISTED = 200
"""How many problems of one kind are kept; the others are counted."""
SHOWN = 12
"""How many places one line of an error names."""
LINES = 4
"""How many lines an error has."""


class Problem(NamedTuple):
    """Something wrong with a checkpoint. An error means that it cannot work; the message says what to do."""

    severity: Severity
    kind: str
    where: str
    message: str


_ANEW = "Download the index and the shards again, of one revision."
_AGAIN = "Quantize the original again, or download this again."

# Worst first, each with the error that it raises and its text; without a text, the reader gives one.
ERRORS: dict[str, tuple[type[QzError], str]] = {
    # What the folder is
    "not-a-folder": (MalformedInput, ""),
    "pipeline-root": (
        MissingInput,
        (
            "{location} is a whole diffusers pipeline, not one model. Name a component with --subfolder (there "
            "are: {inside})."
        ),
    ),
    "modular-pipeline": (
        Unsupported,
        (
            "{where} describes a modular pipeline, whose components are loaded from where it says. Quantize each "
            "there: {components}"
        ),
    ),
    "adapter-only": (
        Unsupported,
        ("{location} holds only {what}, not a model. {how}"),
    ),
    "adapter-unmerged": (
        Unsupported,
        (
            "{where} was saved while a LoRA was attached ({name}), and {library} cannot load such names. Remove it "
            "before saving: {how}"
        ),
    ),
    "original-layout": (
        Unsupported,
        ("{where} names its tensors as {tool} does ({example}), which {library} does not load as it is. {how}"),
    ),
    "gguf-several": (
        MissingInput,
        "{location} holds several models in GGUF: {names}. Choose one with --variant, such as Q8_0, or name the file.",
    ),
    "gguf-parts": (
        MissingInput,
        (
            "{location} holds a model in GGUF that is split into several files, without {names}. Download them all "
            "into one folder, and name that."
        ),
    ),
    "gguf-malformed": (MalformedInput, ""),
    "gguf-type": (Unsupported, ""),
    # What may not be touched
    "unsafe-name": (
        MalformedInput,
        (
            "{where} names {name} as a shard; a shard ends in .safetensors and lies beside its index or, of a model of "
            "transformers, in a folder there. Do not use this checkpoint."
        ),
    ),
    "link-outside": (MalformedInput, ""),
    "not-a-file": (MalformedInput, ""),
    "permission": (PermissionRefused, ""),
    "unreadable": (MalformedInput, ""),
    "io-failed": (IOFailed, ""),
    # What is missing, or is something else
    "config-missing": (MissingInput, "{location} has no config.json, so it is not a model folder. {instead}"),
    "settings-only": (
        MissingInput,
        "{location} holds no model, only {what} ({name}), which has no weights: there is nothing to quantize.",
    ),
    "models-inside": (
        MissingInput,
        "{location} has no config.json, but there are models in it: {inside}. Name one with --subfolder.{also}",
    ),
    "git-lfs-pointer": (MalformedInput, ""),
    "pickle": (MalformedInput, ""),
    "pickle-only": (
        MalformedInput,
        ("{location} has only pickle weights ({name}), which can run code. {how}"),
    ),
    "pickle-unsafe": (MalformedInput, ""),
    "pickle-malformed": (MalformedInput, ""),
    "pickle-tensor": (Unsupported, ""),
    "gguf": (MalformedInput, ""),
    "json-malformed": (MalformedInput, ""),
    "library-unknown": (
        Unsupported,
        (
            "{where} has neither model_type, architectures nor _class_name: neither transformers nor diffusers "
            "knows such a model. {instead}"
        ),
    ),
    "variant-missing": (MissingInput, "{location} has no weights of the variant {name}. Variants there: {there}."),
    "index-missing": (
        MissingInput,
        "{location} has {shards} but no {name}, which says what is in them. Download that too.",
    ),
    "weights-missing": (MissingInput, "{location} has no {name}, which {library} loads{instead}."),
    "index-malformed": (MalformedInput, "{where}: {why}. Download it again."),
    "shard-missing": (MissingInput, "{where} is missing. Download it, or the whole checkpoint again."),
    # What is damaged
    "empty-file": (MalformedInput, ""),
    "not-safetensors": (MalformedInput, ""),
    "truncated": (MalformedInput, ""),
    "changed": (MalformedInput, ""),
    "header-malformed": (MalformedInput, ""),
    "tensor-twice": (
        MalformedInput,
        ("{location}: {name} is in two shards, {first} and {second}. Save the checkpoint anew, or download it again."),
    ),
    "tensor-absent": (MalformedInput, "{where} places {name} in {file}, which does not hold it. " + _ANEW),
    "tensor-elsewhere": (MalformedInput, "{where} places {name} in {file}, but it is in {held}. " + _ANEW),
    "tensor-unindexed": (MalformedInput, "{where} does not list {name}, which is in {held}. " + _ANEW),
    "no-tensors": (MalformedInput, "{location} holds no tensor at all. Download it again."),
    # What is wrong with another tool's quantization
    "scale-missing": (
        MalformedInput,
        "{name} is stored as {dtype} and has no scale, while others have. Download the checkpoint again.",
    ),
    "scale-malformed": (
        MalformedInput,
        "{name} is {found}, which does not fit its weight of shape {weight}. Download the checkpoint again.",
    ),
    "encoded-malformed": (
        MalformedInput,
        "{name} is quantized ({kind}), and its parts do not fit together: {found}. Download the checkpoint again.",
    ),
    "encoded-part-missing": (MalformedInput, "{name} is quantized ({kind}) but has no {missing}. Download it again."),
    "encoded-twice": (
        MalformedInput,
        "{where} and another tensor both stand for {name}. Use a checkpoint that has one of them.",
    ),
    # What is wrong with the quantization
    "nested-absmax-missing": (
        MalformedInput,
        "{name} has no nested_absmax: {library} loads it without an error and computes nonsense. " + _AGAIN,
    ),
    "companion-missing": (MalformedInput, "{name} is quantized ({kind}) but has no {missing}. " + _AGAIN),
    "companion-orphan": (MalformedInput, "{name} belongs to a quantized weight that is not there. " + _AGAIN),
    "companion-malformed": (MalformedInput, "{name} is {found}, where {kind} needs {needed}. " + _AGAIN),
    "quant-state-malformed": (MalformedInput, "{name}: {why}. " + _AGAIN),
    "quant-state-mismatch": (MalformedInput, "{name} says {said}, but {found}. " + _AGAIN),
    "quantization-config-malformed": (MalformedInput, "{where}: quantization_config {why}. " + _AGAIN),
    "quantization-config-missing": (
        MalformedInput,
        (
            "{where} has no quantization_config, but {weights} quantized ({kind}), so {library} cannot "
            "load them. " + _AGAIN
        ),
    ),
    "quantization-config-mismatch": (
        MalformedInput,
        "{where}: quantization_config says {said}, but {found}. " + _AGAIN,
    ),
    "skipped-but-quantized": (
        MalformedInput,
        (
            "{name} is quantized, but quantization_config lists {module} among the modules to skip, so {library} "
            "cannot load it. " + _AGAIN
        ),
    ),
    "split-across-shards": (
        MalformedInput,
        (
            "{name} is in {first}, but its {part} is in {second}; diffusers cannot load 4-bit weights that are "
            "split. Quantize again with qz, or save with a larger shard size."
        ),
    ),
    "storage-unsupported": (
        MalformedInput,
        ("{name} is stored as {dtype}; diffusers loads 4-bit weights stored as U8 only. Quantize the original again."),
    ),
}
WARNINGS: dict[str, str] = {
    "variant-only": "{location} has no plain weights; those of the variant {variant} are taken.",
    "two-layouts": "{location} has both {taken} and {left}; {taken} is taken, as {library} does. Delete the other.",
    "quantized-by-other": (
        "{where}: the model is quantized with {method}, which qz neither reads nor changes. Quantize the "
        "original model instead."
    ),
    "quantization-left-over": "{told}",
    "encoding-unknown": (
        "{where}: the model is already quantized, in a form that qz does not know: {what}. Start from the original "
        "weights."
    ),
    "fp8-weights": (
        "{location} holds {weights} in 8-bit floating point ({name}); qz starts from 16 or 32 bits. Use"
        " the original checkpoint."
    ),
    "quantization-config-differs": (
        "{where}: quantization_config says {said}, but {found}. The tensors count; correct the config."
    ),
    "index-metadata": (
        '{where} has no "metadata", without which {library} cannot load the shards. Save the checkpoint anew.'
    ),
    "index-differs": "{where} does not say that {name} is in {held}, which transformers loads, too: it is taken.",
    "index-total-size": "{where} gives a total_size of {said}; the tensors have {held} bytes.",
    "file-unused": "{where} is not listed by the index, so no loader reads it. Delete it, or download the index again.",
    "component-null": (
        "{where} gives no {names}, which {class_name} requires: from_pretrained loads the pipeline only if you pass "
        "{arguments}."
    ),
    "component-class": "{where}: {told}.",
    "companion-class": "{where}: {told}.",
    "tokenizer-vocabulary": "{where}: {told}.",
    "pickle-files": "{where} is a pickle file, which can run code. It is not read; delete it if nothing needs it.",
    "experts-quantized": (
        "{location} has quantized experts ({name} …), which transformers 5 cannot load: it would merge their codes. "
        "Load it with qz.load; `qz inspect {location} --for vllm --for unsloth` says who else can."
    ),
    "custom-code": ("{location} brings code of its own{named}. qz never runs it: the class must come with {library}."),
}
CHOICES = ("variant-only", "two-layouts", "index-differs")
"""The warnings that say which of several things were taken."""
_PLACES = {kind: place for place, kind in enumerate((*ERRORS, "", *WARNINGS))}


def _place(kind: str) -> int:
    """Kinds that other modules report by themselves come between the errors and the warnings of the tables."""
    return _PLACES.get(kind, len(ERRORS))


def kind_of(error: QzError, missing: str) -> str:
    """The kind of problem that ``error`` is; ``missing`` if it says that a file is not there."""
    if isinstance(error, HubUnreachable | TryAgain):
        raise error  # the checkpoint could not be read at all
    if isinstance(error, Malformed):
        return error.kind
    if isinstance(error, MissingInput):
        return missing
    return "permission" if isinstance(error, PermissionRefused) else "io-failed"


class Problems:
    """A list of problems that stays short: of each kind the first ``LISTED`` are kept, and the others counted."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._found: dict[str, list[Problem]] = {}
        self._more: dict[str, int] = {}

    def add(self, kind: str, where: str, /, **facts: object) -> None:
        """A problem in the words of the tables above. ``where`` in them is the path, unless ``facts`` has another."""
        if self._room(kind):
            text = ERRORS[kind][1] if kind in ERRORS else WARNINGS[kind]
            known = {"location": self.location, "where": f"{self.location}/{where}", **facts}
            self._keep(kind, where, text.format(**known))

    def add_error(self, error: QzError, where: str, missing: str, **facts: object) -> None:
        """An error met while reading; of the kind ``missing``, in its own words, if the file is not there."""
        kind = kind_of(error, missing)
        if isinstance(error, MissingInput):
            self.add(kind, where, **facts)
        elif self._room(kind):
            self._keep(kind, where, str(error))

    def _room(self, kind: str) -> bool:
        if len(self._found.get(kind, ())) < LISTED:
            return True
        self._more[kind] = self._more.get(kind, 0) + 1
        return False

    def _keep(self, kind: str, where: str, message: str) -> None:
        severity: Severity = "warning" if kind in WARNINGS else "error"
        self._found.setdefault(kind, []).append(Problem(severity, kind, where, message))

    def choices(self) -> tuple[str, ...]:
        """The messages of those kinds, the first of each."""
        found = [(self._found[kind], self._more.get(kind, 0)) for kind in CHOICES if kind in self._found]
        counts = [len(alike) - 1 + more for alike, more in found]
        return tuple(
            alike[0].message.removesuffix(".") + (f" (and {more} more such)" if more else "")
            for (alike, _), more in zip(found, counts, strict=True)
        )

    def worst_first(self) -> tuple[Problem, ...]:
        """All of them, by their kind's place in the tables above."""
        listed: list[Problem] = []
        for kind in sorted(self._found, key=_place):
            listed += self._found[kind]
            if kind in self._more:
                last = listed[-1]
                message = f"{self.location} has {counted(self._more[kind], 'more problem')} of the kind {kind}."
                listed.append(Problem(last.severity, kind, self.location, message))
        return tuple(listed)


def worst_first(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Problems of several lists, by their kind's place in the tables above."""
    return tuple(sorted(problems, key=lambda problem: _place(problem.kind)))


def require_none(
    location: str, problems: Iterable[Problem], *, but: Container[str] = (), recorded: bool = False
) -> None:
    """Raise one error for all of ``problems`` that are errors, of kinds that are not in ``but``: see ``as_error``."""
    errors = [each for each in problems if each.severity == "error" and each.kind not in but]
    if errors:
        raise as_error(location, errors, recorded=recorded)


def as_error(location: str, problems: Sequence[Problem], *, recorded: bool = False) -> QzError:
    """One error for all of ``problems``, worst first: at most ``LINES`` lines, one a kind, naming where each occurs.

    ``recorded``: a record says what the files were, so one line more tells how to compare them with it.
    """
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    error, _ = ERRORS.get(problems[0].kind, (MalformedInput, ""))
    is_damage = recorded and issubclass(error, MalformedInput) and "`qz verify`" not in problems[0].message
    further = [f"qz wrote this: `qz verify {location}` tells which files are not as its qz.json says."] * is_damage
    if len(problems) == 1:
        return error(problems[0].message, *further)
    lines = []
    for alike in kinds.values():
        others = [problem.where for problem in alike[1:]]
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        lines.append(alike[0].message + (f" Likewise: {', '.join(others[:SHOWN])}{more}." if others else ""))
    if len(lines) > LINES - 1:
        rest = ", ".join(f"{kind} ({len(alike)})" for kind, alike in list(kinds.items())[LINES - 2 :])
        lines = [*lines[: LINES - 2], f"Also: {rest}. `qz inspect {location}` lists them all."]
    return error(f"{location} has {len(problems)} problems:", *lines, *further)
