"""One request for a file of a repository: with the token at the Hub, without it anywhere else."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import httpx2
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but exported by name only

from qz import __version__
from qz.formats.hub.transport.backoff import Failed
from qz.formats.hub.transport.errors import RETRYABLE, hub_errors, reason, sanitized
from qz.formats.hub.transport.session import hub_session
from qz.formats.hub.transport.trust import is_web_address

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qz.formats.hub.transport.remote_file import RemoteFile

LONGEST_LINK = 16 << 10
_SAID = 2048
_MESSAGE = re.compile(r"<Message>\s*([^<]+)")
_TAGS = re.compile(r"<[^<>]*>")


class Requests:
    """GET requests for the files of one commit, over huggingface_hub's session."""

    def __init__(self, repo_id: str, commit: str, endpoint: str) -> None:
        self.repo_id, self.commit, self.endpoint = repo_id, commit, endpoint
        self.location = f"{repo_id}@{commit[:12]}"

    def url(self, file: RemoteFile) -> str:
        """Where the Hub is asked for ``file``."""
        return hf_hub_url(self.repo_id, file.path, revision=self.commit, endpoint=self.endpoint)

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str], *, at_hub: bool) -> Iterator[httpx2.Response]:
        """The answer's head; its body is read inside. Raises ``Failed`` for what another attempt may not meet."""
        own = build_hf_headers(token=None if at_hub else False, library_name="qz", library_version=__version__)
        timeout = httpx2.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        doing = f"Reading {self.location}"
        try:
            with (
                hub_errors(self.repo_id, doing, revision=self.commit, endpoint=self.endpoint, transport=False),
                hub_session().stream(
                    "GET",
                    url,
                    headers={**own, "Accept-Encoding": "identity", **headers},
                    timeout=timeout,
                    follow_redirects=False,
                ) as response,
            ):
                yield response
        except RETRYABLE as error:
            raise Failed(reason(error)) from None


def target_of(response: httpx2.Response, url: str) -> str:
    """Where ``url`` redirects to. Raises Failed for what is no address of a web server."""
    location = response.headers["location"]
    if len(location) > LONGEST_LINK:
        raise Failed(f"it redirects to a link of {len(location)} characters")
    target = urljoin(url, location)
    if not is_web_address(target):
        raise Failed("it redirects to something other than a web address")
    return target


def first_line(response: httpx2.Response) -> str:
    """What a refusal says: the message of an XML answer, or its first line; without links or tokens."""
    body = b""
    for chunk in response.iter_raw():
        body += chunk[:_SAID]
        if len(body) >= _SAID:
            break
    text = body[:_SAID].decode(errors="replace")
    found = _MESSAGE.search(text)
    lines = [found[1]] if found else [line for line in _TAGS.sub(" ", text).splitlines() if line.strip()]
    return sanitized(lines[0])[:200] if lines else ""
