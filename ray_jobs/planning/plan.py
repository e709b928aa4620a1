"""What fits on a card, and about how long it takes: `ipvla doctor --plan openvla --gpu 4090`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from ipvla.models.adapters import LoRAConfig
from ipvla.models.nf4 import NF4Config, parameter_count
from ipvla.models.vla import IPVLA
from ray_jobs.planning.cards import GIB, Card
from ray_jobs.planning.footprint import (
    Operations,
    activations,
    gradient_bytes,
    keys_values_bytes,
    operations,
    optimizer_bytes,
    saved_by_nf4,
    tensor_bytes,
    weight_bytes,
)
from ray_jobs.planning.published import Planned, planned

#: Of a card's memory: the rest is the driver's, the libraries', and lost between tensors.
USABLE: Final = 0.92
#: Of a card's rated numbers: the first two measured on an H200 with PaliGemma 3B (docs/benchmarks.md), the third
#: assumed.
_ANSWERING, _TRAINING, _READING_WEIGHTS = 0.45, 0.28, 0.7
#: To start the kernels of a layer, on that machine.
_LAYER_MS: Final = 0.6


@dataclass(frozen=True)
class Way:
    """One way to use a model.

    Attributes:
        weights, gradients, optimizer: bytes on each card.
        frame: bytes that each frame adds: activations, or in answering keys and values; None where unknown.
        checkpointed: the same with activations computed again; 0 in answering.
        once: bytes beside, whatever the number of frames.
        ms: of a frame more, in a training step; of an answer, in answering; None where the card's numbers are not
            known.
        missing: what is not counted.
    """

    name: str
    weights: int
    gradients: int
    optimizer: int
    frame: int
    checkpointed: int = 0
    once: int = 0
    ms: float | None = None
    missing: tuple[str, ...] = ()

    def total(self, frames: int, checkpointed: bool = False) -> int:
        """Bytes with so many frames per card."""
        each = self.checkpointed if checkpointed else self.frame
        return self.weights + self.gradients + self.optimizer + self.once + frames * each

    def most(self, card: Card, checkpointed: bool = False) -> int:
        """Frames that fit."""
        each = self.checkpointed if checkpointed else self.frame
        return max(0, int((USABLE * card.gib * GIB - self.total(0)) // max(1, each)))

    def to_dict(self, card: Card) -> dict[str, Any]:
        """In GiB, as `--json` prints it."""
        sizes = {n: getattr(self, n) / GIB for n in ("weights", "gradients", "optimizer", "frame", "checkpointed")}
        fits = {"frames": self.most(card), "frames_checkpointed": self.checkpointed and self.most(card, True)}
        return {"name": self.name, **sizes, **fits, "ms": self.ms, "not_counted": list(self.missing)}


@dataclass(frozen=True)
class Plan:
    """A model's ways on a card; `memory` is an episode's in bytes, `tokens` those of a frame."""

    model: str
    card: Card
    parameters: int
    tokens: int
    memory: int
    ways: tuple[Way, ...]


def plan(model: str, card: Card, gpus: int = 1, rank: int = 32) -> Plan:
    """Of a published model or a policy's directory.

    Args:
        gpus: among which FSDP divides the weights; 1 for no such row.
        rank: of adapters on the language layers.

    Raises:
        ValueError: there is no such model, or its weights would have to be loaded to know it.
    """
    with tempfile.TemporaryDirectory() as directory:
        return plan_of(model, planned(model, Path(directory) / "described"), card, gpus, rank)


def plan_of(name: str, found: Planned, card: Card, gpus: int = 1, rank: int = 32) -> Plan:
    """`plan` of a model that was found."""
    base, adapted = found.build(None), found.build(LoRAConfig(rank=rank))
    frame = found.frame(base)
    work, whole = operations(base, frame), activations(base, frame)
    weights, less = weight_bytes(base), saved_by_nf4(base.backbone, NF4Config())
    memory = tensor_bytes(base.memory.initial(1).values())
    more, gradients, moments = weight_bytes(adapted) - weights, gradient_bytes(adapted), optimizer_bytes(adapted)
    casts = autocast_bytes(adapted)
    for parameter in adapted.parameters():  # autocast computes with copies in the format of the backbone's
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    part = activations(adapted, frame)
    ms = _answer_ms(card, work, found, base, weights)
    held = keys_values_bytes(base.backbone, frame.tokens, 2) + memory
    answer = Way("answer", weights, 0, 0, held + part.largest, ms=ms)  # a layer's activations at a time
    lora = Way(
        f"LoRA {rank}", weights + more, gradients, moments, part.whole, part.checkpointed, casts,
        _step_ms(card, work, 2), part.unknown,
    )  # fmt: skip
    count, all_ms = parameter_count(base), _step_ms(card, work, 3)
    half = Way(
        "all, bfloat16", weights, gradient_bytes(base), optimizer_bytes(base), whole.whole, whole.checkpointed,
        autocast_bytes(base), all_ms, whole.unknown,
    )  # fmt: skip
    single = replace(
        half, name="all, float32", weights=4 * count, gradients=4 * count, optimizer=optimizer_bytes(base.float()),
        once=2 * count,
    )  # fmt: skip
    ways = [
        answer,
        replace(answer, name="answer, NF4", weights=answer.weights - less, ms=None),
        lora,
        replace(lora, name=f"{lora.name}, NF4", weights=lora.weights - less, ms=None),
        *([half] if card.dtype == "bfloat16" else []),
        single,
    ]
    if gpus > 1:
        layers = [sum(p.numel() for p in one.parameters()) for one in base.backbone.language_layers()]
        gathered = 4 * (count - sum(layers) + 2 * max(layers))  # what is no layer, a layer and the next, in full
        divided = {part: getattr(single, part) // gpus for part in ("weights", "gradients", "optimizer")}
        ways.append(replace(single, name=f"{single.name}, FSDP over {gpus}", once=gathered, **divided))
    return Plan(name, card, count, frame.tokens, memory, tuple(ways))


def autocast_bytes(model: IPVLA) -> int:
    """Bytes of autocast's copies of trained float32 weights."""
    return sum(2 * p.numel() for p in model.parameters() if p.requires_grad and p.dtype == torch.float32)


