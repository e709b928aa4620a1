"""The adapter's public functions: the user's configuration to a dataset, a loader, a file of statistics."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from integrations.starvla_ecot.batches import FrameLoader
from integrations.starvla_ecot.config import DATASET_PY, EcotConfig, read_config
from integrations.starvla_ecot.frames import FrameDataset, Member
from ipvla.data.mixtures import OXE_MIXTURES
from ipvla.data.reasoning.episodes import coverage
from ipvla.data.reasoning.store import MissingReasoningError, ReasoningStore, open_store
from ipvla.data.rlds.source import RldsSource
from ipvla.data.source import DatasetError
from ipvla.data.standards import standard_for
from ipvla.data.survey import surveyed
from ipvla.files import write_text
from ipvla.storage import StorageRoots

logger = logging.getLogger(__name__)

STATISTICS_FILE = "dataset_statistics.json"
_TRAIN, _VALIDATION = "train", "val"


def get_vla_dataset_ecot(cfg: Any) -> FrameDataset:
    """The frames of `cfg.datasets.vla_data`, as a torch IterableDataset of samples (`SampleMaker`).

    Reads `datasets.vla_data` with its section `ecot`, `framework.action_model`, `trainer.loss_scale` and `seed`,
    and nothing else of `cfg`. Lists of episodes, surveys and compiled reasoning are kept below
    `$IPVLA_STORAGE_ROOT/cache`.

    Args:
        cfg: nested mappings (a YAML file's), or objects with attributes, OmegaConf's among them.

    Raises:
        ValueError: a key is unknown, missing, or has a value that cannot be.
        DatasetError: a dataset is missing or damaged.
    """
    config = read_config(cfg)
    cache = StorageRoots().cache
    reasoning = _reasoning(config.ecot.reasoning_json, cache / "datasets" / "reasoning")
    mix = OXE_MIXTURES.get(config.ecot.data_mix, {config.ecot.data_mix: 1.0})
    members = [_member(config, name, weight, reasoning, cache / "datasets") for name, weight in mix.items()]
    covered = {member.name: coverage(member.source, reasoning) for member in members} if reasoning else {}
    for name in (name for name, found in covered.items() if not found.found):
        logger.warning("%s: %s; reasoning is '' throughout", name, covered[name])
    rank, world_size = _rank()
    frames = FrameDataset(members, config, rank, world_size)
    c = config.ecot
    logger.info(
        "dataset_py=%s data_mix=%s scheduled_stage=%d reasoning_dropout_prob=%g reasoning=%s "
        "future_action_window_size=%d chunk_len=%d alignment=%s vlm_cot=%g frames=%d",
        DATASET_PY, c.data_mix, c.scheduled_stage, c.reasoning_dropout_prob,
        "yes" if any(each.found for each in covered.values()) else "none",
        config.future_action_window_size, frames.maker.length, frames.maker.alignment, config.vlm_cot_scale,
        len(frames),
    )  # fmt: skip
    return frames


def make_dataloader_ecot(cfg: Any) -> FrameLoader:
    """Batches of `per_device_batch_size` samples, each a list, made by `num_workers` processes.

    Raises what `get_vla_dataset_ecot` does.
    """
    config = read_config(cfg)
    return FrameLoader(get_vla_dataset_ecot(cfg), config.per_device_batch_size, config.num_workers)


def save_dataset_statistics(run_dir: Path | str, stats: Mapping[str, Any]) -> None:
    """Writes `run_dir/dataset_statistics.json`, replacing it at once.

    Args:
        stats: `FrameDataset.dataset_statistics`, or another mapping in OpenVLA's schema; arrays become lists.
    """
    write_text(Path(run_dir) / STATISTICS_FILE, json.dumps(stats, indent=2, default=_json))


def _reasoning(reasoning_json: str | None, cache: Path) -> ReasoningStore | None:
    """None, with a message, where a file was asked for and there is none: training goes on without words."""
    if not reasoning_json:
        return None
    try:
        return open_store(Path(reasoning_json).expanduser(), cache)
    except MissingReasoningError as error:
        logger.warning(
            "%s; training goes on with the actions alone and reasoning ''. To have reasoning, put the file there, "
            "correct datasets.vla_data.ecot.reasoning_json, or set it to null to be rid of this message",
            error,
        )
        return None


def _member(
    config: EcotConfig, name: str, weight: float, reasoning: ReasoningStore | None, read_root: Path
) -> Member:
    location = _version(config.ecot.data_root_dir, name)
    trained = RldsSource(location, _TRAIN, index_root=read_root)
    standard = standard_for(name, trained.features)
    if len(standard.absolute) != config.action_dim:
        raise DatasetError(
            f"{name} has {len(standard.absolute)} action dimensions, framework.action_model.action_dim is "
            f"{config.action_dim}; set it to {len(standard.absolute)}, or take another data_mix"
        )
    survey = surveyed(trained, standard, read_root)
    source, statistics = trained, survey.statistics
    if not config.ecot.train:
        source = RldsSource(location, _VALIDATION, index_root=read_root)
        survey = surveyed(source, standard, read_root)
    if survey.broken:
        example = next(iter(survey.broken.values()))
        logger.warning("%s: %d episodes cannot be used and are left out: %s", name, len(survey.broken), example)
    return Member(name, source, standard, survey, statistics, reasoning, weight)


def _version(data_root_dir: str, name: str) -> str:
    """`<data_root_dir>/<name>/<version>` of the newest version."""
    files, root = fsspec.core.url_to_fs(data_root_dir)
    found = [path.rsplit("/", 2)[-2] for path in files.glob(f"{root}/{name}/*/dataset_info.json")]
    if not found:
        raise DatasetError(
            f"there is no dataset {name} below {data_root_dir}; put it at {name}/<version>/, or correct "
            f"datasets.vla_data.ecot.data_root_dir or data_mix; mixtures are {', '.join(OXE_MIXTURES)}"
        )
    newest = max(found, key=lambda version: [int(part) if part.isdigit() else -1 for part in version.split(".")])
    return f"{data_root_dir.rstrip('/')}/{name}/{newest}"


def _rank() -> tuple[int, int]:
    """This process's rank and how many there are: torch.distributed's if it runs, else what torchrun says."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _json(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"dataset statistics hold a {type(value).__name__}; give numbers, lists or arrays")
