"""`python -m ray_jobs.train`: trains one policy on whole episodes under Ray Train."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import draccus
import torch
from draccus.utils import ParsingError

from ipvla.experiment import ExperimentConfig
from ipvla.files import locked, read_record, write_text
from ipvla.models.adapters import save_adapters
from ipvla.policy import CheckpointError, require_whole_policy
from ipvla.policy import state as weights_of
from ipvla.storage import require_room
from ipvla.tracking import ConsoleSink, JsonlSink, MLflowSink, Sinks, read_jsonl, require_usable
from ipvla.training.checkpoint import differences, flat, load_checkpoint, newest_whole, save_checkpoint, shared
from ipvla.training.loop import train
from ipvla.training.parallel import World
from ipvla.training.target import VLM
from ray_jobs.command_line.cli import Terminated, TrainingError, end_at_once, first_line, lasting_failures, run
from ray_jobs.planning.training_run import require_fits
from ray_jobs.running.cluster import Demand, connect, supplied
from ray_jobs.running.display import TrainingDisplay
from ray_jobs.running.policy_run import publish, training_run, warn_of_waiting

#: In a run's directory: while it is there, the run ends after its next step, with a checkpoint.
_STOP = "stop"
#: In a run's directory: its workers have begun, and would look for `_STOP`.
_BEGUN = "begun"
#: In a run's directory: where Ray Train has the checkpoints.
_TRAINER = "trainer"
_STOP_POLL_S = 1.0
_SIGNAL_POLL_S = 0.2
_logger = logging.getLogger(__name__)


if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


@dataclass(frozen=True)
class TrainSummary:
    """The outcome of a finished run."""

    policy: Path
    steps: int
    frames_per_s: float
    wall_s: float
    final_loss: float


def train_worker(encoded: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    with lasting_failures():
        config: ExperimentConfig = draccus.decode(ExperimentConfig, encoded)
        work(config, run_sinks, _asked_to_stop(config.run_directory / _STOP))


def work(
    config: ExperimentConfig,
    open_sinks: Callable[[ExperimentConfig, int], Sinks],
    stop: Callable[[], bool],
) -> None:
    """Builds, resumes from the last checkpoint if there is one, trains, exports.

    Args:
        open_sinks: of rank 0, given the step that the run goes on from.
        stop: asked by rank 0 after every step whether to end with a checkpoint.
    """
    import ray.train  # takes seconds, and settings are checked before
    import ray.train.torch

    config.prepare()
    torch.set_num_threads(config.training.threads)
    world = World.current(ray.train.torch.get_device())
    experiment = config.build(world)
    # Not Ray Train's record of them, which may name one that is damaged or gone.
    checkpoints, _ = newest_whole(config.run_directory / _TRAINER)
    if checkpoints:
        load_checkpoint(checkpoints[0], experiment.state, world, config.identity, config.completed)
    sink = open_sinks(config, experiment.state.step) if world.rank == 0 else Sinks()

    def save() -> None:
        step = experiment.state.step
        with tempfile.TemporaryDirectory(dir=config.tmp) as directory:
            save_checkpoint(Path(directory), experiment.state, experiment.policy, world, config.identity)
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(directory),
                checkpoint_dir_name=f"step_{step:06d}",
            )

    if world.rank == 0:
        (config.run_directory / _BEGUN).touch()
    try:
        asked = stop if world.rank == 0 else lambda: False
        with _watched(config, world, sink.mlflow, lambda: experiment.state.step):
            train(experiment.state, experiment.lanes, config.training, config.optimizer, world, sink, save, asked)
    except Exception:
        sink.close("FAILED")  # a run that is tried again opens it anew
        raise
    if experiment.state.step < config.training.steps:
        sink.close("KILLED")
        return
    weights = weights_of(experiment.state.model, keep=world.rank == 0)
    if world.rank == 0:
        if config.exports_adapters:
            vlm = {name.removeprefix(VLM): weight for name, weight in weights.items() if name.startswith(VLM)}
            save_adapters(experiment.policy.model.backbone, config.run_directory / "adapters", vlm)
        experiment.policy.save(config.run_directory / "policy", weights)
        if sink.mlflow is not None:
            publish(sink.mlflow, config, register=config.tracking.register)
    sink.close()


def train_policy(config: ExperimentConfig) -> TrainSummary:
    """Trains, or goes on where an interrupted run of the same name stopped; a finished run is returned at once.

    Up to `training.until`, if that is set: there is no policy in `run_directory/policy` before all steps are done,
    but one beside every checkpoint, `checkpointed_policy`.

    Raises:
        DatasetError: the dataset is missing or damaged.
        CheckpointError: a run of this name was configured otherwise, or another process trains it.
        TrainingError: it would fail again: the loss is not a number, or settings and data do not fit.
        RuntimeError: the workers failed more often than Ray Train retries.
        ClusterError: this machine lacks what the workers ask for, or its GPUs are too small (`require_fits`).
        Terminated: SIGTERM came; the run has a checkpoint of its last step.
    """
    config = config.absolute()
    config.prepare()
    require_usable(config.mlflow_uri)
    config.tracking.wandb.require_usable()
    dataset, directory = config.open_dataset(), config.run_directory
    config.check(dataset)  # a worker would say it after a minute
    if not (directory / "policy").exists():
        require_fits(config, dataset)
    _require_same(directory / "experiment.json", config)  # before there is a lock beside it
    require_room(directory, _bytes_to_write(config), "its checkpoints", "or lower training.checkpoints_kept")
    try:
        with locked(directory / "lock", wait=False):
            return _train(config)
    except BlockingIOError:
        raise CheckpointError(
            f"another process trains {directory}; wait until it has ended, or give --name another value"
        ) from None


def _bytes_to_write(config: ExperimentConfig) -> int:
    """What is still to be written of checkpoints and the policy, where a directory tells how large one is; else 0.

    The moments of what is trained come on top: little for adapters.
    """
    pretrained = getattr(config.model.backbone, "pretrained", None)
    known = [path for path in (config.start_from, pretrained) if path and Path(path).is_dir()]
    if not known or (config.run_directory / "policy").exists():
        return 0
    training, written = config.training, len(list((config.run_directory / _TRAINER).glob("step_*")))
    made = -(-training.steps // training.checkpoint_every)
    copies = min(made, training.checkpoints_kept + 1) + 1  # a new one before the oldest goes, and the policy
    return max(copies - written, 0) * sum(file.stat().st_size for file in Path(known[0]).rglob("*.safetensors"))


def _train(config: ExperimentConfig) -> TrainSummary:
    """`train_policy` of a run that no other process trains."""
    directory = config.run_directory
    _claim(directory, config)
    policies = [directory / "policy"]
    if config.training.end < config.training.steps:
        policies.append(checkpointed_policy(config, config.training.end))
    pass_over_damaged(config)
    stop = directory / _STOP
    if not any(map(Path.exists, policies)):
        forget_earlier_starts(config)
        _fit(config)
        if stop.exists() and not any(map(Path.exists, policies)):
            raise Terminated
    return replace(summarise(config), policy=next(filter(Path.exists, policies)))


def pass_over_damaged(config: ExperimentConfig) -> None:
    """Puts what is not whole of a run's policy and checkpoints aside, and says so: it goes on from the rest.

    Ray Train's own record of the checkpoints, which is not written at once, goes: the run finds them without it.
    """
    policy, trainer = config.run_directory / "policy", config.run_directory / _TRAINER
    whole, damaged = newest_whole(trainer)
    if policy.exists():
        try:
            require_whole_policy(policy)
        except CheckpointError as error:
            damaged[policy] = str(error).partition("; ")[0]
    for path, reason in damaged.items():
        aside = path.with_name(f"damaged_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        rest = f"going on from {whole[0].name}" if whole else "no checkpoint is left: beginning anew"
        _logger.warning("passing over %s (%s); it is %s now, %s", path, reason, aside.name, rest)
    (trainer / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    for path in whole[config.training.checkpoints_kept :]:
        shutil.rmtree(path)


def ask_to_stop(config: ExperimentConfig) -> None:
    """A training of this run, in whatever process, ends after its next step, with a checkpoint.

    Before its workers have begun, it is no longer waited for.
    """
    if config.run_directory.is_dir():
        (config.run_directory / _STOP).touch()


def forget_earlier_starts(config: ExperimentConfig) -> None:
    """Removes what an earlier start left to say that it was to stop, or had begun."""
    for name in (_STOP, _BEGUN):
        (config.run_directory / name).unlink(missing_ok=True)


def checkpointed_policy(config: ExperimentConfig, step: int) -> Path:
    """Directory of the policy as it was after this step, if its checkpoint still exists."""
    return config.run_directory / _TRAINER / f"step_{step:06d}" / "policy"


def demand(config: ExperimentConfig) -> Demand:
    """What its workers ask Ray for."""
    workers = "1 training worker" if config.num_workers == 1 else f"{config.num_workers} training workers"
    remedy = "lower num_workers or training.threads"
    return Demand(workers, _worker_resources(config), config.num_workers, remedy)


def _worker_resources(config: ExperimentConfig) -> dict[str, float]:
    return {"CPU": float(config.training.threads), **({"GPU": 1.0} if config.use_gpu else {})}


def _fit(config: ExperimentConfig) -> None:
    import ray.train

    stop = config.run_directory / _STOP
    with connect(config), supplied(demand(config)), _stopping_at(signal.SIGTERM, stop):
        try:
            _interruptible(trainer(config, train_worker).fit, config.run_directory)
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            lasting = getattr(error, "controller_failure", None)
            if isinstance(lasting, TrainingError):
                raise TrainingError(f"training {config.run_directory} failed: {lasting}") from error
            raise RuntimeError(
                f"training {config.run_directory} failed: {error}\n"
                "Start it again to go on from its last whole checkpoint."
            ) from error


def _interruptible(fit: Callable[[], object], run_directory: Path) -> None:
    """Runs `fit` in a thread, for it listens to no signal while it waits for workers.

    Raises:
        Terminated: SIGTERM came before the workers had begun.
    """
    stop, begun = run_directory / _STOP, run_directory / _BEGUN
    fitting = in_background(fit, "Ray Train")
    try:
        while futures.wait([fitting], _SIGNAL_POLL_S).not_done:
            if stop.exists() and not begun.exists():
                raise Terminated
    except BaseException:
        stop.touch()  # where the cluster outlives this, the workers end after their next step
        raise
    fitting.result()


def in_background(work: Callable[[], object], name: str) -> futures.Future[object]:
    """Begins `work` in a thread that this process does not wait for when it ends: it may go on for ever."""
    future = futures.Future[object]()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def trainer(config: ExperimentConfig, worker: Callable[[dict[str, Any]], None]) -> TorchTrainer:
    """A run's Ray Train, whose workers get the encoded settings."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # else a run ends 2 s after its work
    return TorchTrainer(
        worker,
        train_loop_config=draccus.encode(config),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=_worker_resources(config)
        ),
        run_config=RunConfig(
            name=_TRAINER,
            storage_path=str(config.run_directory),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=config.training.checkpoints_kept),
            callbacks=[end_at_once()],
        ),
    )


