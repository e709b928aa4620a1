"""On a GPU, at the size of PaliGemma 3B: what an answer takes, by batch and memory, and what protection costs; and
at the sizes of OpenVLA 7B and pi0, in 4 bits and not, what the planner says beside what it was.

    python -m benchmarks.gpu [--parts "[acting, tuning]"] [--pretrained google/paligemma-3b-pt-224] [--quick true]

- acting: `Policy.act` from pictures in main memory to actions there, for batches of episodes that are under way.
- tuning: a LoRA step without protection, with HSW, and the Thermostat's readings (`evaluators.step_costs`); frames
  per second and the largest memory of a run, also with activations computed again.

- planned: of OpenVLA 7B and pi0, answers and LoRA steps with weights in bfloat16 and in NF4 (`model.nf4`):
  milliseconds, and the largest memory beside `ipvla doctor --plan`'s.

The weights are random unless a checkpoint is given: time does not depend on them. `--quick` does a little of each
with a tiny model, on the CPU where there is no GPU; its results mean nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Final

import draccus
import numpy as np
import torch
from rich.console import Console

from evaluators.step_costs import StepCostConfig, Trainer, step_costs, variants
from ipvla.data.lanes import LaneConfig
from ipvla.data.probe import ProbeConfig
from ipvla.data.publish import appearing, exclusive
from ipvla.data.rlds import write_rlds
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.forgetting import HSWConfig
from ipvla.forgetting.icsm import ICSMConfig
from ipvla.forgetting.thermostat import ThermostatConfig
from ipvla.models.adapters import LoRAConfig
from ipvla.models.backbones import PaliGemmaConfig, PrismaticConfig
from ipvla.models.backbones.random_paligemma import PALIGEMMA_3B, SMALLEST, save_random_paligemma
from ipvla.models.backbones.random_prismatic import SMALLEST as SMALLEST_OPENVLA
from ipvla.models.backbones.random_prismatic import save_random_prismatic
from ipvla.models.heads import OpenVLATokensConfig
from ipvla.models.memory import MemoryConfig, NoMemoryConfig
from ipvla.models.nf4 import NF4Config
from ipvla.models.vla import IPVLA, IPVLAConfig
from ipvla.policy import Policy
from ipvla.training.loop import TrainingConfig
from ipvla.training.parallel import World
from ipvla.training.protection import ForgettingConfig
from ipvla.training.step import OptimizerConfig
from ipvla.types import Episode, ModelInputs, Observation, StepBatch
from ray_jobs.command_line.cli import run
from ray_jobs.planning.cards import card_named
from ray_jobs.planning.footprint import PROMPT
from ray_jobs.planning.plan import Way, plan_of
from ray_jobs.planning.published import Planned, planned
from ray_jobs.subspaces import SubspacesConfig, read_teacher
from studies.engine import placed
from studies.record import Figures, PartStudy, Target, measure_parts

MEMORIES: Final = ("none", "gru", "latent", "bank", "kv")
_CHUNK = 8
_INSTRUCTION = "put the black bowl on the plate and open the drawer"
_EPISODES = 16
_ARTIFACT = "icsm_gpu"


@dataclass(frozen=True)
class GPUStudy(PartStudy):
    """What is measured.

    Attributes:
        pretrained: a PaliGemma that `from_pretrained` reads, or null for random weights of the 3B's sizes.
        memories: of `MEMORIES`, with their default settings.
        batches: episodes that are answered at once, ascending.
        planned_batches: frames that are answered or trained on at once in `planned`.
        repeats: of every answer.
        lanes, window: of a training step: their product is frames per step.
        lora_rank: of the adapters, on all language layers.
        probe: records that ICSM and the Thermostat read.
        costs: how steps are compared.
    """

    all_parts: ClassVar[tuple[str, ...]] = ("acting", "tuning", "planned")
    pretrained: str | None = None
    memories: tuple[str, ...] = MEMORIES
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    planned_batches: tuple[int, ...] = (1, 8, 32)
    repeats: int = 20
    lanes: int = 8
    window: int = 4
    lora_rank: int = 32
    probe: int = 256
    costs: StepCostConfig = field(default_factory=lambda: StepCostConfig(rounds=40))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("memories", MEMORIES)
        self.require_at_least(1, "repeats", "lanes", "window", "lora_rank")
        if list(self.batches) != sorted(set(self.batches)) or len(self.batches) < 2 or self.batches[0] < 1:
            raise ValueError(f"batches is {list(self.batches)}; give two or more ascending numbers of at least 1")
        if not self.quick and not torch.cuda.is_available():
            raise ValueError("torch sees no CUDA device; run this on one, or pass --quick true")

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def backbone(self) -> PaliGemmaConfig:
        """Of the published size unless quick."""
        prompt = (self.picture // int(self._sizes["vision"]["patch_size"])) ** 2 + 40
        return PaliGemmaConfig(self.pretrained or str(self._random_weights), max_prompt_tokens=prompt)

    @property
    def dataset(self) -> str:
        """What is trained on, and below the probe root what is read; of this study's pictures alone."""
        return f"pictures_{self.picture}px"

    @property
    def _random_weights(self) -> Path:
        """Those of this study's sizes: one in small must not leave its own to a full one."""
        return self.cache / f"random_paligemma_{self.picture}px"

    @property
    def picture(self) -> int:
        """Pixels on a side."""
        return int(self._sizes["vision"]["image_size"])

    @property
    def _sizes(self) -> Mapping[str, Mapping[str, Any]]:
        return SMALLEST if self.quick else PALIGEMMA_3B

    def prepare(self, writes: Collection[str] = ()) -> None:
        super().prepare(("data_root_dir", "probe_root_dir", *writes))
        if self.pretrained is None and not self._random_weights.exists():
            words = sorted({*_INSTRUCTION.split(), *self.backbone.prompt.split()})
            with exclusive(self._random_weights), appearing(self._random_weights) as building:
                save_random_paligemma(building, self._sizes, words, torch.bfloat16, str(self.device))
        for root, first in ((self.datasets, 0), (self.probes, _EPISODES)):
            if not (root / self.dataset).exists():
                seeds = range(first, first + _EPISODES)
                write_rlds(root, self.dataset, (episode(seed, self.picture) for seed in seeds), self.picture)

    def experiment(self, memory: str) -> ExperimentConfig:
        """Of one picture per step, all weights in bfloat16; nothing is tuned yet."""
        places: dict[str, Any] = self.directories
        config = draccus.decode(MemoryConfig, {"type": memory})
        return ExperimentConfig(
            **places,
            use_gpu=self.device.type == "cuda",
            data=DataConfig(dataset=self.dataset, image_size=self.picture),
            lanes=LaneConfig(lanes=self.lanes, window=self.window, stride=_CHUNK),
            model=IPVLAConfig(self.backbone, memory=config, chunk=_CHUNK),
            training=TrainingConfig(precision="bf16"),
        )


