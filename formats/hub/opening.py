"""From the name of a model repository to its folder at one commit: the Hub's current one, or what its cache holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, exported by name only

from qz import HubUnreachable
from qz.formats.files.regular_file import read_regular
from qz.formats.hub.repository import HubFolder
from qz.formats.hub.transport.errors import hub_errors
from qz.formats.hub.transport.session import API_TIMEOUT, hub_api, with_retries

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from qz.formats.hub.read_ahead import Pace
    from qz.formats.hub.transport.backoff import Retries

MOST_LISTING_BYTES = 1 << 28
"""Of the listing that huggingface_hub keeps with a snapshot."""


def open_repo(
    repo_id: str,
    *,
    revision: str | None = None,
    cached: bool = True,
    retries: Retries | None = None,
    pace: Pace | None = None,
) -> HubFolder:
    """The root folder of a model repository at the commit that ``revision`` (default: main) names now.

    With HF_HUB_OFFLINE set, what the cache has of it. If the Hub does not answer and ``cached`` is true, the commit
    that ``revision`` named last, if the cache holds all of it; then ``note`` says so.

    Raises MissingInput (no such repository or revision, or it is private), PermissionRefused, HubUnreachable, TryAgain,
    UsageError (not a repository name).
    """
    if is_offline_mode():
        with hub_errors(repo_id, f"Looking up {repo_id}", revision=revision, endpoint=constants.ENDPOINT):
            return _cached(hub_api(), repo_id, revision)
    try:
        return _current(repo_id, revision, retries, pace)
    except HubUnreachable as error:
        folder = _complete_in_cache(repo_id, revision) if cached else None
        if folder is None:
            raise
        older = "" if revision == folder.commit else f"; {revision or 'main'} may name a newer commit by now"
        folder.note = f"{error} Used instead: {folder.location} from the Hub cache, which holds all of it{older}"
        return folder


def _current(repo_id: str, revision: str | None, retries: Retries | None, pace: Pace | None) -> HubFolder:
    endpoint = constants.ENDPOINT
    with hub_errors(repo_id, f"Looking up {repo_id}", revision=revision, endpoint=endpoint):
        api = hub_api()
        info = with_retries(lambda: api.model_info(repo_id, revision=revision, timeout=API_TIMEOUT), retries)
        card: dict[str, Any] = info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]
        validate_repo_id(info.id)
        folder = HubFolder(api, info.id, _commit(info.sha, endpoint, repo_id), retries=retries, pace=pace)
        folder.revision, folder.private, folder.gated = revision, info.private, info.gated
        folder.license = {key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)}
    return folder


def _commit(sha: object, endpoint: str, repo_id: str) -> str:
    """The commit that the Hub names, which becomes part of addresses and messages."""
    if not isinstance(sha, str) or not re.fullmatch("[0-9a-f]{40}", sha):
        raise HubUnreachable(f"{endpoint} names no commit of {repo_id}: is it a Hub? Check HF_ENDPOINT.")
    return sha


def _cached(api: HfApi, repo_id: str, revision: str | None) -> HubFolder:
    try:
        snapshot = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise HubUnreachable(
            f"{repo_id} is not in the Hub cache and HF_HUB_OFFLINE is set. Unset it, or run "
            f"`hf download {repo_id}` first."
        ) from None
    return HubFolder(api, repo_id, snapshot.name, snapshot=snapshot)


def _complete_in_cache(repo_id: str, revision: str | None) -> HubFolder | None:
    """The snapshot that ``revision`` named last, if the listing kept with it shows that nothing of it is missing."""
    try:
        snapshot = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    # Without a listing that it can read, snapshot_download cannot tell, and returns a part of the repository too.
    listing = snapshot.parent.parent / "trees" / f"{snapshot.name}.json"
    try:
        files = json.loads(read_regular(listing, MOST_LISTING_BYTES))["files"]
        complete = isinstance(files, dict) and all((snapshot / name).is_file() for name in files)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return HubFolder(hub_api(), repo_id, snapshot.name, snapshot=snapshot) if complete else None
