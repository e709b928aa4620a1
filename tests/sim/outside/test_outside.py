"""A suite is a folder and a line: the jobs evaluate, collect and compare one that they have never heard of."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from rich.console import Console

from evaluators.success import SuccessConfig, SuccessEvaluation
from ipvla.contract import ContractError
from ipvla.rollout.expert_policy import ExpertClient, ExpertSource
from ipvla.rollout.journal import Journal
from ipvla.rollout.policy_actor import PolicySource
from ipvla.rollout.policy_server import PolicyServer
from ipvla.rollout.sim_pool import simulator_environment
from ipvla.rollout.sim_worker import EpisodeJob, SimWorker
from ipvla.sim.demonstration import Showing
from ipvla.sim.simulator import Split
from ipvla.sim.suites import SUITES
from ipvla.types import EpisodeResult, EpisodeSpec
from ray_jobs.collect import CollectConfig
from ray_jobs.evaluate import EvaluateConfig
from ray_jobs.paired import PairedConfig, paired
from ray_jobs.running.attempts import Attempt, Demonstrator
from tests.rollout.point import PointPolicy, load_point
from tests.sim.gripper_matrix import save_policy
from tests.sim.outside.suite import ENTRY, FACTS, Simulators, load


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """The line, for these tests alone."""
    monkeypatch.setitem(SUITES, "outside", ENTRY)


def config():
    return SuccessConfig(suite="outside", episodes={"go_0": 3}, num_simulators=1)


class Here:
    """The point policy in this process."""

    def __init__(self):
        self.server = PolicyServer(PointPolicy())

    def act(self, episode_id, observation, policy_step):
        return self.server.forward([self.server.admit(episode_id, policy_step, observation)])[0]

    def end(self, episode_id):
        self.server.end(episode_id)


def test_its_facts_are_those_that_jobs_use(tmp_path):
    assert config().played_by.name == "recall"
    with pytest.raises(ValueError, match="profile is 'fast'; for outside choose among exact"):
        SuccessConfig(suite="outside", profile="fast")
    EvaluateConfig(policies=("expert",), success=config())
    CollectConfig(suite="outside", dataset="points", demonstrations={"go_0": 1})
    (tmp_path / "policy").mkdir()
    found = config().build(tmp_path).fingerprint(PolicySource(load_point, tmp_path / "policy"))
    assert found["point"] == version("numpy")
    assert not {"mujoco", "contract"} & set(found)
    assert simulator_environment(FACTS.environment())["POINT_WORLD"] == "1"
    assert "MUJOCO_GL" not in simulator_environment(FACTS.environment())


def test_its_expert_and_a_policy_play_it_in_a_simulators_process(tmp_path):
    worker, evaluation = SimWorker(config().simulators(tmp_path)), config().build(tmp_path)
    view = evaluation.view(ExpertSource(tmp_path))
    for client in (ExpertClient(tmp_path), Here()):
        outcomes = [
            worker.run(EpisodeJob(EpisodeSpec("outside", "go_0", seed, 0), client, view)).outcome
            for seed in (0, 1, 2)
        ]
        assert outcomes == ["success", "timeout", "success"]


def test_its_expert_demonstrates(tmp_path):
    seen = (16, ("agentview",), "exact", Showing())
    outcome = Demonstrator(tmp_path / "staging", "outside", tmp_path, *seen).run(Attempt("go_0", 2, 0))
    assert (outcome.success, outcome.steps) == (True, 5)


def test_its_results_are_compared(tmp_path):
    for name, outcomes in (("a", ("success", "failure")), ("b", ("success", "success"))):
        with Journal(tmp_path / f"{name}.sqlite", {"protocol": "recall-1", "suite": "outside"}) as journal:
            for trial, outcome in enumerate(outcomes):
                spec = EpisodeSpec("outside", "go_1", Split.HELD_OUT.seed(trial), trial)
                journal.record(EpisodeResult(spec, outcome, 3, 2, 0.1, 0.0))
    journals = tuple(str(tmp_path / f"{name}.sqlite") for name in "ab")
    rows = paired(PairedConfig(storage_root=tmp_path, evaluations=journals), Console(quiet=True))
    assert (rows[0].pairs, rows[0].only_first, rows[0].only_second) == (2, 0, 1)


def test_a_policy_of_liberos_hand_is_refused(tmp_path):
    save_policy(tmp_path / "policy", "environment", "upright", "close")
    evaluation = config().build(tmp_path)
    with pytest.raises(ContractError, match=r"gives 7 numbers per action, suite outside .* takes 1"):
        evaluation.view(PolicySource(load_point, tmp_path / "policy"))


@pytest.mark.slow
def test_it_is_evaluated_as_any_suite_is(tmp_path, ray_cluster):
    (tmp_path / "policy").mkdir()
    simulators = Simulators(tmp_path, protocol=config().played_by)
    with SuccessEvaluation(config(), load(tmp_path), simulators) as evaluation:
        expert = evaluation.run("expert", ExpertSource(tmp_path), tmp_path / "expert.sqlite")
        gru = evaluation.run("gru", PolicySource(load_point, tmp_path / "policy"), tmp_path / "gru.sqlite")
    solved = [Split.HELD_OUT.seed(trial) % 3 != 1 for trial in range(3)]
    assert [result.success for result in expert.results] == solved
    assert [result.success for result in gru.results] == solved
