"""Training under Ray Train: the same weights as the plain loop, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import draccus
import psutil
import pytest
import torch

from ipvla.data.source import DatasetError
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.memory import NoMemoryConfig
from ipvla.policy import CheckpointError, Policy
from ipvla.storage import SOURCE_TREE, StorageError
from ipvla.tracking import Sinks, read_jsonl
from ipvla.training.checkpoint import differences
from ipvla.training.loop import TrainingConfig, train
from ipvla.training.parallel import World
from ipvla.training.step import OptimizerConfig
from ray_jobs.command_line.cli import Terminated
from ray_jobs.train import (
    _asked_to_stop,
    _claim,
    _fixed,
    _interruptible,
    _stopping_at,
    ask_to_stop,
    summarise,
    train_policy,
    training_lines,
)

Make = Callable[..., ExperimentConfig]
STEPS = TrainingConfig(steps=120, precision="fp32", log_every=5, checkpoint_every=20)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return Policy.load(directory).model.state_dict()


def plain(config: ExperimentConfig) -> dict[str, torch.Tensor]:
    """What the loop gives without Ray, undisturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.training.threads)
    experiment = config.build(World())
    train(
        experiment.state, experiment.lanes, config.training, config.optimizer, World(), Sinks(), save=lambda: None
    )
    torch.set_num_threads(threads)
    return experiment.state.model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def steps_logged(config: ExperimentConfig) -> int:
    path = config.run_directory / "metrics.jsonl"
    lines = read_jsonl(path) if path.exists() else []
    return lines[-1]["step"] if lines else 0


def wait_for_step(config: ExperimentConfig, step: int, timeout_s: float = 200.0) -> None:
    end = time.monotonic() + timeout_s
    while steps_logged(config) < step:
        assert time.monotonic() < end, f"training reached only step {steps_logged(config)}"
        time.sleep(0.02)


