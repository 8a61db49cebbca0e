"""Files sent to the Hub's Xet storage by hf_xet, in bounded memory, with progress inside a file, and stopped at once.

Each call of ``send`` is one upload commit of hf_xet: the unit of which nothing has to be sent again once it is through.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import constants, get_session, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but exported by name only

from qz import HubUnreachable, OutputRefused, PermissionRefused, TryAgain, __version__
from qz.formats.hub.transport.errors import Signal
from qz.formats.hub.transport.session import with_retries
from qz.formats.publish.verified_file import VerifiedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qz.formats.publish.blobs import Blob

SETTINGS: dict[str, Any] = {
    # Without a bound, 64 xorbs of 64 MB may be under way at the same time.
    "client.ac_max_upload_concurrency": 2,
    "data.max_concurrent_file_ingestion": 1,
    "client.retry_base_delay": "1s",
    "client.retry_max_duration": "120s",
    "client.read_timeout": "120s",
}
"""What differs from hf_xet's defaults, where the environment says nothing: HF_XET_CLIENT_READ_TIMEOUT and the like."""
PIECE = 4 << 20
"""Bytes of a file that are handed over at a time."""
REPORTS = 200
"""Milliseconds between two reports of progress."""
AHEAD = 80 << 20
"""Bytes of a file that may be handed over and not have gone out, where memory is short: one of hf_xet's pieces of 64 MB
and what it needs to begin the next."""
LONGEST_STILL = 2.0
"""Seconds without a byte going out after which hf_xet may need more of the file to go on."""


class XetNotServed(Signal):
    """The Hub has no Xet storage for the repository."""


@dataclass(frozen=True, slots=True)
class _Access:
    """Where the storage is, and the token for it, good until ``expires`` (seconds since 1970)."""

    endpoint: str
    token: str
    expires: int


