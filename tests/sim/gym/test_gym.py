"""Any Gymnasium environment is a suite by its settings file: played, recorded, learned, evaluated, journalled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from importlib.metadata import version
from venv import EnvBuilder

import numpy as np
import pytest
from rich.console import Console

from evaluators.success import SuccessConfig, recorded_view
from ipvla.contract import ContractError
from ipvla.data.dataset import open_dataset
from ipvla.data.lanes import LaneConfig
from ipvla.data.recording import Recording
from ipvla.data.rlds import write_rlds
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.backbones import TinyConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.rollout.expert_policy import ExpertClient, ExpertSource
from ipvla.rollout.journal import Journal
from ipvla.rollout.policy_actor import PolicySource
from ipvla.rollout.sim_worker import EpisodeJob, SimWorker
from ipvla.sim.demonstration import Showing
from ipvla.sim.gym.settings import GymError, GymSettings
from ipvla.sim.protocols import ProtocolError
from ipvla.sim.simulator import Split
from ipvla.sim.suites import load_suite, recorded_entry
from ipvla.storage import SOURCE_TREE
from ipvla.training.loop import TrainingConfig
from ipvla.types import EpisodeResult, EpisodeSpec
from ray_jobs.collect import CollectConfig, collect
from ray_jobs.evaluate import EvaluateConfig, evaluate
from ray_jobs.paired import PairedConfig, paired
from ray_jobs.replay import ReplayConfig, replay
from ray_jobs.running.attempts import Attempt, Demonstrator
from ray_jobs.train import train_policy
from tests.rollout.point import load_point


def simulator(suite, tmp_path, size=16, cameras=("front",)):
    return load_suite(suite, tmp_path).simulator("near", size, cameras)


def played(world, seed, steps=6):
    """States and verdicts of the expert's episode."""
    world.reset(seed)
    solver, seen = world.expert(np.random.default_rng(0)), []
    for _ in range(steps):
        outcome = world.step(solver.act())
        seen.append((*world.proprio().tolist(), outcome.verdict))
    return seen


def test_it_steps_without_drawing_and_a_seed_repeats_an_episode(reach, tmp_path):
    world = simulator(reach(), tmp_path)
    first = played(world, 5)
    assert played(world, 6) != first
    assert played(world, 5) == first
    assert world.t == 6
    assert world.environment.unwrapped.drawn == 0  # and the registered limit of 3 steps does not matter
    seen = world.observe()
    assert (seen.images["front"].shape, seen.images["front"].dtype) == ((16, 16, 3), np.uint8)
    assert (seen.t, seen.instruction) == (6, "push the dot onto the mark")
    state = world.state()
    other = simulator(reach(), tmp_path)
    other.restore(state)
    assert other.proprio().tolist() == world.proprio().tolist()
    world.reset(0)
    lost = [world.step(np.array([1.0, 1.0])) for _ in range(11)][-1]
    assert lost.failure


@pytest.mark.parametrize(
    ("success", "solved"), [({"terminated": True}, True), ({"reward": 1.0}, True), ({"reward": 1.5}, False)]
)
def test_success_is_what_the_settings_say(reach, tmp_path, success, solved):
    verdicts = [row[-1] for row in played(simulator(reach(success=success), tmp_path), 5, 12)]
    assert ("success" in verdicts) == solved


