"""Push a checkpoint to the Hub: verified first, blobs uploaded, then one commit that shows all of it or nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qz import OutputRefused, QzError, TryAgain, __version__
from qz.formats.files.folder import read_text
from qz.formats.files.local_folder import LocalFolder
from qz.formats.hub.repository import HubFolder
from qz.formats.output.recorded.record import RECORD
from qz.formats.publish.blobs import Blob
from qz.formats.publish.checkpoint_files import MAX_CARD_BYTES, README, OwnFiles, own_files, require_model
from qz.formats.publish.destination import Destination, PushedFile, PushResult
from qz.formats.publish.model_card.card import in_words, write_card
from qz.formats.publish.model_card.card_facts import CardFacts, facts_of, inherit
from qz.formats.publish.remote import ObjectsLost, Remote, differing
from qz.progress import OnProgress, Progress, ignore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from huggingface_hub.hf_api import ModelInfo, RepoFile


def push(
    folder: Path,
    to: Destination,
    *,
    dry_run: bool = False,
    source_private: bool | None = None,
    progress: OnProgress = ignore,
) -> PushResult:
    """Publish the checkpoint in ``folder``. Afterwards all of it is visible in one commit, or nothing changed.

    ``source_private``: whether it came from a private or gated repository, if the caller knows more than the record.
    Raises MissingInput (no such folder, or no model in it), MalformedInput (the checkpoint is damaged),
    PermissionRefused (no token, no right, or it would become public without being told to), OutputRefused (other
    weights are there), TryAgain (the branch changed meanwhile, or a rate limit), HubUnreachable.
    """
    local = LocalFolder(folder)
    try:
        require_model(local)
        remote = Remote(to)
        own = _verified(local, progress)
        own.require_stated()
        blobs = [
            Blob(to.path(file.name), file.bytes, file.file if file.data is None else file.data, file.sha256)
            for file in own.files
        ]
        names = frozenset(file.name for file in own.files)
        plan = PushPlan.of(remote, own.record.about if own.record else {}, own.config, names, source_private)
        result = plan.result(blobs, own.left_out, lambda: _card_here(local))
        if dry_run:
            return replace(result, dry_run=True)
        return _carry_out(remote, plan, blobs, own, result, progress)
    finally:
        local.close()


def require_possible(to: Destination, *, source_private: bool | None = None) -> None:
    """Raise now what a push would raise after the work that comes before it: no token, or the wrong audience."""
    remote = Remote(to)
    remote.require_audience(remote.target(), bool(source_private))


@dataclass(frozen=True)
class PushPlan:
    """What a push finds on the Hub, and what it is to say there."""

    remote: Remote
    facts: CardFacts
    found: ModelInfo | None
    head: str | None
    there: Mapping[str, RepoFile]

    @classmethod
    def of(
        cls,
        remote: Remote,
        about: Mapping[str, Any],
        config: Mapping[str, Any],
        names: frozenset[str],
        source_private: bool | None,
    ) -> PushPlan:
        """``about``: of the record; ``config``: of the model; ``names``: of the files. Refuses the wrong audience."""
        facts, restricted = _source(remote, facts_of(about, config, names), restricted=bool(source_private))
        found = remote.target()
        remote.require_audience(found, restricted)
        head = remote.head(found)
        return cls(remote, facts, found, head, remote.listed(head))

    @property
    def message(self) -> str:
        facts = self.facts
        return self.remote.to.message or f"Add {facts.architecture}, {in_words(facts)}, made by qz {__version__}"

    def result(
        self, blobs: Sequence[Blob], left_out: tuple[str, ...] = (), card_here: Callable[[], str | None] = lambda: None
    ) -> PushResult:
        """What the push is going to do. ``card_here``: a text to begin the card with, where the Hub has none."""
        remote, to = self.remote, self.remote.to
        removed = superseded(blobs, self.there, to, remote.repo_id)
        existing = self._card_there() if README in self.there else card_here()
        card = write_card(self.facts, remote.repo_id, to.folder, existing)
        files = [PushedFile(blob.path, blob.size) for blob in blobs]
        return PushResult(
            to=replace(to, repo_id=remote.repo_id),
            url=f"{remote.api.endpoint}/{remote.repo_id}",
            private=self.found.private is not False if self.found else to.private is not False,
            created=self.found is None,
            files=(*files, PushedFile(README, len(card.encode()))),
            left_out=left_out,
            removed=removed,
            notes=tuple(remote.notes),
            dry_run=False,
            card=card,
            facts=self.facts,
        )

    def _card_there(self) -> str:
        assert self.head is not None
        folder = HubFolder(self.remote.api, self.remote.repo_id, self.head)
        try:
            return read_text(folder, README, MAX_CARD_BYTES)
        finally:
            folder.close()


def _carry_out(
    remote: Remote,
    plan: PushPlan,
    blobs: list[Blob],
    own: OwnFiles,
    result: PushResult,
    progress: OnProgress,
) -> PushResult:
    remote.require_valid_card(result.card)
    parent = remote.prepare(plan.found, plan.head)
    whole = [*blobs, Blob.in_memory(README, result.card.encode())]
    try:
        uploaded = _send(remote, differing(whole, plan.there), progress)
    except QzError:
        own.require_same()  # the Hub refuses content whose hash differs from the announced one
        raise
    info = remote.require_still_private(was_private=result.private)
    own.require_same()
    commit, pull_request, again = _commit(remote, plan, whole, result.removed, parent, progress)
    remote.require_complete(commit, whole)
    return replace(
        result,
        commit=commit,
        pull_request=pull_request,
        bytes_uploaded=uploaded + again,
        private=info.private is not False,
    )


def _send(remote: Remote, blobs: Sequence[Blob], progress: OnProgress) -> int:
    uploads = remote.uploads()
    try:
        with remote.errors(f"Uploading to {remote.repo_id}"):
            return uploads.send(blobs, progress)
    except BaseException:
        uploads.stop()
        raise


def _commit(
    remote: Remote,
    plan: PushPlan,
    blobs: Sequence[Blob],
    deleted: Iterable[str],
    parent: str,
    progress: OnProgress,
) -> tuple[str, str | None, int]:
    """The commit and the pull request, and the bytes that had to be sent once more for it."""
    sent = 0
    for last in (False, True):
        try:
            return *remote.commit(blobs, deleted, parent, plan.message, plan.there), sent
        except ObjectsLost:
            if last:
                raise lost_again(remote.repo_id) from None
        # The Hub deletes uploads that no commit uses after a while: send them again, once.
        lost = set(remote.lost(blobs))
        sent = _send(remote, [blob for blob in blobs if blob.path in lost], progress)
    raise AssertionError


def lost_again(repo_id: str) -> TryAgain:
    """The error for files that the Hub does not hold although they were just uploaded."""
    return TryAgain(
        f"{repo_id} does not hold files that were uploaded a moment ago, so the Hub refuses the commit. Nothing was "
        "committed. Wait some minutes and run the same command again."
    )


def _verified(local: LocalFolder, progress: OnProgress) -> OwnFiles:
    total, done = sum(local.sizes().values()), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(Progress("Verifying", bytes=min(done, total), all_bytes=total))

    return own_files(local, count)


def _source(remote: Remote, facts: CardFacts, *, restricted: bool) -> tuple[CardFacts, bool]:
    """The facts with what the source's card says, and whether not everyone may see the source."""
    if facts.base_model is None:
        return facts, restricted
    try:
        info = remote.find(facts.base_model)
    except QzError:
        info = None
    if info is None:
        remote.notes.append(f"{facts.base_model} cannot be seen, so its license is not in the card")
        return facts, True
    card: dict[str, Any] = info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]
    return inherit(facts, card), restricted or bool(info.private) or bool(info.gated)


