"""What breaks it: hostile messages, damaged files, policies that are not finite. Nothing should.

    python -m benchmarks.reliability [--parts "[messages]"] [--quick true]

`messages` reads messages as the server does and takes the CPU time of each; `server` plays against a server in a
process of its own while another client sends it what is heavy; `loaders` loads damaged files; `actions` lets a
policy answer with what is not finite; `chaos` and `resume` kill the processes of an evaluation and a training;
`cluster` sends a job without the token; `soak` reads a server's memory under clients of all kinds. A full run
writes `benchmarks/results/reliability.json`; `--quick` writes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from benchmarks.damage import Trials, damaged, hostile_message
from benchmarks.reliability_loaders import LOADERS
from benchmarks.reliability_runs import measure_chaos, measure_cluster, measure_resume
from benchmarks.reliability_server import measure_delay, measure_soak, observation
from ipvla.rollout.episode import EpisodeId
from ipvla.rollout.openpi.messages import MessageError, ObservationError, from_message, unpack
from ipvla.rollout.policy_server import PolicyServer
from ipvla.types import Memory, Observation
from ray_jobs.command_line.cli import run
from studies.engine import placed
from studies.record import Figures, PartStudy, Target, measure_parts

#: CPU seconds that refusing a message may take.
_SLOW_S: Final = 0.05
#: CPU seconds that refusing a file may take.
_SLOW_LOAD_S: Final = 1.0
#: Growth that counts as none, of a process of some hundred MB.
_FLAT_MB_PER_HOUR: Final = 10.0


@dataclass(frozen=True)
class ReliabilityStudy(PartStudy):
    """How much is tried.

    Attributes:
        seed: of all damage.
        messages: that are read.
        seconds: of playing against the server, quiet and under attack each.
        mutations: of each kind of file.
        answers: of the policy that is not finite at times.
        episodes: that are played undisturbed, and under kills.
        kills: of processes of those episodes.
        training_kills: of processes of a training.
        soak_hours: of clients of all kinds at a server.
    """

    all_parts: ClassVar[tuple[str, ...]] = (
        *("messages", "server", "loaders", "actions", "chaos", "resume", "cluster", "soak"),
    )
    seed: int = 0
    messages: int = 20_000
    seconds: float = 60.0
    mutations: int = 350
    answers: int = 2_000
    episodes: int = 500
    kills: int = 24
    training_kills: int = 4
    soak_hours: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "messages", "seconds", "mutations", "answers", "kills", "training_kills")
        self.require_at_least(3, "episodes")
        if self.soak_hours <= 0:
            raise ValueError(f"soak_hours is {self.soak_hours}; it must be above 0")


def measure_messages(study: ReliabilityStudy) -> Figures:
    """Hostile messages, read as the server does."""
    rng = np.random.default_rng(study.seed)
    good = observation(rng)
    cameras = ("agentview", "robot0_eye_in_hand")
    seconds, refused, crashes, longest = np.zeros(study.messages), 0, [], 0
    for index in range(study.messages):
        message = hostile_message(good, rng)
        began = time.thread_time()
        try:
            from_message(unpack(message), cameras, 8, 0)
        except (MessageError, ObservationError) as error:
            refused, longest = refused + 1, max(longest, len(str(error)))
        except Exception as error:
            crashes.append(f"{error!r:.200}")
        seconds[index] = time.thread_time() - began
    return {
        "fuzz_messages": study.messages,
        "fuzz_refused": refused,
        "fuzz_slow": int((seconds > _SLOW_S).sum()),
        "fuzz_crashes": len(crashes),
        "crashes": crashes[:5],
        "ms_p999": 1e3 * float(np.quantile(seconds, 0.999)),
        "ms_most": 1e3 * float(seconds.max()),
        "longest_refusal": longest,
    }


def measure_loaders(study: ReliabilityStudy) -> Figures:
    """Damaged files of every kind; a run's checkpoints: tests/training/test_damaged_checkpoint.py."""
    outcomes = {}
    for name, loader in LOADERS.items():
        rng = np.random.default_rng(study.seed)
        with TemporaryDirectory() as place:
            path = loader.make(Path(place))
            content, trials = path.read_bytes(), Trials(loader.promised)
            loader.load(path)  # what is imported at the first use is none of the damage's
            for _ in range(math.ceil(loader.tried * study.mutations)):
                path.write_bytes(damaged(content, rng))
                trials.load(lambda path=path, loader=loader: loader.load(path))  # type: ignore[misc]
        outcomes[name] = trials
    return {
        "loader_mutations": sum(trials.count for trials in outcomes.values()),
        "loader_untold": sum(len(trials.broken) for trials in outcomes.values()),
        "untold": [text for trials in outcomes.values() for text in trials.broken][:5],
        "slowest_s": {name: trials.slowest_s for name, trials in outcomes.items()},
        "refused": {name: trials.refused for name, trials in outcomes.items()},
    }


class SometimesNotFinite:
    """A policy whose answers and memory are NaN or infinite for some observations of a batch."""

    execute = 2

    def initial_memory(self, batch: int) -> Memory:
        return {"sum": torch.zeros(batch, 1)}

    def act(self, observations: Any, memory: Memory) -> tuple[npt.NDArray[np.float32], Memory]:
        seen = torch.tensor(np.stack([one.proprio for one in observations]))
        total = memory["sum"] + seen
        return total[:, :, None].expand(-1, 2, 7).numpy(), {"sum": total}


