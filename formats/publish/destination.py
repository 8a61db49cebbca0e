"""Where a push goes, and what it did there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, exported by name only

from qz import TryAgain, UsageError
from qz.formats.malformed import quoted

if TYPE_CHECKING:
    from qz.formats.publish.model_card.card_facts import CardFacts


class UploadsLost(TryAgain):
    """The Hub has swept out files that were sent and deleted here, ``names``: they are to be made once more."""

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a checkpoint goes. ``private``: True for --private, False for --public, None where neither was said.

    ``replace``: weights that are there and that qz did not make may be replaced.
    """

    repo_id: str
    folder: str = ""
    branch: str = "main"
    create_pr: bool = False
    private: bool | None = None
    message: str | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise UsageError(f"{quoted(self.repo_id)} is not a Hub repository name such as owner/name.") from error
        if self.folder and any(part in ("", ".", "..") for part in self.folder.split("/")):
            raise UsageError(f"{self.folder!r} is not a folder inside a repository. Write it as NAME or NAME/NAME.")

    def path(self, name: str) -> str:
        """Where a file of the checkpoint lies in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


@dataclass(frozen=True, slots=True)
class PushedFile:
    """A file of the commit: its path in the repository."""

    path: str
    bytes: int


@dataclass(frozen=True, slots=True)
class PushResult:
    """What a push did, or with ``dry_run`` would do.

    ``removed``: weights in the repository that the new ones take the place of. ``bytes_uploaded``: less than the files'
    sizes where the Hub had some of them. ``left_out``: files beside the checkpoint that are not its own.
    """

    to: Destination
    url: str
    private: bool
    created: bool
    files: tuple[PushedFile, ...]
    left_out: tuple[str, ...]
    removed: tuple[str, ...]
    notes: tuple[str, ...]
    dry_run: bool
    card: str
    facts: CardFacts
    """What the card tells."""
    bytes_uploaded: int = 0
    commit: str | None = None
    pull_request: str | None = None

    @property
    def revision(self) -> str | None:
        """Where loaders find it if that is not the main branch: of a pull request, what the Hub calls it."""
        if self.pull_request is not None:
            return f"refs/pr/{self.pull_request.rpartition('/')[2]}"
        return self.to.branch if self.to.branch != "main" else None

    def as_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            "repository": self.to.repo_id,
            "url": self.url,
            "branch": self.to.branch,
            "subfolder": self.to.folder or None,
            "private": self.private,
            "created": self.created,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "files": [{"path": file.path, "bytes": file.bytes} for file in self.files],
            "left_out": list(self.left_out),
            "removed": list(self.removed),
            "bytes": {"files": sum(file.bytes for file in self.files), "uploaded": self.bytes_uploaded},
            "notes": list(self.notes),
            "dry_run": self.dry_run,
        }
