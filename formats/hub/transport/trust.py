"""Which addresses that a server names are the Hub, or at least on the web."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from huggingface_hub import constants

from qz import HubUnreachable
from qz.formats.malformed import quoted

if TYPE_CHECKING:
    import httpx2

_STORAGE = "x-xet-cas-url"


def is_ours(request: httpx2.Request) -> bool:
    """Whether qz made it: other requests of the program over this session are left alone."""
    return "qz/" in request.headers.get("user-agent", "")


def require_storage_on_the_web(response: httpx2.Response) -> None:
    """Raise HubUnreachable for a storage elsewhere: hf_xet takes a folder of this machine for one, and writes there.

    A hook of huggingface_hub's session, which hands such an address on to hf_xet by itself.
    """
    named = response.headers.get(_STORAGE)
    if named is not None and is_ours(response.request) and not is_web_address(named):
        raise HubUnreachable(
            f"The storage that the Hub names is not a web address: {quoted(named, 60)}. Check HF_ENDPOINT."
        )


def is_hub(url: str, target: str) -> bool:
    """Whether ``target`` is at the same origin as ``url``, or at one that huggingface_hub trusts with the token."""
    here, there = urlsplit(url), urlsplit(target)
    trusted = there.scheme == "https" and there.hostname in constants.HF_URL_HOSTS and there.port is None
    return (here.scheme, here.netloc) == (there.scheme, there.netloc) or trusted


def is_web_address(text: str) -> bool:
    """Whether it is an address of a web server."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)