def _step_ms(card: Card, work: Operations, passes: int) -> float | None:
    """Of a frame: towers forward, the language layers so many times as their forward pass takes.

    With adapters a backward pass takes as long as the forward pass (the gradient of the inputs), with all weights
    twice as long, in the towers too.
    """
    if card.tflops is None:
        return None
    seeing = work.seeing * (1 if passes == 2 else 3)
    return (seeing + passes * work.reading + 3 * work.head) / (card.tflops * 1e9 * _TRAINING)


def _answer_ms(card: Card, work: Operations, found: Planned, model: IPVLA, weights: int) -> float | None:
    """Of one answer to one frame: what is slower of arithmetic, reading the weights, and starting the kernels."""
    if card.tflops is None or card.gb_per_s is None:
        return None
    rate, bandwidth = card.tflops * 1e9 * _ANSWERING, card.gb_per_s * 1e6 * _READING_WEIGHTS
    layers = model.backbone.num_layers
    words = model.backbone.reads.language
    repeated = weights if words else weight_bytes(model.head)
    reading = max((work.seeing + work.reading) / rate, weights / bandwidth, 1.5 * layers * _LAYER_MS)
    again = max(work.head / rate, repeated / bandwidth, layers * _LAYER_MS)
    return reading + found.answers * again


def table(one: Plan) -> Table:
    """As `ipvla doctor --plan` prints it."""
    card = one.card
    title = f"{one.model}: {one.parameters:,} parameters, {one.tokens} tokens per frame, on {card.name}"
    columns = ("weights", "grads", "AdamW", "a frame", "again*", "1 frame", "fit", "ms")
    right = [Column(name, justify="right") for name in columns]
    result = Table(Column("GiB", no_wrap=True), *right, title=title, title_justify="left", box=SIMPLE_HEAD)
    for way in one.ways:
        trained = way.checkpointed > 0
        fits = [f"{way.most(card)}", *([f"{way.most(card, True)}*"] if trained else [])]
        sizes = (way.weights, way.gradients, way.optimizer, way.frame, way.checkpointed, way.total(1, trained))
        some = "none" if way.most(card, trained) == 0 else ", ".join(fits)
        result.add_row(f"{way.name}{'+' * bool(way.missing)}", *map(_gib, sizes), some, _ms(way.ms))
    return result


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def notes(one: Plan) -> str:
    """What the table's words mean."""
    missing = sorted({part for way in one.ways for part in way.missing})
    text = (
        f"A frame: activations, in answering keys, values and memory ({one.memory} bytes) of an episode. * with "
        "training.activation_checkpointing. fit: frames (lanes x window) per card, or episodes answered at "
        f"once, in {USABLE:.0%} of the card. ms: of one answer, or of each frame of a step, estimated from "
        "operations and the card's rated numbers."
    )
    return text + (f" + without the activations of: {', '.join(missing)}." if missing else "")


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""
