"""What a user can get wrong: one line that names the value and the remedy, exit code 2, no file changed."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import draccus
import pytest

from evaluators.success import SuccessConfig
from ipvla.data.rlds import write_rlds
from ipvla.experiment import ExperimentConfig
from ipvla.models.memory import NoMemoryConfig
from ipvla.training.parallel import World
from ray_jobs import collect, evaluate, serve, train
from ray_jobs.command_line.cli import run
from tests.synthetic import SIZE, cue_episode

Told = Callable[..., str]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Told:
    """Runs a job that must refuse; returns what it said after checking that it left every file as it was."""

    def tell(job: object, config_class: type, *arguments: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        with pytest.raises(SystemExit) as stop:
            run(config_class, job.main, "A job.")  # type: ignore[attr-defined]
        error = capfd.readouterr().err
        assert stop.value.code == 2, error
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, error
        assert "Traceback" not in error
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
        return lines[0]

    return tell


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A storage root with one small dataset."""
    write_rlds(tmp_path / "datasets", "cue", [cue_episode(seed) for seed in range(6)], SIZE)
    return tmp_path


def training(root: Path, *arguments: str) -> tuple[str, ...]:
    return ("--storage_root", str(root), "--data.dataset", "cue", "--data.image_size", str(SIZE), *arguments)


def test_an_unknown_field(told: Told, root: Path) -> None:
    line = told(train, ExperimentConfig, *training(root, "--optimizer.learning_rate", "0.1"))
    assert "optimizer.learning_rate" in line
    line = told(train, ExperimentConfig, *training(root, "--model.memory.type", "grru"))
    assert "grru" in line
    assert "gru" in line.replace("grru", "")


def test_speeds_that_cannot_be(told: Told, root: Path) -> None:
    two = training(root, "--model.speeds.type", "fast_in_slow")
    line = told(train, ExperimentConfig, *two, "--model.speeds.period", "20")
    assert "model.speeds.period is 20" in line
    assert "set the period to at most 16" in line
    line = told(train, ExperimentConfig, *two, "--model.speeds.layers", "6")
    assert "a fast part without a slow one" in line
    line = told(train, ExperimentConfig, *two, "--model.head.type", "flow")
    assert "model.head.type flow reads them; choose regression" in line


def test_a_missing_dataset(told: Told, root: Path) -> None:
    line = told(train, ExperimentConfig, *training(root, "--data.dataset", "nothing"))
    assert str(root / "datasets" / "nothing") in line


def test_a_truncated_dataset(told: Told, root: Path) -> None:
    (shard,) = (root / "datasets" / "cue" / "1.0.0").glob("*.array_record*")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert shard.name in told(train, ExperimentConfig, *training(root))


def test_statistics_of_another_action_size(told: Told, root: Path) -> None:
    path = root / "datasets" / "cue" / "1.0.0" / "dataset_statistics.json"
    statistics = json.loads(path.read_text())
    for name, values in statistics["cue"]["action"].items():
        statistics["cue"]["action"][name] = values[:5]
    path.write_text(json.dumps(statistics))
    line = told(train, ExperimentConfig, *training(root))
    assert "5" in line
    assert "7" in line
    assert "action" in line


def test_a_checkpoint_of_another_model(told: Told, make_experiment: Callable[..., ExperimentConfig]) -> None:
    config = make_experiment()
    policy = config.build(World()).policy
    other = replace(config, model=replace(config.model, memory=NoMemoryConfig())).build(World()).policy
    directory = config.run_directory / "policy"
    policy.save(directory)
    other.save(config.runs / "other")
    (config.runs / "other" / "model.safetensors").rename(directory / "model.safetensors")
    roots = ("--storage_root", str(config.root), "--run_root_dir", str(config.runs))
    line = told(evaluate, evaluate.EvaluateConfig, *roots, "--policies", f"[{config.name}]")
    assert "belongs to another model" in line

    (config.run_directory / "experiment.json").write_text(json.dumps(draccus.encode(config)))
    line = told(
        train, ExperimentConfig, *roots, "--data.dataset", "cue", "--data.image_size", str(SIZE),
        "--model.memory.type", "none",
    )  # fmt: skip
    assert "other settings" in line


