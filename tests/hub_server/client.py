"""huggingface_hub in this process, talking to a Hub of the tests."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hub_server.server import OWNER, HubServer
from pace import HANG

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest

    from forked import Runner


class Hurried:
    """The module ``time`` for huggingface_hub's own back-off, which is not what these tests are about."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.01))


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch, home: Path, *, xet: bool = True, **options: Any) -> Iterator[HubServer]:
    """A Hub that huggingface_hub in this process talks to, as with HF_ENDPOINT, HF_HOME and HF_TOKEN.

    Without ``xet`` as with HF_HUB_DISABLE_XET.

    The library reads the environment once, when it is first imported, so its constants are set as well.
    """
    from huggingface_hub import close_session, constants, file_download
    from huggingface_hub.utils import _http

    with HubServer(**options) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(home))
        monkeypatch.setenv("HF_TOKEN", OWNER)
        monkeypatch.setenv("HF_XET_CACHE", str(home / "xet"))  # hf_xet remembers there what an address has
        monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "1ms")  # what huggingface_hub's own session goes by
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "0" if xet else "1")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_HUB_DISABLE_XET": not xet,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_ETAG_TIMEOUT": HANG,  # the libraries take a file for missing that is not answered for in time
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", Hurried())
        if transformers := sys.modules.get("transformers.utils.hub"):
            monkeypatch.setattr(transformers, "_hf_api", None)  # made once, for the Hub of that moment
        close_session()
        yield hub
        close_session()


def connected_forks(forks: Runner) -> Runner:
    """Runs of commands that talk to the Hub that this process is ``connected`` to."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    return forks.within(**{**settings, "HF_HUB_OFFLINE": "0"})
