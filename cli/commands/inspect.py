"""``qz inspect``: what a checkpoint holds, from its headers; and whether it can work, as the exit code says."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from qz.cli.options import arguments, reports, selection
from qz.cli.progress import Display

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qz import QzError
    from qz.formats.checkpoint.problems import Problem
    from qz.quantize.consumers.verdict import Verdict
    from qz.quantize.inspection.report import Tensor


def inspect(
    source: arguments.SourceArg,
    subfolder: selection.SubfolderOpt = None,
    revision: selection.RevisionOpt = None,
    variant: selection.VariantOpt = None,
    allow_pickle: selection.AllowPickleOpt = False,
    tensors: reports.TensorsOpt = False,
    pattern: reports.FilterOpt = None,
    plan: reports.PlanOpt = False,
    verify: reports.VerifyOpt = False,
    consumers: reports.ForOpt = None,
    as_json: reports.JsonOpt = False,
    quiet: reports.QuietOpt = False,
) -> None:
    """Show what a model, pipeline or .safetensors file is, what quantizing would give, and what is wrong with it."""
    from qz.quantize.libraries.importing.lean_imports import gc_paused

    with Display(quiet=quiet) as display, gc_paused():  # modules and hundreds of thousands of tensors stay in use
        from qz import UsageError, api
        from qz.cli.reports.inspection import present
        from qz.cli.reports.tensors import matching

        found = api.inspect(
            source,
            subfolder=subfolder,
            revision=revision,
            variant=variant,
            allow_pickle=allow_pickle,
            plan=plan,
            verify=verify,
            consumers=list(dict.fromkeys(consumers or ())),
            on_progress=display,
        )
    if pattern is not None and not matching(found.tensors, pattern) and not found.errors:
        raise UsageError(f"--filter {pattern} matches no tensor of {source}. {nearest_tensor(pattern, found.tensors)}")
    present(found, as_json=as_json, listed=tensors or pattern is not None, pattern=pattern, quiet=quiet)
    refused = {name: each for name, each in found.consumers.items() if each.loads is False}
    if found.errors:
        raise unusable(source, found.errors)
    if refused:
        raise not_loaded(source, refused)


def not_loaded(source: str, refused: Mapping[str, Verdict]) -> QzError:
    """What the command ends with if a consumer that was asked for cannot load the checkpoint."""
    from qz import MalformedInput
    from qz.quantize.consumers.registry import CONSUMERS

    listed = "; ".join(f"{CONSUMERS[name].title} ({each.errors[0].rule})" for name, each in refused.items())
    return MalformedInput(f"{source} does not load in {listed}. The report says what would.")


def nearest_tensor(pattern: str, tensors: tuple[Tensor, ...]) -> str:
    """What may have been meant by a pattern that matches nothing."""
    from qz.quantize.planning.nearest import nearest

    return nearest(pattern.strip("*.") or pattern, (tensor.name for tensor in tensors))


def unusable(source: str, errors: tuple[Problem, ...]) -> QzError:
    """What the command ends with after its report: 65, but 77 and 74 where the checkpoint could not be looked at."""
    from qz import IOFailed, MalformedInput, PermissionRefused

    kinds = Counter(error.kind for error in errors)
    listed = ", ".join(kind if count == 1 else f"{kind} ({count})" for kind, count in list(kinds.items())[:6])
    more = f" and {len(kinds) - 6} more kinds" if len(kinds) > 6 else ""
    first = errors[0].kind
    error = PermissionRefused if first == "permission" else IOFailed if first == "io-failed" else MalformedInput
    return error(f"{source} cannot be used as it is: {listed}{more}. The report says what to do.")
