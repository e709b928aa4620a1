"""Episodes over real Ray actors, with processes killed under them."""

import time
from dataclasses import replace

import pytest
import ray

from ipvla.rollout import policy_actor
from ipvla.rollout.endpoint import Serving
from ipvla.rollout.evaluation import SimPool, evaluate_episodes
from ipvla.rollout.journal import Journal
from ipvla.rollout.policy_actor import PolicyDiedError, PolicyService, PolicySource
from ipvla.rollout.sim_pool import JobFailedError, OutsideFailureError
from ipvla.rollout.sim_worker import VideoJob
from ipvla.types import EpisodeSpec
from tests.rollout.point import (
    LATE_S,
    Points,
    load_buggy,
    load_dying,
    load_dying_at_birth,
    load_dying_then_late,
    load_fixed_left,
    load_nothing,
    load_point,
    load_stillborn,
    load_unlucky,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

SPECS = [EpisodeSpec("point", task, seed, trial=seed) for task in ("ground_go", "recall_go") for seed in range(6)]


@pytest.fixture(scope="module")
def pool(ray_cluster):
    """Simulators that outlive a policy, as in an evaluation of several."""
    with SimPool(Points(broken="broken_go"), 2, cpus_per_simulator=0.5) as pool:
        yield pool


@pytest.fixture(scope="module")
def service(ray_cluster, tmp_path_factory):
    """A policy actor that serves one policy after another; it is replaced where a test kills it."""
    policy = PolicyService(PolicySource(load_point, tmp_path_factory.mktemp("policy")))
    yield policy
    policy.close()


def evaluate(tmp_path, pool, load, policy=None, specs=SPECS, on_result=lambda result: None):
    """(results, the policy's stats), with a new actor unless there is a `policy` to switch."""
    own = PolicyService(PolicySource(load, tmp_path)) if policy is None else policy
    own.switch(PolicySource(load, tmp_path))
    try:
        with Journal(tmp_path / "journal.sqlite", {}) as journal:
            return evaluate_episodes(specs, pool, own, journal, on_result=on_result), own.stats()
    finally:
        if policy is None:
            own.close()


def essence(results):
    """All that a result says but when and at which attempt."""
    return [replace(r, spec=replace(r.spec, attempt=0), wall_s=0, policy_s=0, sim_cpu_s=0) for r in results]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pool, service):
    results, stats = evaluate(tmp_path_factory.mktemp("undisturbed"), pool, load_point, service)
    assert stats["episodes"] == 0, "every episode's memory is freed"
    return results


def test_every_episode_has_its_own_cue(undisturbed):
    expected = ["success" if seed % 3 != 1 else "timeout" for seed in range(6)] * 2
    assert [r.outcome for r in undisturbed] == expected
    assert [r.spec for r in undisturbed] == SPECS


def test_a_killed_simulator_loses_and_doubles_nothing(tmp_path, undisturbed, service):
    with SimPool(Points(tmp_path / "killed", kill_at=2), 2, cpus_per_simulator=0.5) as mortal:
        results, stats = evaluate(tmp_path, mortal, load_point, service)
    assert (tmp_path / "killed").exists()
    assert essence(results) == essence(undisturbed)
    assert sum(r.spec.attempt for r in results) == 1
    assert stats["episodes"] == 0, "the dead attempt's memory is freed too"


def test_a_simulator_that_hangs_is_replaced(tmp_path, undisturbed, service):
    hanging = Points(tmp_path / "hung", hang_at=2)
    with SimPool(hanging, 2, cpus_per_simulator=0.5, episode_timeout_s=5) as pool:
        results, stats = evaluate(tmp_path, pool, load_point, service)
    assert (tmp_path / "hung").exists()
    assert essence(results) == essence(undisturbed)
    assert sum(r.spec.attempt for r in results) == 1
    assert stats["episodes"] == 0
    with pytest.raises(ValueError, match="within 0 s"):
        SimPool(hanging, 2, episode_timeout_s=0)


def test_a_killed_policy_loses_and_doubles_nothing(tmp_path, pool, undisturbed):
    results, stats = evaluate(tmp_path, pool, load_dying)
    assert (tmp_path / "killed").exists()
    assert essence(results) == essence(undisturbed)
    assert 1 <= sum(r.spec.attempt for r in results) <= 2
    assert stats["episodes"] == 0


@pytest.mark.parametrize("load", [load_dying_at_birth, load_unlucky])
def test_a_policy_that_fails_once_loses_and_doubles_nothing(tmp_path, pool, undisturbed, service, load):
    results, stats = evaluate(tmp_path, pool, load, service if load is load_unlucky else None)
    assert essence(results) == essence(undisturbed)
    assert sum(r.spec.attempt for r in results) <= 2
    assert stats["episodes"] == 0


