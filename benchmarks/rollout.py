"""The rollout service: how fast it is, how it scales, what it does when its processes die or when it runs long.

    python -m benchmarks.rollout --libero_assets DIRECTORY [--parts "[speed, overhead, scaling]"] [--quick true]

- speed: a serial loop in the order of public evaluation scripts against the service, which plays the same tasks
  with the same policy by the same protocol ("oft": two pictures, a call of the policy every 8 control steps).
  Serial episodes and both services take turns, so that whatever else slows the machine slows all of them; figures
  are of medians over rounds. Needs the assets of LIBERO's own suites.
- overhead: what an answer takes beyond `policy.act`, of one caller and of eight, beside a bare call of Ray's.
- pictures: what profile `fast` changes of them, of LIBERO's own suites (`rollout_pictures`).
- scaling: simulators and policies that only wait (`rollout_scaling`).
- chaos: processes are killed, at random (`rollout_chaos`).
- soak: thousands of episodes by the same processes (`rollout_soak`).

Every part writes its figures, with its own commit and machine, to `benchmarks/results/rollout.json` and keeps what
is there of the others. `--quick` does a little of each, and its results mean nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import ray
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from benchmarks.record import Target, read_record, this_run, write_record
from benchmarks.rollout_chaos import measure_chaos
from benchmarks.rollout_pictures import measure_pictures
from benchmarks.rollout_policy import save_untrained_policy
from benchmarks.rollout_recall import RecallService
from benchmarks.rollout_scaling import ACTORS, CORES_ARE_THE_LIMIT, driver_cpu_ms, measure_scaling
from benchmarks.rollout_serial import play_serially
from benchmarks.rollout_service import Throughput, act_overhead_ms, bare_call_ms, play_by_service
from benchmarks.rollout_soak import measure_soak
from benchmarks.scratch import placed
from benchmarks.tables import target_rows
from ipvla.rollout.sim_pool import simulator_environment
from ipvla.sim.protocols import load_protocol
from ipvla.sim.standard.assets import provide_assets
from ipvla.sim.standard.tasks import standard_tasks
from ipvla.storage import StorageRoots
from ray_jobs.command_line.cli import run
from ray_jobs.running.cluster import connect

PARTS: Final = ("speed", "overhead", "pictures", "scaling", "chaos", "soak")
_SUITE = "libero_spatial"
_PROFILES = ("exact", "fast")
_CALLERS = (1, 8)
#: What counts as flat: over 5,000 episodes a process grows by 5 MB, less than 2 % of what a simulator has.
_FLAT_MB_PER_1000 = 1.0


@dataclass(frozen=True)
class RolloutStudy(StorageRoots):
    """What is measured.

    Attributes:
        quick: in small, in a temporary place unless a storage root is given.
        parts: of `PARTS`.
        libero_assets: directory of LIBERO's assets; not needed where `ray_jobs.doctor` was told.
        rounds: of a serial episode and a run of each service.
        tasks: of the suite's first ones, that the services play.
        trials: per task, of a service in a round.
        picture_tasks: of each suite, whose pictures are compared.
        num_simulators: of a service; None for as many as it finds by itself.
        calls: of the policy, per caller; and episodes for the driver's share.
        horizon: control steps of an episode, or None for the protocol's.
        actors: that only wait, of each point; ascending.
        chunks: that one of them plays in an episode.
        chaos_episodes: that are played undisturbed, and disturbed.
        kill_s: a process is killed after so many seconds, drawn from this range, again and again.
        soak_episodes: in all.
        soak_warm_up: short evaluations before, in which all worlds are built again and again.
        reading: episodes between two readings of every process's memory.
    """

    quick: bool = False
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    libero_assets: str | None = None
    rounds: int = 3
    tasks: int = 2
    trials: int = 6
    picture_tasks: int = 2
    num_simulators: int | None = None
    calls: int = 400
    horizon: int | None = None
    actors: list[int] = field(default_factory=lambda: list(ACTORS))
    chunks: int = 16
    chaos_episodes: int = 400
    kill_s: tuple[float, float] = (3.0, 7.0)
    soak_episodes: int = 6000
    soak_warm_up: int = 128
    reading: int = 100

    def __post_init__(self) -> None:
        counts = (
            "rounds",
            "tasks",
            "trials",
            "picture_tasks",
            "num_simulators",
            "calls",
            "chunks",
            "chaos_episodes",
        )
        for name in (*counts, "reading"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"parts: {unknown or 'none'} to measure; choose among {', '.join(PARTS)}")
        if self.actors != sorted(set(self.actors)) or not self.actors or self.actors[0] < 1:
            raise ValueError(f"actors: {self.actors} must be ascending numbers of at least 1")
        if self.soak_episodes < 4 * self.reading:
            raise ValueError(
                f"soak_episodes: {self.soak_episodes} are too few for a reading after {self.reading} each; "
                f"ask for {4 * self.reading} or more"
            )


def measure_speed(study: RolloutStudy, console: Console) -> dict[str, Any]:
    """Figures of the service against the serial loop."""
    policy = save_untrained_policy(study.runs / "rollout" / "policy")
    protocol = load_protocol("oft")
    if study.horizon is not None:
        protocol = replace(protocol, horizons={_SUITE: study.horizon})
    tasks = [task.name for task in standard_tasks(_SUITE)[: study.tasks]]
    serial = ray.remote(num_cpus=1, max_calls=1, runtime_env={"env_vars": simulator_environment()})(play_serially)
    rounds: dict[str, list[float]] = {"serial": [], **{profile: [] for profile in _PROFILES}}
    runs: dict[str, list[Throughput]] = {profile: [] for profile in _PROFILES}
    for number in range(study.rounds):
        console.print(f"round {number + 1} of {study.rounds}")
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
    return {
        "ms_per_step": {name: [1e3 * one for one in values] for name, values in rounds.items()},
        "service": {profile: [asdict(one) for one in played] for profile, played in runs.items()},
        "efficiency": {p: [one.efficiency(_cores()) for one in played] for p, played in runs.items()},
        "cores": _cores(),
        "num_simulators": _counted([one.simulators for played in runs.values() for one in played]),
        "protocol": str(protocol),
        "suite": _SUITE,
    }


def measure_overhead(study: RolloutStudy) -> dict[str, Any]:
    """Milliseconds by round; whatever slows the machine slows the bare call too."""
    rounds: dict[str, list[float]] = {"bare": [], **{str(callers): [] for callers in _CALLERS}}
    for _ in range(study.rounds):
        rounds["bare"].append(bare_call_ms(study.calls))
        for callers in _CALLERS:
            rounds[str(callers)].append(act_overhead_ms(callers, study.calls, study.tmp / "rollout"))
    return {"ms": rounds}


def measure(study: RolloutStudy, part: str, console: Console) -> dict[str, Any]:
    """The figures of a part; Ray must be connected."""
    scratch = study.runs / "rollout"
    scratch.mkdir(parents=True, exist_ok=True)
    if study.libero_assets is not None:
        provide_assets(study.cache, study.libero_assets)
    service = RecallService(study.cache, scratch / "recall_policy", horizon=64, num_simulators=3, replicas=2)
    if part == "speed":
        return measure_speed(study, console)
    if part == "overhead":
        return measure_overhead(study)
    if part == "pictures":
        return {"differences": [asdict(one) for one in measure_pictures(study.cache, study.picture_tasks)]}
    if part == "scaling":
        points = measure_scaling(
            scratch,
            study.actors,
            study.chunks,
            lambda point: console.print(
                f"{point.actors} simulators, {point.forward} policy: {point.answers_per_s:.1f} answers/s of "
                f"{point.bound:.1f} at most, {point.cpu:.0%} of the cores"
            ),
        )
        return {
            "points": [{**asdict(p), "to_bound": p.to_bound, "to_ideal": p.to_ideal} for p in points],
            "driver_cpu_ms": driver_cpu_ms(scratch, study.calls),
        }
    with TemporaryDirectory(dir=scratch) as journals:
        if part == "chaos":
            return asdict(measure_chaos(service, study.chaos_episodes, study.kill_s, Path(journals)))
        service = replace(service, horizon=16, num_simulators=2, replicas=1)
        journal = Path(journals) / "soak.sqlite"
        with Progress(console=console) as progress:
            task = progress.add_task("episodes", total=study.soak_episodes)
            return asdict(
                measure_soak(
                    service,
                    study.soak_episodes,
                    study.reading,
                    journal,
                    lambda done: progress.update(task, completed=done),
                    study.soak_warm_up,
                )
            )


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was promised, of the parts that there are figures of."""
    found: list[Target] = []
    if "speed" in figures:
        found += _speed_targets(figures["speed"])
    if "overhead" in figures:
        found += _overhead_targets(figures["overhead"]["ms"])
    if "scaling" in figures:
        found += _scaling_targets(figures["scaling"]["points"])
    if "chaos" in figures:
        chaos = figures["chaos"]
        found += [
            Target("chaos_lost", chaos["lost"], 0, False),
            Target("chaos_different", chaos["different"], 0, False, note="in any action or in the outcome"),
            Target("chaos_doubled", chaos["doubled"], 0, False),
        ]
    if "soak" in figures:
        found.append(_soak_target(figures["soak"]))
    return found


