"""What the services do when their processes are killed, or when they run long: recorded.

    python -m tests.endurance [--parts "[chaos, soak, sweep]"] [--quick true]

- chaos: simulators and replicas are killed at random (`chaos`).
- soak: thousands of episodes by the same processes (`soak`).
- sweep: a sweep of the Thermostat's gains on the embedded default, whose driver is killed once in the middle, up
  to the comparison of the best trial with the default on fresh seeds and layouts (`killed_sweep`).

Chaos and soak are recorded in `benchmarks/results/rollout.json`, the sweep in `service.json`, beside the other
parts. `--quick` does a little of each, and its results mean nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from rich.console import Console
from rich.progress import Progress

from benchmarks import rollout, service
from ray_jobs.command_line.cli import ending_at_sigterm, run
from ray_jobs.running.cluster import connect
from studies.engine import placed
from studies.record import Figures, PartStudy, measure_parts
from tests.endurance.chaos import measure_chaos
from tests.endurance.killed_sweep import KilledSweep, SweepStudy
from tests.endurance.recall_service import RecallService
from tests.endurance.soak import measure_soak


@dataclass(frozen=True)
class EnduranceStudy(PartStudy):
    """What is measured.

    Attributes:
        chaos_episodes: that are played undisturbed, and disturbed.
        kill_s: a process is killed after so many seconds, drawn from this range, again and again.
        soak_episodes: in all.
        soak_warm_up: short evaluations before, in which all worlds are built again and again.
        reading: episodes between two readings of every process's memory.
        seed: of the base policy that trials start from, and of the trials.
        trials: of the sweep; at least 2, or there is no middle.
    """

    all_parts: ClassVar[tuple[str, ...]] = ("chaos", "soak", "sweep")
    chaos_episodes: int = 400
    kill_s: tuple[float, float] = (3.0, 7.0)
    soak_episodes: int = 6000
    soak_warm_up: int = 128
    reading: int = 100
    seed: int = 100
    trials: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "chaos_episodes", "reading")
        self.require_at_least(2, "trials")
        if self.soak_episodes < 4 * self.reading:
            raise ValueError(
                f"soak_episodes: {self.soak_episodes} are too few for a reading after {self.reading} each; "
                f"ask for {4 * self.reading} or more"
            )

    @property
    def sweep(self) -> SweepStudy:
        return SweepStudy(quick=self.quick, seed=self.seed, trials=self.trials, **self.directories)


def measure(study: EnduranceStudy, part: str, console: Console) -> Figures:
    """The figures of a part; each has a cluster of its own."""
    if part == "sweep":
        prepared_s = study.sweep.make_ready(console)
        return {**KilledSweep(study.sweep.arguments()).run(console.print), "prepared_s": prepared_s}
    scratch = study.runs / "rollout"
    scratch.mkdir(parents=True, exist_ok=True)
    recall = RecallService(study.cache, scratch / "recall_policy", horizon=64, num_simulators=3, replicas=2)
    with connect(study), TemporaryDirectory(dir=scratch) as place:
        if part == "chaos":
            return asdict(measure_chaos(recall, study.chaos_episodes, study.kill_s, Path(place)))
        recall = replace(recall, horizon=16, num_simulators=2, replicas=1)
        with Progress(console=console) as progress:
            task = progress.add_task("episodes", total=study.soak_episodes)

            def advance(done: int) -> None:
                progress.update(task, completed=done)

            journal, episodes = Path(place) / "soak.sqlite", study.soak_episodes
            return asdict(measure_soak(recall, episodes, study.reading, journal, advance, study.soak_warm_up))


def main(study: EnduranceStudy) -> None:
    """Measures and prints; what is not in small is recorded."""
    console = Console()
    if study.quick:
        study = replace(study, chaos_episodes=12, kill_s=(2.0, 4.0), soak_episodes=40, reading=10, soak_warm_up=0)
        study = replace(study, trials=min(study.trials, 3), parts=study.parts or ("chaos", "soak"))
    with ending_at_sigterm(), placed(study, study.quick) as here:
        for name, of, parts in (("rollout", rollout, {"chaos", "soak"}), ("service", service, {"sweep"})):
            if some := tuple(part for part in here.measured if part in parts):
                seeds = [here.seed] if name == "service" else []
                these = replace(here, parts=some)
                measure_parts(name, these, lambda part: measure(here, part, console), of.targets, console, seeds)


if __name__ == "__main__":
    run(EnduranceStudy, main, __doc__)
