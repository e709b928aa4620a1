"""Writes docs/jobs_transcript.md: jobs on a fresh cluster, as their users submit them.

    python -m tests.ray_jobs.transcript

Starts two Ray nodes and an MLflow server on this machine, runs one command after another, kills the server before
one and starts it again after, and ends what it started.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ray.util.state import list_actors, list_nodes

from ipvla.sim.fingerprint import commit
from ipvla.storage import SOURCE_TREE
from studies.record import cpu_name
from tests.ray_jobs.head import Cluster, free_port, ray_cluster
from tests.tracking.server import answers, mlflow_server, until

PAGE = SOURCE_TREE / "docs" / "jobs_transcript.md"
SUBMIT = "ipvla submit --"
_SMOKE = "ray_jobs/experiments/quickstart/smoke"
#: What each command is for, and itself. Sizes are such that all is over in minutes and nothing is learned.
COMMANDS: Mapping[str, str] = {
    "Demonstrations": f"{SUBMIT} collect --config_path {_SMOKE}/collect.yaml --dataset tiny "
    '--demonstrations "{ground_red: 2, ground_blue: 2}" --storage_root $ROOT',
    "Training": f"{SUBMIT} train --config_path {_SMOKE}/train.yaml --study tiny --name gru --data.dataset tiny "
    "--training.checkpoint_every 10 --storage_root $ROOT",
    "An evaluation while MLflow is away": f"{SUBMIT} evaluate --config_path {_SMOKE}/evaluate.yaml --study tiny "
    "--policies [gru] --success.num_simulators 2 --storage_root $ROOT",
    "MLflow is back": "ipvla mlflow_sync --storage_root $ROOT",
    "A setting that is refused, before anything is shipped": f"{SUBMIT} train --training.steps 0",
}
#: Before it the server is killed, after it started again.
AWAY = "An evaluation while MLflow is away"
#: Those that are to fail; a page with others that did is not written.
REFUSED = {"A setting that is refused, before anything is shipped": 2}
#: Class of an actor -> what the page calls it; Ray's own are left out.
_PARTS = {"RayTrainWorker": "training worker", "_Host": "simulator", "PolicyActor": "policy"}
_KEPT_FIRST, _KEPT_LAST, _WIDTH = 6, 14, 115
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
#: What Ray says before a job, and MLflow's client on its way.
_ADVICE = re.compile(
    r"^(\d{4}-\d\d-\d\d .*Runtime env is setting up.|Running entrypoint for job .*|"
    r".* Retrying \(Retry.*|[🏃🧪].*)$"
)


@dataclass(frozen=True)
class Ran:
    """A command line, what it printed, how it ended, how long it took, and where its parts were."""

    command: str
    output: str
    exit_code: int
    seconds: float
    places: str

    def markdown(self) -> str:
        """A block as in a terminal, shortened."""
        shell = "\n".join(f"$ {line}" if not n else line for n, line in enumerate(wrapped(self.command)))
        end = f"Exit code {self.exit_code}, {self.seconds:.0f} s.{self.places}"
        return f"```\n{shell}\n{shortened(self.output)}\n```\n\n{end}"


@dataclass(frozen=True)
class Place:
    """Where the commands run.

    Attributes:
        root: `$ROOT`.
        tracking: MLflow's address.
    """

    cluster: Cluster
    root: Path
    tracking: str

    def run(self, command: str) -> Ran:
        """Runs a command line in the source tree; both addresses are in its environment."""
        began, before = time.monotonic(), self._actors()
        done = subprocess.run(
            command,
            shell=True,
            cwd=SOURCE_TREE,
            env={
                **os.environ,
                **{"RAY_API_SERVER_ADDRESS": self.cluster.dashboard, "MLFLOW_TRACKING_URI": self.tracking},
                **{"ROOT": str(self.root), "COLUMNS": str(_WIDTH)},
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - began
        output = done.stdout.replace(str(self.root), "$ROOT").replace(self.tracking, "http://HOST:5000")
        new = Counter(part for key, part in self._actors().items() if key not in before)
        parts = [f"{part} on {node}" + (f" ({n} times)" if n > 1 else "") for (part, node), n in new.items()]
        return Ran(
            command, output, done.returncode, seconds, f" Ran: {', '.join(sorted(parts))}." if parts else ""
        )

    def _actors(self) -> dict[str, tuple[str, str]]:
        """Actor -> what it is, and its node's address."""
        nodes = {node.node_id: node.node_ip for node in list_nodes(address=self.cluster.dashboard)}
        actors = list_actors(address=self.cluster.dashboard, limit=1000)
        return {
            actor.actor_id: (_PARTS[name], nodes[actor.node_id])
            for actor in actors
            if actor.node_id in nodes and (name := actor.class_name.split(".")[0]) in _PARTS
        }


def shortened(output: str) -> str:
    """Its first and last lines, without colours and without what Ray and MLflow say of each job."""
    printed = (line.rstrip() for line in _ESCAPES.sub("", output).splitlines())
    lines = [line[:_WIDTH] for line in printed if line and not _ADVICE.match(line)]
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


def page(ran: Mapping[str, Ran]) -> str:
    """The whole page."""
    head = (
        "# Jobs on a fresh cluster: a transcript\n\n"
        "`python -m tests.ray_jobs.transcript` starts two Ray nodes (127.0.0.2 is the head) and an MLflow server "
        "on this\nmachine, runs these commands, shortens what they print and writes this page. Both addresses are "
        "in the environment:\n`RAY_API_SERVER_ADDRESS` and `MLFLOW_TRACKING_URI`. Sizes are too small to learn "
        f"anything. {cpu_name()}, Python\n{platform.python_version()}, commit `{commit()[:10]}`. Meaning: "
        "[clusters.md](clusters.md).\n"
    )
    parts = [f"## {title}\n\n{one.markdown()}\n" for title, one in ran.items()]
    return "\n".join([head, *parts])


def main() -> None:
    """Runs the commands and writes the page."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # the head's dashboard listens on 127.0.0.1 only
    ran: dict[str, Ran] = {}
    with tempfile.TemporaryDirectory(prefix="ipvla-") as directory, ExitStack() as ends:
        port = free_port()
        place = Place(ends.enter_context(ray_cluster(2)), Path(directory) / "shared", f"http://127.0.0.1:{port}")
        server = ends.enter_context(ExitStack())
        server.enter_context(mlflow_server(Path(directory), port))
        until(lambda: answers(place.tracking))
        for title, command in COMMANDS.items():
            if title == AWAY:
                server.close()
            ran[title] = place.run(command)
            print(ran[title].markdown(), flush=True)
            if ran[title].exit_code != REFUSED.get(title, 0):
                sys.exit(f"{title}: exit code {ran[title].exit_code}; {PAGE.name} is left as it was")
            if title == AWAY:
                server.enter_context(mlflow_server(Path(directory), port))
                until(lambda: answers(place.tracking))
    PAGE.write_text(page(ran))


if __name__ == "__main__":
    main()
