"""Which arguments have an effect in which runs: one that would be ignored is refused, by one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

from qz import UsageError


class Need(NamedTuple):
    """What must hold in a run of ``commands`` for an ``argument`` to have an effect, and what is said if it does not.

    ``fact`` is a keyword of ``Asked.require``; in ``otherwise``, ``{source}`` stands for what the user named.
    """

    commands: str
    argument: str
    fact: str
    otherwise: str

    def concerns(self, command: str) -> bool:
        return command in self.commands.split()


ON_THE_HUB = "--{} is about a repository on the Hub, and {{source}} is here. Leave it out."
OF_A_FILE = "{{source}} is a file: --{} needs the folder that it lies in."
AGAINST = "--{} belongs to --against SOURCE: hashes are compared without it. Add it, or leave this one out."
FILES = "--{} is about the files as they are: leave out --against, or this."
PUSHED = "{} Add --push REPO_ID."
ONE_MODEL = "{}, and {{source}} is a pipeline. Name a component with --subfolder{}."
ONE_INSIDE = "{}, and {{source}} holds a whole pipeline. Leave it out."
NO_PIPELINE = "{source} is one model, not a pipeline: leave out --components and --component."
SENT = "--{} is about files here, and the parts of {{source}} were sent to the Hub. Leave it out."
FOUR_BIT = "--{} is about 4-bit weights, and no component of {{source}} gets them. Leave it out."
OF_TEXT = (
    "--{} is for models that read text, and {{source}} generates from prompts: --text FILE has one a line, --steps and "
    "--resolution say how. Leave it out."
)
OF_PROMPTS = (
    "--{} is for pipelines of diffusers, which generate from prompts, and {{source}} is a model that reads text. Leave "
    "it out."
)
PARTS_ARE_PUBLISHED = (
    "Parts are published when they are merged: leave out --push here, and say `qz merge --push`. Or add --push-only, "
    "to send each weight file when it is finished and keep none here."
)

NEEDS = (
    Need("quantize dequantize calibrate inspect", "revision", "hub", ON_THE_HUB.format("revision")),
    Need("verify", "revision", "against", AGAINST.format("revision")),
    Need("verify attest", "revision", "hub", ON_THE_HUB.format("revision")),
    Need("attest", "revision", "named", "--revision belongs to --source SOURCE. Add that, or leave it out."),
    Need("verify", "statement", "files", FILES.format("statement")),
    Need("verify", "public_key", "files", FILES.format("public-key")),
    Need("quantize dequantize", "download", "hub", ON_THE_HUB.format("download")),
    Need(
        "quantize dequantize calibrate",
        "variant",
        "folder",
        "--variant chooses among the weight files of a folder, and {source} is one file. Leave it out.",
    ),
    Need(
        "quantize dequantize",
        "config",
        "one_file",
        "--config says what a single file is a model of. Name such a file, or leave it out.",
    ),
    Need(
        "quantize",
        "layout",
        "model",
        "--layout single-file writes one model, and {source} is a pipeline. Name its denoiser with --subfolder, mostly "
        "`transformer`.",
    ),
    Need(
        "quantize",
        "max_shard_bytes",
        "shards",
        "--max-shard-size is about several files, and --layout single-file writes one. Leave one of them out.",
    ),
    Need("quantize", "components", "pipeline", NO_PIPELINE),
    Need("quantize", "component_methods", "pipeline", NO_PIPELINE),
    Need("quantize", "experts", "model", ONE_MODEL.format("--experts is for one model", "")),
    Need("quantize", "experts", "one_inside", ONE_INSIDE.format("--experts is for one model")),
    Need("quantize", "layout", "one_inside", ONE_INSIDE.format("--layout single-file writes one denoiser")),
    Need("dequantize", "against", "one_inside", ONE_INSIDE.format("--against compares one model")),
    Need("dequantize", "against", "model", ONE_MODEL.format("--against compares one model", ", or leave it out")),
    Need("quantize", "scales", "four_bit", FOUR_BIT.format("scales search")),
    Need("quantize", "importance", "four_bit", FOUR_BIT.format("importance")),
    Need("quantize", "rounding", "four_bit", FOUR_BIT.format("rounding gptq")),
    Need(
        "quantize dequantize merge",
        "public",
        "push",
        PUSHED.format("--public and --private say who may see what --push publishes."),
    ),
    Need(
        "quantize dequantize merge",
        "push_subfolder",
        "push",
        PUSHED.format("--push-subfolder says where --push publishes."),
    ),
    Need(
        "quantize dequantize",
        "push_only",
        "push",
        "--push-only keeps no output here, so it needs the repository to publish in: --push REPO_ID.",
    ),
    Need("quantize dequantize", "push", "published", PARTS_ARE_PUBLISHED),
    Need(
        "quantize dequantize",
        "if_exists",
        "output_here",
        "--if-exists and --overwrite are about an output here, which --push-only does not make.",
    ),
    Need("merge", "overwrite", "parts_here", SENT.format("overwrite")),
    Need("merge", "threads", "parts_here", SENT.format("threads")),
    Need("calibrate", "method", "scores", "A method is for scores: add --scores, or leave the method out."),
    Need("calibrate compare", "tokens", "reads_text", OF_TEXT.format("tokens")),
    Need("calibrate", "generate", "reads_text", OF_TEXT.format("generate")),
    Need("calibrate", "experts", "reads_text", OF_TEXT.format("experts")),
    *(
        Need("calibrate compare", name, "reads_prompts", OF_PROMPTS.format(name))
        for name in ("steps", "resolution", "seed")
    ),
    Need("inspect", "subfolder", "folder", OF_A_FILE.format("subfolder")),
    Need("inspect", "variant", "folder", OF_A_FILE.format("variant")),
    Need("inspect", "plan", "folder", OF_A_FILE.format("plan")),
    Need("inspect", "verify", "folder", OF_A_FILE.format("verify")),
    *(
        Need("verify", name, "against", AGAINST.format(option))
        for name, option in (
            *((name, name) for name in ("file", "config", "lora", "importance", "sample", "device", "threads")),
            ("allow_pickle", "allow-pickle"),
            ("resume", "no-resume"),
        )
    ),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user asked of a command: its arguments that differ from their defaults, and what it is about."""

    command: str
    source: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Asked:
        """``arguments``: all of the function's, by name; the first is the source."""
        defaults = {name: parameter.default for name, parameter in signature(function).parameters.items()}
        given = {
            name: value for name, value in arguments.items() if value != defaults[name] and value not in ((), [], {})
        }
        return cls(function.__name__, str(arguments[next(iter(defaults))]), given)

    def require(self, **facts: bool) -> None:
        """Raise UsageError for an argument that needs one of these ``facts`` that does not hold."""
        for need in NEEDS:
            if need.argument in self.values and need.concerns(self.command) and facts.get(need.fact) is False:
                raise UsageError(need.otherwise.format(source=self.source))
