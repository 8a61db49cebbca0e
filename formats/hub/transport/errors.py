"""What the Hub's refusals mean to the user: every error of huggingface_hub as an error of the package."""

from __future__ import annotations

import errno
import re
from contextlib import contextmanager
from json import JSONDecodeError
from typing import TYPE_CHECKING

import httpx2
from huggingface_hub import errors

from qz import (
    HubUnreachable,
    IOFailed,
    MalformedInput,
    MissingInput,
    PermissionRefused,
    QzError,
    TryAgain,
    Unsupported,
    UsageError,
)
from qz.formats.hub.transport.limits import TooSlow
from qz.formats.hub.transport.tokens import exchange_failure, known_token, one_scope, scope
from qz.formats.malformed import UNSAFE_TEXT, Malformed
from qz.redaction import redact
from qz.trace import trace_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another attempt may not get."""
RETRYABLE = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
"""Failures of a connection that another one may not have."""
_LINK = re.compile(r"https?://\S+\?\S*|\bhf_\w+")
"""With parameters, which may be a signature; and whatever looks like the beginning of a token."""


class Signal(Exception):
    """One part of this room tells another something; not an error yet, so the boundary lets it pass."""


@contextmanager
def hub_errors(
    repo_id: str, doing: str, *, revision: str | None = None, endpoint: str = "", transport: bool = True
) -> Iterator[None]:
    """Turn whatever goes wrong inside into an error of the package: what huggingface_hub and httpx may raise for an
    answer is of no foreseeable kind.

    ``doing`` begins the message: "Reading me/model". With ``transport`` false, failures of the connection that another
    attempt may not have pass through.
    """
    try:
        yield
    except (QzError, Signal, MemoryError):
        raise
    except Exception as error:
        if not transport and isinstance(error, RETRYABLE):
            raise
        meant = exchange_failure(error, doing) or meaning(error, repo_id, doing, revision=revision, endpoint=endpoint)
        if meant is None:
            raise
        # The original may quote a signed link, so it is not shown as the cause, but its sanitized text, for --debug.
        meant.add_note("\n".join(_without_secrets(line) for line in trace_lines(error)))
        raise meant from None


def meaning(
    error: BaseException, repo_id: str, doing: str, *, revision: str | None = None, endpoint: str = ""
) -> QzError | None:
    """The error of the package for ``error``; None for what the local system refuses, which says so itself."""
    page = f"{endpoint or 'https://huggingface.co'}/{repo_id}"
    while error.__cause__ and isinstance(error, _WRAPPERS) and not isinstance(error, errors.HfHubHTTPError):
        error = error.__cause__  # the wrapped error says more than huggingface_hub's
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, repo_id, doing, revision, page)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return PermissionRefused(f"{doing} needs a Hub token and there is none. Run `hf auth login`, or set HF_TOKEN.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnreachable(f"{doing} needs the Hub, but HF_HUB_OFFLINE is set. Unset it, or use a local folder.")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return HubUnreachable(f"{doing} failed: {repo_id} is not in the cache and the Hub cannot be reached.")
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{repo_id!r} is neither a folder nor a Hub repository name such as owner/name.")
    if isinstance(error, httpx2.HTTPError):
        return HubUnreachable(
            f"{doing} failed: the Hub at {endpoint or page} does not answer ({reason(error)}). Check the network and "
            "try again."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return IOFailed(f"{doing} failed: the disk that holds the Hub cache is full. Free some space, or set HF_HOME.")
    if isinstance(error, JSONDecodeError):
        return HubUnreachable(
            f"{doing} failed: {endpoint or page} did not return a valid Hub response. Check HF_ENDPOINT."
        )
    if isinstance(error, ValueError) and "LFS batch" in str(error):
        return HubUnreachable(f"{doing} failed: the Hub does not accept the files. Try again later; see {page}.")
    if isinstance(error, ValueError) and "too large" in str(error):
        return Unsupported(
            f"{doing} failed: files of more than 50 GB are served over Xet only. Run `pip install hf_xet`, and unset "
            "HF_HUB_DISABLE_XET, then try again."
        )
    if isinstance(error, UnicodeEncodeError) and not (known_token() or "").isascii():
        return PermissionRefused(
            f"{doing} failed: the Hub token contains a character that a token cannot contain. Copy it into HF_TOKEN "
            "again, or run `hf auth login`."
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return None
    if isinstance(error, OSError) and "onsistency check" in str(error):
        return Malformed(
            "changed", f"{doing} failed: the number of bytes received is not the one that the Hub lists. Try again."
        )
    return HubUnreachable(
        f"{doing} failed: the answer of {endpoint or page} cannot be used ({type(error).__name__}: "
        f"{sanitized(str(error))[:120]}). Check HF_ENDPOINT and the proxy settings, or try again later."
    )


_WRAPPERS = (RuntimeError, ValueError, errors.LocalEntryNotFoundError)


def _refusal(error: errors.HfHubHTTPError, repo_id: str, doing: str, revision: str | None, page: str) -> QzError:
    status, said = error.response.status_code, _said(error)
    login = (
        "Run `hf auth login`, or set HF_TOKEN"
        if not known_token()
        else one_scope() + "Check that your token may do this (`hf auth whoami`)"
    )
    if isinstance(error, errors.GatedRepoError):
        more = "" if known_token() else " and run `hf auth login`"
        return PermissionRefused(f"{repo_id} is gated. Ask for access at {page}{more}, then try again.")
    if isinstance(error, errors.DisabledRepoError):
        return PermissionRefused(f"{repo_id} is disabled on the Hub. See {page}.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return MissingInput(
            f"{repo_id} is not on the Hub, or it is private and you may not see it. {login}; see {page}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return MissingInput(f"{repo_id} has no revision {revision or 'main'!r}. Branches and commits: {page}/commits.")
    if isinstance(error, errors.EntryNotFoundError):
        return MissingInput(
            f"{doing} failed: it is not in {repo_id} at revision {revision or 'main'!r}. See {page}/tree."
        )
    if status in (404, 410):
        return MissingInput(f"{doing} failed: the Hub does not have it ({status}{said}). See {page}.")
    if status == 401 and scope():
        return PermissionRefused(
            f"{doing} was refused ({status}{said}): the token of this CI job has ended, or it was withdrawn. Run the "
            "job again."
        )
    if status == 401 and known_token():
        return PermissionRefused(
            f"{doing} was refused ({status}{said}): the Hub does not accept your token. It may have expired or been "
            "revoked: create one at https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN."
        )
    if status in (401, 402, 403):
        return PermissionRefused(f"{doing} was refused ({status}{said}). {login}; see {page}.")
    if status in (409, 412):
        return TryAgain(
            f"{doing} failed: {repo_id} was changed meanwhile ({status}{said}). Look at {page} and try again."
        )
    if status == 429:
        return TryAgain(f"{doing} failed: the Hub limits the rate of requests{said}. Wait some minutes and try again.")
    if status in BUSY or status >= 500:
        return HubUnreachable(
            f"{doing} failed: the Hub answers {status}{said}. Try again later; see https://status.huggingface.co."
        )
    return MalformedInput(f"{doing} failed: the Hub answers {status}{said}. See {page}.")


def _said(error: errors.HfHubHTTPError) -> str:
    """What the server says, one line, without links or anything that looks like a token."""
    text = sanitized(error.server_message or "")
    return f": {text[:200].rstrip('.')}" if text else ""


def reason(error: httpx2.HTTPError) -> str:
    """What kept a connection from working, in words."""
    if isinstance(error, TooSlow):
        return str(error)
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time"
    return sanitized(str(error))[:200] or type(error).__name__


def sanitized(text: str) -> str:
    """``text`` on one line, without signed links, tokens, or characters that do something to a terminal."""
    return " ".join(UNSAFE_TEXT.sub(" ", _without_secrets(text)).split())


def _without_secrets(text: str) -> str:
    return redact(_LINK.sub("…", text))