def test_pictures_of_observations_and_flat_states(reach, tmp_path):
    wide = simulator(reach(cameras={"wide": "pixels/wide"}), tmp_path, 12, ("wide",))
    assert wide.observe().images["wide"].shape == (12, 12, 3)
    flat = simulator(reach(task={"arguments": {"flat": True}}, state=["."]), tmp_path)
    assert flat.proprio().shape == (2,)
    blind = simulator(reach(state=None, state_size=1), tmp_path)
    assert blind.proprio().tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": {"id": "ipvla_tests/Reech-v0"}},
            "no registered environment.*did you mean 'ipvla_tests/Reach-v0'",
        ),
        ({"modules": ["gym_of_nobody"]}, "needs gym_of_nobody, which .* cannot import"),
        ({"action_size": 14}, "action_size is 14, its actions are \\[2\\]"),
        ({"state": ["dots"]}, "no 'dots'; they have dot, mark, pixels/wide"),
        ({"state_size": 3}, "state_size is 3, its state has 2 numbers"),
        ({"cameras": {"front": "pixels/narrow"}}, "no 'pixels/narrow'; they have dot, mark, pixels/wide"),
        ({"cameras": {"front": "dot"}}, "camera front \\(dot\\) is float32 \\[2\\]; it must be uint8"),
        ({"success": {"info": "success"}}, "info has no 'success'; it has is_success"),
        ({"task": {"arguments": {"sped": 1}}}, "cannot be made with .*sped"),
        (
            {"task": {"arguments": {"seeded": False}}, "state": ["dot", "mark"], "state_size": 4},
            "the same seed begins two episodes differently",
        ),
        ({"task": {"expert": "tests.sim.gym.reach:exprt"}}, "has no such function"),
        ({"packages": ["gym-of-nobody"]}, "gym-of-nobody is not installed"),
        ({"python": "/nowhere/python"}, "'/nowhere/python': No such file"),
    ],
)
def test_an_environment_that_does_not_fit_is_one_line_before_anything_starts(reach, tmp_path, changes, message):
    config = SuccessConfig(suite=reach(**changes))
    with pytest.raises(GymError, match=message) as raised:
        config.build(tmp_path)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("*.sqlite"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_rate": 3}, "'control_rate' is no setting"),
        ({"action_size": None}, "action_size is missing"),
        ({"action_size": "two"}, "action_size is 'two'; give a whole number"),
        ({"action": "wheels"}, "action is 'wheels'; choose one of"),
        ({"success": {}}, "success: this is no mapping"),
        ({"success": {"terminated": True, "reward": 1}}, "exactly one of"),
        ({"task": {"horizon": 0}}, "tasks.near: horizon is 0"),
        ({"task": {"expert": "walk"}}, "write MODULE:FUNCTION"),
        ({"state": "dot"}, "give a list of names"),
        ({"cameras": {}}, "cameras is empty"),
        ({"name": "a b"}, "the file's name names the suite"),
    ],
)
def test_settings_that_are_wrong_are_named_with_their_file(reach, changes, message):
    suite = reach(**changes)
    with pytest.raises(GymError, match=message) as raised:
        SuccessConfig(suite=suite)
    assert suite.removeprefix("gym:") in str(raised.value)


def test_a_file_that_is_missing_or_no_yaml(tmp_path):
    with pytest.raises(GymError, match="No such file"):
        SuccessConfig(suite=f"gym:{tmp_path}/none.yaml")
    (tmp_path / "torn.yaml").write_text("tasks: {near: [")
    with pytest.raises(GymError, match=r"torn.yaml: while parsing"):
        SuccessConfig(suite=f"gym:{tmp_path}/torn.yaml")


def test_its_results_name_its_settings_and_can_be_opened_from_them(reach, tmp_path):
    config = SuccessConfig(suite=reach(), episodes={"near": 2})
    evaluation = config.build(tmp_path)
    found = evaluation.fingerprint(ExpertSource(tmp_path, config.entry))
    assert (config.suite_name, found["suite"], found["protocol"][:5]) == ("reach", "reach", "gym-1")
    entry = recorded_entry(found)
    assert entry.load(tmp_path).version == found["suite_version"]
    assert entry.facts.contract == evaluation.view(ExpertSource(tmp_path, config.entry))
    assert recorded_view(found, config.played_by, entry.load(tmp_path)) == entry.facts.contract
    elsewhere = GymSettings.from_dict(json.loads(found["suite_settings"]))
    assert replace(elsewhere, python=sys.executable).version == found["suite_version"]
    assert replace(elsewhere, control_hz=20).version != found["suite_version"]
    with pytest.raises(ProtocolError, match=r"protocol recall shows agentview; .* has front"):
        SuccessConfig(suite=config.suite, protocol="recall")
    with pytest.raises(ValueError, match="has no scripted expert"):
        EvaluateConfig(policies=("expert",), success=replace(config, suite=reach(task={"expert": ""})))


