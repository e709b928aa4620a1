"""Every kind of file that this program reads: how a good one is written, and what reading it may raise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch

from benchmarks.rollout_speed import save_untrained_policy
from ipvla.data.dataset import open_dataset
from ipvla.data.lerobot import Layout
from ipvla.data.lerobot.writer import PartWriter
from ipvla.data.libero_hdf5 import LiberoHdf5Source
from ipvla.data.pictures import EncodedPictures, encode_png
from ipvla.data.probe import ProbeConfig
from ipvla.data.reasoning.store import open_store
from ipvla.data.rlds import write_rlds
from ipvla.data.rlds.source import RldsSource
from ipvla.data.source import DatasetError, Feature, Steps, Trajectory
from ipvla.data.standards import standard_of
from ipvla.data.statistics import Statistics
from ipvla.data.survey import load_survey, publish_survey, surveyed
from ipvla.forgetting.artifact import ArtifactError
from ipvla.forgetting.fisher import DiagonalFisher
from ipvla.models.action_tokens.fast import FastTokens
from ipvla.models.action_tokens.rvq import RVQSettings, RVQTokens, one_part
from ipvla.policy import CheckpointError, Policy
from ipvla.rollout.journal import Journal, JournalError
from ipvla.sim.demonstration import Demonstration
from ipvla.sim.gym.settings import GymError, GymSettings
from ipvla.storage import SOURCE_TREE
from ipvla.tracking.mlflow_spool import RunIdentity, Spool, SpoolError
from ipvla.types import Episode, EpisodeResult, EpisodeSpec
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.settings import SettingError, parse
from ray_jobs.import_policy import ImportConfig, imported

_PRESETS: Final = SOURCE_TREE / "ray_jobs" / "experiments"
_CHECKPOINTS: Final = SOURCE_TREE / "tests" / "checkpoints"
_SIZE: Final = 16


@dataclass(frozen=True)
class Loader:
    """A kind of file.

    Attributes:
        make: writes a good one in an empty directory, and returns the file that is to be damaged.
        load: reads it.
        promised: what it raises if it cannot.
        tried: share of the mutations that it is given, where reading takes long.
    """

    make: Callable[[Path], Path]
    load: Callable[[Path], object]
    promised: type[Exception]
    tried: float = 1.0


def _policy(file: str, place: Path) -> Path:
    return save_untrained_policy(place / "policy") / file


def _journal(place: Path) -> Path:
    with Journal(place / "episodes.sqlite", {"policy": "abc"}) as records:
        for trial in range(12):
            records.record(
                EpisodeResult(EpisodeSpec("recall", "ground_red", trial, trial), "success", 9, 2, 0.5, 0.1)
            )
    return place / "episodes.sqlite"


def _read_journal(path: Path) -> None:
    with Journal.existing(path) as records:
        records.results()


def _statistics(place: Path) -> Path:
    values = [np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32)]
    Statistics.compute(values, values).save(place / "dataset_statistics.json", "cue")
    return place / "dataset_statistics.json"


def _artifact(file: str, place: Path) -> Path:
    DiagonalFisher({"backbone": "tiny", "width": 3}, {"a": torch.ones(300)}).save(place)
    return place / file


def _copied(source: Path, place: Path) -> Path:
    return Path(shutil.copy(source, place))


def _episode(seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    length = int(rng.integers(6, 9))
    pictures = {"agentview": rng.integers(0, 255, (length, _SIZE, _SIZE, 3), np.uint8)}
    state, action = rng.normal(size=(length, 8)), rng.uniform(-1, 1, (length, 7))
    return Episode(
        *("press_red", "ground", "press the red button", seed, pictures),
        *(state.astype(np.float32), action.astype(np.float32)),
    )


def _demonstration(place: Path) -> Path:
    Demonstration(**vars(_episode(0))).save(place / "0.npz")
    return place / "0.npz"


def _rlds(file: str, place: Path) -> Path:
    """The one file of that name, or pattern, in a dataset that this program wrote."""
    return next(write_rlds(place, "some", map(_episode, range(4)), _SIZE).glob(file))


def _read_all(directory: Path) -> None:
    """As a training does: what cannot be used is told at the start."""
    dataset = open_dataset(directory)
    dataset.require_readable()
    dataset.statistics()
    for index in range(len(dataset)):
        dataset.episode(index)


def _lerobot(file: str, place: Path) -> Path:
    rng = np.random.default_rng(0)
    features = {
        "observation.images.top": Feature("image", (_SIZE, _SIZE, 3), "uint8"),
        "observation.state": Feature("number", (8,), "float32"),
        "action": Feature("number", (7,), "float32"),
    }

    writer = PartWriter(place / "some", Layout(10, features), 0, 0, 0, {})
    for seed in range(3):
        picture = encode_png(rng.integers(0, 255, (_SIZE, _SIZE, 3), np.uint8))
        steps: dict[str, Steps] = {
            "observation.images.top": EncodedPictures((picture,) * 5),
            "observation.state": rng.normal(size=(5, 8)).astype(np.float32),
            "action": rng.uniform(-1, 1, (5, 7)).astype(np.float32),
            "task": ("press the button",) * 5,
        }
        writer.add(Trajectory(steps, f"episode {seed}"))
    writer.close()
    return next((place / "some").glob(file))


def _hdf5(place: Path) -> Path:
    import h5py

    path = place / "press_the_red_button_demo.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "press the red button"})
        for number in range(2):
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = rng.uniform(-1, 1, (5, 7))
            for name, size in (("ee_states", 6), ("gripper_states", 2), ("joint_states", 7)):
                demo[f"obs/{name}"] = rng.normal(size=(5, size))
            for name in ("agentview_rgb", "eye_in_hand_rgb"):
                demo[f"obs/{name}"] = rng.integers(0, 255, (5, _SIZE, _SIZE, 3), np.uint8)
    return path


def _read_hdf5(path: Path) -> None:
    source = LiberoHdf5Source(path)
    for index in range(len(source)):
        source.trajectory(index)


def _survey(place: Path) -> Path:
    source = RldsSource(write_rlds(place, "some", map(_episode, range(4)), _SIZE))
    publish_survey(place / "survey.json", "some", surveyed(source, standard_of(source), None))
    return place / "survey.json"


def _index(file: str, place: Path) -> Path:
    """The stored list of episodes of a dataset that lists none itself."""
    directory = write_rlds(place, "some", map(_episode, range(4)), _SIZE)
    (directory / "episodes.json").unlink()
    open_dataset(directory, read_root=place / "read")
    return next((place / "read").glob(file))


def _read_indexed(path: Path) -> None:
    """A damaged list is made anew, so that all is read as it was written."""
    lengths = [len(_episode(seed).action) for seed in range(4)]
    assert open_dataset(path.parent.parent / "some" / "1.0.0", read_root=path.parent).lengths.tolist() == lengths


def _reasoning(place: Path) -> Path:
    steps = {str(t): {"plan": "press red", "subtask": "press red"} for t in range(5)}
    path = place / "reasonings.json"
    path.write_text(json.dumps({f"{number}.hdf5": {"0": steps, "1": steps} for number in range(3)}))
    return path


def _read_reasoning(path: Path) -> None:
    cache = path.parent / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    open_store(path, cache).episode("1.hdf5", "1")


def _read_compiled(path: Path) -> None:
    open_store(path, path.parent).episode("1.hdf5", "1")


def _compiled(place: Path) -> Path:
    return open_store(_reasoning(place), place).database


def _spool(place: Path) -> Path:
    spool = Spool.create(place, RunIdentity("sqlite:///x.db", "study", "gru", "runs/study/gru"))
    for step in range(5):
        spool.append({"kind": "metrics", "values": {"loss": 0.5}, "step": step, "ms": 17})
    spool.close(delete=False)
    return spool.path


def _read_spool(path: Path) -> None:
    spool = Spool.take(path)
    assert spool is not None
    try:
        spool.undelivered()
    finally:
        spool.close(delete=False)


def _chunks() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (40, 4, 3)).astype(np.float32)


def _fast(file: str, place: Path) -> Path:
    FastTokens.fit(_chunks(), vocab_size=256).save(place)
    return place / file


def _rvq(file: str, place: Path) -> Path:
    torch.manual_seed(0)
    RVQTokens(RVQSettings(4, one_part(3, 1), codes=8, code_dim=4, latent=8, channels=8, levels=1)).save(place)
    return place / file


def _openvla(file: str, place: Path) -> Path:
    model = shutil.copytree(_CHECKPOINTS / "openvla" / "model", place / "model")
    shutil.copy(_CHECKPOINTS / "openvla" / "towers.json", model)
    return model / file


def _import_openvla(path: Path) -> None:
    imported(ImportConfig(path.parent, path.parent.parent / "policy", "toy_bridge"))


def _adapter(file: str, place: Path) -> Path:
    _openvla("", place)
    return shutil.copytree(_CHECKPOINTS / "openvla" / "lora_adapter", place / "adapter") / file


def _import_adapter(path: Path) -> None:
    model = path.parent.parent / "model"
    imported(ImportConfig(model, path.parent.parent / "policy", "toy_bridge", adapter=path.parent))


def _load_policy(path: Path) -> object:
    return Policy.load(path.parent)


def _load_artifact(path: Path) -> object:
    return DiagonalFisher.load(path.parent, {"width": 3})


def _load_dataset(path: Path) -> None:
    _read_all(path.parent)


def _load_lerobot(path: Path) -> None:
    _read_all(next(place for place in path.parents if place.name == "some"))


def _load_probe(path: Path) -> None:
    """As a reading of the Thermostat does, whose hash names it."""
    ProbeConfig("some", records=6).build(path.parents[2]).sha256  # noqa: B018


LOADERS: Final = {
    "policy.json": Loader(partial(_policy, "policy.json"), _load_policy, CheckpointError),
    "model.safetensors": Loader(partial(_policy, "model.safetensors"), _load_policy, CheckpointError),
    "journal": Loader(_journal, _read_journal, JournalError),
    "statistics": Loader(_statistics, lambda path: Statistics.load(path, 7), ValueError),
    "artifact's record": Loader(partial(_artifact, "fisher.json"), _load_artifact, ArtifactError),
    "artifact's tensors": Loader(partial(_artifact, "fisher.safetensors"), _load_artifact, ArtifactError),
    "settings": Loader(
        partial(_copied, _PRESETS / "quickstart" / "full" / "collect.yaml"),
        lambda path: parse(CollectConfig, ["--config_path", str(path)]),
        SettingError,
    ),
    "gymnasium": Loader(partial(_copied, _PRESETS / "gym_aloha" / "aloha.yaml"), GymSettings.load, GymError),
    "demonstration": Loader(_demonstration, Demonstration.load, ValueError),
    "survey": Loader(_survey, load_survey, DatasetError),
    "RLDS index": Loader(partial(_index, "*.npy"), _read_indexed, DatasetError),
    "RLDS index's labels": Loader(partial(_index, "*[0-9a-f].json"), _read_indexed, DatasetError),
    "probe": Loader(partial(_rlds, "*.array_record*"), _load_probe, DatasetError),
    "LIBERO's HDF5": Loader(_hdf5, _read_hdf5, DatasetError),
    "reasoning": Loader(_reasoning, _read_reasoning, DatasetError),
    "compiled reasoning": Loader(_compiled, _read_compiled, DatasetError),
    "MLflow's spool": Loader(_spool, _read_spool, SpoolError),
    **{
        f"RLDS {name}": Loader(partial(_rlds, name), _load_dataset, DatasetError)
        for name in ("dataset_info.json", "features.json", "episodes.json", "recording.json")
    },
    "RLDS shard": Loader(partial(_rlds, "*.array_record*"), _load_dataset, DatasetError),
    **{
        f"LeRobot {name}": Loader(partial(_lerobot, name), _load_lerobot, DatasetError)
        for name in (*("meta/info.json", "meta/tasks.parquet", "meta/episodes/*/*.parquet", "data/*/*.parquet"),)
    },
    **{
        f"FAST {name}": Loader(partial(_fast, name), lambda path: FastTokens.load(path.parent), ValueError)
        for name in ("tokenizer.json", "processor_config.json")
    },
    **{
        f"RVQ {name}": Loader(partial(_rvq, name), lambda path: RVQTokens.load(path.parent), ValueError)
        for name in ("config.json", "model.safetensors")
    },
    **{
        f"import {name}": Loader(partial(_openvla, name), _import_openvla, ValueError, 0.1)
        for name in (
            *("config.json", "dataset_statistics.json", "preprocessor_config.json", "tokenizer.json"),
            *("towers.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors"),
        )
    },
    **{
        f"import adapter's {name}": Loader(partial(_adapter, name), _import_adapter, ValueError, 0.1)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    },
}
