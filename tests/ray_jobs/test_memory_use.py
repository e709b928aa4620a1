"""Probing as a job: from a trained policy's directory to its table, its plot and its MLflow run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from evaluators.memory_use import InterventionConfig
from evaluators.success import SuccessConfig
from ipvla.data.rlds import write_rlds
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.backbones import TinyConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.training.parallel import World
from ray_jobs import memory_use
from ray_jobs.memory_use import MemoryUseJobConfig, loss_table, measure
from tests.synthetic import cue_episode


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with an untrained policy."""
    root = tmp_path_factory.mktemp("storage")
    write_rlds(root / "datasets", "cue", [cue_episode(seed) for seed in range(8)], 16)
    config = ExperimentConfig(
        storage_root=root,
        data=DataConfig(dataset="cue", image_size=64),
        model=IPVLAConfig(backbone=TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8)),
    )
    config.build(World()).policy.save(root / "runs" / "recall" / "gru" / "policy")
    return root


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_policy_is_probed_and_the_loss_lands_in_its_run(root: Path) -> None:
    config = MemoryUseJobConfig(
        storage_root=root,
        policies=("gru",),
        success=SuccessConfig(episodes={"ground_red": 2}, num_simulators=1),
        probe=InterventionConfig(("swap",), (70,)),
    )
    (use,) = measure(config, Console(quiet=True))
    (row,) = use.tasks
    assert (row.name, row.intervention, row.t, row.n) == ("ground_red", "swap", 70, 2)

    directory = root / "runs" / "recall" / "gru" / "memory_use"
    described = json.loads((directory / "memory_use.json").read_text())
    assert described["tasks"][0]["touched"] == row.touched
    client = MlflowClient(config.mlflow_uri)
    (mlflow_run,) = client.search_runs([client.get_experiment_by_name("recall").experiment_id])
    (point,) = client.get_metric_history(mlflow_run.info.run_id, "memory_use/ground_red/swap")
    assert (point.value, point.step) == (row.lost, 70)
    assert {file.path for file in client.list_artifacts(mlflow_run.info.run_id)} == {
        "memory_use.json", "memory_use.png", "memory_use.svg"
    }  # fmt: skip

    console = Console(record=True, width=120, file=io.StringIO())
    console.print(loss_table(use))
    assert f"{row.undisturbed}/2 → {row.k}/2" in console.export_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--probe.kinds", "[rest]"], "did you mean 'reset'?"),
        (["--probe.times", "[-5]"], "-5 lies before the episode"),
        (["--success.episodes.ground_red", "2", "--probe.times", "[80]"], "its horizon is 80; choose t < 80"),
        (["--success.episodes.ground_red", "1"], "leaves swap no donor"),
        (["--policies", "[gruu]"], "gruu"),
        (["--policies", "[]"], "policies is empty"),
    ],
)
def test_bad_input_is_one_line(root: Path, refused: Callable[..., str], arguments: list[str], told: str) -> None:
    policies = [] if "--policies" in arguments else ["--policies", "[gru]"]
    given = ("--storage_root", str(root), *policies, *arguments)
    assert told in refused(MemoryUseJobConfig, memory_use.main, *given)