@contextlib.contextmanager
def _stopping_at(number: signal.Signals, path: Path) -> Iterator[None]:
    """A machine that is taken away says so some seconds before: the first such signal asks the workers to stop."""

    def ask(*_: object) -> None:
        signal.signal(number, before)  # the next one ends this process
        path.touch()
        _logger.warning("%s: stopping after the next step, with a checkpoint", number.name)

    try:
        before = signal.signal(number, ask)
    except ValueError:  # not the main thread, which alone handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, before)


def _asked_to_stop(path: Path) -> Callable[[], bool]:
    """Whether the file is there, looked at once in a second."""
    looked = time.monotonic()

    def asked() -> bool:
        nonlocal looked
        if time.monotonic() - looked < _STOP_POLL_S:
            return False
        looked = time.monotonic()
        return path.exists()

    return asked


def _claim(directory: Path, config: ExperimentConfig) -> None:
    """Writes the run's settings at its first start; a run of the same name with other settings is refused.

    One that has not made a step yet is nothing to keep, whatever its settings.
    """
    record = directory / "experiment.json"
    _require_same(record, config)
    if record.exists() and _has_steps(config):
        return
    if not _has_steps(config):
        shutil.rmtree(directory / _TRAINER, ignore_errors=True)  # what Ray Train wrote of other settings
    write_text(record, json.dumps(draccus.encode(config), indent=1))


