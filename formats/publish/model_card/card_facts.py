"""What is known of how a checkpoint was made: its record and its config, as facts for a model card."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qz.formats.files.folder import PIPELINE_INDEX
from qz.formats.files.local_folder import LocalFolder
from qz.formats.malformed import UNSAFE_TEXT
from qz.formats.output.recorded.about import LIBRARIES, REPO_ID
from qz.formats.output.recorded.record import read_record
from qz.formats.publish.checkpoint_files import PAGE, config_here

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "prior")
"""What a converted model has in common with the one that it was made of. ``prior``: the repository from which diffusers
loads the other half of a pipeline (Kandinsky, Stable Cascade)."""
HUB = "https://huggingface.co"
BITS = {"nf4": 4, "fp4": 4, "int8": 8}
"""Of the methods."""


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a pipeline: ``method`` is none for one that is as it was. Bytes on disk before and after."""

    name: str
    architecture: str
    method: str
    bytes: tuple[int, int]


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card tells. ``source`` is a repository id if ``commit`` is known, else a folder's name. Sizes in bytes."""

    library: str
    architecture: str
    method: str
    source: str | None = None
    commit: str | None = None
    origin: str | None = None
    """The repository that a local source was made from."""
    subfolder: str | None = None
    double_quant: bool = False
    scales: str = "absmax"
    rounding: str = "nearest"
    importance: tuple[str, str] | None = None
    """File and SHA-256 of what was known of the model's inputs."""
    loras: tuple[tuple[str, float, str], ...] = ()
    """Of those that were fused into the weights, the file with its repository or folder, the scale, and the SHA-256."""
    dtype: str | None = None
    compute_dtype: str | None = None
    parameters: tuple[int, int] | None = None
    """All, and those that are quantized."""
    bytes: tuple[int, int] | None = None
    footprint: tuple[int, int] | None = None
    skipped: tuple[str, ...] = ()
    losses: tuple[tuple[str, float], ...] = ()
    """Relative error of the weights, by module."""
    loss: float | None = None
    """Of all of them together."""
    losses_left_out: int = 0
    """Modules of which the record does not tell."""
    command: tuple[str, ...] = ()
    """The words of the command that makes it again."""
    versions: Mapping[str, str] = field(default_factory=dict)
    inherited: Mapping[str, Any] = field(default_factory=dict)
    """From the head of the source's card; see ``INHERITED``."""
    tokenizer: bool = False
    module: str | None = None
    """Where the class is, if the library does not export it."""
    pipeline_class: str | None = None
    """Of the pipeline that it is a component of."""
    pipeline: bool = False
    """Whether it is a whole pipeline; ``components`` are its models."""
    components: tuple[Component, ...] = ()
    lacking: tuple[str, ...] = ()
    """Components that its class requires, and that who loads it passes."""
    loads_in: tuple[tuple[str, bool, str], ...] = ()
    """Programs with their versions, whether they load it by the rules from their code, and what is to know."""
    experts: bool = False
    """Whether the experts of an MoE model are quantized, which the library cannot load."""
    page: str | None = None
    """The name of the page that lists all layers, if it lies beside the checkpoint."""

    @property
    def base_model(self) -> str | None:
        named = self.source if self.commit else self.origin
        return named if named and REPO_ID.fullmatch(named) else None

    @property
    def methods(self) -> tuple[str, ...]:
        """That it is quantized with; of a pipeline there may be several."""
        return tuple(name for name in self.method.split("+") if name in BITS)


def facts_here(folder: Path) -> CardFacts:
    """The facts of an output of qz. ``config.json`` is missing in a single file's folder."""
    local = LocalFolder(folder)
    record = read_record(local)
    names = frozenset(file.name for file in record.files) if record is not None else frozenset[str]()
    return facts_of(record.about if record is not None else {}, config_here(local, names), names)


