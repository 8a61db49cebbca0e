"""A repository on the Hub as a push sees it: who may see it, what it holds, and the one commit made there."""

from __future__ import annotations

import base64
import json
import time
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx2
from huggingface_hub import get_session, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but exported by name only

from qz import HubUnreachable, MalformedInput, MissingInput, PermissionRefused, __version__
from qz.formats.hub.transport import session
from qz.formats.hub.transport.backoff import TOLD_FROM, log
from qz.formats.hub.transport.errors import BUSY, Signal, hub_errors
from qz.formats.hub.transport.session import hub_api, seconds_asked, token, with_retries
from qz.formats.publish.upload import Uploads

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from huggingface_hub.hf_api import ModelInfo

    from qz.formats.publish.blobs import Blob
    from qz.formats.publish.destination import Destination

UNKNOWN_OBJECT = "LFS pointer pointed to a file that does not exist"
"""How the Hub refuses a commit that names an object which it does not hold (any more)."""


class ObjectsLost(Signal):
    """The Hub no longer holds some files that were uploaded: their paths."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        super().__init__(", ".join(paths))
        self.paths = paths


class Remote:
    """The repository that ``to`` names. Nothing changes there before ``prepare``; nothing shows before ``commit``."""

    def __init__(self, to: Destination) -> None:
        if not token("Pushing"):
            raise PermissionRefused(
                "Pushing needs a Hub token and there is none. Run `hf auth login`, or set HF_TOKEN."
            )
        self.api, self.to, self.repo_id = hub_api(), to, to.repo_id
        self.notes: list[str] = []

    def errors(self, doing: str) -> AbstractContextManager[None]:
        return hub_errors(self.repo_id, doing, revision=self.to.branch, endpoint=self.api.endpoint)

    def uploads(self, ahead: int | None = None) -> Uploads:
        return Uploads(self.api, self.repo_id, self.to.branch, create_pr=self.to.create_pr, ahead=ahead)

    # What is there

    def target(self) -> ModelInfo | None:
        """The repository, under its full and present name; None if it is yet to be made."""
        if "/" not in self.repo_id:
            with self.errors("Asking who you are"):
                self.repo_id = f"{with_retries(lambda: self.api.whoami(cache=True))['name']}/{self.repo_id}"
        found = self.find(self.repo_id)
        if found is not None:
            self.repo_id = found.id
        elif self.to.create_pr:
            raise MissingInput(f"{self.repo_id} does not exist, so there is nothing to open a pull request on.")
        return found

    def find(self, repo_id: str, revision: str | None = None) -> ModelInfo | None:
        with self.errors(f"Looking up {repo_id}"):
            try:
                return with_retries(lambda: self.api.model_info(repo_id, revision=revision))
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

    def require_audience(self, found: ModelInfo | None, restricted: bool) -> None:
        """Refuse what would show the checkpoint to more people than was said."""
        if found is None or found.private is not False:
            if found is not None and self.to.private is False:
                self.notes.append(f"{self.repo_id} stays private; change that in its settings")
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

    def listed(self, commit: str | None) -> dict[str, RepoFile]:
        """Every file of the commit; none where there is no commit yet."""
        if commit is None:
            return {}
        with self.errors(f"Listing {self.repo_id}"):
            tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    # What changes

    def prepare(self, found: ModelInfo | None, head: str | None) -> str:
        """Make the repository and the branch if they are missing; the commit to build on."""
        if found is None:
            with self.errors(f"Making {self.repo_id}"):
                private = self.to.private is not False
                with_retries(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
        info = self.find(self.repo_id, self.to.branch)
        if info is None:
            with self.errors(f"Making the branch {self.to.branch} of {self.repo_id}"):
                with_retries(lambda: self.api.create_branch(self.repo_id, branch=self.to.branch, exist_ok=True))
            info = self.find(self.repo_id, self.to.branch)
        if info is None or info.sha is None:
            raise HubUnreachable(f"{self.repo_id} was made, but the Hub does not show it yet. Push again.")
        return head or info.sha

    def require_still_private(self, *, was_private: bool) -> ModelInfo:
        info = self.find(self.repo_id)
        if info is None:
            raise MissingInput(f"{self.repo_id} disappeared during the push. Nothing was committed.")
        self.repo_id = info.id  # it may have moved
        if info.private is False and was_private and self.to.private is not False:
            raise PermissionRefused(
                f"{self.repo_id} became public during the push. Nothing was committed. Make it private again, or push "
                "with --public."
            )
        return info

    def require_valid_card(self, card: str) -> None:
        """Ask what the Hub thinks of the card's head, before anything is sent. MalformedInput if it is refused."""
        with self.errors(f"Checking the model card of {self.repo_id}"):

            def ask() -> Any:
                url = f"{self.api.endpoint}/api/validate-yaml"
                response = get_session().post(url, json={"content": card, "repoType": "model"}, headers=_headers())
                said = response.json()
                if response.status_code != 400 or not said.get("errors"):
                    hf_raise_for_status(response)
                return said

            errors = [str(each.get("message")) for each in with_retries(ask).get("errors", [])]
        if errors:
            raise MalformedInput(
                f"The Hub refuses the front matter of the README.md of {self.repo_id}: {'; '.join(errors[:3])}. "
                f"Repair it there ({self.api.endpoint}/{self.repo_id}), then push again."
            )

    def commit(
        self,
        blobs: Sequence[Blob],
        deleted: Iterable[str],
        parent: str,
        message: str,
        there: Mapping[str, RepoFile],
    ) -> tuple[str, str | None]:
        """The one commit, on ``parent``; its oid, and the pull request's address.

        What is ``there``, in ``parent``, is left out; if nothing is left, there is no commit and its oid is returned.
        Raises ObjectsLost if the Hub does not hold what was uploaded, TryAgain if the branch moved.
        """
        new = differing(blobs, there)
        lines: list[dict[str, Any]] = [_entry(blob) for blob in new]
        lines += [{"key": "deletedFile", "value": {"path": path}} for path in deleted]
        if not lines:
            return parent, None
        header = {"summary": message, "description": "", "parentCommit": parent}
        lines.insert(0, {"key": "header", "value": header})
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        failures = 0
        while True:
            with self.errors(f"Committing to {self.repo_id} ({self.to.branch})"):
                try:
                    return self._post_commit(body)
                except (HfHubHTTPError, httpx2.TransportError, JSONDecodeError) as error:
                    failures += 1
                    self._require_another_attempt(error, failures)
                    # The answer may be lost though the commit was made. If it was not, the named parent makes it safe
                    # to try again.
                    head = self.head(self.find(self.repo_id))
                    if head not in (None, parent) and not self.missing(str(head), blobs):
                        return str(head), None
                    if head != parent or _status(error) in (409, 412):
                        raise
                    pause = _pause(error, failures)
                    if pause >= TOLD_FROM:
                        log.warning("The Hub asks to wait before the commit: going on in %.0f s.", pause)
                    time.sleep(pause)

    def _post_commit(self, body: bytes) -> tuple[str, str | None]:
        response = get_session().post(
            f"{self.api.endpoint}/api/models/{self.repo_id}/commit/{quote(self.to.branch, safe='')}",
            content=body,
            headers={**_headers(), "Content-Type": "application/x-ndjson"},
            params={"create_pr": "1"} if self.to.create_pr else None,
        )
        hf_raise_for_status(response, endpoint_name="commit")
        said = response.json()
        if "commitOid" not in said:
            raise JSONDecodeError("the answer names no commit", "", 0)
        return str(said["commitOid"]), said.get("pullRequestUrl") if self.to.create_pr else None

    def _require_another_attempt(self, error: Exception, failures: int) -> None:
        """Raise what another attempt would not change, or not soon."""
        status = _status(error)
        if status == 400 and UNKNOWN_OBJECT in str(error):
            raise ObjectsLost(()) from None
        if self.to.create_pr or status not in (*BUSY, 409, 412) or failures >= session.ASKING.attempts:
            raise error
        if _pause(error, failures) > session.ASKING.longest_asked:
            raise error

    def lost(self, blobs: Sequence[Blob]) -> tuple[str, ...]:
        """Paths of the uploaded files that the Hub does not hold; all, where it does not say which."""
        named = [blob for blob in blobs if blob.lfs]
        asked = {
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "hash_algo": "sha256",
            "objects": [{"oid": blob.hashed(), "size": blob.size} for blob in named],
            "ref": {"name": self.to.branch},
        }
        headers = {"Accept": "application/vnd.git-lfs+json", "Content-Type": "application/vnd.git-lfs+json"}

        def ask() -> Any:
            url = f"{self.api.endpoint}/{self.repo_id}.git/info/lfs/objects/batch"
            response = get_session().post(url, json=asked, headers={**_headers(), **headers})
            hf_raise_for_status(response)
            return response.json()

        with self.errors(f"Asking what {self.repo_id} holds"):
            missing = {each["oid"] for each in with_retries(ask)["objects"] if each.get("actions")}
        return tuple(blob.path for blob in named if blob.hashed() in missing) or tuple(blob.path for blob in named)

    def require_complete(self, commit: str, blobs: Sequence[Blob]) -> None:
        wrong = self.missing(commit, blobs)
        if wrong:
            raise HubUnreachable(
                f"{self.repo_id}@{commit[:12]} does not hold what was pushed ({', '.join(wrong[:3])}). Push again."
            )

    def missing(self, commit: str, blobs: Sequence[Blob]) -> list[str]:
        """Files that the commit does not hold as they were sent."""
        return [blob.path for blob in differing(blobs, self.listed(commit))]


def differing(blobs: Iterable[Blob], there: Mapping[str, RepoFile]) -> list[Blob]:
    """Those that are not there, or not as they are here."""
    return [blob for blob in blobs if blob.path not in there or not blob.is_at(there[blob.path])]


def _headers() -> dict[str, str]:
    headers: dict[str, str] = build_hf_headers(library_name="qz", library_version=__version__)
    return headers


def _entry(blob: Blob) -> dict[str, Any]:
    """A line of the commit."""
    if blob.lfs:
        value = {"path": blob.path, "algo": "sha256", "oid": blob.hashed(), "size": blob.size}
        return {"key": "lfsFile", "value": value}
    content = base64.b64encode(blob.read()).decode()
    return {"key": "file", "value": {"path": blob.path, "content": content, "encoding": "base64"}}


def _status(error: Exception) -> int:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else 500


def _pause(error: Exception, failures: int) -> float:
    """Seconds before the next attempt: what the Hub asks for, or ever longer."""
    asked = seconds_asked(error.response.headers) if isinstance(error, HfHubHTTPError) else None
    return session.ASKING.wait(failures) if asked is None else asked