def _require_same(record: Path, config: ExperimentConfig) -> None:
    """Raises CheckpointError if the record of a run that has made steps has other settings; writes nothing."""
    if not record.exists() or not _has_steps(config):
        return
    try:
        recorded = draccus.decode(ExperimentConfig, read_record(record))
    except (OSError, ValueError, KeyError, TypeError, ParsingError) as error:
        raise CheckpointError(
            f"{record} is damaged ({first_line(error)}); give --name another value, or delete {record.parent}"
        ) from error
    if changes := differences(_fixed(recorded), _fixed(config)):
        raise CheckpointError(
            f"{record.parent} holds a run with other settings ({changes}); give --name another value, or delete "
            "that directory"
        )


def _has_steps(config: ExperimentConfig) -> bool:
    """Has the run a policy, a checkpoint, or steps in its log?"""
    traces = (config.run_directory / "policy", *config.run_directory.glob(f"{_TRAINER}/step_*"))
    return any(path.exists() for path in traces) or bool(training_lines(config))


def _fixed(config: ExperimentConfig) -> dict[str, Any]:
    """All of a run's settings but how far it goes for now, and how it is spread over lanes and workers."""
    training = replace(config.training, until=None, sharding="ddp", activation_checkpointing=False)
    return {
        **shared(config.identity),
        "forgetting": config.identity.get("forgetting"),
        "optimizer": draccus.encode(config.optimizer),
        "training": draccus.encode(training),
    }


