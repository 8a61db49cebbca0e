"""A Slurm array makes the parts, and a job that depends on it merges them: on a real slurmctld and slurmd."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import submitit

import slurm
from commands import contents
from qz import api

pytestmark = pytest.mark.skipif(
    bool(slurm.missing()) or os.geteuid() != 0, reason="needs Slurm, installed and started by root"
)

SETTINGS = ("--max-shard-size", "20KB", "--threads", "1", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Slurm]:
    with slurm.Slurm() as cluster:
        yield cluster


def submitted(cluster: slurm.Slurm, place: Path, *options: str, line: str) -> str:
    script = f"#!/bin/sh\nexec {sys.executable} -m qz {line}\n"
    log = place / "slurm-%j-%a.log"
    return cluster("sbatch", "--parsable", f"--output={log}", f"--chdir={place}", *options, input=script).strip()


def test_an_array_and_the_merge_that_waits_for_it_make_what_one_run_makes(
    cluster: slurm.Slurm, tiny_llama: Path, tmp_path: Path
) -> None:
    """Also when a task is killed and requeued while it runs."""
    api.quantize(tiny_llama, tmp_path / "one", max_shard_bytes=20_000, device="cpu")
    command = f"quantize {tiny_llama} -o out {' '.join(SETTINGS)}"
    array = submitted(cluster, tmp_path, "--array=1-3", "--requeue", line=f"{command} --part auto")
    merge = submitted(cluster, tmp_path, f"--dependency=afterok:{array}", line="merge out --quiet")

    cluster.wait_for(lambda: cluster.states(array).get(f"{array}_1") == "RUNNING")
    cluster("scontrol", "requeue", f"{array}_1")
    cluster.wait_for(lambda: cluster.states(array).get(f"{array}_1") == "PENDING")
    cluster("scontrol", "update", f"jobid={array}_1", "starttime=now")  # instead of two minutes later
    cluster.wait_for(lambda: cluster.states(merge)[merge] == "COMPLETED" or told(cluster, array, merge))

    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert cluster.states(merge)[merge] == "COMPLETED", logs
    assert contents(tmp_path / "out") == contents(tmp_path / "one"), logs
    assert not (tmp_path / "out.parts").exists()


def test_an_array_of_submitit_makes_what_one_run_makes(
    cluster: slurm.Slurm, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    how: dict[str, Any] = {"max_shard_bytes": 20_000, "device": "cpu", "threads": 1}
    api.quantize(tiny_llama, tmp_path / "one", **how)
    executor = submitit.AutoExecutor(folder=tmp_path / "logs", cluster="slurm")
    executor.update_parameters(cpus_per_task=1, timeout_min=60)
    parts, output = [f"{number}/3" for number in range(1, 4)], tmp_path / "out"
    jobs = executor.map_array(lambda part: api.quantize(tiny_llama, output, part=part, **how).as_json()["part"], parts)
    assert [job.result() for job in jobs] == [{"number": number, "of": 3} for number in range(1, 4)]
    api.merge(output)
    assert contents(output) == contents(tmp_path / "one")


def told(cluster: slurm.Slurm, *jobs: str) -> bool:
    """Whether a task has failed, so that nothing more will come."""
    states = [state for job in jobs for state in cluster.states(job).values()]
    return any(state in ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY") for state in states)


def test_a_task_started_again_by_itself_is_told_to_say_which_part_it_is(
    cluster: slurm.Slurm, tiny_llama: Path, tmp_path: Path
) -> None:
    line = f"quantize {tiny_llama} -o out {' '.join(SETTINGS)} --part auto"
    job = submitted(cluster, tmp_path, "--array=3", line=line)
    cluster.wait_for(lambda: set(cluster.states(job).values()) <= {"FAILED", "COMPLETED"})
    assert set(cluster.states(job).values()) == {"FAILED"}
    assert "--part $SLURM_ARRAY_TASK_ID/N" in "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert not (tmp_path / "out.parts").exists()
