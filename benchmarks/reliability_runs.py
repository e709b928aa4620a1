"""Runs that are killed from outside, at random moments, and started again: what is lost, doubled or different?

`measure_chaos` plays episodes of the embedded suite twice, by a driver in a process of its own: undisturbed, and
while this process kills its simulators, its policy actor, and itself. `measure_resume` does so to a training.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import draccus
import numpy as np
import psutil
import torch

from ipvla.data.lanes import LaneConfig
from ipvla.data.rlds import write_rlds
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.backbones import TinyConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import read_tensors
from ipvla.rollout.evaluation import evaluate_episodes
from ipvla.rollout.journal import Journal
from ipvla.storage import SOURCE_TREE, StorageRoots
from ipvla.tracking import Sinks, read_jsonl
from ipvla.training.loop import TrainingConfig, train
from ipvla.training.parallel import World
from ipvla.types import EpisodeResult
from ray_jobs.command_line.cli import run
from ray_jobs.running.cluster import connect
from studies.record import Figures
from tests.endurance.chaos import same_episode
from tests.endurance.recall_service import RecallService, actors
from tests.ray_jobs.head import posted, ray_head
from tests.synthetic import SIZE, cue_episode

_TASKS: Final = 4
#: Control steps of an episode: two chunks, the second of which depends on the memory of the first.
_HORIZON: Final = 16
#: A kill is chance here, not a defect of the episode: no number of them is to end the run.
_ATTEMPTS: Final = 100
#: Every so many kills one ends the driver, and with it all that it started.
_DRIVERS_EVERY: Final = 4
_POLL_S: Final = 0.2
_PATIENCE_S: Final = 1800.0
_TRAINING: Final = TrainingConfig(steps=60, precision="fp32", log_every=1, checkpoint_every=5, checkpoints_kept=3)


@dataclass(frozen=True)
class DriverConfig(StorageRoots):
    """What a driver plays.

    Attributes:
        journal: that it writes; each key that it records goes to a text file beside it.
        episodes: in all.
    """

    journal: Path | None = None
    episodes: int = 500


def drive(config: DriverConfig) -> None:
    """Plays what the journal lacks."""
    assert config.journal is not None
    service = RecallService(config.cache, config.journal.with_name("policy"), _HORIZON, num_simulators=2)
    with (
        connect(config),
        service.running() as (pool, policy),
        Journal(config.journal, {}) as records,
        config.journal.with_suffix(".txt").open("a", buffering=1) as told,
    ):

        def on_result(result: EpisodeResult) -> None:
            told.write(f"{result.spec.key}\n")

        specs = service.specs(_TASKS, config.episodes)
        evaluate_episodes(specs, pool, policy, records, max_attempts=_ATTEMPTS, on_result=on_result)


def measure_chaos(roots: StorageRoots, episodes: int, kills: int, seed: int) -> Figures:
    """Kills come at random numbers of recorded episodes."""
    place = roots.runs / "reliability"
    place.mkdir(parents=True, exist_ok=True)
    undisturbed, disturbed = (
        DriverConfig(**roots.directories, journal=place / f"{name}.sqlite", episodes=episodes)
        for name in ("undisturbed", "disturbed")
    )
    for config in (undisturbed, disturbed):  # of an earlier measurement
        for path in place.glob(f"{_journal(config).stem}.*"):
            path.unlink()
    rng, began = np.random.default_rng(seed), time.monotonic()
    _run_until_done(undisturbed, [], rng)
    middle = time.monotonic()
    moments = sorted(rng.choice(np.arange(1, episodes - 1), min(kills, episodes - 2), replace=False).tolist())
    counts = _run_until_done(disturbed, moments, rng)
    one, other = _played(_journal(undisturbed)), _played(_journal(disturbed))
    return {
        "episodes": len(one),
        "kills": dict(counts),
        "attempts": sum(result.spec.attempt for result in other.values()),
        "lost": len(one.keys() - other.keys()) + max(0, episodes - len(one)),
        "doubled": len(_told(disturbed)) - len(set(_told(disturbed))),
        "different": sum(not same_episode(one[key], other[key]) for key in one.keys() & other.keys()),
        "undisturbed_s": middle - began,
        "disturbed_s": time.monotonic() - middle,
    }


def _journal(config: DriverConfig) -> Path:
    assert config.journal is not None
    return config.journal


def _told(config: DriverConfig) -> list[str]:
    path = _journal(config).with_suffix(".txt")
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _played(journal: Path) -> dict[str, EpisodeResult]:
    with Journal.existing(journal) as records:
        return {r.spec.key: replace(r, trace=records.trace(r.spec)) for r in records.results()}


def _run_until_done(config: DriverConfig, moments: list[int], rng: np.random.Generator) -> Counter[str]:
    """Starts the driver again and again until it ends by itself; kills something whenever a moment has come."""
    flags = [f"--{name}={value}" for name, value in config.directories.items()]
    flags += [f"--journal={config.journal}", f"--episodes={config.episodes}"]
    return killed(["benchmarks.reliability_runs", *flags], lambda: len(_told(config)), moments, rng, actors)


def killed(
    command: list[str],
    progress: Callable[[], int],
    moments: list[int],
    rng: np.random.Generator,
    victims: Callable[[psutil.Process], Mapping[psutil.Process, str]],
) -> Counter[str]:
    """How many processes of each kind were killed until `python -m COMMAND` ended well.

    Args:
        progress: of it.
        moments: ascending progresses, at each of which something is killed: a victim that `rng` draws, or, every
            few times, all of it, which is then started again.
        victims: of a driver, by what they are.

    Raises:
        RuntimeError: it fails by itself, or does not get on.
    """
    counts = Counter[str]()
    left = [(moment, number % _DRIVERS_EVERY == 1) for number, moment in enumerate(moments)]
    while True:
        job = _started(command)
        deadline = time.monotonic() + _PATIENCE_S
        try:
            while (code := job.poll()) is None:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} does not end")
                if left and progress() >= left[0][0]:
                    alive = sorted(victims(psutil.Process(job.pid)).items(), key=lambda one: one[0].pid)
                    if left[0][1]:
                        counts["driver"] += 1
                        left.pop(0)
                        break
                    if alive:
                        process, kind = alive[rng.integers(len(alive))]
                        with suppress(psutil.NoSuchProcess):
                            process.kill()
                            counts[kind] += 1
                            left.pop(0)
                time.sleep(_POLL_S)
            else:
                if code:
                    raise RuntimeError(f"{command[0]} ended with exit code {code}")
                return counts
        finally:
            _end(job)


def _started(command: list[str]) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=SOURCE_TREE,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end(job: subprocess.Popen[bytes]) -> None:
    """The process and all that it started, at once."""
    below = []
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(job.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()


def measure_resume(roots: StorageRoots, kills: int, seed: int) -> Figures:
    """A small training, killed at random steps: are its weights those of an undisturbed one, to the last bit?"""
    root = roots.runs / "reliability" / f"resume-{os.getpid()}"
    write_rlds(root / "datasets", "cue", [cue_episode(number) for number in range(12)], SIZE)
    config = ExperimentConfig(
        storage_root=root,
        cache_dir=roots.cache,
        tmp_dir=roots.tmp,
        study="reliability",
        name="killed",
        data=DataConfig(dataset="cue", image_size=SIZE),
        lanes=LaneConfig(lanes=2, window=4),
        model=IPVLAConfig(TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8), chunk=4),
        training=_TRAINING,
    )
    settings = root / "train.yaml"
    settings.write_text(json.dumps(draccus.encode(config)))
    rng = np.random.default_rng(seed)
    moments = sorted(rng.choice(np.arange(6, _TRAINING.steps - 1), kills, replace=False).tolist())

    def steps() -> int:
        lines = read_jsonl(path) if (path := config.run_directory / "metrics.jsonl").exists() else []
        return max((int(line["step"]) for line in lines), default=0)

    counts = killed(["ray_jobs.train", "--config_path", str(settings)], steps, moments, rng, _workers)
    experiment = config.build(World())
    threads = torch.get_num_threads()
    torch.set_num_threads(_TRAINING.threads)
    train(experiment.state, experiment.lanes, _TRAINING, config.optimizer, World(), Sinks(), save=lambda: None)
    torch.set_num_threads(threads)
    undisturbed = experiment.state.model.state_dict()
    trained = read_tensors(config.run_directory / "policy" / "model.safetensors")
    logged = [int(line["step"]) for line in read_jsonl(config.run_directory / "metrics.jsonl")]
    same = all(torch.equal(value, undisturbed[name]) for name, value in trained.items())
    return {
        "steps": _TRAINING.steps,
        "kills": dict(counts),
        "killed_at": moments,
        "resume_bitwise": int(same and logged == list(range(1, _TRAINING.steps + 1))),
    }


def _workers(driver: psutil.Process) -> dict[psutil.Process, str]:
    """The processes that train."""
    found = {}
    for process in driver.children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found[process] = "worker"
    return found


def measure_cluster() -> Figures:
    """A job without, with a wrong, and with the right token, for a cluster as shipped configurations start Ray."""
    token = os.urandom(24).hex()
    with ray_head(token=token) as address:
        answers: dict[str, Any] = {
            name: posted(address, given)
            for name, given in (("none", None), ("wrong", "guess" * 8), ("right", token))
        }
    return {"status": answers, "open_jobs_api": sum(answers[name] == 200 for name in ("none", "wrong"))}


if __name__ == "__main__":
    run(DriverConfig, drive, __doc__)
