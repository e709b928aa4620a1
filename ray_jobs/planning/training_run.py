"""Whether a training run fits the machine, asked before its workers start: `require_fits`."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

import psutil
import torch

from ipvla.data.mixture_dataset import Dataset
from ipvla.experiment import ExperimentConfig
from ipvla.models.backbones import TinyConfig
from ipvla.models.backbones.weightless import weightless
from ipvla.models.vla import IPVLA
from ipvla.training.precision import autocast_format
from ray_jobs.planning.cards import GIB, Card
from ray_jobs.planning.footprint import (
    Saved,
    activations,
    gradient_bytes,
    optimizer_bytes,
    saved_by_nf4,
    weight_bytes,
)
from ray_jobs.planning.plan import USABLE, Way, autocast_bytes
from ray_jobs.planning.published import Planned
from ray_jobs.running.cluster import ClusterError

_logger = logging.getLogger(__name__)
#: Rank of the adapters that a message proposes.
_RANK: Final = 32


def smallest_card() -> Card | None:
    """The GPU of this machine that has the least memory; None without any."""
    if not torch.cuda.is_available():
        return None
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    least = min(every, key=lambda one: one.total_memory)
    return Card(least.name, least.total_memory / GIB)


def require_fits(
    config: ExperimentConfig, dataset: Dataset, card: Card | None = None, ram_gib: float | None = None
) -> None:
    """Compares what the planner says of a run with the card of each worker, or on CPUs with the machine's memory.

    A card too small for it is refused; one that is filled to more than `USABLE` of it, and a main memory below the
    weights, gradients and moments of all workers, are warned of. What protects old skills is not counted, so a run
    that passes may still not fit. What the planner cannot describe is let through.

    Args:
        card: None for the smallest of this machine's; without any, nothing is compared of a run on GPUs.
        ram_gib: None for this machine's.

    Raises:
        ClusterError: the run needs more than the card has; the line says what to change.
    """
    if not config.use_gpu:
        _warn_of_ram(config, dataset, psutil.virtual_memory().total / GIB if ram_gib is None else ram_gib)
        return
    card = card or smallest_card()
    if card is None:
        return
    way = training_way(config, dataset)
    if way is None:
        return
    frames = config.lanes.lanes * config.lanes.window
    needed = way.total(frames, config.training.activation_checkpointing) / GIB
    of = f"({way.total(0) / GIB:.3g} of weights, gradients and moments, the rest for {frames} frames)"
    if needed > card.gib:
        raise ClusterError(
            f"training needs {needed:.3g} GiB per GPU {of}, and {card.name} has {card.gib:.3g}; "
            f"{_remedy(config, way, card)}"
        )
    if needed > USABLE * card.gib:
        _logger.warning(
            "training is planned to fill %.3g GiB %s of the %.3g that %s has, and may fail; %s",
            *(needed, of, card.gib, card.name, _remedy(config, way, card)),
        )


def _warn_of_ram(config: ExperimentConfig, dataset: Dataset, gib: float) -> None:
    if isinstance(config.model.backbone, TinyConfig):  # it takes some megabytes, and describing it a second
        return
    way = training_way(config, dataset, "cpu")
    if way is not None and (held := config.num_workers * way.total(0) / GIB) > gib:
        _logger.warning(
            "weights, gradients and moments of %d training workers take %.3g GiB, and this machine has %.3g; "
            "train adapters alone (model.lora), a smaller model, or lower num_workers",
            *(config.num_workers, held, gib),
        )


def training_way(config: ExperimentConfig, dataset: Dataset, device: str = "cuda") -> Way | None:
    """What a run takes per worker, on CPUs without activations; None if it cannot be known without weights."""
    if config.model.osf is not None:  # it decomposes weights, of which there are none
        return None
    backbone = config.model.backbone
    if config.start_from is not None:
        backbone = backbone.beside(config.start_from)
    features = dataset.statistics()
    found = Planned(
        replace(config.model, backbone=weightless(backbone)),
        views=len(config.data.cameras),
        image_size=config.data.image_size,
        proprio=features.proprio.dim if config.data.proprio is None else len(config.data.proprio),
        actions=features.action.dim,
    )
    try:
        return _way(config, found, device)
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, OSError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        _logger.debug("what training takes is not known: %s", error)
        return None


def _way(config: ExperimentConfig, found: Planned, device: str) -> Way:
    model = _trained(config, found)
    weights, gradients, moments = weight_bytes(model), gradient_bytes(model), optimizer_bytes(model)
    if config.model.nf4 is not None:
        weights -= saved_by_nf4(found.build(None).backbone, config.model.nf4)
    if config.training.sharding == "fsdp" and config.num_workers > 1:
        weights, gradients, moments = (size // config.num_workers for size in (weights, gradients, moments))
    saved, copies = Saved(0, 0, 0, 0), 0
    if device != "cpu":
        if autocast_format(config.training.precision, torch.device(device)) is not None:
            copies = autocast_bytes(model)
            model = model.bfloat16()  # as large as float16, and what autocast computes in
        saved = activations(model, found.frame(model))
    return Way("this run", weights, gradients, moments, saved.whole, saved.checkpointed, copies)


def _trained(config: ExperimentConfig, found: Planned) -> IPVLA:
    """With what is trained, and nothing else, asking for gradients."""
    model = found.build(config.model.lora)
    if config.model.head.distils:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    return model


def _remedy(config: ExperimentConfig, way: Way, card: Card) -> str:
    """What the run does not do yet to be smaller, and how many frames fit as it is."""
    model, checkpointed = config.model, config.training.activation_checkpointing
    settings = {
        f"model.lora.rank {_RANK}": model.adapted is None and not model.head.distils,
        "model.nf4 {}": model.nf4 is None,
        "training.activation_checkpointing true": not checkpointed,
    }
    changes = [f"set {', '.join(undone)}"] if (undone := [name for name, apt in settings.items() if apt]) else []
    if frames := way.most(card, checkpointed):
        changes.append(f"lower lanes.lanes x lanes.window to at most {frames}")
    return ", or ".join([*changes, "take a larger card"])
