"""What the real Hub does beyond answering: one line each, with where it was read. Tests turn a line off, or turn it up.

Played always, with the code in ``reading``, ``cdn`` and ``xet``:

- the token is never to reach the CDN; small files go by 307 to /api/resolve-cache (huggingface_hub, file_download.py)
- 416 past the end; 206 with Content-Range (RFC 9110)
- gated: 401 or 403 with X-Error-Code GatedRepo, while info and tree stay readable (huggingface_hub, utils/_http.py)
- private and missing: 401 without a token, 404 with one, RepoNotFound; 401 "Invalid credentials" (the same)
- RevisionNotFound, EntryNotFound with X-Repo-Commit; disabled: 403 "Access to this resource is disabled." (the same)
- renamed repositories: 307 for GET, HEAD and POST (huggingface_hub, utils/_http.py, "follow_relative_redirects")
- tokens for Xet are for one repository and one revision (hub-docs, docs/xet/auth)

Played on order, as a ``Fault``: 408, 5xx, 504 with a page of HTML, dropped and cut connections, RST, stalls, a trickle,
flipped bytes, 200 for a Range, Content-Range missing or "*", t = 0 and t > 300 in RateLimit, bursts of some seconds,
a branch that moves between two requests, reconstructions that lack a term, lost answers, 412.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

_RATES = "huggingface/hub-docs, docs/hub/rate-limits.md"


def rule(default: Any, what: str, source: str) -> Any:
    return field(default=default, metadata={"what": what, "source": source})


@dataclass
class Rules:
    bound_links: bool = rule(
        True, "a link minted with a Range serves that Range only: 403 invalid range", "huggingface/xet-core#897"
    )
    binding_hosts: tuple[str, ...] = rule(("aws",), "the hosts that bind so", "huggingface/datasets#7685")
    hosts: tuple[str, ...] = rule(("aws", "gcp"), "a host per redirect, in turn", "huggingface/xet-core#897")
    link_seconds: float = rule(3600, "a signed link expires: 403, XML", "huggingface/datasets#7685 (X-Amz-Expires)")
    outage: tuple[str, ...] = rule(
        (), "hosts that refuse every link: 403 SignatureError: invalid key pair id", "huggingface/datasets#8328"
    )
    largest_unranged: int = rule(40 << 30, "400 for a GET without Range of more", "huggingface/huggingface_hub#4330")
    largest_served: int = rule(400 << 30, "400 for any GET without Range beyond", "huggingface/xet-core#592")
    head_links_serve_get: bool = rule(True, "a link minted by HEAD serves GET", "huggingface/huggingface.js#1024")
    relays: tuple[str, ...] = rule((), "redirects before the signed link: hosts, or 'relative'", "RFC 9110, 10.2.2")
    requests_per_connection: int = rule(100, "then closed, unannounced, between requests", "RFC 9112, 9.3")
    weak_etags: bool = rule(False, 'ETag: W/"…"', "RFC 9110, 8.8.3")
    gzip_anyway: bool = rule(False, "Content-Encoding: gzip although identity was asked for", "RFC 9110, 12.5.3")
    rate_window: float = rule(300, "seconds of the fixed windows of RateLimit, on every answer of the Hub", _RATES)
    api_anonymous: int = rule(500, "requests to /api a window, for an address", _RATES)
    api_user: int = rule(1000, "the same for a free account", _RATES)
    resolvers_anonymous: int = rule(3000, "resolves a window, for an address", _RATES)
    resolvers_user: int = rule(5000, "the same for a free account", _RATES)
    retry_after: bool = rule(False, "429 with Retry-After beside RateLimit", _RATES)
    xet: bool = rule(True, "X-Xet-Hash and Link on resolve, xetHash in listings", "hub-docs, docs/xet/auth")
    without_xet: tuple[str, ...] = rule((), "LFS files that were never moved to Xet: patterns", "hub-docs, docs/xet")
    xet_token_seconds: float = rule(3600, "how long a token for Xet is good", "hub-docs, docs/xet/auth")
    xorb_grants: bool = rule(
        True, "xorbs go by PUT to a link that the CAS grants; otherwise 404, and directly", "hf_xet 1.8; xet-core#974"
    )
    reconstructions_v2: bool = rule(True, "/v2/reconstructions; otherwise 404, and /v1", "hub-docs, docs/xet/api")


def table() -> list[tuple[str, Any, str, str]]:
    """Name, default, what is played, source."""
    return [(line.name, line.default, line.metadata["what"], line.metadata["source"]) for line in fields(Rules)]
