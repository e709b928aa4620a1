"""This project's side of `benchmarks.lerobot`: `ray_jobs.evaluate` plays recorded actions.

python -m benchmarks.lerobot_ours WORK.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluators.success import SuccessConfig, SuccessEvaluation
from evaluators.success_table import SuccessTable
from ipvla.contract import Contract
from ipvla.policy import Policy
from ipvla.rollout.endpoint import PolicyEndpoint, Service, Serving
from ipvla.rollout.policy_actor import PolicySource
from ipvla.sim.environment import require_simulators
from ipvla.sim.protocols import EvaluationProtocol, load_protocol
from ipvla.sim.suites import suite_entry
from ipvla.types import Memory, Observation
from ray_jobs.evaluate import EvaluateConfig
from ray_jobs.evaluate import main as evaluate


class RecordedPolicy:
    """Answers with the recorded actions, a chunk at a time, and takes no time for it.

    Args:
        directory: has `actions.npy`, float32 [T, A], and `policy.txt`, two lines: the actions of a chunk, and a
            directory for what it is shown, empty to write nothing.
    """

    def __init__(self, directory: Path) -> None:
        self._actions: npt.NDArray[np.float32] = np.load(directory / "actions.npy")
        execute, self._seen = (directory / "policy.txt").read_text().split("\n")
        self.execute = int(execute)

    def initial_memory(self, batch: int) -> Memory:
        return {}

    def act(self, observations: Sequence[Observation], memory: Memory) -> tuple[npt.NDArray[np.float32], Memory]:
        if self._seen:
            for one in observations:
                self._write(one)
        return np.stack([self._actions[one.t : one.t + self.execute] for one in observations]), memory

    def _write(self, one: Observation) -> None:
        """What is seen, in a file per task, trial and control step."""
        trial = one.episode.split("/")[2]
        pictures: dict[str, Any] = dict(zip(("image", "image2"), one.images.values(), strict=True))
        np.savez(Path(self._seen) / f"{one.instruction}_{trial}_{one.t}.npz", state=one.proprio, **pictures)


@dataclass(frozen=True)
class RecordedSource:
    """A `PolicySource` whose directory has no trained policy."""

    source: PolicySource

    def sha256(self) -> str:
        return self.source.sha256()

    def view(self, offered: Contract, world: str = "the world") -> Contract:
        return self.source.view(offered, world)

    def serve(self, serving: Serving, running: Service | None = None) -> Service:
        return self.source.serve(serving, running)


class TimedEvaluation(SuccessEvaluation):
    """Adds to `result` when playing began and ended, simulators' start included."""

    result: Path

    def run(self, *args: Any, **options: Any) -> SuccessTable:
        began = time.time()
        table = super().run(*args, **options)
        told = {"began": began, "ended": time.time(), "episodes": len(table.results)}
        self.result.write_text(json.dumps({**json.loads(self.result.read_text()), **told}))
        return table


@dataclass(frozen=True)
class ShortSuccessConfig(SuccessConfig):
    """Ends episodes after `steps` control steps.

    Attributes:
        result: file that gets times, JSON.
    """

    steps: int = 1
    result: Path = field(default_factory=Path)

    @property
    def played_by(self) -> EvaluationProtocol:
        protocol = load_protocol(self.protocol)
        return replace(protocol, horizons={**protocol.horizons, self.suite: self.steps})

    def build(self, cache_dir: Path) -> SuccessEvaluation:
        require_simulators()
        built = TimedEvaluation(self, suite_entry(self.suite).load(cache_dir), self.simulators(cache_dir))
        built.result = self.result
        return built


@dataclass(frozen=True)
class RecordedEvaluateConfig(EvaluateConfig):
    """Evaluates the recorded actions in `directory`."""

    recorded: Path = field(default_factory=Path)

    def source(self, name: str, load: Callable[..., Policy]) -> PolicyEndpoint:
        return RecordedSource(PolicySource(RecordedPolicy, self.recorded))


def main(work_file: Path) -> None:
    """Plays what the file says, and writes to its `result`."""
    imported = time.time()
    work = json.loads(work_file.read_text())
    result = Path(work["result"])
    result.write_text(json.dumps({"imported": imported}))
    actions = Path(work["actions"])
    (actions.parent / "policy.txt").write_text(f"{work['execute']}\n{work['seen']}")
    success = ShortSuccessConfig(
        suite=work["suite"],
        protocol="lerobot",
        profile=work["profile"],
        episodes=dict.fromkeys(work["tasks"], work["trials"]),
        num_simulators=work["simulators"],
        steps=work["steps"],
        result=result,
    )
    evaluate(
        RecordedEvaluateConfig(
            storage_root=Path(work["storage_root"]),
            cache_dir=Path(work["cache_dir"]),
            study=work["name"],
            policies=("recorded",),
            success=success,
            videos=0,
            recorded=actions.parent,
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