def measure_actions(study: ReliabilityStudy) -> Figures:
    """What leaves the house, of evaluation and server alike, and whether memory stays as it should."""
    rng, server = np.random.default_rng(study.seed), PolicyServer(SometimesNotFinite())
    names = [EpisodeId(f"{index}") for index in range(8)]
    steps, sums = dict.fromkeys(names, 0), dict.fromkeys(names, np.float32(0))
    out, wrong, answers = 0, 0, 0
    while answers < study.answers:
        asked = {name: np.float32(rng.choice([1, 0.5, np.nan, np.inf], p=[0.5, 0.3, 0.1, 0.1])) for name in names}
        requests = [
            server.admit(name, steps[name], Observation({}, np.array([value], np.float32), "go", 0))
            for name, value in asked.items()
        ]
        for (name, value), chunk in zip(asked.items(), server.forward(requests), strict=True):
            answers += 1
            if not isinstance(chunk, np.ndarray):
                wrong += bool(np.isfinite(value))
                continue
            steps[name], sums[name] = steps[name] + 1, sums[name] + value
            out += not np.isfinite(chunk).all()
            wrong += bool(chunk[0, 0] != sums[name])
    return {"answers": answers, "nan_actions_out": out, "wrong_memory": wrong}


_PARTS: Final[Mapping[str, Callable[[ReliabilityStudy], Figures]]] = {
    "messages": measure_messages,
    "server": lambda study: measure_delay(study.seconds, study.seed),
    "loaders": measure_loaders,
    "actions": measure_actions,
    "chaos": lambda study: measure_chaos(study, study.episodes, study.kills, study.seed),
    "resume": lambda study: measure_resume(study, study.training_kills, study.seed),
    "cluster": lambda _: measure_cluster(),
    "soak": lambda study: measure_soak(study.soak_hours, study.seed),
}


def _killed(kills: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(kills.items()))


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was promised, of the parts that there are figures of."""
    found = []
    if messages := figures.get("messages"):
        slow = f"above {1e3 * _SLOW_S:.0f} ms of CPU; the slowest took {messages['ms_most']:.0f} ms"
        found += [
            Target("fuzz_messages", messages["fuzz_messages"], 20_000, True),
            Target("fuzz_slow", messages["fuzz_slow"], messages["fuzz_messages"] / 1000, False, note=slow),
            Target("fuzz_crashes", messages["fuzz_crashes"], 0, False),
        ]
    if server := figures.get("server"):
        note = (
            f"beyond a median answer of {server['answer_ms_median']:.0f} ms, {server['canary_answers']} answers; "
            f"without an attack {server['quiet_delay_ms_p999']:.0f} ms"
        )
        found.append(Target("canary_delay_ms_p999", server["canary_delay_ms_p999"], 100, False, note=note))
    if loaders := figures.get("loaders"):
        slowest = max(loaders["slowest_s"].values())
        found += [
            Target("loader_mutations", loaders["loader_mutations"], 2_000, True),
            Target("loader_untold", loaders["loader_untold"], 0, False),
            Target("loader_slowest_s", slowest, _SLOW_LOAD_S, False, note="CPU time"),
        ]
    if actions := figures.get("actions"):
        found += [
            Target(
                "nan_actions_out", actions["nan_actions_out"], 0, False, note=f"of {actions['answers']} answers"
            ),
            Target("nan_memory_wrong", actions["wrong_memory"], 0, False),
        ]
    if chaos := figures.get("chaos"):
        killed = _killed(chaos["kills"])
        found += [
            Target("chaos_episodes", chaos["episodes"], 500, True, note=f"killed: {killed}"),
            Target("chaos_kills", sum(chaos["kills"].values()), 20, True),
            *(Target(f"chaos_{name}", chaos[name], 0, False) for name in ("lost", "doubled", "different")),
        ]
    if resume := figures.get("resume"):
        killed = _killed(resume["kills"])
        note = f"of {resume['steps']} steps; killed: {killed}"
        found.append(Target("resume_bitwise", resume["resume_bitwise"], 1, True, note=note))
    if cluster := figures.get("cluster"):
        status = cluster["status"]
        note = f"status {status['none']} without a token, {status['wrong']} with a wrong one"
        found.append(Target("open_jobs_api", cluster["open_jobs_api"], 0, False, note=note))
    if soak := figures.get("soak"):
        rss, end = soak["rss_mb"], soak["course_mb"][-4:]
        note = (
            f"growth per hour after the first quarter of {soak['hours']:.2f} hours, from {rss['settled']:.0f} to "
            f"{rss['last']:.0f} MB, in the last sixth {end[-1] - end[0]:.1f} MB; "
            f"{soak['clients']['answers']} answers, {soak['clients'].get('honest_refused', 0)} of them refusals"
        )
        found.append(Target("soak_hours_rss_mb", soak["slope_mb_per_hour"], _FLAT_MB_PER_HOUR, False, note=note))
    return found


def main(study: ReliabilityStudy) -> None:
    """Measures, prints, and on a full run records."""
    if study.quick:
        study = replace(study, messages=1_000, seconds=5.0, mutations=8, answers=200, soak_hours=0.01)
        study = replace(study, episodes=6, kills=1, training_kills=1)
    with placed(study, study.quick) as here:
        measure_parts("reliability", here, lambda part: _PARTS[part](here), targets, Console(), [here.seed])


if __name__ == "__main__":
    run(ReliabilityStudy, main, __doc__)
