"""The rollout service: how fast it is, how it scales, and what its fast pictures are like.

    python -m benchmarks.rollout --libero_assets DIRECTORY [--parts "[speed, overhead, scaling]"] [--quick true]

- speed: a serial loop in the order of public evaluation scripts against the service, which plays the same tasks
  with the same policy by the same protocol ("oft": two pictures, a call of the policy every 8 control steps).
  Serial episodes and both services take turns, so that whatever else slows the machine slows all of them; figures
  are of medians over rounds. Needs the assets of LIBERO's own suites.
- overhead: what an answer takes beyond `policy.act`, of one caller and of eight, beside a bare call of Ray's.
- pictures: what profile `fast` changes of them, of LIBERO's own suites (`rollout_pictures`).
- scaling: simulators and policies that only wait (`rollout_scaling`).

What it does when its processes are killed or when it runs long: `python -m tests.endurance`.

Every part writes its figures, with its own commit and machine, to `benchmarks/results/rollout.json`, beside those
of the others. `--quick` does a little of each, and its results mean nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar, Final

import ray
from rich.console import Console

from benchmarks import rollout_speed as service
from benchmarks.rollout_pictures import measure_pictures
from benchmarks.rollout_scaling import ACTORS, CORES_ARE_THE_LIMIT, driver_cpu_ms, measure_scaling
from ipvla.rollout.sim_pool import simulator_environment
from ipvla.sim.protocols import load_protocol
from ipvla.sim.standard.assets import provide_assets
from ipvla.sim.standard.tasks import standard_tasks
from ray_jobs.command_line.cli import run
from ray_jobs.running.cluster import connect
from studies.engine import placed
from studies.record import Figures, PartStudy, Target, measure_parts
from studies.tables import extent

_SUITE: Final = "libero_spatial"
_PROFILES: Final = ("exact", "fast")
_CALLERS: Final = (1, 8)
#: What counts as flat: over 5,000 episodes a process grows by 5 MB, less than 2 % of what a simulator has.
_FLAT_MB_PER_1000: Final = 1.0


@dataclass(frozen=True)
class RolloutStudy(PartStudy):
    """What is measured.

    Attributes:
        libero_assets: directory of LIBERO's assets; not needed where `ray_jobs.doctor` was given it.
        rounds: of a serial episode and a run of each service.
        tasks: of the suite's first ones, that the services play.
        trials: per task, of a service in a round.
        picture_tasks: of each suite, whose pictures are compared.
        num_simulators: of a service; None for as many as it finds by itself.
        calls: of the policy, per caller; and episodes for the driver's share.
        horizon: control steps of an episode, or None for the protocol's.
        actors: that only wait, of each point; ascending.
        chunks: that one of them plays in an episode.
    """

    all_parts: ClassVar[tuple[str, ...]] = ("speed", "overhead", "pictures", "scaling")
    libero_assets: str | None = None
    rounds: int = 3
    tasks: int = 2
    trials: int = 6
    picture_tasks: int = 2
    num_simulators: int | None = None
    calls: int = 400
    horizon: int | None = None
    actors: tuple[int, ...] = ACTORS
    chunks: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "rounds", "tasks", "trials", "picture_tasks", "num_simulators", "calls", "chunks")
        if list(self.actors) != sorted(set(self.actors)) or not self.actors or self.actors[0] < 1:
            raise ValueError(f"actors: {list(self.actors)} must be ascending numbers of at least 1")


def measure_speed(study: RolloutStudy, console: Console) -> Figures:
    """Figures of the service against the serial loop."""
    policy = service.save_untrained_policy(study.runs / "rollout" / "policy")
    protocol = load_protocol("oft")
    if study.horizon is not None:
        protocol = replace(protocol, horizons={_SUITE: study.horizon})
    tasks = [task.name for task in standard_tasks(_SUITE)[: study.tasks]]
    serial = ray.remote(num_cpus=1, max_calls=1, runtime_env={"env_vars": simulator_environment()})(
        service.play_serially
    )
    s_per_step: dict[str, list[float]] = {"serial": [], **{profile: [] for profile in _PROFILES}}
    runs: dict[str, list[dict[str, float]]] = {profile: [] for profile in _PROFILES}
    for number in range(study.rounds):
        task = tasks[number % len(tasks)]
        seconds, steps = ray.get(serial.remote(study.cache, policy, protocol, _SUITE, task, 1))
        s_per_step["serial"].append(sum(seconds) / sum(steps))
        for profile, played in runs.items():
            simulators, trials = study.num_simulators, study.trials
            played.append(
                service.play_by_service(study.cache, policy, protocol, _SUITE, tasks, trials, simulators, profile)
            )
            s_per_step[profile].append(played[-1]["wall_s"] / played[-1]["steps"])
        last = ", ".join(f"{name} {1e3 * values[-1]:.0f}" for name, values in s_per_step.items())
        console.print(f"round {number + 1} of {study.rounds}, ms per control step: {last}")
    cores = len(os.sched_getaffinity(0))
    return {
        "ms_per_step": {name: [1e3 * one for one in values] for name, values in s_per_step.items()},
        "service": runs,
        "efficiency": {p: [service.efficiency(one, cores) for one in played] for p, played in runs.items()},
        "cores": cores,
        "num_simulators": extent(int(one["simulators"]) for played in runs.values() for one in played),
        "protocol": str(protocol),
        "suite": _SUITE,
    }


def measure_overhead(study: RolloutStudy) -> Figures:
    """Milliseconds by round; whatever slows the machine slows the bare call too."""
    ms: dict[str, list[float]] = {"bare": [], **{str(callers): [] for callers in _CALLERS}}
    for _ in range(study.rounds):
        ms["bare"].append(service.bare_call_ms(study.calls))
        for callers in _CALLERS:
            ms[str(callers)].append(service.act_overhead_ms(callers, study.calls, study.tmp / "rollout"))
    return {"ms": ms}


def measure(study: RolloutStudy, part: str, console: Console) -> Figures:
    """The figures of a part; Ray must be connected."""
    if study.libero_assets is not None:
        provide_assets(study.cache, study.libero_assets)
    if part == "speed":
        return measure_speed(study, console)
    if part == "overhead":
        return measure_overhead(study)
    if part == "pictures":
        return {"differences": measure_pictures(study.cache, study.picture_tasks)}
    scratch = study.runs / "rollout"
    scratch.mkdir(parents=True, exist_ok=True)
    points = []
    for point in measure_scaling(scratch, study.actors, study.chunks):
        points.append(point)
        console.print(
            "{actors} simulators, {forward} policy: {answers_per_s:.1f} answers/s of {bound:.1f} at most, "
            "{cpu:.0%} of the cores".format(**point)
        )
    return {"points": points, "driver_cpu_ms": driver_cpu_ms(scratch, study.calls)}


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was promised, of the parts that there are figures of."""
    parts = {
        "speed": _speed_targets,
        "overhead": _overhead_targets,
        "scaling": _scaling_targets,
        "chaos": _chaos_targets,
        "soak": _soak_targets,
    }
    return [target for part, of in parts.items() if part in figures for target in of(figures[part])]