def episode(seed: int, size: int, steps: int = 64) -> Episode:
    """Pictures of coarse random patches, no two alike, and random actions."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (steps, 14, 14, 3), np.uint8)
    frames = coarse.repeat(size // 14, 1).repeat(size // 14, 2)
    state = rng.normal(size=(steps, 8)).astype(np.float32)
    action = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    return Episode("pictures", "pictures", _INSTRUCTION, seed, {"agentview": frames}, state, action)


def measure_acting(study: GPUStudy, console: Console) -> dict[str, Any]:
    """Of every memory: by batch the milliseconds of an act, and the line through them."""
    told: dict[str, Any] = {}
    for name in study.memories:
        policy = study.experiment(name).build(World()).policy
        policy.model.to(study.device).eval()
        with _peak(study.device) as peak:
            by_batch = {batch: act_ms(policy, batch, study) for batch in study.batches}
        per_row, fixed = np.polyfit(list(by_batch), [median(ms) for ms in by_batch.values()], 1).tolist()
        told[name] = {
            "ms": {str(batch): ms for batch, ms in by_batch.items()},
            "fixed_ms": fixed,
            "per_row_ms": per_row,
            "memory_bytes": sum(v.numel() * v.element_size() for v in policy.initial_memory(1).values()),
            "peak_gib": peak["gib"],
        }
        medians = ", ".join(f"{batch}: {median(ms):.1f}" for batch, ms in by_batch.items())
        console.print(f"{name}: milliseconds by batch {medians}")
    return {"memories": told, "pictures": 1, "pixels": study.picture}


def act_ms(policy: Policy, batch: int, study: GPUStudy) -> list[float]:
    """Milliseconds of consecutive steps of so many episodes, the first three not counted."""
    memory, taken = policy.initial_memory(batch), []
    for step in range(3 + study.repeats):
        rng = np.random.default_rng(step)
        observations = [
            Observation(
                {"agentview": rng.integers(0, 256, (study.picture, study.picture, 3), np.uint8)},
                rng.normal(size=8).astype(np.float32),
                _INSTRUCTION,
                step * _CHUNK,
            )
            for _ in range(batch)
        ]
        started = time.perf_counter()
        _, memory = policy.act(observations, memory)  # actions are in main memory: the device has been waited for
        taken.append(1e3 * (time.perf_counter() - started))
    return taken[3:]


def measure_tuning(study: GPUStudy, console: Console) -> dict[str, Any]:
    """Costs of protection, frames per second, and the memory that a run takes."""
    config = protected(study)
    costs = step_costs(config, study.costs)
    frames = study.lanes * study.window
    console.print(f"step: {costs['baseline_ms']:.1f} ms, with the method {costs['method_ms']:.1f} ms")
    runs = variants(config)
    again = replace(runs["method"], training=replace(config.training, activation_checkpointing=True))
    peaks = {
        name: peak_gib(run_, study)
        for name, run_ in {"baseline": runs["baseline"], "method": runs["method"], "checkpointed": again}.items()
    }
    return {
        "costs": costs,
        "frames": frames,
        "frames_per_s": 1e3 * frames / costs["method_ms"],
        "peak_gib": peaks,
        "lora_rank": study.lora_rank,
    }


def protected(study: GPUStudy) -> ExperimentConfig:
    """LoRA on all language layers, HSW at all sites and a Thermostat; teacher and artifact are made."""
    base = study.experiment("gru")
    teacher = study.runs / "teacher"
    base.build(World()).policy.save(teacher)
    probe = ProbeConfig(dataset=study.dataset, records=study.probe)
    places: dict[str, Any] = study.directories
    read_teacher(
        SubspacesConfig(
            **places,
            teacher=teacher,
            probe=probe,
            icsm=ICSMConfig(rank=min(128, study.probe // 2), scoring="fisher"),
            adapters=None,
            batch=16,
            use_gpu=base.use_gpu,
        ),
        study.artifacts / _ARTIFACT,
    )
    return replace(
        base,
        start_from=teacher,
        model=replace(base.model, lora=LoRAConfig(rank=study.lora_rank, alpha=study.lora_rank)),
        forgetting=ForgettingConfig(
            artifact=_ARTIFACT,
            method=HSWConfig(beta=0.9, gamma=0.5),
            thermostat=ThermostatConfig(batch=min(64, study.probe // 2)),
            probe=probe,
        ),
    )


def peak_gib(config: ExperimentConfig, study: GPUStudy) -> float | None:
    """Most memory of three steps of a run that has the device to itself."""
    with _peak(study.device) as peak:
        trainer = Trainer(config, World(device=study.device))
        for batch in trainer.batches(3):
            trainer.step(batch)
        del trainer
    return peak["gib"]


@contextmanager
def _peak(device: torch.device) -> Iterator[dict[str, float | None]]:
    """Fills in `gib`, the most that tensors took meanwhile; None on a CPU."""
    told: dict[str, float | None] = {"gib": None}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield told
    if device.type == "cuda":
        told["gib"] = torch.cuda.max_memory_allocated(device) / 2**30


def measure_planned(study: GPUStudy, console: Console) -> dict[str, Any]:
    """Of each model and format: milliseconds of answers by batch, of LoRA steps by frames, and memory, in GiB."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in ("smallest",) if study.quick else ("openvla", "pi0"):
            model = _smallest(Path(directory)) if study.quick else planned(name, Path(directory) / name)
            said = {way.name: way for way in plan_of(name, model, card_named("h200"), rank=study.lora_rank).ways}
            for label, nf4 in (("bfloat16", None), ("NF4", NF4Config())):
                suffix = ", NF4" if nf4 else ""
                found[f"{name}, {label}"] = {
                    "answers": _answers(model, nf4, said[f"answer{suffix}"], study),
                    "steps": _steps(model, nf4, said[f"LoRA {study.lora_rank}{suffix}"], study),
                }
                console.print(name, label, found[f"{name}, {label}"])
    return found


