"""The Hub token: the user's own, or one of a single scope that a CI job gets for its identity (Trusted Publishers)."""

from __future__ import annotations

import os
from contextlib import suppress

import httpx2
from huggingface_hub import errors, get_token

from qz import HubUnreachable, PermissionRefused, QzError


def known_token() -> str | None:
    """The token, or None where there is none or it cannot be had: for messages, so nothing is raised."""
    with suppress(errors.OIDCError, errors.HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, LookupError):
        return get_token()
    return None


def scope() -> str | None:
    """What a token that is exchanged for an identity is good for: a repository, or a user; None without."""
    return os.environ.get("HF_OIDC_RESOURCE") or None


def exchange_failure(error: BaseException, doing: str) -> QzError | None:
    """What an exchange that failed means to the user; None if ``error`` is of another request."""
    if isinstance(error, errors.OIDCError):
        return PermissionRefused(
            f"{doing} needs a Hub token, and HF_OIDC_RESOURCE says to exchange the identity of this CI job for one, "
            "but the job has none. Give it `permissions: id-token: write`, or unset HF_OIDC_RESOURCE."
        )
    if not isinstance(error, errors.HfHubHTTPError) or not _is_exchange(error.response.url):
        return None
    status = error.response.status_code
    if status in (400, 401, 403):
        return PermissionRefused(
            f"{doing} needs a Hub token, and the identity of this CI job was not exchanged for one ({status}). "
            f"Name this repository and workflow as a Trusted Publisher in the settings of {scope()} on the Hub, and "
            "give the job `permissions: id-token: write`."
        )
    return HubUnreachable(
        f"{doing} needs a Hub token, and the exchange of this CI job's identity for one failed ({status}). "
        "Run the job again; see https://status.huggingface.co."
    )


def one_scope() -> str:
    """How a refusal may be the scope's fault, for the end of a message; empty without one."""
    if scope() is None:
        return ""
    kind = "writes that repository and reads no other" if "/" in str(scope()) else "reads what is gated, writes nothing"
    return f"HF_OIDC_RESOURCE={scope()} gives a token that {kind}: set it for each step. "


def _is_exchange(url: httpx2.URL) -> bool:
    asked = os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL", "")
    return url.path == "/oauth/token" or (bool(asked) and str(url).startswith(asked.partition("?")[0]))