def _watched(
    config: ExperimentConfig, world: World, mlflow: MLflowSink | None, step: Callable[[], int]
) -> AbstractContextManager[object]:
    """What this worker asks of its machine goes to MLflow meanwhile."""
    every_s = config.tracking.system_every_s
    if not every_s:
        return contextlib.nullcontext()
    import ray.train

    from ipvla.tracking.system_metrics import Place, SystemMonitor

    here = ray.train.get_context()
    gpu = (world.device.index or 0) if world.device.type == "cuda" else None
    place = Place(world.rank, here.get_node_rank(), here.get_local_rank() == 0, gpu)
    return SystemMonitor(place, config.run_directory / "system", every_s, step, mlflow)


def run_sinks(config: ExperimentConfig, step: int) -> Sinks:
    """Where a run that goes on from this step logs to."""
    mlflow = training_run(config)
    mlflow.log_params(flat(draccus.encode(config)))
    wandb = config.tracking.wandb.build(config.run_directory, config.study, config.name)
    sinks = Sinks((ConsoleSink(), JsonlSink(config.run_directory / "metrics.jsonl", step), mlflow))
    if wandb is None:
        return sinks
    wandb.log_params(flat(draccus.encode(config)))
    return Sinks((*sinks.sinks, wandb))


def training_lines(config: ExperimentConfig) -> list[dict[str, Any]]:
    """What training logged so far; a Thermostat's readings have lines of their own, which are left out."""
    metrics = config.run_directory / "metrics.jsonl"
    return [line for line in read_jsonl(metrics) if "train/loss" in line] if metrics.exists() else []


def summarise(config: ExperimentConfig) -> TrainSummary:
    """Speed and final loss of a finished run, from its metrics; NaN where these are gone."""
    lines = training_lines(config)
    wall_s = sum(line["train/seconds"] for line in lines)
    frames = sum(line["train/frames_per_s"] * line["train/seconds"] for line in lines)
    return TrainSummary(
        policy=config.run_directory / "policy",
        steps=lines[-1]["step"] if lines else config.training.end,
        frames_per_s=frames / wall_s if wall_s else math.nan,
        wall_s=wall_s,
        final_loss=lines[-1]["train/loss"] if lines else math.nan,
    )


def main(config: ExperimentConfig) -> None:
    """Trains, then says where the policy lies."""
    with TrainingDisplay(lambda: {config.name: config}):
        summary = train_policy(config)
    print(
        f"{summary.steps} steps at {summary.frames_per_s:.0f} frames/s, final loss {summary.final_loss:.4f}; "
        f"the policy is in {summary.policy}"
    )


if __name__ == "__main__":
    run(ExperimentConfig, main, __doc__, warn_of_waiting)