def _speed_targets(figures: Mapping[str, Any]) -> list[Target]:
    """A ratio is of medians over rounds, its interval the smallest and the largest round's."""
    ms = figures["ms_per_step"]
    found = {
        f"speedup_{profile}": (bound, [a / b for a, b in zip(ms["serial"], ms[profile], strict=True)])
        for profile, bound in (("exact", 8.0), ("fast", 12.0))
    }
    found["efficiency"] = (0.85, figures["efficiency"]["exact"])
    return [
        Target(name, median(values), bound, True, interval=_span(values))
        for name, (bound, values) in found.items()
    ]


def _overhead_targets(figures: Mapping[str, Any]) -> list[Target]:
    ms = figures["ms"]
    note = f"a bare call of Ray's with the same pictures takes {median(ms['bare']):.2f} ms"
    return [
        Target(f"act_overhead_ms_{n}", median(ms[n]), bound, False, interval=_span(ms[n]), note=told)
        for n, bound, told in (("1", 2.0, note), ("8", 1.0, ""))
    ]


def _scaling_targets(figures: Mapping[str, Any]) -> list[Target]:
    """The least of the points at which the machine's cores were not the limit."""
    points = figures["points"]
    free = [point for point in points if point["cpu"] < CORES_ARE_THE_LIMIT]
    found = []
    for name in ("bound", "ideal"):
        if not free:
            note = "the cores were the limit at every point"
            found.append(Target(f"scaling_to_{name}", None, 0.9, True, note=note))
            continue
        least = min(free, key=lambda point: point[f"to_{name}"])
        note = f"{least['actors']} simulators, {least['forward']} policy: the least of {len(free)} points"
        if len(free) < len(points):
            note += f" (of {len(points)}; at the rest the cores are the limit)"
        if name == "bound":
            within = least["ideal"] / least["bound"]
            note += f"; a service that takes no time at all would reach {within:.2f} there"
        found.append(Target(f"scaling_to_{name}", least[f"to_{name}"], 0.9, True, note=note))
    return found


def _chaos_targets(chaos: Mapping[str, Any]) -> list[Target]:
    notes = {"lost": "", "different": "in any action or in the outcome", "doubled": ""}
    return [Target(f"chaos_{name}", chaos[name], 0, False, note=note) for name, note in notes.items()]


def _soak_targets(soak: Mapping[str, Any]) -> list[Target]:
    steepest = max(soak["processes"], key=lambda process: process["slope_mb_per_1000"])
    slope, files = steepest["slope_mb_per_1000"], max(process["files"] for process in soak["processes"])
    note = (
        f"{steepest['kind']}, the process that grows most in {soak['episodes']} episodes; left behind: "
        f"{soak['leases']} leases, {files} open files, {soak['actors']} actors"
    )
    return [Target("soak_memory_slope_mb_per_1000", slope, _FLAT_MB_PER_1000, False, note=note)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def main(study: RolloutStudy) -> None:
    """Measures and prints; what is not in small is recorded."""
    console = Console()
    if study.quick:
        study = replace(study, rounds=1, tasks=1, trials=1, num_simulators=1, calls=40, horizon=24, actors=(2,))
        study = replace(study, picture_tasks=1, chunks=4)
    with placed(study, study.quick) as here:

        def measured(part: str) -> Figures:
            with nullcontext() if part == "pictures" else connect(here):  # a cluster of its own for each
                return measure(here, part, console)

        measure_parts("rollout", here, measured, targets, console)


if __name__ == "__main__":
    run(RolloutStudy, main, __doc__)
