"""One episode of an evaluation once more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ipvla.rollout.episode import run_episode
from ipvla.rollout.journal import Journal, JournalError
from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.protocols import load_protocol
from ipvla.sim.simulator import Split
from ipvla.sim.suites import load_suite
from ipvla.types import EpisodeSpec
from ray_jobs.replay import ReplayConfig, replay

TASK, TRIAL = "ground_red", 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with the journal of one episode, in which the hand goes down somewhere."""
    root = tmp_path_factory.mktemp("storage")
    suite = load_suite("recall", root / "cache")
    fingerprint = {
        "suite": "recall",
        "suite_version": suite.version,
        "protocol": str(load_protocol("recall")),
        "profile": "exact",
        "camera_size": "64",
    }
    simulator = SuiteSimulators(root / "cache")("recall", TASK)
    spec = EpisodeSpec("recall", TASK, Split.HELD_OUT.seed(TRIAL), TRIAL)
    chunk = np.array([[0.3, 0.1, -0.5, 0, 0, 0, 1]] * 4, np.float32)
    result = run_episode(simulator, spec, lambda observation, policy_step: chunk)
    simulator.close()
    for policy, version in (("gru", suite.version), ("old", "0")):
        place = root / "runs" / "recall" / policy / "episodes.sqlite"
        with Journal(place, fingerprint | {"suite_version": version}) as journal:
            journal.record(result)
    return root


def config(root: Path, **settings: object) -> ReplayConfig:
    told = {"policy": "gru", "task": TASK, "trial": TRIAL, "size": 64, **settings}
    return ReplayConfig(storage_root=root, cache_dir=root / "cache", **told)  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_episode_becomes_a_video_and_a_table_of_its_steps(root: Path) -> None:
    played = replay(config(root))
    assert (played.video.parent.name, played.video.name) == ("replays", f"{TASK}-{TRIAL}.mp4")
    assert played.video.stat().st_size > 1000
    rows = pq.read_table(played.steps).to_pylist()
    assert len(rows) == played.result.steps
    assert rows[-1]["action_2"] == -0.5


def test_what_is_not_there_is_told(root: Path) -> None:
    with pytest.raises(JournalError, match=r"no trial 5 of 'ground_red'; its trials are 4 to 4"):
        replay(config(root, trial=5))
    with pytest.raises(JournalError, match=r"no trial 4 of 'recall'; its tasks are ground_red"):
        replay(config(root, task="recall"))
    with pytest.raises(JournalError, match="there is no journal"):
        replay(config(root, policy="none"))
    with pytest.raises(ValueError, match="policy is empty"):
        ReplayConfig(storage_root=root, task=TASK)
    with pytest.raises(ValueError, match="not a positive multiple of 16"):
        config(root, size=100)


def test_an_episode_of_another_version_is_not_replayed(root: Path) -> None:
    with pytest.raises(ValueError, match=r"the suite of .* is 0, here it is"):
        replay(config(root, policy="old"))
