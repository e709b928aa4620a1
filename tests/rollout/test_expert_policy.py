"""A scripted expert through the service, like any policy."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from evaluators.success import SuccessConfig
from ipvla.contract import HAND, from_environment
from ipvla.rollout.expert_policy import ExpertClient
from ipvla.sim.protocol_simulator import ProtocolSimulator
from ipvla.sim.protocols import load_protocol
from ipvla.sim.suites import load_suite
from ipvla.types import EpisodeSpec
from ray_jobs.evaluate import EvaluateConfig, evaluate

TASK = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_expert_is_evaluated_as_any_policy_is(tmp_path: Path) -> None:
    config = EvaluateConfig(
        storage_root=tmp_path,
        policies=("expert",),
        videos="all",
        success=SuccessConfig(episodes={"ground_red": 3}, num_simulators=1),
    )
    done = evaluate(config, Console(quiet=True))
    (table,) = done.tables
    assert [(row.name, row.k, row.n) for row in table.tasks] == [("ground_red", 3, 3)]
    assert [video.outcome for video in done.videos] == ["success"] * 3
    with sqlite3.connect(config.directory / "expert" / "episodes.sqlite") as journal:
        (fingerprint,) = journal.execute("select fingerprint from study").fetchone()
    assert len(json.loads(fingerprint)["policy_sha256"]) == 64


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_it_speaks_the_protocols_conventions(standard_cache: Path, tmp_path: Path) -> None:
    """Protocol "openvla" has another sign of the gripper, and settles before the expert's first look."""
    config = SuccessConfig(suite="libero_object", protocol="openvla", episodes={TASK: 1}, num_simulators=1)
    done = evaluate(
        EvaluateConfig(
            storage_root=tmp_path, cache_dir=standard_cache, policies=("expert",), videos=0, success=config
        ),
        Console(quiet=True),
    )
    assert [result.outcome for result in done.tables[0].results] == ["success"]


def test_actions_and_commands_are_two_ways_to_say_the_same(tmp_path: Path) -> None:
    for name in ("openvla", "openpi"):
        played: list[float] = []

        class Listening:
            task = load_suite("recall", tmp_path).task("ground_red")

            def step(self, command: np.ndarray, played: list[float] = played) -> None:
                played.append(float(command[-1]))

        adapted = ProtocolSimulator(Listening(), load_protocol(name), "libero_object")  # type: ignore[arg-type]
        spoken = load_protocol(name).contract(HAND)
        adapted.show(spoken)
        for gripper in (-1.0, 1.0):
            adapted.step(from_environment(np.array([0, 0, 0, 0, 0, 0, gripper]), spoken.gripper))
        assert played == [-1.0, 1.0]


def test_suites_without_an_expert_say_so(standard_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="policies: libero_goal has no scripted expert; choose one of recall"):
        EvaluateConfig(policies=("expert",), success=SuccessConfig(suite="libero_goal"))
    spec = EpisodeSpec("libero_goal", "turn_on_the_stove", 0, 0)
    with pytest.raises(ValueError, match="libero_goal has no scripted expert"):
        ExpertClient(standard_cache).playing(None, spec)  # type: ignore[arg-type]
