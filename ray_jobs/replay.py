"""`python -m ray_jobs.replay`: one episode of an evaluation once more, as a video and step by step.

    python -m ray_jobs.replay --study recall --policy gru --task recall --trial 3

The journal has every action that was played; the simulator plays them again, without the policy. Writes
`replays/TASK-TRIAL.mp4` and `.parquet` (actions, seconds of the policy and of the simulator) beside the journal;
and `.png`, a picture of when it thought and acted, of a policy at two speeds or in a world that did not wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluators.episodes import write_trace
from evaluators.success import recorded_view
from evaluators.timeline import has_timeline, timeline
from ipvla.files import replacing
from ipvla.rollout.episode import replay_episode
from ipvla.rollout.journal import Journal, JournalError, labelled
from ipvla.rollout.recorder import VideoRecorder
from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.perturbations import recorded_perturbation
from ipvla.sim.protocols import load_protocol
from ipvla.sim.simulator import Simulator
from ipvla.sim.suites import recorded_entry
from ipvla.storage import StorageRoots
from ipvla.types import EpisodeResult, EpisodeTrace
from ray_jobs.command_line.cli import run


@dataclass(frozen=True)
class ReplayConfig(StorageRoots):
    """Which episode.

    Attributes:
        study, policy: whose evaluation, `run_root_dir/STUDY/POLICY/episodes.sqlite`.
        label: of its results, if they were given one.
        task: by name.
        trial: of the task.
        size: side of the video in pixels, a multiple of 16.
        every: control steps per frame of the video.
    """

    study: str = "recall"
    policy: str = ""
    label: str = ""
    task: str = ""
    trial: int = 0
    size: int = 256
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("policy", "task"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; say whose episode, for example --policy gru --task recall")
        VideoRecorder(self.size, self.every)  # refuses what it cannot record

    @property
    def journal(self) -> Path:
        return self.runs / self.study / self.policy / labelled("episodes.sqlite", self.label)


@dataclass(frozen=True)
class Replay:
    """What there is of an episode now."""

    result: EpisodeResult
    trace: EpisodeTrace
    video: Path
    steps: Path
    timeline: Path | None = None


def replay(config: ReplayConfig) -> Replay:
    """Plays the episode again and writes both files.

    Raises:
        JournalError: there is no journal, it lacks the episode, or its actions.
        ReplayError: the episode does not go the same way again.
        ValueError: the suite, the protocol or the perturbation has changed since.
    """
    with Journal.existing(config.journal) as journal:
        fingerprint, result = journal.fingerprint, _find(journal, config)
        trace = journal.trace(result.spec)
    if trace is None:
        raise JournalError(f"{config.journal} has no actions of {result.spec.key}; evaluate it again elsewhere")
    terms = recorded_entry(fingerprint).facts.contract
    recorder = VideoRecorder(config.size, config.every, terms.control_hz if terms else None)
    simulator = _simulator(config, fingerprint)
    try:
        replay_episode(simulator, result, trace.actions, [recorder])
    finally:
        simulator.close()
    path = config.journal.parent / "replays" / f"{config.task}-{config.trial}.mp4"
    steps, picture = write_trace(trace, path.with_suffix(".parquet")), None
    if has_timeline(trace):
        with replacing(picture := path.with_suffix(".png")) as part:
            part.write_bytes(timeline(result, trace))
    return Replay(result, trace, recorder.save(path), steps, picture)


def _find(journal: Journal, config: ReplayConfig) -> EpisodeResult:
    results = journal.results()
    for result in results:
        if (result.spec.task, result.spec.trial) == (config.task, config.trial):
            return result
    tasks = sorted({result.spec.task for result in results})
    trials = [result.spec.trial for result in results if result.spec.task == config.task]
    known = f"its trials are {min(trials)} to {max(trials)}" if trials else f"its tasks are {', '.join(tasks)}"
    raise JournalError(f"{journal.path} has no trial {config.trial} of {config.task!r}; {known}")


def _simulator(config: ReplayConfig, fingerprint: dict[str, str]) -> Simulator:
    entry, protocol = recorded_entry(fingerprint), fingerprint["protocol"]
    suite = entry.load(config.cache)
    played_by = load_protocol(protocol.rpartition("+")[0].rpartition("-")[0])
    for name, then, now in (
        ("suite", fingerprint["suite_version"], suite.version),
        ("protocol", protocol, str(played_by)),
    ):
        if then != now:
            raise ValueError(
                f"the {name} of {config.journal} is {then}, here it is {now}; replay with what it was played with"
            )
    if not suite.facts.replayable:
        raise ValueError(f"suite {suite.name} does not repeat an episode; look at its videos instead")
    perturbation = recorded_perturbation(fingerprint.get("perturbation"))
    size, profile = int(fingerprint["camera_size"]), fingerprint["profile"]
    make = SuiteSimulators(config.cache, size, played_by, profile, perturbation, entry)
    simulator = make(suite.name, config.task)
    simulator.show(recorded_view(fingerprint, played_by, suite))
    return simulator


def main(config: ReplayConfig) -> None:
    """Replays, and says what came out and where it is."""
    played = replay(config)
    result, answers_ms = played.result, 1e3 * played.trace.answer_s
    print(
        f"{result.spec.key}: {result.outcome} after {result.steps} control steps, attempt {result.spec.attempt}; "
        f"the policy answered {result.policy_steps} times, in {np.median(answers_ms):.0f} ms (median) to "
        f"{answers_ms.max():.0f} ms\nvideo: {played.video}\nsteps: {played.steps}"
    )
    if played.timeline is not None:
        print(f"picture: {played.timeline}")


if __name__ == "__main__":
    run(ReplayConfig, main, __doc__)