def _smallest(directory: Path) -> Planned:
    """An OpenVLA for CPUs."""
    save_random_prismatic(directory / "smallest", SMALLEST_OPENVLA, ["a"], torch.bfloat16, weights=False)
    backbone = PrismaticConfig(directory / "smallest")
    return Planned(IPVLAConfig(backbone, NoMemoryConfig(), OpenVLATokensConfig(), chunk=1), 7, image_size=28)


def _answers(model: Planned, nf4: NF4Config | None, way: Way, study: GPUStudy) -> dict[str, Any]:
    network = _drawn(model, nf4, None, study.device).eval()
    told = {}
    for batch in study.planned_batches:
        inputs, memory = _inputs(model, network, batch, study.device), network.initial_memory(batch)
        t, taken = torch.zeros(batch, dtype=torch.int64, device=study.device), []
        with _peak(study.device) as peak:
            for _ in range(2 + study.repeats):
                started = time.perf_counter()
                network.act(inputs, memory, t)[0].cpu()
                taken.append(1e3 * (time.perf_counter() - started))
        told[str(batch)] = {"ms": median(taken[2:]), "gib": peak["gib"], "planned_gib": way.total(batch) / 2**30}
    return told


def _steps(model: Planned, nf4: NF4Config | None, way: Way, study: GPUStudy) -> dict[str, Any]:
    lora = LoRAConfig(rank=study.lora_rank, alpha=study.lora_rank)
    network = _drawn(model, nf4, lora, study.device).train()
    network.backbone.checkpoint_activations()
    optimizer = OptimizerConfig().build(network)
    told = {}
    for frames in study.planned_batches:
        batch, taken = _window(model, network, frames, study.device), []
        with _peak(study.device) as peak:
            for _ in range(2 + study.repeats):
                started = time.perf_counter()
                with torch.autocast(study.device.type, torch.bfloat16):
                    loss, _ = network.loss(batch, network.initial_memory(frames))
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                float(loss.detach())
                taken.append(1e3 * (time.perf_counter() - started))
        planned_gib = way.total(frames, checkpointed=True) / 2**30
        told[str(frames)] = {"ms": median(taken[2:]), "gib": peak["gib"], "planned_gib": planned_gib}
    return told


