"""Collection: exactly what was asked for, the same whatever happens meanwhile, all of it or nothing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from ipvla.data.dataset import open_dataset
from ipvla.data.lanes import LaneConfig
from ipvla.data.source import DatasetError
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.memory import NoMemoryConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.sim.demonstration import Demonstration
from ipvla.sim.standard.tasks import standard_tasks
from ipvla.sim.suites import suite_entry
from ipvla.storage import SOURCE_TREE
from ipvla.training.parallel import World
from ray_jobs.collect import CollectConfig, collect
from ray_jobs.running.attempts import Attempt, Outcome, Staging, next_attempts
from ray_jobs.running.learner import LearnerConfig

WANTED = {"ground_red": 3, "ground_blue": 2}


def config_in(root: Path, **changes) -> CollectConfig:
    config = CollectConfig(storage_root=root, dataset="few", demonstrations=WANTED, seed=3, camera_size=32)
    return replace(config, **{"num_simulators": 2, **changes})


def simulator_process() -> int:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # others come and go
            if "ray::_Host" in "".join(child.cmdline()):
                return child.pid
    raise AssertionError("no simulator is running")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tmp_path_factory):
    """A collection by one simulator: what all others must equal."""
    config = replace(config_in(tmp_path_factory.mktemp("undisturbed")), num_simulators=1)
    seen = []
    return config, collect(config, seen.append), seen


@pytest.mark.slow
def test_every_task_gets_exactly_its_number_in_the_order_of_seeds(undisturbed):
    config, summary, seen = undisturbed
    dataset = open_dataset(config.directory)
    assert [(task, dataset.tasks.count(task)) for task in dict.fromkeys(dataset.tasks)] == list(WANTED.items())
    assert summary.demos == len(dataset) == 5
    assert summary.directory == config.directory
    assert summary.control_steps >= dataset.lengths.sum()
    assert 0 < summary.cpu_ms_per_step < 200
    seeds = [dataset.episode(index).seed for index in range(5)]
    assert seeds[:3] == sorted(seeds[:3])
    assert min(seeds) >= 3_000_000
    assert dataset.episode(0).image(0, "agentview").shape == (32, 32, 3)

    first, last = seen[0], seen[-1]
    assert [(task.task, task.demonstrations, task.target, task.attempts) for task in first] == [
        ("ground_red", 0, 3, 0),
        ("ground_blue", 0, 2, 0),
    ]
    assert all(task.demonstrations == task.target for task in last)


@pytest.mark.slow
def test_a_complete_dataset_is_returned_at_once_and_never_replaced(undisturbed):
    config, summary, _ = undisturbed
    before = contents(config.directory)
    assert collect(config, lambda tasks: pytest.fail("nothing is to be done")) == summary
    for change in ({"seed": 4}, {"camera_size": 64}, {"demonstrations": {"ground_red": 3}}):
        (name,) = change
        with pytest.raises(DatasetError, match=f"^{name}: .* was collected with .*; .*choose another --dataset"):
            collect(replace(config, **change))
    assert contents(config.directory) == before
    assert not config.staging.exists()


@pytest.mark.slow
def test_a_killed_simulator_changes_nothing(undisturbed, tmp_path):
    config = config_in(tmp_path)
    killed = []

    def kill_one(tasks):
        if sum(task.attempts for task in tasks) and not killed:
            killed.append(simulator_process())
            os.kill(killed[0], signal.SIGKILL)

    summary = collect(config, kill_one)
    assert contents(config.directory) == contents(undisturbed[0].directory)
    assert summary.control_steps == undisturbed[1].control_steps


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_driver_loses_nothing_that_was_finished(undisturbed, tmp_path):
    config = config_in(tmp_path)
    settings = {"demonstrations": json.dumps(WANTED), "dataset": "few", "seed": 3, "camera_size": 32}
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = [
        sys.executable,
        "-m",
        "ray_jobs.collect",
        *options,
        "--num_simulators=1",
        f"--storage_root={tmp_path}",
    ]
    driver = subprocess.Popen(
        command, cwd=SOURCE_TREE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not (finished := sorted(config.staging.rglob("attempts/*/*.json"))):
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.02)
    driver.kill()
    driver.communicate()
    assert not config.directory.exists()

    times = {path: path.stat().st_mtime_ns for path in finished}
    unchanged = []
    collect(config, lambda tasks: unchanged.append({path: path.stat().st_mtime_ns for path in finished} == times))
    assert all(unchanged)
    assert contents(config.directory) == contents(undisturbed[0].directory)


@pytest.fixture
def staged(ray_cluster, tmp_path):
    """All attempts are through already, a surplus among them; only the dataset is still to be written."""
    config = config_in(tmp_path, demonstrations={"ground_red": 2})
    staging = Staging(config.staging / "attempts")
    for index, success in enumerate([False, True, False, True, True]):
        attempt = Attempt("ground_red", index, config.seed)
        demonstration = Demonstration(
            task="ground_red",
            family="ground",
            instruction="press the red button",
            seed=attempt.layout,
            images={"agentview": np.full((index + 1, 32, 32, 3), index, np.uint8)},
            state=np.zeros((index + 1, 8), np.float32),
            action=np.zeros((index + 1, 7), np.float32),
        )
        staging.add(attempt, Outcome(success, index + 1, 0.01), demonstration if success else None)
    return config


@pytest.mark.slow
def test_the_first_successes_count_and_all_attempts_are_accounted_for(staged):
    summary = collect(staged)
    dataset = open_dataset(staged.directory)
    assert [dataset.episode(index).seed for index in range(len(dataset))] == [3_000_001, 3_000_003]
    assert summary.control_steps == 1 + 2 + 3 + 4 + 5
    assert summary.cpu_ms_per_step == pytest.approx(1000 * 5 * 0.01 / 15)


@pytest.mark.parametrize(("suite", "refused"), [("libero_spatial", True), ("libero_object", False)])
def test_a_dataset_whose_bowls_were_drawn_beside_the_stove_is_not_taken_for_a_new_one(tmp_path, suite, refused):
    task = standard_tasks(suite)[0].name
    config = config_in(tmp_path, suite=suite, demonstrations={task: 1})
    request = {"suite": suite, "suite_version": suite_entry(suite).load(config.cache).version, "seed": 3}
    request |= {"camera_size": 32, "demonstrations": {task: 1}}
    config.directory.mkdir(parents=True)
    summary = {"demos": 1, "control_steps": 9, "cpu_ms_per_step": 1.0, "wall_s": 1.0}
    config.record.write_text(json.dumps({"request": request, "summary": summary}))
    if refused:
        with pytest.raises(DatasetError, match=r"^drawing: .* was collected with 1, not 2; .*another --dataset"):
            collect(config)
    else:
        assert collect(config).control_steps == 9


@pytest.mark.slow
def test_attempts_of_another_request_are_refused(staged):
    (staged.staging / "request.json").write_text(json.dumps({"suite": "recall", "suite_version": "0"}))
    with pytest.raises(DatasetError, match=r"^suite_version: .* was collected with 0, not 2"):
        collect(staged)
    assert not staged.directory.exists()


def test_a_dataset_of_other_hands_is_left_alone(tmp_path):
    config = config_in(tmp_path)
    config.directory.mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"was not made by ray_jobs\.collect; choose another --dataset"):
        collect(config)


def test_rounds_fill_gaps_and_allow_for_failures():
    def indices(target, *successes):
        outcomes = {
            index: Outcome(success, 1, 0.0) for index, success in enumerate(successes) if success is not None
        }
        return [attempt.index for attempt in next_attempts({"t": target}, {"t": outcomes}, 0)]

    assert indices(3) == [0, 1, 2]
    assert indices(3, True, None, True) == [1]
    assert indices(4, True, None, True) == [1, 3]
    assert indices(2, True, None, True) == [1], "an earlier seed comes first, even if there are enough"
    assert indices(4, True, False, True, False) == [4, 5, 6, 7], "half of them fail: four for two"
    assert indices(2, False) == [1, 2]
    assert indices(2, False, True, True) == []
    with pytest.raises(RuntimeError, match="the expert solved t in 2 of 60 attempts"):
        indices(50, *[True] * 2, *[False] * 58)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_simulators": 0}, "num_simulators: 0 simulators cannot collect anything; give 1 or more"),
        ({"demonstrations": {}}, "demonstrations: none are asked for"),
        ({"demonstrations": {"recall": -1}}, "demonstrations.recall: -1 is negative"),
        ({"seed": 2147}, r"seed: 2147 is outside \[0, 2147\)"),
        ({"dataset": "../x"}, "dataset: '../x' is no name"),
        ({"camera_size": 0}, "camera_size: 0 is not positive"),
        ({"initial_states": "published"}, "initial_states: recall has no published ones"),
    ],
)
def test_senseless_requests_are_refused(tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        config_in(tmp_path, **change)


def test_collections_of_different_seeds_share_no_layout():
    assert Attempt("recall", 999_999, 0).layout < Attempt("recall", 0, 1).layout
    assert Attempt("recall", 999_999, 2146).layout < 2**31


@pytest.mark.long
@pytest.mark.slow
def test_the_expert_of_a_standard_suite_fills_a_dataset(ray_cluster, standard_cache, tmp_path):
    soup = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    config = CollectConfig(
        storage_root=tmp_path,
        cache_dir=standard_cache,
        suite="libero_object",
        dataset="soup",
        demonstrations={soup: 2},
        num_simulators=1,
        camera_size=32,
    )
    assert collect(config).demos == 2
    dataset = open_dataset(config.directory)
    assert list(dataset.tasks) == [soup] * 2
    assert all(50 < length < 280 for length in dataset.lengths), "within the protocols' horizon"
    assert dataset.episode(0).image(0, "agentview").shape == (32, 32, 3)

    trained = ExperimentConfig(
        storage_root=tmp_path,
        data=DataConfig(dataset="soup", image_size=32),
        lanes=LaneConfig(lanes=1, window=4, stride=4),
        model=IPVLAConfig(memory=NoMemoryConfig()),
    )
    trained.build(World()).policy.save(tmp_path / "learner")
    learner = LearnerConfig(tmp_path / "learner", steps=100)
    corrected = replace(config, dataset="corrections", demonstrations={soup: 1}, learner=learner)
    assert collect(corrected).demos == 1
    begun, led = dataset.episode(0).state[0], open_dataset(corrected.directory).episode(0).state[0]
    assert np.abs(led[:3] - begun[:3]).max() > 0.02, "the learner moved the hand before the expert took over"
    assert json.loads(corrected.record.read_text())["request"]["learner"] == learner.identity
    with pytest.raises(DatasetError, match=r"learner: .* was collected with .*steps.*100.*, not None"):
        collect(replace(corrected, learner=None))


def test_a_learner_that_cannot_be_corrected_is_refused(tmp_path, standard_cache):
    with pytest.raises(ValueError, match=r"learner: the expert of recall cannot take over in the middle of an ep"):
        config_in(tmp_path, learner=LearnerConfig(tmp_path, 5))
    with pytest.raises(ValueError, match=r"learner\.steps is 0; let it play 1 control step or more"):
        LearnerConfig(tmp_path, 0)
    missing = config_in(
        tmp_path,
        cache_dir=standard_cache,
        suite="libero_object",
        demonstrations={"pick_up_the_milk_and_place_it_in_the_basket": 1},
        learner=LearnerConfig(tmp_path / "none", 5),
    )
    with pytest.raises(ValueError, match=r"learner.policy: there is no policy.json in .*none; give a trained"):
        collect(missing)
