"""Push a checkpoint to the Hub: verified first, blobs uploaded, then one commit that shows all of it or nothing."""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import replace
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from qz import HubUnreachable, MissingInput, OutputRefused, PermissionRefused, QzError, __version__
from qz.formats.folder import LocalFolder
from qz.formats.hub.errors import BUSY, hub_errors
from qz.formats.hub.repository import HubFolder
from qz.formats.hub.session import ASKING, hub_api, patiently
from qz.formats.output.record import RECORD
from qz.formats.publish.card import in_words, write_card
from qz.formats.publish.card_facts import CardFacts, facts_of, inherit
from qz.formats.publish.checkpoint_files import README, OwnFile, OwnFiles, own_files
from qz.formats.publish.destination import Destination, PushedFile, PushResult
from qz.formats.publish.upload import Blob, upload
from qz.progress import OnProgress, Progress, ignore

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from huggingface_hub.hf_api import ModelInfo


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
    Raises MalformedInput (the checkpoint is damaged), PermissionRefused (no token, no right, or it would become public
    without being told to), OutputRefused (other weights are there), TryAgain (the branch changed meanwhile, or a rate
    limit), HubUnreachable.
    """
    local = LocalFolder(folder)
    try:
        return _Push(to, source_private, progress).run(local, dry_run=dry_run)
    finally:
        local.close()


def require_possible(to: Destination, *, source_private: bool | None = None) -> None:
    """Raise now what a push would raise after the work that comes before it: no token, or the wrong audience."""
    pushing = _Push(to, source_private, ignore)
    pushing.require_audience(pushing.target(), bool(source_private))


class _Push:
    """One push. Nothing on the Hub changes before ``prepare``, and nothing shows before ``commit``."""

    def __init__(self, to: Destination, source_private: bool | None, progress: OnProgress) -> None:
        if not get_token():
            raise PermissionRefused(
                "Pushing needs a Hub token and there is none. Run `hf auth login`, or set HF_TOKEN."
            )
        self.api, self.to, self.progress = hub_api(), to, progress
        self.source_private = source_private
        self.repo_id = to.repo_id
        self.notes: list[str] = []

    def run(self, local: LocalFolder, *, dry_run: bool) -> PushResult:
        own = self.verified(local)
        names = {file.name for file in own.files}
        facts = facts_of(
            own.record.about if own.record else {},
            own.config,
            tokenizer=bool(names & {"tokenizer.json", "tokenizer_config.json"}),
            pipeline="model_index.json" in names,
        )
        facts, restricted = self.source(facts)
        found = self.target()
        self.require_audience(found, restricted)
        head = self.head(found)
        there = self.listed(head) if head else {}
        prefix = f"{self.to.folder}/" if self.to.folder else ""
        removed = self.superseded(own, there, prefix)
        card = write_card(facts, self.repo_id, self.to.folder, self.card_there(local, there, head))
        files = [PushedFile(prefix + file.name, file.bytes) for file in own.files]
        files.append(PushedFile(README, len(card.encode())))
        result = PushResult(
            to=replace(self.to, repo_id=self.repo_id),
            url=f"{self.api.endpoint}/{self.repo_id}",
            private=found.private is not False if found else self.to.private is not False,
            created=found is None,
            files=tuple(files),
            left_out=own.left_out,
            removed=removed,
            notes=tuple(self.notes),
            dry_run=dry_run,
            card=card,
        )
        return result if dry_run else self.carry_out(own, result, found, head, message=_message(self.to, facts))

    def carry_out(
        self, own: OwnFiles, result: PushResult, found: ModelInfo | None, head: str | None, *, message: str
    ) -> PushResult:
        parent = self.prepare(found, head)
        prefix = f"{self.to.folder}/" if self.to.folder else ""
        blobs = [Blob.of(prefix + file.name, file) for file in own.files]
        blobs.append(Blob(CommitOperationAdd(README, result.card.encode()), len(result.card.encode())))
        try:
            with self.errors(f"Uploading to {self.repo_id}"):
                uploaded = upload(
                    self.api, self.repo_id, blobs, self.to.branch, create_pr=self.to.create_pr, progress=self.progress
                )
        except QzError:
            own.require_same()  # the Hub refuses what does not have the hash that was announced
            raise
        info = self.require_still_private(was_private=result.private)
        own.require_same()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [blob.addition for blob in blobs]
        operations += map(CommitOperationDelete, result.removed)
        commit, pull_request = self.commit(blobs, operations, parent, message)
        self.require_complete(commit, blobs)
        return replace(
            result, commit=commit, pull_request=pull_request, bytes_uploaded=uploaded, private=info.private is not False
        )

    # Before anything changes

    def errors(self, doing: str) -> AbstractContextManager[None]:
        return hub_errors(self.repo_id, doing, revision=self.to.branch, endpoint=self.api.endpoint)

    def target(self) -> ModelInfo | None:
        """The repository, under its full and present name; None if it is yet to be made."""
        if "/" not in self.repo_id:
            with self.errors("Asking who you are"):
                self.repo_id = f"{patiently(lambda: self.api.whoami(cache=True))['name']}/{self.repo_id}"
        found = self.find(self.repo_id)
        if found is not None:
            self.repo_id = found.id
        elif self.to.create_pr:
            raise MissingInput(f"{self.repo_id} does not exist, so there is nothing to open a pull request on.")
        return found

    def verified(self, local: LocalFolder) -> OwnFiles:
        total, done = sum(local.sizes().values()), 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            self.progress(Progress("Verifying", bytes=min(done, total), all_bytes=total, unit="file"))

        return own_files(local, count)

    def find(self, repo_id: str, revision: str | None = None) -> ModelInfo | None:
        with self.errors(f"Looking up {repo_id}"):
            try:
                return patiently(lambda: self.api.model_info(repo_id, revision=revision))
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

    def source(self, facts: CardFacts) -> tuple[CardFacts, bool]:
        """The facts with what the source's card says, and whether not everyone may see the source."""
        restricted = bool(self.source_private)
        if facts.base_model is None:
            return facts, restricted
        try:
            info = self.find(facts.base_model)
        except QzError:
            info = None
        if info is None:
            self.notes.append(f"{facts.base_model} cannot be seen, so its license is not in the card")
            return facts, True
        card: dict[str, Any] = info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]
        return inherit(facts, card), restricted or bool(info.private) or bool(info.gated)

    def require_audience(self, found: ModelInfo | None, restricted: bool) -> None:
        """Refuse what would show the checkpoint to more people than was said."""
        if found is None or found.private is not False:
            if found is not None and self.to.private is False:
                self.notes.append(f"{self.repo_id} is private and stays so; change that in its settings")
            return
        if self.to.private:
            raise PermissionRefused(
                f"{self.repo_id} is public, and --private was asked for. Push to another repository, or make this one "
                f"private first: {self.api.endpoint}/{self.repo_id}/settings."
            )
        if restricted and self.to.private is None:
            raise PermissionRefused(
                f"{self.repo_id} is public, but the checkpoint was made from a private or gated model. If its license "
                "allows that, say --public; or push to a private repository."
            )

    def head(self, found: ModelInfo | None) -> str | None:
        """The commit that the push builds on; None if the repository is yet to be made."""
        if found is None:
            return None
        branch = self.find(self.repo_id, self.to.branch)
        if branch is None and self.to.create_pr:
            raise MissingInput(f"{self.repo_id} has no branch {self.to.branch!r} to open a pull request on.")
        return (branch or found).sha

    def listed(self, commit: str) -> dict[str, RepoFile]:
        """Every file of the commit."""
        with self.errors(f"Listing {self.repo_id}"):
            tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def superseded(self, own: OwnFiles, there: dict[str, RepoFile], prefix: str) -> tuple[str, ...]:
        """Weights that loaders would take for a part of the new ones. OutputRefused if they are not qz's to replace."""
        weights = {prefix + file.name: file for file in own.files if _family(file.name)}
        families = {_family(path) for path in weights}
        old = sorted(path for path in there if _family(path) in families and path not in weights)
        other = [path for path, file in weights.items() if path in there and not _is_same(file, there[path])]
        if (old or other) and not (self.to.replace or self.to.create_pr or prefix + RECORD in there):
            names = ", ".join([*old, *other][:3])
            raise OutputRefused(
                f"{self.repo_id} holds other weights already ({names}). Push to another repository, --branch or "
                "--subfolder, or say --replace."
            )
        return tuple(old)

    def card_there(self, local: LocalFolder, there: dict[str, RepoFile], head: str | None) -> str | None:
        """The text that the card is written into: the repository's, else the folder's."""
        if README in there and head:
            folder = HubFolder(self.api, self.repo_id, head)
            data = bytearray(folder.sizes()[README])
            folder.read_into(README, 0, memoryview(data))
            folder.close()
        elif README in local.sizes():
            data = bytearray(local.sizes()[README])
            local.read_into(README, 0, memoryview(data))
        else:
            return None
        return data.decode("utf-8-sig", errors="replace")

    # The push

    def prepare(self, found: ModelInfo | None, head: str | None) -> str:
        """Make the repository and the branch if they are missing; the commit to build on."""
        if found is None:
            with self.errors(f"Making {self.repo_id}"):
                private = self.to.private is not False
                patiently(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
        info = self.find(self.repo_id, self.to.branch)
        if info is None:
            with self.errors(f"Making the branch {self.to.branch} of {self.repo_id}"):
                patiently(lambda: self.api.create_branch(self.repo_id, branch=self.to.branch, exist_ok=True))
            info = self.find(self.repo_id, self.to.branch)
        if info is None or info.sha is None:
            raise HubUnreachable(f"{self.repo_id} was made, but the Hub does not show it yet. Push again.")
        return head or info.sha

    def require_still_private(self, *, was_private: bool) -> ModelInfo:
        info = self.find(self.repo_id)
        if info is None:
            raise MissingInput(f"{self.repo_id} vanished during the push. Nothing was committed.")
        if info.private is False and was_private and self.to.private is not False:
            raise PermissionRefused(
                f"{self.repo_id} became public during the push. Nothing was committed. Make it private again, or push "
                "with --public."
            )
        return info

    def commit(
        self,
        blobs: list[Blob],
        operations: list[CommitOperationAdd | CommitOperationDelete],
        parent: str,
        message: str,
    ) -> tuple[str, str | None]:
        """The one commit; its oid, and the pull request's address."""
        failures = 0
        while True:
            with self.errors(f"Committing to {self.repo_id} ({self.to.branch})"):
                try:
                    done = self.api.create_commit(
                        self.repo_id,
                        operations,
                        commit_message=message,
                        revision=self.to.branch,
                        create_pr=self.to.create_pr,
                        parent_commit=parent,
                    )
                    return done.oid, done.pr_url
                except (HfHubHTTPError, httpx2.TransportError, JSONDecodeError) as error:
                    failures += 1
                    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
                    if self.to.create_pr or status not in (*BUSY, 409, 412):
                        raise
                    # The answer may be lost though the commit was made. If it was not, the named parent makes it safe
                    # to try again.
                    head = self.head(self.find(self.repo_id))
                    if head not in (None, parent) and not self.missing(str(head), blobs):
                        return str(head), None
                    if head != parent or status in (409, 412) or failures >= ASKING.attempts:
                        raise
                    time.sleep(ASKING.wait(failures))

    def require_complete(self, commit: str, blobs: list[Blob]) -> None:
        wrong = self.missing(commit, blobs)
        if wrong:
            raise HubUnreachable(
                f"{self.repo_id}@{commit[:12]} does not hold what was pushed ({', '.join(wrong[:3])}). Push again."
            )

    def missing(self, commit: str, blobs: list[Blob]) -> list[str]:
        """Files that the commit does not hold as they were sent."""
        there = self.listed(commit)
        return [blob.path for blob in blobs if blob.path not in there or not blob.is_at(there[blob.path])]


def _family(path: str) -> str | None:
    """What a loader takes as one set of weights: the path without numbers of shards; None if it is no weights."""
    match = re.fullmatch(r"(.*?)(-\d{5}-of-\d{5})?\.safetensors(\.index(\.\w+)?\.json)?", path)
    return f"{match[1]}{match[4] or ''}" if match else None


def _is_same(file: OwnFile, entry: RepoFile) -> bool:
    if entry.size != file.bytes:
        return False
    if entry.lfs is None:  # an index
        data = file.file.read()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == entry.blob_id
    return entry.lfs.sha256 == (file.sha256 or file.file.hashed())


def _message(to: Destination, facts: CardFacts) -> str:
    return to.message or f"Add {facts.architecture}, {in_words(facts)}, made by qz {__version__}"
