"""`python -m ray_jobs.submit`: a job on a cluster, followed to its end.

Ships this source tree, shows the job's log as it is written, and ends with the exit code that the job itself ended
with; Ctrl-C stops the job. The job's settings are checked before anything is shipped.

    python -m ray_jobs.submit --address http://head:8265 -- train --config_path FILE --storage_root /shared
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from ipvla import plain_yaml
from ipvla.choices import did_you_mean
from ipvla.plain_yaml import YamlError
from ipvla.sim.fingerprint import COMMIT_VARIABLE, commit
from ipvla.storage import SOURCE_TREE, absolute_paths
from ipvla.tracking import without_password
from ray_jobs.command_line.cli import first_line, run
from ray_jobs.command_line.jobs import JOBS, config_class, module, named, split
from ray_jobs.command_line.settings import SettingError, parse
from ray_jobs.running.cluster import ClusterError

_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_DASHBOARD_PORT = 8265
_TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
_POLL_S = 0.5
#: Loggers of Ray that say of each job how it is shipped and followed.
_CHATTY = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env")
_INTERRUPTED = 130


@dataclass(frozen=True)
class SubmitConfig:
    """Where a job is submitted to, and with what; the job and its own settings follow `--`.

    Attributes:
        address: of the cluster's dashboard, `http://HOST:PORT` or `HOST:PORT`; default `$RAY_API_SERVER_ADDRESS`,
            else `$RAY_ADDRESS` or port 8265 of its host, else `http://127.0.0.1:8265`.
        working_dir: directory that is shipped and run in, or a package's URI that every node can read.
        runtime_env: YAML file with what the job's processes run in; null for nothing.
        env: more environment variables of the job, name -> value; `MLFLOW_TRACKING_URI` is passed on if it is set.
        follow: shows the log and waits for the end; without it the job's id is printed, and it runs on.
        submission_id: a name for the job, unique in the cluster; by default Ray chooses one.
        job: its name and settings, what follows `--`.
    """

    address: str | None = None
    working_dir: str = str(SOURCE_TREE)
    runtime_env: Path | None = SOURCE_TREE / "cluster_configs" / "runtime_env.yaml"
    env: dict[str, str] = field(default_factory=dict)
    follow: bool = True
    submission_id: str | None = None
    job: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.job:
            raise ValueError("no job was given; write it behind --, as in: ipvla submit -- train --name gru")

    @property
    def dashboard(self) -> str:
        """Address of the dashboard, with its scheme."""
        given = self.address or os.environ.get(_ADDRESS_VARIABLE)
        if given:
            return given if "://" in given else f"http://{given}"
        cluster = os.environ.get("RAY_ADDRESS", "")
        if "://" in cluster:
            return cluster
        host = cluster.rpartition(":")[0] or "127.0.0.1"  # `auto` and `local` name no host
        return f"http://{host}:{_DASHBOARD_PORT}"

    @property
    def entrypoint(self) -> str:
        """The job's command line on the cluster.

        Raises:
            SettingError: there is no such job, or it would refuse its settings.
            StorageError: one of its directories is an address.
        """
        name, settings = named(self.job)
        if name not in JOBS or name == "submit":
            known = [job for job in JOBS if job != "submit"]
            raise SettingError(f"{name}: there is no such job; {did_you_mean(name, known)}")
        absolute_paths(parse(config_class(name), settings))  # an address where a directory belongs
        return shlex.join(["python", "-m", module(name), *settings])

    def environment(self) -> dict[str, Any]:
        """Ray's runtime environment. SettingError if its file cannot be used."""
        read: Any = {}
        if self.runtime_env is not None:
            try:
                read = plain_yaml.load_file(self.runtime_env) or {}
            except (OSError, YamlError) as error:
                raise SettingError(
                    f"runtime_env: {self.runtime_env} cannot be read ({error}); give a YAML file"
                ) from None
        if not isinstance(read, dict):
            raise SettingError(
                f"runtime_env: {self.runtime_env} holds {read!r:.60}; it must hold `name: value` lines"
            )
        # the repository stays behind
        sources = {COMMIT_VARIABLE: commit()} if self.working_dir == str(SOURCE_TREE) else {}
        tracking = {_TRACKING_VARIABLE: uri} if (uri := os.environ.get(_TRACKING_VARIABLE)) else {}
        variables = {**sources, **tracking, **(read.get("env_vars") or {}), **self.env}
        return {**read, "working_dir": self.working_dir, "env_vars": variables}


def submit(config: SubmitConfig) -> int:
    """Submits the job and, if it is followed, returns its exit code; 0 once it is submitted otherwise.

    Raises:
        SettingError: a setting of the job, or the runtime environment, cannot be used.
        ClusterError: no cluster answers, or it does not take the job.
    """
    entrypoint, environment = config.entrypoint, config.environment()
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        client = _client(config.dashboard)
        job = client.submit_job(entrypoint=entrypoint, runtime_env=environment, submission_id=config.submission_id)
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise ClusterError(
            f"{config.dashboard} does not take the job ({first_line(error)}); give --address of a cluster's "
            "dashboard (with a token: the same RAY_AUTH_MODE here as there)"
        ) from None
    print(f"{job}: {entrypoint}", file=sys.stderr, flush=True)
    if uri := environment["env_vars"].get(_TRACKING_VARIABLE):
        print(f"MLflow: {without_password(uri)}", file=sys.stderr, flush=True)
    if not config.follow:
        print(job)
        return 0
    return follow(client, job)


def _client(dashboard: str) -> JobSubmissionClient:
    """One for this dashboard: Ray takes an address in its variables before the argument."""
    before = os.environ.get(_ADDRESS_VARIABLE)
    os.environ[_ADDRESS_VARIABLE] = dashboard
    try:
        return JobSubmissionClient(dashboard)
    finally:
        if before is None:
            del os.environ[_ADDRESS_VARIABLE]
        else:
            os.environ[_ADDRESS_VARIABLE] = before


def follow(client: JobSubmissionClient, job: str) -> int:
    """Shows a job's log until the job ends; its exit code. Stops the job if this process is interrupted."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    shown = 0
    try:
        while not client.get_job_status(job).is_terminal():
            shown = asyncio.run(_show(client, job, shown))
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        print(f"stopping {job}", file=sys.stderr, flush=True)
        client.stop_job(job)
        while not client.get_job_status(job).is_terminal():
            time.sleep(_POLL_S)
        return _INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    return exit_code(client, job)


def exit_code(client: JobSubmissionClient, job: str) -> int:
    """That of a job's process; 130 if it was stopped, 1 if it never had a process, or its node was lost."""
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return _INTERRUPTED
    if info.driver_exit_code is None:
        print(f"{job} failed: {info.message}", file=sys.stderr)
    return info.driver_exit_code or 1


async def _show(client: JobSubmissionClient, job: str, shown: int) -> int:
    """Its log but for so many characters; how many there were when the job ended, or the connection did."""
    length = 0
    async for lines in client.tail_job_logs(job):
        sys.stdout.write(lines[max(shown - length, 0) :])
        sys.stdout.flush()
        length += len(lines)
    return max(length, shown)


if __name__ == "__main__":
    ours, job = split(sys.argv[1:])
    if job:
        sys.argv[1:] = [*ours, "--job", yaml.safe_dump(job, default_flow_style=True, width=10**6).strip()]
    run(SubmitConfig, submit, __doc__)
