"""``qz verify``: is an output what its record says, or what its source becomes?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.cli.options import arguments, machine, outputs, reports, selection, signatures
from qz.cli.output import Column, duration, facts, percent, plain, show, size, table, warn
from qz.cli.progress import Display
from qz.counted import counted

if TYPE_CHECKING:
    from qz.quantize.verification.report import Verification

SHOWN = 20
"""Differences that the table shows; the JSON has all."""
DIFFERENCES = (Column("where", foldable=True), Column("what", foldable=True), Column("explained by", foldable=True))


def verify(
    output: arguments.VerifiedArg,
    against: selection.SourceOpt = None,
    revision: selection.SourceRevisionOpt = None,
    file: selection.FileOpt = None,
    config: selection.ConfigOpt = None,
    lora: selection.LoraOpt = None,
    importance: selection.UsedImportanceOpt = None,
    allow_pickle: selection.AllowPickleOpt = False,
    sample: selection.SampleOpt = None,
    resume: outputs.ResumeOpt = True,
    statement: signatures.StatementOpt = None,
    public_key: signatures.PublicKeyOpt = None,
    device: machine.DeviceOpt = "auto",
    threads: machine.ThreadsOpt = None,
    as_json: reports.JsonOpt = False,
    quiet: reports.QuietOpt = False,
) -> None:
    """Compare an output with the hashes in its record, or with what its source becomes: every tensor, streamed."""
    from qz import MalformedInput, api

    with Display(quiet=quiet) as display:
        found = api.verify(
            output,
            against,
            revision=revision,
            file=file,
            config=config,
            lora=lora or (),
            importance=importance,
            allow_pickle=allow_pickle,
            sample=sample,
            resume=resume,
            statement=statement,
            public_key=public_key,
            device=device,
            threads=threads,
            on_progress=display,
        )
    for note in found.notes:
        warn(note)
    parts = [facts(report(found)), *([table(DIFFERENCES, rows(found))] if rows(found) else [])]
    show(found.as_json(), as_json=as_json, text="\n\n".join(parts))
    if not found.intact:
        raise MalformedInput(verdict(found))


def verdict(found: Verification) -> str:
    """What the command ends with if something differs."""
    if (unrecorded := no_record(found)) is not None:
        return unrecorded
    if found.source is None:
        told = f"what {found.statement} states" if found.statement is not None else "as qz wrote it"
        return f"{found.output} is not {told}. The report says what differs."
    why = (
        f"All of it is what the libraries write on another device: it was made on {found.recorded_device}."
        if found.explained
        else "The report says what differs."
    )
    return f"{found.output} is not what {found.source} becomes with the recorded settings. {why}"


def no_record(found: Verification) -> str | None:
    """Why there was nothing to compare, where qz did not write what was named."""
    return next((problem.message for problem in found.problems if problem.kind == "record-missing"), None)


def report(found: Verification) -> list[tuple[str, str]]:
    """The result as labels and values."""
    rows = [("output", found.output)]
    if found.recorded is not None:
        hashes = "recorded hashes" if found.statement is None else f"hashes in {found.statement}"
        rows.append(("compared", f"{counted(found.recorded.files, 'file')} with the {hashes}"))
    if found.signed_by is not None:
        signed = not any(problem.kind == "signature-invalid" for problem in found.problems)
        rows.append(("signature", f"by {found.signed_by}" if signed else f"not by {found.signed_by}, or not of this"))
    if found.recomputed is not None:
        compared, whole = found.recomputed.tensors
        some = f"{compared:,} of {counted(whole, 'tensor')}" if found.sample else counted(compared, "tensor")
        files, _ = found.recomputed.files
        rows.append(("source", str(found.source) + (f"@{found.revision}" if found.revision else "")))
        rows.append(("compared", f"{some} and {counted(files, 'other file')}, {size(found.recomputed.bytes)} read"))
        if before := found.recomputed.tensors_before:
            rows.append(("earlier", f"{counted(before, 'tensor')} of these, by a comparison that was interrupted"))
        if found.sample:
            rows.append(("sample", percent(found.sample, 1.0)))
    rows.append(("result", "intact" if found.intact else "differs" if no_record(found) is None else "not known"))
    return [*rows, ("took", duration(found.seconds))]


def rows(found: Verification) -> list[tuple[str, str, str]]:
    """A row for each thing that differs."""
    listed = [(problem.where, problem.message, "") for problem in found.problems]
    if found.recomputed is not None:
        listed += [(name, "the file is missing or has other bytes", "") for name in found.recomputed.unlike_files]
        for each in found.recomputed.differences:
            how = each.missing or f"{counted(each.bytes, 'byte')}, first at {each.first:,}"
            listed.append((each.name, how, each.explained or "–"))
    shown = [(plain(name), how, why) for name, how, why in listed[:SHOWN]]
    if len(listed) > SHOWN:
        shown.append((f"… and {len(listed) - SHOWN:,} more, see --json", "", ""))
    return shown
