"""A real Slurm on this machine, of one node: munged, slurmctld and slurmd, without cgroups, systemd or accounting."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from pace import HANG

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")


def missing() -> list[str]:
    """What of Slurm is not installed: apt-get install slurmctld slurmd slurm-client munge."""
    return [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]


class Slurm:
    """A context manager. ``environment`` is what its commands need."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="slurm-")  # in a short path, for its socket
        self.folder = Path(self._temporary.name)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        run, host = self.folder, socket.gethostname().partition(".")[0]
        key = run / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        one, two = free_port(), free_port()
        (run / "slurm.conf").write_text(
            f"""ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={one}
SlurmdPort={two}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={run}/munge.socket
CredType=cred/munge
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.pid
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MinJobAge=3600
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
        )
        files = {"key-file": key, "socket": run / "munge.socket", "pid-file": run / "munged.pid"}
        files |= {"log-file": run / "munged.log", "seed-file": run / "munged.seed"}
        self._start("munged", "--force", "--foreground", *(f"--{name}={path}" for name, path in files.items()))
        self._start("slurmctld", "-D", "-c", "-f", str(run / "slurm.conf"))
        self._start("slurmd", "-D", "-f", str(run / "slurm.conf"), "-N", host)
        self.wait_for(lambda: "idle" in self("sinfo", "--noheader", "--format=%T", check=False))
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            daemon.wait(HANG)
        self._temporary.cleanup()

    def _start(self, *command: str) -> None:
        log = self.folder / f"{command[0]}.out"
        with open(log, "wb") as output:
            daemon = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output, cwd=self.folder)
        self._daemons.append(daemon)

    def __call__(self, *command: str, check: bool = True, **how: Any) -> str:
        """What a command of Slurm says."""
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=HANG, check=False, **how
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}{self.logs()}")
        return done.stdout

    def states(self, job: str) -> dict[str, str]:
        """The state of each task of an array, or of a job, by its id."""
        lines = self("squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={job}").splitlines()
        return dict(line.split() for line in lines)

    def wait_for(self, condition: Any) -> None:
        """Until it holds; AssertionError with the daemons' logs if it never does."""
        end = time.monotonic() + HANG
        while not condition():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self._daemons):
                raise AssertionError(f"Slurm does not get there: {self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log")))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