def test_a_policy_that_no_process_survives_ends_the_run(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(policy_actor, "_STARTS", 2)
    with pytest.raises(PolicyDiedError, match=rf"policy in {tmp_path} ended 2 times while it loaded"):
        evaluate(tmp_path, pool, load_stillborn)


def test_replicas_share_the_episodes(tmp_path, pool, undisturbed):
    policy = PolicyService(PolicySource(load_point, tmp_path), Serving(replicas=2, capacity=2))
    with Journal(tmp_path / "journal.sqlite", {}) as journal:
        results = evaluate_episodes(SPECS, pool, policy, journal)
    assert essence(results) == essence(undisturbed)
    assert [r.spec.attempt for r in results] == [0] * len(SPECS), "nothing was played twice"
    assert policy.stats()["episodes"] == 0
    policy.close()
    with pytest.raises(ValueError, match="0 replicas"):
        PolicyService(PolicySource(load_point, tmp_path), Serving(replicas=0))


def test_a_killed_replica_loses_and_doubles_nothing(tmp_path, pool, undisturbed):
    """The other one goes on, and takes new episodes while the dead one's replacement still loads."""
    policy = PolicyService(PolicySource(load_dying_then_late, tmp_path), Serving(replicas=2))
    policy.client()
    began = time.monotonic()
    with Journal(tmp_path / "journal.sqlite", {}) as journal:
        results = evaluate_episodes(SPECS, pool, policy, journal)
    assert time.monotonic() - began < LATE_S / 2, "nobody waits for the replica that loads"
    assert (tmp_path / "killed").exists()
    assert essence(results) == essence(undisturbed)
    assert policy.stats()["episodes"] == 0
    policy.close()
    assert policy.stats() == {}


def test_one_actor_serves_one_policy_after_another(tmp_path, pool, service):
    outcomes, requests = [], [service.stats().get("requests", 0)]
    for load in (load_fixed_left, load_point):
        service.switch(PolicySource(load, tmp_path))
        results = sorted(pool.run(SPECS[:3], service), key=lambda result: result.spec.seed)
        outcomes.append([result.success for result in results])
        requests.append(service.stats()["requests"])
    assert requests[2] > requests[1] > requests[0], "it is the same actor"
    with pytest.raises(ray.exceptions.RayTaskError, match="no such policy"):
        service.switch(PolicySource(load_nothing, tmp_path))
    assert outcomes == [[True, False, False], [True, False, True]]


def test_a_rerun_fills_only_what_is_missing(tmp_path, pool, undisturbed, service):
    evaluate(tmp_path, pool, load_point, service, specs=SPECS[:5])
    ran = []
    results, _ = evaluate(tmp_path, pool, load_point, service, on_result=ran.append)
    assert essence(results) == essence(undisturbed)
    assert sorted(r.spec.key for r in ran) == sorted(spec.key for spec in SPECS[5:])
    _, stats = evaluate(tmp_path, pool, load_buggy)
    assert stats == {}, "nothing missing: no policy is even loaded"


def test_a_bug_in_the_model_ends_the_run_with_its_traceback(tmp_path, pool, service):
    with pytest.raises(
        JobFailedError, match=r"point/ground_go/0/0 failed 3 times; last: .*a bug in the model"
    ) as caught:
        evaluate(tmp_path, pool, load_buggy, service, specs=SPECS[:1])
    assert "raise ZeroDivisionError" in str(caught.value.__cause__)
    assert not isinstance(caught.value, ValueError), "a defect: the command line shows the traceback"


def test_a_simulator_that_cannot_start_ends_the_run_and_keeps_what_was_recorded(tmp_path, pool, service):
    broken = EpisodeSpec("point", "broken_go", 0, trial=0)
    with pytest.raises(JobFailedError, match=r"point/broken_go/0/0 .* the scene does not compile") as caught:
        evaluate(tmp_path, pool, load_point, service, specs=[*SPECS[:3], broken])
    assert isinstance(caught.value, OutsideFailureError), "one line on the command line"
    assert "\n" not in str(caught.value)
    with Journal(tmp_path / "journal.sqlite", {}) as journal:
        assert {r.spec.task for r in journal.results()} == {"ground_go"}


def test_videos_are_of_what_was_played(tmp_path, pool, service):
    service.switch(PolicySource(load_point, tmp_path))
    one, two = pool.run(SPECS[:2], service)
    elsewhere = replace(two, steps=two.steps + 1)
    jobs = [VideoJob(r, r.trace.actions, tmp_path / "videos" / f"{r.steps}.mp4") for r in (one, elsewhere)]
    assert pool.record(jobs) == [jobs[0].path], "of an episode that goes another way there is none"
    assert jobs[0].path.stat().st_size > 500
    assert [p.name for p in (tmp_path / "videos").iterdir()] == [jobs[0].path.name]


def test_no_simulators_is_refused():
    with pytest.raises(ValueError, match="num_simulators >= 1"):
        SimPool(Points(), 0)
