"""The rollout service: how much faster than a serial loop, and how close to what the machine could do at best.

    python -m benchmarks.rollout --libero_assets DIRECTORY [--quick true]

Needs the assets of LIBERO's own suites. The serial loop is that of public evaluation scripts; the service plays
the same tasks with the same policy by the same protocol ("oft": two pictures, a call of the policy every 8 control
steps). Serial episodes and both services take turns, so that whatever else slows the machine slows all of them;
figures are of medians over rounds. A full run writes `benchmarks/results/rollout.json`; `--quick` plays a round
with one episode of each kind, and its results mean nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import ray
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.record import Target, write_record
from benchmarks.rollout_policy import save_untrained_policy
from benchmarks.rollout_serial import play_serially
from benchmarks.rollout_service import Throughput, act_overhead_ms, play_by_service
from benchmarks.scratch import placed
from benchmarks.tables import target_rows
from ipvla.rollout.sim_pool import simulator_environment
from ipvla.sim.protocols import load_protocol
from ipvla.sim.standard.assets import provide_assets
from ipvla.sim.standard.tasks import standard_tasks
from ipvla.storage import StorageRoots
from ray_jobs.cli import run
from ray_jobs.cluster import connect

_SUITE = "libero_spatial"
_PROFILES = ("exact", "fast")
_CALLERS = (1, 8)


@dataclass(frozen=True)
class RolloutStudy(StorageRoots):
    """What is measured.

    Attributes:
        quick: in small, in a temporary place unless a storage root is given.
        libero_assets: directory of LIBERO's assets; not needed where `ray_jobs.doctor` was told.
        rounds: of a serial episode and a run of each service.
        tasks: of the suite's first ones, that the services play.
        trials: per task, of a service in a round.
        num_simulators: of a service.
        calls: of the policy, per caller.
        horizon: control steps of an episode, or None for the protocol's.
    """

    quick: bool = False
    libero_assets: str | None = None
    rounds: int = 3
    tasks: int = 2
    trials: int = 6
    num_simulators: int = 3
    calls: int = 400
    horizon: int | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "tasks", "trials", "num_simulators", "calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def measure(study: RolloutStudy, console: Console) -> dict[str, Any]:
    """The figures; Ray must be connected."""
    if study.libero_assets is not None:
        provide_assets(study.cache, study.libero_assets)
    policy = save_untrained_policy(study.runs / "rollout" / "policy")
    protocol = load_protocol("oft")
    if study.horizon is not None:
        protocol = replace(protocol, horizons={_SUITE: study.horizon})
    tasks = [task.name for task in standard_tasks(_SUITE)[: study.tasks]]
    serial = ray.remote(num_cpus=1, max_calls=1, runtime_env={"env_vars": simulator_environment()})(play_serially)
    rounds: dict[str, list[float]] = {"serial": [], **{profile: [] for profile in _PROFILES}}
    runs: dict[str, list[Throughput]] = {profile: [] for profile in _PROFILES}
    for number in range(study.rounds):
        console.rule(f"round {number + 1} of {study.rounds}")
        seconds, steps = ray.get(
            serial.remote(study.cache, policy, protocol, _SUITE, tasks[number % len(tasks)], 1)
        )
        rounds["serial"].append(sum(seconds) / sum(steps))
        console.print(f"serial: {1e3 * rounds['serial'][-1]:.0f} ms per control step")
        for profile in _PROFILES:
            played = play_by_service(
                study.cache,
                policy,
                protocol,
                _SUITE,
                tasks,
                study.trials,
                num_simulators=study.num_simulators,
                profile=profile,
            )
            runs[profile].append(played)
            rounds[profile].append(played.wall_s / played.steps)
            console.print(f"service, {profile}: {1e3 * rounds[profile][-1]:.0f} ms per control step")
    overheads = {str(n): act_overhead_ms(n, study.calls, study.tmp / "rollout") for n in _CALLERS}
    return {
        "ms_per_step": {name: [1e3 * one for one in values] for name, values in rounds.items()},
        "service": {profile: [asdict(one) for one in played] for profile, played in runs.items()},
        "efficiency": {p: [one.efficiency(_cores()) for one in played] for p, played in runs.items()},
        "act_overhead_ms": overheads,
        "cores": _cores(),
        "num_simulators": study.num_simulators,
        "protocol": str(protocol),
        "suite": _SUITE,
    }


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was promised; a ratio is of medians over rounds, its interval the smallest and the largest round's."""
    ms, bounds = figures["ms_per_step"], {"exact": 8.0, "fast": 12.0}
    ratios = {
        profile: [serial / one for serial, one in zip(ms["serial"], ms[profile], strict=True)]
        for profile in _PROFILES
    }
    efficiency = figures["efficiency"]["exact"]
    overheads = figures["act_overhead_ms"]
    return [
        *(
            Target(f"speedup_{p}", median(ratios[p]), bounds[p], True, interval=_span(ratios[p]))
            for p in _PROFILES
        ),
        Target("efficiency", median(efficiency), 0.85, True, interval=_span(efficiency)),
        Target("act_overhead_ms_1", overheads["1"], 2.0, False),
        Target("act_overhead_ms_8", overheads["8"], 1.0, False),
    ]


def main(study: RolloutStudy) -> None:
    """Measures, prints, and on a full run records."""
    console = Console()
    if study.quick:
        study = _in_small(study)
    with placed(study, study.quick) as here, connect(here):
        figures = measure(here, console)
    found = targets(figures)
    console.print(Markdown("\n".join(target_rows([target.to_dict() for target in found]))))
    if not study.quick:
        console.print(f"written to {write_record('rollout', [], figures, found)}")


def _in_small(study: RolloutStudy) -> RolloutStudy:
    return replace(study, rounds=1, tasks=1, trials=1, num_simulators=1, calls=40, horizon=40)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


if __name__ == "__main__":
    run(RolloutStudy, main, __doc__)