def superseded(blobs: Iterable[Blob], there: Mapping[str, RepoFile], to: Destination, repo_id: str) -> tuple[str, ...]:
    """Weights that loaders would take for a part of the new ones. OutputRefused if they are not qz's to replace."""
    weights = {blob.path: blob for blob in blobs if _family(blob.path)}
    families = {_family(path) for path in weights}
    old = sorted(path for path in there if _family(path) in families and path not in weights)
    other = [path for path, blob in weights.items() if path in there and not blob.is_at(there[path])]
    if (old or other) and not (to.replace or to.create_pr or to.path(RECORD) in there):
        names = ", ".join([*old, *other][:3])
        raise OutputRefused(
            f"{repo_id} holds other weights already ({names}). Push to another repository, --branch or --subfolder, or "
            "say --replace."
        )
    return tuple(old)


def _card_here(local: LocalFolder) -> str | None:
    return read_text(local, README, MAX_CARD_BYTES) if README in local.sizes() else None


def _family(path: str) -> str | None:
    """What a loader takes as one set of weights: the path without numbers of shards; None if it is no weights."""
    match = re.fullmatch(r"(.*?)(-\d{5}-of-\d{5})?\.safetensors(\.index(\.\w+)?\.json)?", path)
    return f"{match[1]}{match[4] or ''}" if match else None
