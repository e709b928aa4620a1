"""Writes docs/jobs_transcript.md: jobs on a fresh cluster of this machine, as their users submit them.

    python -m tests.ray_jobs.transcript

Starts a Ray head with a dashboard on free ports, submits one job after another, and ends what it started.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ipvla.sim.fingerprint import commit
from ipvla.storage import SOURCE_TREE
from studies.record import cpu_name
from tests.ray_jobs.head import ray_head

PAGE = SOURCE_TREE / "docs" / "jobs_transcript.md"
SUBMIT = "python -m ray_jobs.submit --"
_SMOKE = "ray_jobs/experiments/quickstart/smoke"
_SMALL = "--data.dataset tiny --training.steps 20 --training.checkpoint_every 10"
#: What each job is for, and its command line. Sizes are such that all is over in minutes and nothing is learned.
JOBS: Mapping[str, str] = {
    "Demonstrations": f"{SUBMIT} collect --config_path {_SMOKE}/collect.yaml --dataset tiny "
    '--demonstrations "{ground_red: 2, ground_blue: 2}" --storage_root $ROOT',
    "Training": f"{SUBMIT} train --config_path {_SMOKE}/train.yaml --study tiny --name gru "
    f"{_SMALL} --storage_root $ROOT",
    "A setting that is refused, before anything is shipped": f"{SUBMIT} train --training.steps 0",
}
#: Those that are to fail; a page with others that did is not written.
REFUSED = {"A setting that is refused, before anything is shipped": 2}
_KEPT_FIRST, _KEPT_LAST, _WIDTH = 6, 14, 115
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
#: What Ray's command writes before each of its own lines.
_PREFIX = re.compile(r"^\d{4}-\d\d-\d\d \S+\s+[A-Z]+ \S+ -- ")
#: What it says to everybody.
_ADVICE = re.compile(
    r"^(-+|Job submission server .*|Next steps|Package gcs://.*|Runtime env is .*|\s*ray job .*|\(.*--.*"
    r"|(Query|Request|Tailing|Running|Directory|Ignoring|WebSocket|Uploading|Creating) .*)$"
)


@dataclass(frozen=True)
class Submitted:
    """A command line, what it printed, how it ended and how long it took."""

    command: str
    output: str
    exit_code: int
    seconds: float

    def markdown(self) -> str:
        """A block as in a terminal, shortened."""
        shell = "\n".join(f"$ {line}" if not n else line for n, line in enumerate(wrapped(self.command)))
        return f"```\n{shell}\n{shortened(self.output)}\n```\n\nExit code {self.exit_code}, {self.seconds:.0f} s."


def submitted(command: str, root: Path, address: str) -> Submitted:
    """Runs a command line in the source tree, with `$ROOT` for `root`."""
    environment = {**os.environ, "RAY_ADDRESS": address, "ROOT": str(root), "COLUMNS": str(_WIDTH)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    began = time.monotonic()
    done = subprocess.run(
        command,
        shell=True,
        cwd=SOURCE_TREE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    output = done.stdout.replace(str(root), "$ROOT").replace(address, "http://127.0.0.1:8265")
    return Submitted(command, output, done.returncode, time.monotonic() - began)


def shortened(output: str) -> str:
    """Its first and last lines, without colours and without what Ray advises."""
    told = (_PREFIX.sub("", line).rstrip() for line in _ESCAPES.sub("", output).splitlines())
    lines = [line[:_WIDTH] for line in told if line.strip() and not _ADVICE.match(line)]
    if len(lines) > _KEPT_FIRST + _KEPT_LAST:
        left = len(lines) - _KEPT_FIRST - _KEPT_LAST
        lines = [*lines[:_KEPT_FIRST], f"... {left} lines ...", *lines[-_KEPT_LAST:]]
    return "\n".join(lines)


def wrapped(command: str) -> list[str]:
    """A command line over several lines, as a shell takes it."""
    lines = [""]
    for word in re.findall(r'"[^"]*"|\S+', command):
        if len(lines[-1]) + len(word) > _WIDTH - 8:
            lines[-1] += "\\"
            lines.append("    ")
        lines[-1] += f"{word} "
    return [line.rstrip() for line in lines]


def page(jobs: Mapping[str, Submitted]) -> str:
    """The whole page."""
    head = (
        "# Jobs on a fresh cluster: a transcript\n\n"
        "`python -m tests.ray_jobs.transcript` starts a Ray head on this machine, submits these jobs, shortens "
        "what they print\nand writes this page. The sizes are too small to learn anything. "
        f"{cpu_name()}, Python {platform.python_version()},\ncommit `{commit()[:10]}`. Meaning: "
        "[clusters.md](clusters.md).\n"
    )
    parts = [f"## {title}\n\n{job.markdown()}\n" for title, job in jobs.items()]
    return "\n".join([head, *parts])


def main(titles: Sequence[str] = tuple(JOBS)) -> None:
    """Submits the jobs and writes the page."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # the head listens on 127.0.0.1 only
    jobs: dict[str, Submitted] = {}
    with tempfile.TemporaryDirectory(prefix="ipvla-") as root, ray_head() as address:
        for title in titles:
            print(shlex.join([title]), flush=True)
            jobs[title] = submitted(JOBS[title], Path(root), address)
            print(jobs[title].markdown(), flush=True)
            if jobs[title].exit_code != REFUSED.get(title, 0):
                sys.exit(f"{title}: exit code {jobs[title].exit_code}; {PAGE.name} is left as it was")
    PAGE.write_text(page(jobs))


if __name__ == "__main__":
    main()
