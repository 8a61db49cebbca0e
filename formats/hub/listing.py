"""What the Hub lists in one folder of a commit, page by page, checked for what cannot be true."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin

from huggingface_hub import hf_raise_for_status
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but exported by name only

from qz import HubUnreachable, __version__
from qz.formats.hub.transport.remote_file import RemoteFile
from qz.formats.hub.transport.session import API_TIMEOUT, hub_session, with_retries
from qz.formats.hub.transport.trust import is_hub
from qz.formats.malformed import quoted

if TYPE_CHECKING:
    import httpx2

    from qz.formats.hub.transport.backoff import Retries

MOST_PAGES = 1_000
MOST_ENTRIES = 100_000
"""Files and folders of one folder; the Hub recommends fewer than 10,000."""
LARGEST_FILE = 1 << 50
_SHA1, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


def list_folder(
    endpoint: str, repo_id: str, commit: str, path: str, retries: Retries | None = None
) -> tuple[dict[str, RemoteFile], tuple[str, ...]]:
    """The files of folder ``path`` by name, and the names of its folders. HubUnreachable for what is no listing."""
    url = f"{endpoint}/api/models/{repo_id}/tree/{quote(commit, safe='')}" + (f"/{quote(path)}" if path else "")
    prefix = f"{path}/" if path else ""
    files: dict[str, RemoteFile] = {}
    folders: list[str] = []
    pages = 0
    while url:
        response = with_retries(lambda url=url: _page(url), retries)  # type: ignore[misc]  # the default binds the loop's
        pages += 1
        entries = response.json()
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise _no_listing(repo_id, "is no list of files")
        for entry in entries:
            whole = _text(entry, "path", repo_id)
            name = whole.removeprefix(prefix)
            if "/" in name:
                continue
            if entry.get("type") == "directory":
                folders.append(name)
            else:
                files[name] = _file(entry, whole, repo_id)
        if pages >= MOST_PAGES or len(files) + len(folders) > MOST_ENTRIES:
            raise _no_listing(repo_id, f"does not end after {pages} pages")
        url = _next(response, repo_id)
    return files, tuple(sorted(folders))


def _page(url: str) -> httpx2.Response:
    headers = build_hf_headers(library_name="qz", library_version=__version__)
    response = hub_session().get(url, headers={**headers, "Accept-Encoding": "gzip"}, timeout=API_TIMEOUT)
    hf_raise_for_status(response)
    return response


def _next(response: httpx2.Response, repo_id: str) -> str:
    """The address of the next page, which must be at the Hub: it is asked with the token."""
    link = response.links.get("next", {}).get("url")
    if not link:
        return ""
    here = str(response.url)
    target = urljoin(here, link)
    if not is_hub(here, target):
        raise _no_listing(repo_id, "continues on another server")
    return target


def _file(entry: dict[str, Any], path: str, repo_id: str) -> RemoteFile:
    lfs = entry.get("lfs")
    if lfs is not None and not isinstance(lfs, dict):
        raise _no_listing(repo_id, f"gives no hash for {quoted(path)}")
    size, git = entry.get("size"), entry.get("oid")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= LARGEST_FILE:
        raise _no_listing(repo_id, f"gives {quoted(path)} the size {quoted(str(size)[:40])}")
    if not isinstance(git, str) or not _SHA1.fullmatch(git):
        raise _no_listing(repo_id, f"gives no hash for {quoted(path)}")
    sha256 = lfs.get("oid", lfs.get("sha256")) if lfs else None
    if lfs and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise _no_listing(repo_id, f"gives no hash for {quoted(path)}")
    xet = entry.get("xetHash")
    return RemoteFile(path, size, git, sha256, xet if isinstance(xet, str) and _SHA256.fullmatch(xet) else None)


def _text(entry: dict[str, Any], key: str, repo_id: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise _no_listing(repo_id, f"has an entry without {key}")
    return value


def _no_listing(repo_id: str, why: str) -> HubUnreachable:
    return HubUnreachable(f"The listing of {repo_id} {why}: this is not how a Hub answers. Check HF_ENDPOINT.")