def test_the_expert_plays_and_demonstrates_and_the_data_know_their_terms(reach, tmp_path):
    config = SuccessConfig(suite=reach(action="joints"), episodes={"near": 2}, camera_size=16)
    worker = SimWorker(config.simulators(tmp_path))
    client = ExpertClient(tmp_path, config.entry)
    result = worker.run(EpisodeJob(EpisodeSpec("reach", "near", 3, 0), client, None))
    assert result.outcome == "success"
    staging = tmp_path / "staging"
    demonstrator = Demonstrator(staging, config.entry, tmp_path, 16, ("front",), "exact", Showing())
    assert demonstrator.run(Attempt("near", 3, 0)).success
    demonstration = load_suite(config.suite, tmp_path).demonstrate(simulator(config.suite, tmp_path), 3, Showing())
    recording = Recording("upright", 10.0, terms=config.entry.facts.contract)
    write_rlds(tmp_path, "reached", [demonstration], 16, recording)
    dataset = open_dataset(tmp_path / "reached" / "1.0.0")
    assert dataset.contract == config.entry.facts.contract
    np.testing.assert_array_equal(dataset.episode(0).action, demonstration.action)


def test_terms_that_are_damaged_are_named(reach, tmp_path):
    config = SuccessConfig(suite=reach())
    demonstration = load_suite(config.suite, tmp_path).demonstrate(simulator(config.suite, tmp_path), 3, Showing())
    written = write_rlds(
        tmp_path, "reached", [demonstration], 16, Recording("upright", 10.0, terms=config.entry.facts.contract)
    )
    values = json.loads((written / "recording.json").read_text())
    (written / "recording.json").write_text(json.dumps({**values, "terms": {"cameras": ["front"]}}))
    with pytest.raises(ValueError, match=r"terms: .* is no contract"):
        open_dataset(written)


def test_a_policy_of_another_robot_is_refused(reach, tmp_path):
    from tests.sim.gripper_matrix import save_policy

    save_policy(tmp_path / "policy", "environment", "upright", "close")
    evaluation = SuccessConfig(suite=reach()).build(tmp_path)
    with pytest.raises(ContractError, match=r"gives 7 numbers per action, suite reach by protocol gym takes 2"):
        evaluation.view(PolicySource(load_point, tmp_path / "policy"))


def test_its_results_are_compared_without_its_file(reach, tmp_path):
    config = SuccessConfig(suite=reach())
    found = config.build(tmp_path).fingerprint(ExpertSource(tmp_path, config.entry))
    for name, outcomes in (("a", ("success", "timeout")), ("b", ("success", "success"))):
        with Journal(tmp_path / f"{name}.sqlite", found) as journal:
            for trial, outcome in enumerate(outcomes):
                spec = EpisodeSpec("reach", "near", Split.HELD_OUT.seed(trial), trial)
                journal.record(EpisodeResult(spec, outcome, 3, 2, 0.1, 0.0))
    (tmp_path / "reach.yaml").unlink()
    journals = tuple(str(tmp_path / f"{name}.sqlite") for name in "ab")
    rows = paired(PairedConfig(storage_root=tmp_path, evaluations=journals), Console(quiet=True))
    assert (rows[0].pairs, rows[0].only_first, rows[0].only_second) == (2, 0, 1)


@pytest.fixture(scope="module")
def another_python(tmp_path_factory):
    """The interpreter of a virtual environment that has a package which this one lacks, and ours after its own."""
    directory = tmp_path_factory.mktemp("own") / "venv"
    EnvBuilder(with_pip=False, symlinks=True).create(directory)
    (own,) = (directory / "lib").glob("python*/site-packages")
    ours = sysconfig.get_path("purelib")
    (own / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    (own / "only_there.py").write_text("from tests.sim.gym.reach import *\n")
    described = own / "numpy-9.9.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.9\n")
    return str(directory / "bin" / "python")


