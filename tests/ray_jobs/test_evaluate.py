"""Evaluation as a job: exactly one record per episode, whoever is killed; the same records as undisturbed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import draccus
import numpy as np
import numpy.typing as npt
import pytest
from mlflow import MlflowClient
from rich.console import Console

from evaluators.success import SuccessConfig
from ipvla.contract import ContractError
from ipvla.data.conventions import Conventions
from ipvla.data.rlds import write_rlds
from ipvla.data.statistics import Statistics
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.backbones import TinyConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import CheckpointError, Policy
from ipvla.rollout.journal import Journal
from ipvla.rollout.openpi.client import OpenpiError, OpenpiSource
from ipvla.rollout.policy_actor import PolicySource
from ipvla.storage import SOURCE_TREE
from ipvla.training.parallel import World
from ray_jobs.evaluate import EvaluateConfig, evaluate, main, what_it_can_show
from ray_jobs.paired import PairedConfig
from ray_jobs.replay import ReplayConfig
from tests.synthetic import cue_episode

EPISODES = {"ground_red": 4, "place": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with an untrained policy under two names."""
    root = tmp_path_factory.mktemp("storage")
    write_rlds(root / "datasets", "cue", [cue_episode(seed) for seed in range(8)], 16)
    config = ExperimentConfig(
        storage_root=root,
        data=DataConfig(dataset="cue", image_size=64),
        model=IPVLAConfig(backbone=TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8)),
    )
    policy = config.build(World()).policy
    for name in ("gru", "again"):
        policy.save(root / "runs" / "recall" / name / "policy")
    return root


def test_a_policy_that_does_not_fit_the_suite_is_refused_before_any_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joints = np.random.default_rng(0).uniform(-2, 2, (50, 14)).astype(np.float32)
    conventions = Conventions(
        Statistics.compute([joints], [joints], (True,) * 14),
        cameras=("front",),
        image_size=32,
        chunk=4,
        gripper="none",
    )
    directory = tmp_path / "runs" / "recall" / "aloha" / "policy"
    Policy.build(IPVLAConfig(backbone=TinyConfig(), chunk=4), conventions, 4).save(directory)
    monkeypatch.setattr("ray_jobs.evaluate.connect", lambda *_: pytest.fail("a cluster was asked for"))
    with pytest.raises(ContractError) as refused:
        evaluate(settings(tmp_path, "aloha"), Console(quiet=True))
    (line,) = str(refused.value).splitlines()
    assert f"the policy in {directory} looks through front" in line
    assert "gives 14 numbers per action, suite recall by protocol recall takes 7" in line


def settings(root: Path, policy: str) -> EvaluateConfig:
    return EvaluateConfig(
        storage_root=root,
        policies=(policy,),
        videos=0,
        # one row per forward pass: a product's last bit depends on how many rows there are
        success=SuccessConfig(episodes=EPISODES, num_simulators=2, policy_max_batch=1),
    )


