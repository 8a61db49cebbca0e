"""Conversions that run beside the page, each in a process of its own, and can be found again from another visit."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
AT_ONCE = 2
"""Conversions that may run at the same time; the free hardware has two cores."""
KEPT = 50
"""Finished conversions that are remembered."""
LINES = 200


class Busy(Exception):
    """Others are being served; the message says so."""


@dataclass
class Job:
    """One conversion. ``key`` is a secret that finds it again; it opens nothing else."""

    request: dict[str, Any]
    owner: str
    """Who asked: the name of an account, empty for nobody's."""
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    state: str = "running"
    """``running``, ``done``, ``failed`` or ``stopped``."""
    progress: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LINES))
    process: subprocess.Popen[str] | None = None
    changed: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """End the work cleanly, as Ctrl-C does. What was uploaded is found again by the same request."""
        if self.process is not None and self.state == "running":
            self.log.append("Stopping …")
            self.process.send_signal(signal.SIGINT)


class Jobs:
    """All conversions of this process. Thread-safe."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._nothing = tempfile.TemporaryDirectory()  # where the workers run: no name is one of a folder there

    def start(self, request: dict[str, Any], owner: str, token: str | None) -> Job:
        """Run ``request`` (``worker.convert``) with the token of ``owner``. Raises Busy."""
        with self._lock:
            running = [job for job in self._jobs.values() if job.state == "running"]
            for job in running:
                if (job.request, job.owner) == (request, owner) and request.get("target"):
                    return job  # asked for twice, by a second click or another tab
            if len(running) >= AT_ONCE:
                raise Busy("Other conversions are running here. Try again in some minutes, or duplicate this Space.")
            job = Job(request, owner)
            self._jobs[job.key] = job
            for old in [key for key, each in self._jobs.items() if each.state != "running"][:-KEPT]:
                del self._jobs[old]
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        if token:
            environment["HF_TOKEN"] = token
        else:
            environment["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
        job.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self._nothing.name,
            env=environment,
            start_new_session=True,
        )
        for read in (self._follow, self._errors):
            threading.Thread(target=read, args=(job,), daemon=True).start()
        assert job.process.stdin is not None
        with suppress(BrokenPipeError), job.process.stdin as stdin:  # of a worker that cannot start, which is followed
            json.dump(request, stdin)
        return job

    def find(self, key: str | None) -> Job | None:
        with self._lock:
            return self._jobs.get(key or "")

    def _follow(self, job: Job) -> None:
        assert job.process is not None
        assert job.process.stdout is not None
        for line in job.process.stdout:
            event = json.loads(line)
            if event["event"] == "progress":
                self._progressed(job, event["data"])
            else:
                job.result = event["data"]
                job.log.append("Done." if event["event"] == "done" else event["data"]["message"])
            job.changed.set()
        code = job.process.wait()
        if code == 0:
            job.state = "done"
        else:
            job.state = "stopped" if code in (130, -signal.SIGINT) else "failed"
            job.result = job.result or {
                "message": "The conversion ended unexpectedly. Ask for the same again.",
                "code": code,
            }
        job.changed.set()

    @staticmethod
    def _progressed(job: Job, progress: dict[str, Any]) -> None:
        if progress["doing"] != job.progress.get("doing"):
            job.log.append(f"{progress['doing']} …")
        if progress["file"]:
            job.log.append(f"{progress['file']} is finished.")
        if progress["kept"]:
            job.log.append("{} of {} files were made before and are kept.".format(*progress["kept"]))
        job.progress = progress

    @staticmethod
    def _errors(job: Job) -> None:
        assert job.process is not None
        assert job.process.stderr is not None
        for line in job.process.stderr:
            job.log.append(line.rstrip())
            job.changed.set()