def training_worker() -> psutil.Process:
    """The process in which this session's Ray runs the training loop."""
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            return process
    raise AssertionError("no training worker runs")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_costs_nothing(make_experiment: Make) -> None:
    config = make_experiment(training=STEPS)
    killed: list[int] = []

    def kill() -> None:
        wait_for_step(config, 50)
        worker = training_worker()
        worker.kill()
        killed.append(worker.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    summary = train_policy(config)
    killer.join()
    assert killed
    assert summary.steps == 120
    undisturbed = plain(config)
    assert same(weights(summary.policy), undisturbed)
    logged = [line["step"] for line in read_jsonl(config.run_directory / "metrics.jsonl")]
    assert logged == list(range(5, 121, 5)), "every step is logged once"
    assert train_policy(config) == summary, "a finished run is not run again"

    shutil.rmtree(summary.policy)  # killed after its last checkpoint, before the policy was written
    assert same(weights(train_policy(config).policy), undisturbed)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_driver_costs_nothing(make_experiment: Make, tmp_path: Path) -> None:
    config = make_experiment(training=STEPS)
    settings = tmp_path / "experiment.yaml"
    settings.write_text(json.dumps(draccus.encode(config)))  # JSON is YAML
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    job = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.train", "--config_path", str(settings)],
        cwd=SOURCE_TREE,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_step(config, 50)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert not (config.run_directory / "policy").exists()
    summary = train_policy(config)
    assert summary.steps == 120
    assert same(weights(summary.policy), plain(config))


def test_a_run_that_is_asked_to_stop_has_a_checkpoint_of_its_last_step(make_experiment: Make) -> None:
    """Of a job on a cluster: test_submit.py."""
    experiment = make_experiment(training=replace(STEPS, steps=20)).build(World())
    config, saved = replace(STEPS, steps=20), list[int]()
    train(
        *(experiment.state, experiment.lanes, config, OptimizerConfig(), World(), Sinks()),
        save=lambda: saved.append(experiment.state.step),
        stop=lambda: experiment.state.step == 7,
    )
    assert (experiment.state.step, saved) == (7, [7])


def test_the_first_sigterm_asks_for_a_stop_and_the_second_ends_the_process(tmp_path: Path) -> None:
    before, path = signal.getsignal(signal.SIGTERM), tmp_path / "stop"
    with _stopping_at(signal.SIGTERM, path):
        assert not path.exists()
        os.kill(os.getpid(), signal.SIGTERM)
        assert path.exists()
        assert signal.getsignal(signal.SIGTERM) == before
    asked = _asked_to_stop(path)
    assert not asked(), "it looks once in a second"
    time.sleep(1.1)
    assert asked()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_train_one_model(make_experiment: Make) -> None:
    """Two workers with two lanes each walk the same episodes as one with four, and see every frame once."""
    short = TrainingConfig(steps=6, precision="fp32", log_every=1, checkpoint_every=3)
    config = make_experiment(training=short, num_workers=2, name="two")
    config = replace(config, lanes=replace(config.lanes, lanes=2), data=replace(config.data, cache_gib=0.1))
    summary = train_policy(config)
    one = replace(config, num_workers=1, lanes=replace(config.lanes, lanes=4), name="one")
    frames = [line["train/loss"] for line in read_jsonl(config.run_directory / "metrics.jsonl")]
    assert len(frames) == 6
    reference = plain(one)
    for name, value in weights(summary.policy).items():
        torch.testing.assert_close(value, reference[name], atol=2e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}")


def test_a_missing_dataset_is_told_before_anything_starts(make_experiment: Make) -> None:
    config = make_experiment(data=DataConfig(dataset="nothing"))
    with pytest.raises(DatasetError, match="nothing"):
        train_policy(config)
    assert not config.run_directory.exists()


def test_a_disk_without_room_is_told_before_anything_starts(
    make_experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_experiment().build(World()).policy.save(tmp_path / "start")
    size = (tmp_path / "start" / "model.safetensors").stat().st_size
    config = make_experiment(start_from=tmp_path / "start")
    full = shutil.disk_usage(tmp_path)._replace(
        free=4 * size - 1
    )  # two checkpoints, one being written, the policy
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(StorageError, match=r"its checkpoints take .* lower training\.checkpoints_kept"):
        train_policy(config)
    assert not (config.run_directory / "experiment.json").exists(), "a failed start leaves no claim"


def test_a_thermostats_readings_are_no_training_steps(make_experiment: Make) -> None:
    config = make_experiment()
    assert training_lines(config) == [], "nothing is logged yet"
    trained = {"step": 10, "train/loss": 0.5, "train/seconds": 2.0, "train/frames_per_s": 100.0}
    config.run_directory.mkdir(parents=True)
    text = "".join(
        json.dumps(line) + "\n" for line in ({"step": 10, "probe/d": 0.1}, trained, {"step": 11, "probe/d": 0.2})
    )
    (config.run_directory / "metrics.jsonl").write_text(text)
    assert training_lines(config) == [trained]
    assert (summarise(config).steps, summarise(config).frames_per_s, summarise(config).final_loss) == (
        10,
        100,
        0.5,
    )


@pytest.mark.parametrize("lanes", [2, 5])
def test_a_run_may_go_on_with_other_workers_and_lanes(make_experiment: Make, lanes: int) -> None:
    config = make_experiment()
    training = replace(config.training, sharding="fsdp", activation_checkpointing=True)
    spread = replace(config, num_workers=2, lanes=replace(config.lanes, lanes=lanes), training=training)
    _claim(config.run_directory, config)
    _claim(spread.run_directory, spread)


def test_a_run_with_other_settings_is_refused_and_left_alone(make_experiment: Make) -> None:
    config = make_experiment()
    config.run_directory.mkdir(parents=True)
    record = config.run_directory / "experiment.json"
    record.write_text(json.dumps(draccus.encode(config)))
    (config.run_directory / "metrics.jsonl").write_text(LINE)
    with pytest.raises(CheckpointError, match=r"other settings \(optimizer.lr 0.003, this run has 0.5; opti"):
        train_policy(replace(config, optimizer=OptimizerConfig(lr=0.5)))
    assert json.loads(record.read_text()) == draccus.encode(config)


#: Of a run that has made a step.
LINE = (
    json.dumps({"step": 1, "time": 0.0, "train/loss": 1.0, "train/seconds": 1.0, "train/frames_per_s": 1.0}) + "\n"
)


def test_a_run_that_never_made_a_step_is_begun_anew(make_experiment: Make) -> None:
    config = make_experiment()
    record = config.run_directory / "experiment.json"
    _claim(config.run_directory, config)
    (config.run_directory / "metrics.jsonl").write_text("")
    (config.run_directory / "trainer").mkdir()
    other = replace(config, optimizer=OptimizerConfig(lr=0.5))
    _claim(config.run_directory, other)
    assert json.loads(record.read_text())["optimizer"]["lr"] == 0.5
    record.write_text("{")
    _claim(config.run_directory, config)
    assert json.loads(record.read_text()) == draccus.encode(config)


@pytest.mark.parametrize("text", ["", '{"name": "x"', '{"model": 3}'])
def test_a_damaged_record_is_one_line(make_experiment: Make, text: str) -> None:
    config = make_experiment()
    _claim(config.run_directory, config)
    (config.run_directory / "metrics.jsonl").write_text(LINE)
    (config.run_directory / "experiment.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"experiment.json is damaged \(.*give --name another value, or del"):
        _claim(config.run_directory, config)


def test_only_the_settings_that_differ_are_named(make_experiment: Make) -> None:
    ours = make_experiment()
    gone = replace(ours, model=replace(ours.model, memory=NoMemoryConfig(), chunk=4), seed=3)
    assert differences(_fixed(ours), _fixed(gone)) == (
        'model.memory.type "gru", this run has "none"; model.chunk 2, this run has 4; seed 0, this run has 3'
    )
    assert differences(_fixed(ours), _fixed(ours)) == ""
    many = {str(number): number for number in range(9)}
    assert differences(many, {}).endswith("; 4 4, this run has null; and 4 more")


def wait_for_ever() -> None:
    threading.Event().wait()


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_training_that_waits_for_workers_ends_at_a_signal(
    make_experiment: Make, number: signal.Signals, raised: type[BaseException]
) -> None:
    config = make_experiment()
    config.run_directory.mkdir(parents=True)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), number)).start()
    before, began = signal.signal(signal.SIGINT, signal.default_int_handler), time.monotonic()
    try:
        with (
            pytest.raises(raised),
            _stopping_at(signal.SIGTERM, config.run_directory / "stop"),
        ):
            _interruptible(wait_for_ever, config.run_directory)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 5


def test_a_training_whose_workers_have_begun_ends_by_itself(make_experiment: Make) -> None:
    config = make_experiment()
    config.run_directory.mkdir(parents=True)
    (config.run_directory / "begun").touch()
    ask_to_stop(config)
    ended = []
    _interruptible(lambda: ended.append(time.sleep(1)), config.run_directory)
    assert ended == [None], "it was not cut short"
    with pytest.raises(KeyError):
        _interruptible(lambda: {}["lost"], config.run_directory)


#: Trains, and asks for what this machine lacks, on one cluster of its own; run from another directory.
_RELATIVE = """
import sys
from ray_jobs import train
from ray_jobs.command_line.cli import run
from ray_jobs.running.cluster import connect
from ipvla.experiment import ExperimentConfig
from ipvla.storage import StorageRoots

def ends(*words):
    sys.argv = ["train", *SMALL, *words]
    try:
        run(ExperimentConfig, train.main, "")
    except SystemExit as end:
        print(f"exit {end.code or 0}", file=sys.stderr, flush=True)

SMALL = sys.argv[1:]
with connect(StorageRoots(), num_cpus=2):
    ends("--name", "first", "--storage_root", "by_flag")
    ends("--name", "next", "--start_from", "by_flag/runs/recall/first/policy")
    ends("--name", "gpu", "--use_gpu", "true")
    ends("--name", "many", "--num_workers", "8")
"""


@pytest.mark.long
@pytest.mark.slow
def test_relative_paths_are_those_of_the_working_directory(storage_root: Path, tmp_path: Path) -> None:
    shutil.copytree(storage_root / "datasets" / "cue", tmp_path / "data" / "cue")
    small = [
        *("--data.dataset", "./data/cue/1.0.0", "--data.image_size", "16", "--lanes.lanes", "2"),
        *("--training.steps", "2", "--training.checkpoint_every", "2", "--training.log_every", "1"),
        *("--model.backbone.width", "32", "--model.backbone.heads", "2", "--model.backbone.mlp", "32"),
        *("--tracking.system_every_s", "0"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"IPVLA_STORAGE_ROOT": "by_variable", "PYTHONPATH": str(SOURCE_TREE)}
    done = subprocess.run(
        [sys.executable, "-c", _RELATIVE, *small],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stderr
    assert Policy.load(tmp_path / "by_flag" / "runs" / "recall" / "first" / "policy").describe(), said
    assert Policy.load(tmp_path / "by_variable" / "runs" / "recall" / "next" / "policy").describe(), said
    assert said.count("exit 0\n") == said.count("exit 2\n") == 2, said
    assert "error: use_gpu: this machine has no GPU (torch " in said
    assert "error: this machine cannot hold 8 training workers with 1 CPU each: it has 2 CPU; lower num_w" in said
    assert "Traceback" not in said