def facts_of(about: Mapping[str, Any], config: Mapping[str, Any], files: Collection[str] = ()) -> CardFacts:
    """The facts in a record's ``about`` (empty for a checkpoint that qz did not make) and the checkpoint's config.

    ``files``: names of the checkpoint's.
    """
    quantization = _mapping(config.get("quantization_config"))
    source = _mapping(about.get("source"))
    architectures = config.get("architectures")
    named = config.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else "")
    method = "none" if about.get("act") == "dequantize" else str(about.get("method") or _method(quantization))
    compute = quantization.get("bnb_4bit_compute_dtype")
    return CardFacts(
        library=_library(source.get("library"), config),
        architecture=str(source.get("architecture") or named or "AutoModel"),
        method=method,
        source=_text(source.get("location")),
        commit=_text(source.get("revision")),
        origin=_text(_mapping(about.get("origin")).get("location")),
        subfolder=_text(source.get("subfolder")),
        module=_text(source.get("module")),
        pipeline_class=_text(source.get("pipeline")),
        double_quant=bool(about.get("double_quant", quantization.get("bnb_4bit_use_double_quant"))),
        scales=str(about.get("scales") or "absmax"),
        rounding=str(about.get("rounding") or "nearest"),
        importance=_importance(about.get("importance")),
        loras=_loras(about.get("loras")),
        dtype=_text(about.get("dtype") or config.get("dtype") or config.get("torch_dtype")),
        compute_dtype=str(compute) if compute and method in ("nf4", "fp4") else None,
        parameters=_pair(about.get("parameters"), "total", "quantized"),
        bytes=_pair(about.get("bytes"), "source", "output"),
        footprint=_pair(about.get("memory_footprint"), "before", "after"),
        skipped=tuple(str(name) for name in about.get("skipped") or ()),
        losses=_losses(about.get("loss")),
        loss=_error(_mapping(_mapping(about.get("loss")).get("total"))),
        losses_left_out=_mapping(about.get("loss")).get("layers_left_out") or 0,
        command=tuple(about.get("command") or ()),
        versions={"qz": str(about["qz"])} | {str(k): str(v) for k, v in _mapping(about.get("versions")).items()}
        if "qz" in about
        else {},
        tokenizer=not {"tokenizer.json", "tokenizer_config.json"}.isdisjoint(files),
        pipeline=PIPELINE_INDEX in files or "components" in about,
        components=_components(about.get("components")),
        lacking=tuple(name for name in about.get("lacking") or () if isinstance(name, str) and name.isidentifier()),
        loads_in=tuple(
            (f"{each.get('name')} ({each.get('package')})", bool(each.get("loads")), str(each.get("why") or ""))
            for each in about.get("loads_in") or ()
        ),
        experts=bool(_mapping(about.get("settings")).get("experts")),
        page=PAGE if PAGE in files else None,
    )


def inherit(facts: CardFacts, card: Mapping[str, Any]) -> CardFacts:
    """The facts with what the source's card says; a link inside the source's repository becomes a full one."""
    taken = {key: card[key] for key in INHERITED if _inheritable(card.get(key))}
    link = taken.get("license_link")
    if isinstance(link, str) and facts.base_model and not re.match(r"[a-z]+://", link):
        taken["license_link"] = f"{HUB}/{facts.base_model}/blob/main/{link.removeprefix('./')}"
    return replace(facts, inherited=taken)


def _library(named: Any, config: Mapping[str, Any]) -> str:
    return named if named in LIBRARIES else "diffusers" if "_class_name" in config else "transformers"


def _inheritable(value: Any) -> bool:
    """A short text, or several: what these keys hold."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(v, str) and 0 < len(v) <= 300 and not UNSAFE_TEXT.search(v) for v in values)


def _method(quantization: Mapping[str, Any]) -> str:
    if quantization.get("load_in_8bit"):
        return "int8"
    if quantization.get("load_in_4bit"):
        return str(quantization.get("bnb_4bit_quant_type", "fp4"))
    return "none"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _importance(value: Any) -> tuple[str, str] | None:
    file, sha256 = _text(_mapping(value).get("file")), _text(_mapping(value).get("sha256"))
    return (file, sha256) if file and sha256 else None


def _loras(value: Any) -> tuple[tuple[str, float, str], ...]:
    found = []
    for each in map(_mapping, value if isinstance(value, list) else ()):
        location, file = _text(each.get("location")) or "", _text(each.get("file")) or ""
        place = location if location == file else f"{location}/{file}"
        scale = each.get("scale")
        found.append((place, float(scale) if isinstance(scale, int | float) else 1.0, str(each.get("sha256") or "")))
    return tuple(found)


def _pair(value: Any, first: str, second: str) -> tuple[int, int] | None:
    pair = (_mapping(value).get(first), _mapping(value).get(second))
    return (pair[0], pair[1]) if isinstance(pair[0], int) and isinstance(pair[1], int) else None


def _losses(value: Any) -> tuple[tuple[str, float], ...]:
    """Worst first, as the record has them."""
    layers = [_mapping(layer) for layer in _mapping(value).get("layers") or ()]
    return tuple((str(layer.get("name")), error) for layer in layers if (error := _error(layer)) is not None)


def _error(told: Mapping[str, Any]) -> float | None:
    error = told.get("relative_error")
    return float(error) if isinstance(error, int | float) else None


def _components(value: Any) -> tuple[Component, ...]:
    """The components that have weights."""
    found = []
    for each in map(_mapping, value if isinstance(value, list) else ()):
        size = _pair(each.get("bytes"), "source", "output")
        if size and size[0]:
            method = str(each.get("method") or "none")
            found.append(Component(str(each.get("name")), str(each.get("architecture") or ""), method, size))
    return tuple(found)