def records(root: Path, policy: str) -> int:
    """Rows in the journal so far."""
    path = root / "runs" / "recall" / policy / "episodes.sqlite"
    if not path.exists():
        return 0
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as journal:
        try:
            return int(journal.execute("select count(*) from episodes").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def played(root: Path, policy: str) -> dict[str, tuple[str, object, npt.NDArray[np.float32]]]:
    """Of every record its outcome, what the simulator says of its end, and the actions, float32 [T, 7]."""
    with Journal.existing(root / "runs" / "recall" / policy / "episodes.sqlite") as journal:
        found = {}
        for result in journal.results():
            trace = journal.trace(result.spec)
            assert trace is not None
            found[result.spec.key] = (result.outcome, result.details, trace.actions)
    return found


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_driver_loses_nothing_and_repeats_nothing(root: Path, tmp_path: Path) -> None:
    undisturbed = evaluate(settings(root, "gru"), Console(quiet=True)).tables[0]
    untouched = played(root, "gru")
    assert len({actions.tobytes() for _, _, actions in untouched.values()}) == sum(EPISODES.values())

    path = tmp_path / "evaluate.yaml"
    path.write_text(json.dumps(draccus.encode(settings(root, "again"))))
    job = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.evaluate", "--config_path", str(path)],
        cwd=SOURCE_TREE,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + 300
    while records(root, "again") < 2:
        assert time.monotonic() < end
        assert job.poll() is None
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    before = records(root, "again")
    assert before < sum(EPISODES.values())

    main(settings(root, "again"))
    resumed = played(root, "again")
    assert resumed.keys() == untouched.keys()
    for key, (outcome, details, actions) in resumed.items():
        assert (outcome, details) == untouched[key][:2]
        np.testing.assert_array_equal(actions, untouched[key][2], key)
    told = json.loads((root / "runs" / "recall" / "success.json").read_text())["policies"]["again"]
    assert told["fingerprint"] == undisturbed.fingerprint
    assert {name: row["n"] for name, row in told["tasks"].items()} == EPISODES

    main(replace(settings(root, "gru"), policies=("gru", "again")))  # nothing is left to play
    client = MlflowClient(settings(root, "gru").mlflow_uri)
    found = client.search_runs([client.get_experiment_by_name("recall").experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert set(runs) == {"gru", "again", "evaluation-recall-gru-again"}
    assert all("| ground | " in run.data.tags["mlflow.note.content"] for run in found)
    assert (
        "| place | gru - again | 2 | +0.00 ("
        in runs["evaluation-recall-gru-again"].data.tags["mlflow.note.content"]
    )
    files = client.list_artifacts(runs["evaluation-recall-gru-again"].info.run_id)
    assert {file.path for file in files} == {"report.html", "success.json", "success_recall.png"}


def test_what_an_evaluation_can_show_is_told_before_it_runs() -> None:
    assert what_it_can_show(6) == "6 layouts are too few to tell two policies apart"
    assert "0.04 if they disagree on 10%, 0.09 if they disagree on 50%" in what_it_can_show(500)


def test_a_missing_policy_is_told_before_anything_starts(root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no policy in .*gruu"):
        evaluate(settings(root, "gruu"), Console(quiet=True))
    with pytest.raises(ValueError, match="name trained runs"):
        EvaluateConfig(storage_root=root)


def test_a_policy_may_be_asked_for_at_a_server(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPVLA_SERVE_TOKEN", "secret")
    url = "ws://127.0.0.1:8000"
    config = EvaluateConfig(storage_root=root, policies=("pi0", "gru"), servers={"pi0": url})
    assert config.source("pi0", Policy.load) == OpenpiSource(url, "secret")
    here = root / "runs" / "recall" / "gru" / "policy"
    assert config.source("gru", Policy.load) == PolicySource(Policy.load, here)


def test_a_server_that_does_not_answer_is_told_before_anything_starts(root: Path) -> None:
    config = EvaluateConfig(storage_root=root, policies=("pi0",), servers={"pi0": "ws://127.0.0.1:9"})
    with pytest.raises(OpenpiError, match=r"no openpi server answers at ws://127.0.0.1:9"):
        evaluate(config, Console(quiet=True))
    with pytest.raises(ValueError, match="name them in policies as well"):
        EvaluateConfig(storage_root=root, policies=("gru",), servers={"pi0": "ws://127.0.0.1:9"})


def test_results_with_a_label_lie_beside_the_others(root: Path) -> None:
    config = settings(root, "gru")
    labelled = replace(config, label="swap")
    assert config.journal("gru").name == "episodes.sqlite"
    assert labelled.journal("gru").name == "episodes-swap.sqlite"
    assert (labelled.labelled("report.html"), labelled.labelled("videos")) == ("report-swap.html", "videos-swap")
    directory = labelled.journal("gru").parent
    directory.mkdir(parents=True, exist_ok=True)
    labelled.journal("gru").touch()
    compared = PairedConfig(storage_root=root, evaluations=("recall/gru", "recall/gru/swap"))
    assert [compared.journal(one) for one in compared.evaluations] == [
        config.journal("gru"),
        labelled.journal("gru"),
    ]
    replayed = ReplayConfig(storage_root=root, policy="gru", task="recall", label="swap")
    assert replayed.journal == labelled.journal("gru")
    with pytest.raises(ValueError, match=r"label is '\.\./x'; it is part of file names"):
        replace(config, label="../x")
