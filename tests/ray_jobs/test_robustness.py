"""A policy under perturbations, from one command to the table."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from rich.console import Console

from evaluators.success import SuccessConfig
from ipvla.data.conventions import Conventions
from ipvla.data.statistics import Statistics
from ipvla.models.backbones import TinyConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.rollout.journal import Journal
from ipvla.sim.perturbations import language
from ray_jobs import robustness as job
from ray_jobs.command_line.cli import run
from ray_jobs.evaluate import EvaluateConfig
from ray_jobs.replay import ReplayConfig, replay
from ray_jobs.robustness import RobustnessConfig

TASK = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_expert_is_played_under_perturbations_and_compared(
    standard_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It sees the true state, so it reaches the goal from another start of the arm too, on another way."""
    config = RobustnessConfig(
        storage_root=tmp_path,
        cache_dir=standard_cache,
        study="expert",
        policies=("expert",),
        success=SuccessConfig(
            suite="libero_object", protocol="ipvla", profile="fast", episodes={TASK: 2}, num_simulators=1
        ),
        dimensions=("robot",),
        levels=(5,),
    )
    job.main(config)
    assert "expert under perturbations; unperturbed 2/2" in capfd.readouterr().out
    written = json.loads((config.directory / "robustness.json").read_text())["expert"]
    rows = {(row["dimension"], row["level"]): row for row in written["rows"]}
    assert rows["robot", 5]["n"] == rows["robot", 5]["pairs"] == rows["total", None]["pairs"] == 2

    directory = config.directory / "expert"
    with Journal.existing(directory / "episodes.sqlite") as journal:
        plain, fingerprint = journal.results(), journal.fingerprint
    assert "perturbation" not in fingerprint
    assert [result.details for result in plain] == [{}, {}]
    with Journal.existing(directory / "robustness" / "robot_5" / "episodes.sqlite") as journal:
        moved, depends_on = journal.results(), dict(journal.fingerprint)
    assert json.loads(depends_on.pop("perturbation"))["type"] == "robot"
    assert depends_on == fingerprint, "nothing else is different"
    assert all("arm_offset_rad" in result.details for result in moved)
    assert [result.steps for result in moved] != [result.steps for result in plain]

    client = MlflowClient(config.mlflow_uri)
    (tracked,) = client.search_runs([client.get_experiment_by_name("expert").experiment_id])
    assert tracked.data.metrics["robustness/libero_object/robot/5"] == rows["robot", 5]["rate"]

    played = replay(
        ReplayConfig(
            storage_root=tmp_path,
            cache_dir=standard_cache,
            study="expert",
            policy="expert/robustness/robot_5",
            task=TASK,
            trial=1,
            every=20,
        )
    )
    assert played.video.is_file(), "the perturbed episode goes the same way again"

    (again,) = job.measure(config, Console(quiet=True))
    assert again.to_dict()["rows"] == written["rows"], "nothing is played again"


OBJECT = ("--success.suite", "libero_object")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "success.suite: recall cannot be perturbed; choose one of LIBERO's"),
        ((*OBJECT, "--dimensions", "[camra]"), "libero_object has no 'camra'; did you mean 'camera'?"),
        (("--success.suite", "libero_90", "--dimensions", "[language]"), "libero_90 has no 'language'"),
        ((*OBJECT, "--levels", "[6]"), "perturbation.level is 6; choose one of 1 to 5"),
        ((*OBJECT, "--levels", "[2, 2]"), "levels is [2, 2]; name none twice"),
        ((*OBJECT, "--levels", "[]"), "levels is empty"),
        ((*OBJECT, "--success.perturbation.type", "light"), "success.perturbation is set by this job"),
        (("--success.suite", "libero_objct"), "Did you mean 'libero_object'?"),
    ],
)
def test_what_cannot_be_played_is_one_line_before_anything_starts(
    arguments: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked = ["job", "--storage_root", str(tmp_path), "--policies", "[gru]", *arguments]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as stop:
        run(RobustnessConfig, job.main, "A job.")
    assert stop.value.code == 2
    assert told in capfd.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("--success.perturbation.type", "camera"),
            "perturbation.type: suite recall cannot play 'camera'; it can",
        ),
        ((*OBJECT, "--success.perturbation", "{type: cam}"), "success.perturbation.type: 'cam' is unknown"),
        ((*OBJECT, "--success.perturbation", "{type: noise, level: 0}"), "perturbation.level is 0"),
        (
            ("--success.suite", "libero_goal_task", "--success.perturbation", "{type: language}"),
            "suite libero_goal_task cannot play 'language'; choose one of camera, robot, light, noise",
        ),
    ],
)
def test_an_evaluation_refuses_a_perturbation_that_there_is_not(
    arguments: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["job", "--policies", "[gru]", *arguments])
    with pytest.raises(SystemExit) as stop:
        run(EvaluateConfig, lambda config: None, "A job.")
    assert stop.value.code == 2
    assert told in capfd.readouterr().err


def test_language_without_its_package_is_refused_before_any_process_starts(
    standard_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "PLUS_ROOT", tmp_path / "nothing")
    config = RobustnessConfig(
        storage_root=tmp_path,
        cache_dir=standard_cache,
        policies=("expert",),
        success=SuccessConfig(suite="libero_object", episodes={TASK: 1}),
        dimensions=("camera", "language"),
    )
    with pytest.raises(ValueError, match="run make assets"):
        job.measure(config, Console(quiet=True))


def test_an_instruction_longer_than_the_policys_prompts_is_refused_before_any_process_starts(
    standard_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LIBERO-Plus says the same task at greater length; words that the tokenizer lacks are spelled."""
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 7)).astype(np.float32)
    statistics = Statistics.compute([actions], [np.zeros((50, 8), np.float32)], (True,) * 7)
    conventions = Conventions(statistics, cameras=("agentview",), image_size=32, chunk=4)
    model = IPVLAConfig(backbone=TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8), chunk=4)
    Policy.build(model, conventions, 4).save(tmp_path / "runs" / "plus" / "short" / "policy")
    config = RobustnessConfig(
        storage_root=tmp_path,
        cache_dir=standard_cache,
        study="plus",
        policies=("short",),
        success=SuccessConfig(suite="libero_object", protocol="ipvla", episodes={TASK: 10}),
    )
    monkeypatch.setattr(job, "connect", lambda *_: pytest.fail("a cluster was asked for"))
    with pytest.raises(ValueError, match=r"instructions have more tokens than .*max_prompt_tokens 32, up to \d+"):
        job.measure(config, Console(quiet=True))
    assert not [*tmp_path.rglob("episodes.sqlite")]
    with pytest.raises(pytest.fail.Exception, match="a cluster was asked for"):
        job.measure(replace(config, dimensions=("camera",)), Console(quiet=True))