def _drawn(model: Planned, nf4: NF4Config | None, lora: LoRAConfig | None, device: torch.device) -> IPVLA:
    """Small random weights, layer by layer on the device, so that they need not fit in float32."""
    network = model.build(None)
    with torch.no_grad():
        for part in network.modules():
            for name, weight in list(part.named_parameters(recurse=False)):
                drawn = torch.randn(weight.shape, dtype=weight.dtype, device=device) * 0.02
                setattr(part, name, torch.nn.Parameter(drawn))
            for name, buffer in list(part.named_buffers(recurse=False)):
                part.register_buffer(name, torch.zeros_like(buffer, device=device), persistent=False)
    settle = getattr(network.backbone.vlm, "settle", None)
    if settle is not None:  # the frequencies of OpenVLA's rotation; zeros take pi0's the same time
        settle()
        network.to(device)
    if hasattr(network.backbone.vlm, "tie_weights"):
        network.backbone.vlm.tie_weights()
    network.action_varies.fill_(1)
    if nf4 is not None:
        nf4.apply(network.backbone)
    if lora is not None:
        lora.apply(network.backbone)
    return network.to(device)


def _inputs(model: Planned, network: IPVLA, batch: int, device: torch.device) -> ModelInputs:
    """Random pictures and states, and a prompt as long as the plan's."""
    before = getattr(getattr(network.backbone, "frame", None), "before", (1,))
    ids = torch.tensor([*before, *[5] * PROMPT], device=device).expand(batch, -1)
    side = model.image_size or 224
    images = torch.randint(0, 256, (batch, model.views, side, side, 3), dtype=torch.uint8, device=device)
    state = torch.randn(batch, model.proprio, device=device)
    return ModelInputs(images, state, ids, torch.ones_like(ids, dtype=torch.bool))


def _window(model: Planned, network: IPVLA, frames: int, device: torch.device) -> StepBatch:
    """One step of so many lanes."""
    inputs = _inputs(model, network, frames, device).map(lambda x: x[:, None])
    chunk, (yes, zero) = model.config.chunk, (torch.ones, torch.zeros)
    empty = zero(frames, 1, 0, dtype=torch.int64, device=device)
    numbers = zero(frames, 1, dtype=torch.int64, device=device)
    true = yes(frames, 1, dtype=torch.bool, device=device)
    return StepBatch(
        inputs=inputs, actions=torch.rand(frames, 1, chunk, model.actions, device=device) * 2 - 1,
        action_valid=yes(frames, 1, chunk, dtype=torch.bool, device=device), is_first=true, valid=true, t=numbers,
        episode_key=numbers, noise_seed=numbers, plan=empty, last_plan=empty, question=empty, answer=empty,
    )  # fmt: skip


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What is promised of protection on any device."""
    costs = figures["tuning"]["costs"] if "tuning" in figures else {}
    bounds = {"hsw_step_ratio": 1.05, "thermostat_step_ratio": 1.02}
    return [Target.of(f"{name}_gpu", one, bounds[name]) for name, one in costs.items() if name in bounds]


def main(study: GPUStudy) -> None:
    """Measures and prints; what is not in small is recorded."""
    console = Console()
    if study.quick:
        costs = replace(study.costs, rounds=6, warmup=1, draws=50)
        small = replace(
            study,
            batches=study.batches[:2],
            planned_batches=(1, 2),
            repeats=3,
            lanes=2,
            window=2,
            probe=32,
            costs=costs,
        )
        study = small
    measures = {"acting": measure_acting, "tuning": measure_tuning, "planned": measure_planned}
    with placed(study, study.quick) as here:
        device = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "CPU"

        def measured(part: str) -> Figures:
            return {**measures[part](here, console), "device": device}

        measure_parts("gpu", here, measured, targets, console)


if __name__ == "__main__":
    run(GPUStudy, main, __doc__)