class XetUploads:
    """Uploads to one branch of one repository. ``stop`` may be called from any thread, at any time."""

    def __init__(self, endpoint: str, repo_id: str, branch: str, *, create_pr: bool, ahead: int | None = None) -> None:
        """``ahead``: bytes that may be handed over and not have gone out, and one call of ``send`` at a time then; None
        for as many as hf_xet takes."""
        self._repo_id, self._ahead = repo_id, ahead
        # This gives a token to users who may open a pull request, but not write.
        asked = "?create_pr=1" if create_pr else ""
        self._token_url = f"{endpoint}/api/models/{repo_id}/xet-write-token/{quote(branch, safe='')}{asked}"
        self._session: Any = None
        self._commits: dict[Any, _Sent] = {}
        self._stopped = False
        self._lock = threading.Lock()
        self._turn: AbstractContextManager[object] = nullcontext() if ahead is None else threading.Lock()

    def send(self, blobs: Sequence[Blob], progress: Callable[[int], None]) -> int:
        """Upload files; the bytes that went over the network, which is less where the storage has some of the content.

        ``progress`` is told how many bytes of the files are done. Their ``sha256`` is set where it was not known.

        Raises XetNotServed, OutputRefused if a file is not what was verified, what huggingface_hub raises for a token
        that is refused, TryAgain and HubUnreachable.
        """
        with self._turn:
            return self._send(blobs, progress)

    def _send(self, blobs: Sequence[Blob], progress: Callable[[int], None]) -> int:
        try:
            return self._commit(blobs, self._access(), progress)
        except (OSError, RuntimeError) as error:
            self._require_another_attempt(error)
            # hf_xet remembers on disk what it uploaded; where the storage has lost that since, only forgetting helps.
            memory = f"afresh-{secrets.token_hex(4)}" if _status(error) == 400 else None
        try:
            return self._commit(blobs, self._access(), progress, memory)
        except (OSError, RuntimeError) as error:
            self._require_another_attempt(error)
            raise self._meaning(error) from None
        finally:
            if memory is not None:
                _forget(memory)

    def _require_another_attempt(self, error: Exception) -> None:
        """Raise what another attempt would not change: a file that cannot be read, or an end that was ordered."""
        if self._stopped:
            raise TryAgain(f"Uploading to {self._repo_id} was stopped.") from None
        if not isinstance(error, ConnectionError) and not str(error).startswith(("Network", "Server")):
            raise error

    def stop(self) -> None:
        """Let all that is under way fail now."""
        with self._lock:
            self._stopped = True
            for commit, sent in self._commits.items():
                commit.abort()
                sent.end()

    def _access(self) -> _Access:
        """A token from the Hub, by a request of our own: hf_xet would hide why there is none."""

        def ask() -> Any:
            response = get_session().get(self._token_url, headers=self._headers())
            hf_raise_for_status(response)
            return response.headers

        try:
            headers = with_retries(ask)
            return _Access(
                headers[constants.HUGGINGFACE_HEADER_X_XET_ENDPOINT],
                headers[constants.HUGGINGFACE_HEADER_X_XET_ACCESS_TOKEN],
                int(headers[constants.HUGGINGFACE_HEADER_X_XET_EXPIRATION]),
            )
        except HfHubHTTPError as error:
            known = error.response.headers.get("X-Error-Code") in ("RepoNotFound", "RevisionNotFound")
            if error.response.status_code in (404, 501) and not known:
                raise XetNotServed from None
            raise
        except (KeyError, ValueError):
            raise XetNotServed from None

    def _headers(self) -> dict[str, str]:
        headers: dict[str, str] = build_hf_headers(library_name="qz", library_version=__version__)
        return headers

    def _commit(
        self, blobs: Sequence[Blob], access: _Access, progress: Callable[[int], None], memory: str | None = None
    ) -> int:
        """One attempt. ``memory``: where hf_xet looks up what it has uploaded, if not where it always does."""

        session = self._own_session() if memory is None else _session({"shard.cache_subdir": memory})
        headers, sent = self._headers(), _Sent()

        def tell(whole: Any, _: object) -> None:
            sent.move(whole.total_bytes_completed)
            progress(whole.total_bytes_completed)

        commit = session.new_upload_commit(
            endpoint=access.endpoint,
            token=access.token,
            token_expiry_unix_secs=access.expires,
            token_refresh_url=self._token_url,
            token_refresh_headers=headers,
            custom_headers={key: value for key, value in headers.items() if key.lower() != "authorization"},
            progress_callback=tell,
            progress_interval_ms=REPORTS,
        )
        with self._lock:
            if self._stopped:
                commit.abort()
            self._commits[commit] = sent
        try:
            fed = [self._feed(commit, blob, sent) for blob in blobs]
            report = commit.wait_to_finish()
        except BaseException:
            commit.abort()
            raise
        finally:
            with self._lock:
                del self._commits[commit]
        for blob, (size, sha256) in zip(blobs, fed, strict=True):
            if size != blob.size or sha256 != (blob.sha256 or sha256):
                raise OutputRefused(
                    f"{blob.path} changed during the push: {size:,} bytes with the SHA-256 {sha256} were sent, not "
                    "what was verified. Nothing was committed; push again."
                )
            blob.sha256 = sha256
        return int(report.dedup_metrics.total_bytes_uploaded)

    def _own_session(self) -> Any:
        with self._lock:
            if self._session is None:
                self._session = _session({})
            return self._session

    def _feed(self, commit: Any, blob: Blob, sent: _Sent) -> tuple[int, str]:
        """Hand a file over, piece by piece; its size and SHA-256 as they were handed over.

        hf_xet would open a path by itself, and whatever lies there by then.
        """
        import hf_xet

        stream = commit.start_upload_stream(name=blob.path, sha256=hf_xet.COMPUTE_SHA256)
        if isinstance(blob.content, VerifiedFile):
            with open(blob.content.open(), "rb", buffering=0) as file:
                while piece := file.read(PIECE):
                    if self._ahead is not None:
                        sent.wait(len(piece), self._ahead)
                    if self._stopped:
                        raise RuntimeError("stopped")
                    stream.write(piece)
        else:
            stream.write(blob.read())
        info = stream.finish().xet_info
        return info.file_size, info.sha256

    def _meaning(self, error: Exception) -> Exception:
        """What a failure of the storage means to the user. The token was good a moment ago."""
        status = _status(error)
        doing = f"Uploading to {self._repo_id} failed: the Hub's storage"
        if status == 429:
            return TryAgain(f"{doing} limits the rate of requests. Wait some minutes and run the same command again.")
        if status in (401, 403):
            return PermissionRefused(
                f"{doing} does not accept the token that the Hub gave for it ({status}). Run the same command again; "
                "if this persists, set HF_HUB_DISABLE_XET=1."
            )
        why = f"answers {status}" if status else "does not answer"
        return HubUnreachable(
            f"{doing} {why}. Run the same command again: it continues where it stopped. See also "
            "https://status.huggingface.co."
        )


class _Sent:
    """How much of an upload was handed over, and how much of that has gone out."""

    def __init__(self) -> None:
        self._fed = self._gone = 0
        self._ended = False
        self._lock = threading.RLock()
        self._change = threading.Condition(self._lock)

    def move(self, gone: int) -> None:
        with self._lock:
            self._gone = gone
            self._change.notify_all()

    def end(self) -> None:
        """Wake all waiting threads, which then give up."""
        with self._lock:
            self._ended = True
            self._change.notify_all()

    def wait(self, coming: int, ahead: int) -> None:
        """Before ``coming`` bytes are handed over: until less than ``ahead`` is on its way, or nothing moves."""
        with self._lock:
            self._fed += coming
            while self._fed - self._gone > ahead and not self._ended:
                gone = self._gone
                self._change.wait(LONGEST_STILL)
                if self._gone == gone:
                    return


def _session(settings: dict[str, Any]) -> Any:
    """A session with our settings, unless the user's environment has others."""
    import hf_xet

    own = {name: value for name, value in SETTINGS.items() if _variable(name) not in os.environ}
    return hf_xet.XetSession(hf_xet.XetConfig().with_config({**own, **settings}))


def _variable(setting: str) -> str:
    return f"HF_XET_{setting.replace('.', '_').upper()}"


def _status(error: Exception) -> int | None:
    """The HTTP status in hf_xet's text: ``… client error (403 Forbidden) …``."""
    match = re.search(r"\b(?:client|server) error \((\d{3})\b", str(error))
    return int(match[1]) if match else None


def _forget(memory: str) -> None:
    """Remove what hf_xet noted for one attempt only."""
    for folder in Path(constants.HF_XET_CACHE).glob(f"*/{memory}"):
        shutil.rmtree(folder, ignore_errors=True)
