"""huggingface_hub as a command uses it: its API object, quiet and with timeouts, and patience with a busy server."""

from __future__ import annotations

import logging
import os
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

import httpx2
from huggingface_hub import HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # public, exported by name only

from qz import __version__
from qz.formats.global_settings import change_global
from qz.formats.hub.transport.backoff import TOLD_FROM, Retries, log
from qz.formats.hub.transport.errors import BUSY, hub_errors
from qz.formats.hub.transport.limits import bind, unbind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")


API_TIMEOUT = 30.0
"""Seconds without a byte before a question about a repository is asked again."""
ASKING = Retries(attempts=4)
"""For questions that a person waits for."""


def hub_api() -> HfApi:
    """The Hub at HF_ENDPOINT, with the token of the environment or of ``hf auth login``."""
    if not {"HF_DEBUG", "HF_HUB_VERBOSITY"} & os.environ.keys():
        change_global("huggingface_hub's verbosity", _quiet)
    hub_session()
    return HfApi(library_name="qz", library_version=__version__, headers={"Accept-Encoding": "gzip"})


def _quiet() -> Callable[[], None]:
    """No warnings of the client: they quote links, and what goes wrong is raised."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    return lambda: logger.setLevel(level)


def hub_session() -> httpx2.Client:
    """huggingface_hub's session, with timeouts and bounds: the library replaces it after some failures."""
    session = get_session()
    change_global(session, lambda: _bounded(session))
    return session


def _bounded(session: httpx2.Client) -> Callable[[], None]:
    timeout = session.timeout
    if timeout == httpx2.Timeout(None):
        session.timeout = httpx2.Timeout(300.0, connect=10.0)  # a large commit takes the Hub a while
    bind(session)

    def restore() -> None:
        session.timeout = timeout
        unbind(session)

    return restore


def token(doing: str) -> str | None:
    """The token that requests are made with, None if there is none. ``doing`` says what for: "Pushing".

    In CI it may be exchanged for the job's identity first; raises what that exchange ends with.
    """
    with hub_errors("", doing):
        return get_token()


def with_retries(ask: Callable[[], T], retries: Retries | None = None) -> T:
    """What ``ask`` returns, asked again when the Hub is busy or the connection fails; for what may be asked twice."""
    retries, failures = retries or ASKING, 0
    while True:
        try:
            return ask()
        except (HfHubHTTPError, httpx2.TransportError) as error:
            failures += 1
            wait = None
            if isinstance(error, HfHubHTTPError):
                wait = seconds_asked(error.response.headers)
                if error.response.status_code not in BUSY and error.response.status_code < 500:
                    raise
            if failures >= retries.attempts or (wait or 0) > retries.longest_asked:
                raise
            if wait is not None and wait >= TOLD_FROM:
                log.warning("The Hub asks to wait (it limits the rate of requests): going on in %.0f s.", wait)
            time.sleep(retries.wait(failures) if wait is None else wait)


def seconds_asked(headers: Mapping[str, str]) -> float | None:
    """How long an answer asks to wait: its ``Retry-After``, or the end of the rate limit's window and a second more,
    because that end is rounded down."""
    after = headers.get("retry-after", "").strip()
    if after.isascii() and after.isdigit():
        return float(after[:9])
    try:
        if after:
            return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
        limit = parse_ratelimit_headers(headers)
    except (ValueError, TypeError, OverflowError):
        return None
    return limit.reset_in_seconds + 1.0 if limit and limit.remaining == 0 else None