def test_packages_are_those_of_the_interpreter_that_is_named(reach, tmp_path, another_python):
    alone = reach(modules=["only_there"], packages=["numpy"])
    with pytest.raises(GymError, match="needs only_there"):
        SuccessConfig(suite=alone).build(tmp_path)
    config = SuccessConfig(suite=reach(modules=["only_there"], packages=["numpy"], python=another_python))
    found = config.build(tmp_path).fingerprint(ExpertSource(tmp_path, config.entry))
    assert found["numpy"] == "9.9"
    assert another_python not in found["suite_settings"]


@pytest.mark.slow
def test_data_training_evaluation_and_replay_with_an_interpreter_of_its_own(
    reach, tmp_path, ray_cluster, another_python
):
    suite = reach(modules=["only_there"], python=another_python)
    collected = collect(
        CollectConfig(
            storage_root=tmp_path,
            suite=suite,
            dataset="reached",
            demonstrations={"near": 3},
            camera_size=16,
            num_simulators=1,
        )
    )
    assert collected.demos == 3
    train_policy(
        ExperimentConfig(
            storage_root=tmp_path,
            name="mine",
            study="reach",
            data=DataConfig(dataset="reached", cameras=("front",), image_size=64),
            lanes=LaneConfig(lanes=2, window=4, stride=2),
            model=IPVLAConfig(backbone=TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8), chunk=2),
            training=TrainingConfig(steps=2, precision="fp32", log_every=1, checkpoint_every=2),
        )
    )
    policy = Policy.load(tmp_path / "runs" / "reach" / "mine" / "policy")
    assert policy.transforms.contract == SuccessConfig(suite=suite).entry.facts.contract
    settings = EvaluateConfig(
        storage_root=tmp_path,
        study="reach",
        policies=("expert", "mine"),
        success=SuccessConfig(suite=suite, episodes={"near": 2}, num_simulators=1, camera_size=16),
        videos=1,
    )
    evaluation = evaluate(settings, Console(quiet=True))
    assert [len(table.results) for table in evaluation.tables] == [2, 2]
    assert evaluation.tables[0].results[0].success
    assert evaluation.videos
    journal = tmp_path / "runs" / "reach" / "mine" / "episodes.sqlite"
    with Journal.existing(journal) as records:
        fingerprint, results = records.fingerprint, records.results()
    assert GymSettings.from_dict(json.loads(fingerprint["suite_settings"])).modules == ("only_there",)
    assert {result.spec.suite for result in results} == {"reach"}
    with pytest.raises(GymError, match="needs only_there"):  # it is played where its packages are
        replay(ReplayConfig(storage_root=tmp_path, study="reach", policy="mine", task="near", size=32))


ALOHA = f"gym:{SOURCE_TREE}/ray_jobs/experiments/gym_aloha/aloha.yaml"


@pytest.mark.slow
def test_gym_aloha_is_what_its_settings_say_and_its_expert_hands_the_cube_over(tmp_path):
    config = SuccessConfig(suite=ALOHA)
    found = config.build(tmp_path).fingerprint(ExpertSource(tmp_path, config.entry))
    assert (found["gym-aloha"], found["mujoco"]) == ("0.1.5", version("mujoco"))
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from ipvla.sim.demonstration import Showing; from ipvla.sim.suites import load_suite\n"
        f"suite = load_suite({ALOHA!r}, Path(sys.argv[1]))\n"
        "world = suite.simulator('transfer_cube', 32, ('top',))\n"
        "shown = [suite.demonstrate(world, 0, Showing(pictures_every=50)) for _ in range(2)]\n"
        "assert all(np.array_equal(a, b) for a, b in ((shown[0].action, shown[1].action), "
        "(shown[0].state, shown[1].state)))\n"
        "print(shown[0].action.shape[1], shown[0].images['top'].shape[1:], shown[0].images['top'].max() > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=SOURCE_TREE,
        env={name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "14 (32, 32, 3) True", done.stderr