def _speed_targets(figures: Mapping[str, Any]) -> list[Target]:
    """A ratio is of medians over rounds, its interval the smallest and the largest round's."""
    ms, bounds = figures["ms_per_step"], {"exact": 8.0, "fast": 12.0}
    ratios = {
        profile: [serial / one for serial, one in zip(ms["serial"], ms[profile], strict=True)]
        for profile in _PROFILES
    }
    efficiency = figures["efficiency"]["exact"]
    return [
        *(
            Target(f"speedup_{p}", median(ratios[p]), bounds[p], True, interval=_span(ratios[p]))
            for p in _PROFILES
        ),
        Target("efficiency", median(efficiency), 0.85, True, interval=_span(efficiency)),
    ]


def _overhead_targets(ms: Mapping[str, Sequence[float]]) -> list[Target]:
    note = f"a bare call of Ray's with the same pictures takes {median(ms['bare']):.2f} ms"
    return [
        Target(f"act_overhead_ms_{n}", median(ms[n]), bound, False, interval=_span(ms[n]), note=told)
        for n, bound, told in (("1", 2.0, note), ("8", 1.0, ""))
    ]


def _scaling_targets(points: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The least of the points at which the machine's cores were not the limit."""
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
            note += (
                f"; a service that takes no time at all would reach {least['ideal'] / least['bound']:.2f} there"
            )
        found.append(Target(f"scaling_to_{name}", least[f"to_{name}"], 0.9, True, note=note))
    return found


def _soak_target(soak: Mapping[str, Any]) -> Target:
    steepest = max(soak["processes"], key=lambda process: process["slope_mb_per_1000"])
    note = (
        f"{steepest['kind']}, the process that grows most in {soak['episodes']} episodes; left behind: "
        f"{soak['leases']} leases, {max(process['files'] for process in soak['processes'])} open files, "
        f"{soak['actors']} actors"
    )
    return Target(
        "soak_memory_slope_mb_per_1000", steepest["slope_mb_per_1000"], _FLAT_MB_PER_1000, False, note=note
    )


def main(study: RolloutStudy) -> None:
    """Measures and prints; what is not in small is recorded."""
    console = Console()
    if study.quick:
        study = _in_small(study)
    record = None if study.quick else read_record("rollout")
    figures: dict[str, Any] = dict(record["figures"]) if record else {}
    # Parts of a full run each have a cluster to themselves.
    with placed(study, study.quick) as here, connect(here) if study.quick else nullcontext():
        for part in study.parts:
            console.rule(part)
            run_of_part = this_run()  # as it began
            with nullcontext() if part == "pictures" else connect(here):
                figures[part] = {**measure(here, part, console), "run": run_of_part}
            if not study.quick:  # what the parts after this one come to does not matter to it
                console.print(f"written to {write_record('rollout', [], figures, targets(figures))}")
    console.print(Markdown("\n".join(target_rows([target.to_dict() for target in targets(figures)]))))


def _in_small(study: RolloutStudy) -> RolloutStudy:
    small = replace(study, rounds=1, tasks=1, trials=1, num_simulators=1, calls=40, horizon=24, actors=[2])
    return replace(
        small,
        picture_tasks=1,
        chunks=4,
        chaos_episodes=12,
        kill_s=(2.0, 4.0),
        soak_episodes=40,
        reading=10,
        soak_warm_up=0,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _counted(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


if __name__ == "__main__":
    run(RolloutStudy, main, __doc__)