def test_an_unwritable_storage_root(told: Told, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    line = told(
        collect, collect.CollectConfig, "--storage_root", str(tmp_path / "file"), "--demonstrations.recall", "1"
    )
    assert "cannot be written" in line
    assert "IPVLA_STORAGE_ROOT" in line


def test_a_storage_root_in_the_source_tree(told: Told) -> None:
    root = Path(collect.__file__).parents[1] / "storage"
    line = told(collect, collect.CollectConfig, "--storage_root", str(root), "--demonstrations.recall", "1")
    assert "inside the source tree" in line
    assert not root.exists()


def test_an_unknown_task(told: Told, tmp_path: Path) -> None:
    line = told(collect, collect.CollectConfig, "--storage_root", str(tmp_path), "--demonstrations.recal", "1")
    assert "recal" in line
    assert "'recall'" in line


def test_a_suite_without_an_expert(told: Told, tmp_path: Path) -> None:
    asked = ("--storage_root", str(tmp_path), "--suite", "libero_goal", "--demonstrations.turn_on_the_stove", "1")
    line = told(collect, collect.CollectConfig, *asked)
    assert "libero_goal has no scripted expert; choose one of recall, libero_spatial, libero_object" in line


def test_zero_simulators(told: Told, tmp_path: Path) -> None:
    collecting = ("--storage_root", str(tmp_path), "--demonstrations.recall", "1", "--num_simulators", "0")
    assert "num_simulators" in told(collect, collect.CollectConfig, *collecting)
    evaluating = ("--storage_root", str(tmp_path), "--policies", "[gru]", "--success.num_simulators", "0")
    assert "num_simulators is 0" in told(evaluate, evaluate.EvaluateConfig, *evaluating)
    assert SuccessConfig().num_simulators is None


def test_a_busy_port(told: Told, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        line = told(
            collect, collect.CollectConfig, "--storage_root", str(tmp_path), "--demonstrations.recall", "1",
            "--dashboard_port", port,
        )  # fmt: skip
    assert port in line
    assert "in use" in line


@pytest.mark.parametrize("damage", ["{", "{}", '{"model": {"memory": {"type": "none"}}}', '{"model": 1}'])
def test_a_damaged_policy(told: Told, make_experiment: Callable[..., ExperimentConfig], damage: str) -> None:
    config = make_experiment()
    directory = config.run_directory / "policy"
    config.build(World()).policy.save(directory)
    (directory / "policy.json").write_text(damage)
    line = told(serve, serve.ServeConfig, "--policy", str(directory), "--storage_root", str(config.root))
    assert str(directory) in line
    assert "policy" in line


def test_a_gpu_that_is_not_there(told: Told, make_experiment: Callable[..., ExperimentConfig]) -> None:
    config = make_experiment()
    asked = ("--policy", str(config.run_directory), "--storage_root", str(config.root), "--use_gpu", "true")
    line = told(serve, serve.ServeConfig, *asked)
    assert line.startswith("error: use_gpu: this machine has no GPU (torch ")


def test_an_address_as_storage_root(told: Told, root: Path) -> None:
    line = told(train, ExperimentConfig, "--storage_root", "s3://bucket/x", "--data.dataset", "cue")
    assert "is an address; give a directory of a file system that all nodes share" in line


def test_an_mlflow_address_that_cannot_be(told: Told, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    assert "is of no kind that MLflow takes" in told(train, ExperimentConfig, *training(root))


def test_a_full_disk(told: Told, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config: ExperimentConfig) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root / "x"))

    monkeypatch.setattr(train, "train_policy", full)
    line = told(train, ExperimentConfig, *training(root))
    assert line == (
        f"error: no space is left on the disk for {root / 'x'}; free some, or give another --storage_root, and "
        "run the same command again"
    )
