"""An experiment: one tree of settings, and the order in which the parts are built from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import draccus
import numpy as np
import torch

from ipvla.contract import Contract, ContractError
from ipvla.data.augmentation import AugmentationConfig
from ipvla.data.conventions import PAST_END, Conventions, PastEnd
from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.data.geometry import GeometryConfig, PointTerms
from ipvla.data.lanes import LaneConfig, LaneReader
from ipvla.data.mixture_dataset import Dataset, MixtureDataset
from ipvla.data.mixtures import OXE_MIXTURES, Mixture, mixture_named
from ipvla.data.normalisation import NORMALISATIONS, Normalisation
from ipvla.data.reasoning import ReasoningConfig
from ipvla.data.source import BrokenEpisodeError, DatasetError
from ipvla.data.sources import RLDS_BACKENDS, RldsBackend, absolute_location, dataset_location
from ipvla.data.standards import StandardConfig
from ipvla.data.standards.standard import EncodedEpisode
from ipvla.models.vla import IPVLA, IPVLAConfig
from ipvla.policy import CheckpointError, Policy, policy_conventions, policy_sha256
from ipvla.storage import StorageRoots, paths_of_fields_absolute
from ipvla.tracking import TrackingConfig
from ipvla.training.feature_cache import hold_features
from ipvla.training.loop import TrainingConfig
from ipvla.training.parallel import World
from ipvla.training.precision import loss_scaler
from ipvla.training.protection import ForgettingConfig
from ipvla.training.step import OptimizerConfig, TrainingState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
        dataset: name of an RLDS dataset or a LeRobotDataset v3 under `data_root_dir`, of which the newest version
            is taken; or the address of one in object storage.
        mixture: instead of one dataset, several with their weights (`ipvla.data.mixtures.Mixture`); or the name of
            a public one as `dataset`. Rollouts are normalised as its first dataset, or as they are told.
        standard: how the features of a dataset that is not known by name become robot episodes.
        skip_noops: leave out steps that do nothing.
        padded_state: a 0 before the gripper in the state of LIBERO and Bridge, as OpenVLA has it.
        normalisation: of actions and proprioception: bounds_q99, bounds, normal, quantiles or min_max
            (`ipvla.data.normalisation`).
        past_end: what a chunk holds past its episode's end: `mask` (no targets there), `openvla` or `truncate`
            (`ipvla.data.conventions`).
        skip_bad_episodes: go on without episodes that cannot be read, and say how many.
        skip_unlabelled: leave out episodes whose task is not told in words; reads the dataset once.
        reasoning: of the episodes, from ECoT's file beside the dataset; null for what the dataset itself recorded.
        rlds_backend: native, or dlimp for TensorFlow's own way to read RLDS (requirements-oxe.txt).
        cameras: views in order.
        image_size: side in pixels that the model sees.
        proprio: columns of the recorded proprioception that the model sees; None for all, [] for none.
        augmentation: how training pictures vary; null for not at all.
        geometry: of the pictures, for `model.fusion`; null for its defaults.
        cache_gib: memory for decoded frames, per worker.
    """

    dataset: str = "recall"
    cameras: tuple[str, ...] = ("agentview",)
    image_size: int = 64
    proprio: tuple[int, ...] | None = None
    cache_gib: float = 2.0
    mixture: dict[str, float] = field(default_factory=dict)
    standard: StandardConfig | None = None
    skip_noops: bool = False
    padded_state: bool = False
    normalisation: Normalisation = "bounds_q99"
    past_end: PastEnd = "mask"
    skip_bad_episodes: bool = False
    skip_unlabelled: bool = False
    rlds_backend: RldsBackend = "native"
    reasoning: ReasoningConfig | None = None
    augmentation: AugmentationConfig | None = None
    geometry: GeometryConfig | None = None

    def __post_init__(self) -> None:
        known = {"normalisation": NORMALISATIONS, "past_end": PAST_END, "rlds_backend": RLDS_BACKENDS}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.cache_gib <= 0:
            raise ValueError(f"data.cache_gib is {self.cache_gib}; it must be above 0")

    def absolute(self) -> Self:
        """With absolute paths, those of datasets too."""
        mixture = {absolute_location(name): weight for name, weight in self.mixture.items()}
        config = replace(self, dataset=absolute_location(self.dataset), mixture=mixture)
        return paths_of_fields_absolute(config)

    def build(self, data_root: Path, read_root: Path | None = None) -> Dataset:
        """Opens the dataset or datasets. DatasetError if one is missing or damaged.

        Args:
            data_root: the directory of all datasets.
            read_root: where what is only known once they were read is kept.
        """
        mixture = Mixture(self.mixture) if self.mixture else None
        if mixture is None and self.dataset in OXE_MIXTURES and not (data_root / self.dataset).exists():
            mixture = mixture_named(self.dataset)
        if mixture is None:
            return self._open(data_root, self.dataset, 1, read_root)
        shares = len(mixture.weights)
        parts = {name: self._open(data_root, name, shares, read_root) for name in mixture.weights}
        return MixtureDataset(parts, mixture, self.proprio)

    def _open(self, data_root: Path, name: str, shares: int, read_root: Path | None) -> EpisodeDataset:
        return open_dataset(
            dataset_location(data_root, name),
            int(self.cache_gib * 2**30 / shares),
            standard=self.standard,
            skip_noops=self.skip_noops,
            padded_state=self.padded_state,
            read_root=read_root,
            skip_bad_episodes=self.skip_bad_episodes,
            skip_unlabelled=self.skip_unlabelled,
            rlds_backend=self.rlds_backend,
            reasoning=self.reasoning,
        )


@dataclass(frozen=True)
class ExperimentConfig(StorageRoots):
    """One training run.

    Attributes:
        name: the run's, unique in its study; its directory is `run_root_dir/study/name`.
        study: the MLflow experiment that the run belongs to.
        seed: of the weights; `lanes.seed` is that of the data's order.
        num_workers: training workers; use_gpu: one GPU each.
        start_from: directory of a trained policy whose weights and normalisation this run begins with, if any; a
            memory of another mechanism begins afresh. Its LoRA adapters are merged, for the next task.
        parent_run_key: the directory of the run that this one is nested under in MLflow, if any.
        parent_run_id: the same by its MLflow id, where another program made it.
        tracking: what MLflow gets of the run.
        forgetting: protection of what `start_from` knows, or None.
    """

    most_used: ClassVar[tuple[str, ...]] = (
        "study", "name", "start_from", "use_gpu", "num_workers", "data.dataset", "data.cameras", "data.image_size",
        "model.backbone.type", "model.memory.type", "model.head.type", "optimizer.lr", "training.steps",
    )  # fmt: skip

    name: str = "train"
    study: str = "recall"
    seed: int = 0
    num_workers: int = 1
    use_gpu: bool = False
    start_from: Path | None = None
    parent_run_key: str | None = None
    parent_run_id: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    lanes: LaneConfig = field(default_factory=LaneConfig)
    model: IPVLAConfig = field(default_factory=IPVLAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    forgetting: ForgettingConfig | None = None

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers is {self.num_workers}; it must be at least 1")
        if self.lanes.stride > self.model.chunk:
            raise ValueError(
                f"lanes.stride {self.lanes.stride} exceeds model.chunk {self.model.chunk}: "
                "the policy would run out of actions; lower the stride or raise the chunk"
            )
        if self.model.head.bounded and self.data.normalisation in ("normal", "quantiles"):
            raise ValueError(
                f"data.normalisation {self.data.normalisation} leaves actions without bounds, and model.head "
                "covers [-1, 1] alone; choose bounds_q99 or bounds, or another head"
            )
        if self.model.head.distils and self.start_from is None:
            raise ValueError(
                "model.head.distil learns from the policy in start_from, which is not set; give the directory of "
                "a trained policy with the same head"
            )
        if self.data.reasoning is not None and "reasoning" not in self.model.requires():
            raise ValueError(
                "data.reasoning is set, and nothing is trained on it; set model.reasoning_loss ({} for its "
                "defaults), or data.reasoning to null"
            )
        if self.model.nf4 is not None:
            self._check_nf4()
        if self.training.feature_cache_gib and self.data.augmentation is not None:
            raise ValueError(
                "training.feature_cache_gib is set, and data.augmentation makes other pictures in every epoch; "
                "set the former to 0, or the latter to null"
            )
        if self.model.fusion.reads and self.data.augmentation is not None and self.data.augmentation.shift_px:
            raise ValueError(
                "data.augmentation.shift_px moves pictures away from their points, which model.fusion reads; set "
                "it to 0"
            )
        if self.data.geometry is not None and not self.model.fusion.reads:
            raise ValueError("data.geometry is set, and model.fusion.type none reads no points; set it to null")
        if self.training.sharding == "fsdp":
            self._check_sharding()

    def _check_nf4(self) -> None:
        """ValueError for what would train or change weights in 4 bits."""
        if self.model.lora is None and not self.model.head.distils:
            raise ValueError(
                "model.nf4 freezes the backbone's weights in 4 bits, and nothing adapts them; set "
                "model.lora.rank, or model.nf4 to null"
            )
        method = self.protected_by.method if self.protected_by else None
        if method is not None and method.moves_base:
            raise ValueError(
                f"forgetting.method.type {method.get_choice_name(type(method))} changes the weights below the "
                "adapters, which model.nf4 freezes in 4 bits; set model.nf4 to null, or take another method"
            )

    def _check_sharding(self) -> None:
        """ValueError for what runs other parts of the model on each worker, or needs whole weights."""
        model, method = self.model, self.protected_by.method if self.protected_by else None
        refused = {
            f"model.memory.type {model.memory.get_choice_name(type(model.memory))}": not model.memory.shards,
            "model.reasoning_loss": model.reasoning_loss is not None,
            "model.questions": model.questions is not None,
            "model.plan_readout": model.plan_readout is not None,
            "model.osf": model.osf is not None,
            "model.nf4": model.nf4 is not None,
            "model.fusion": model.fusion.reads,
            f"model.speeds.type {model.speeds.kind}": model.speeds.two,
        }
        if method is not None and not method.shards:
            refused[f"forgetting.method.type {method.get_choice_name(type(method))}"] = True
        if wrong := [setting for setting, found in refused.items() if found]:
            raise ValueError(
                f"training.sharding is fsdp, which {' and '.join(wrong)} cannot be trained under; set it to ddp, "
                "or do without these"
            )

    @property
    def run_directory(self) -> Path:
        return self.runs / self.study / self.name

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run that resumes from it."""
        return {
            "model": draccus.encode(self.model),
            "data": draccus.encode(self.data),
            "lanes": draccus.encode(self.lanes),
            "seed": self.seed,
            "start_from": self.start_from and str(self.start_from),
            **({"forgetting": draccus.encode(self.protected_by)} if self.protected_by else {}),
        }

    @classmethod
    def completed(cls, recorded: dict[str, Any]) -> dict[str, Any]:
        """Some of a run's settings as recorded, with the defaults of those inside that have come since."""
        try:
            settings = draccus.encode(draccus.decode(cls, recorded))
        except draccus.ParsingError:  # settings that are gone: who compares names them
            return recorded
        return {name: settings[name] for name in recorded}

    @property
    def protected_by(self) -> ForgettingConfig | None:
        """`forgetting`, unless it is switched off."""
        return self.forgetting if self.forgetting and self.forgetting.enabled else None

    @property
    def exports_adapters(self) -> bool:
        """Are there adapters that PEFT can put on the weights of `start_from` again?"""
        moved = self.protected_by is not None and self.protected_by.method.moves_base
        return self.model.adapted is not None and not moved

    def open_dataset(self) -> Dataset:
        """What is trained on. DatasetError if it is missing or damaged."""
        return self.data.build(self.datasets, self.cache / "datasets")

    def check(self, dataset: Dataset) -> None:
        """What can be known of settings and data before any model is built; also warns of what will be lost.

        Once, before workers start: it reads many episodes, and the tokenizer all instructions. `build` repeats no
        more than what tells at once.

        Raises:
            DatasetError: the dataset has broken episodes, lacks a camera, or what the model is trained on; or
                `data.reasoning` is about none of its episodes.
            CheckpointError: there is no policy in `start_from`.
            ContractError: the policy there was trained on data in other terms.
            ValueError: an instruction's prompt is too long, or the backbone's weights are none.
        """
        self._require(dataset)
        try:
            dataset.observation(0, 0, self.data.cameras)
        except BrokenEpisodeError:
            if not dataset.skips_bad_episodes:
                raise
        _require_coverage(dataset)
        self.model.check(sorted(dataset.instructions()), len(self.data.cameras))
        if self.start_from is not None:
            start = policy_conventions(self.start_from)
            if start is None:
                raise CheckpointError(
                    f"start_from: no policy in {self.start_from}; give a directory that ray_jobs.train wrote, "
                    "e.g. runs/STUDY/NAME/policy"
                )
            _require_same_terms(start.contract, dataset.contract, str(self.start_from), dataset.name)
        if dataset.reworded:
            logger.warning(
                "%s: the task in words changes within %d of %d episodes; the first words are used throughout",
                *(dataset.location, dataset.reworded, len(dataset)),
            )

    def _require(self, dataset: Dataset) -> None:
        """DatasetError if it has broken episodes, or lacks a camera or what the model is trained on."""
        dataset.statistics()
        dataset.require_readable()
        missing = [camera for camera in self.data.cameras if camera not in dataset.cameras]
        if missing:
            raise DatasetError(
                f"data.cameras names {', '.join(missing)}, and {dataset.location} has "
                f"{', '.join(dataset.cameras)}: "
                f'choose among these, for example --data.cameras "[{", ".join(dataset.cameras)}]"'
            )
        for feature, settings in self.model.requires().items():
            if not _recorded(dataset, feature):
                what, remedy = _REQUIRED[feature]
                raise DatasetError(
                    f"dataset: {dataset.location} has no {what}, which {' and '.join(settings)} "
                    f"{'are' if len(settings) > 1 else 'is'} trained on; {remedy}, or do without"
                )
        self.points(dataset)

    def points(self, dataset: Dataset) -> PointTerms | None:
        """How the model's points are made of the dataset's depth; None for a model that reads none.

        DatasetError if it has no depth, or points would be a guess that nobody asked for.
        """
        if not self.model.fusion.reads:
            return None
        lacking = dataset.without_geometry(self.data.cameras)
        return (self.data.geometry or GeometryConfig()).terms(dataset.location, *lacking)

    def build(self, world: World) -> Experiment:
        """Dataset -> conventions -> policy -> optimizer -> lanes, seeded; the same on every worker.

        Raises:
            DatasetError: the dataset is missing, damaged, or lacks what the memory is trained on.
            CheckpointError: there is no policy in `start_from`.
            ArtifactError: the subspaces of `forgetting` are missing or of something else.
            ValueError: the policy in `start_from` has other sizes, or `forgetting.method` does not fit the model.
        """
        dataset = self.open_dataset()
        self._require(dataset)
        start = None if self.start_from is None else self._begun(Policy.load(self.start_from))
        torch.manual_seed(self.seed)
        if start is not None:
            _require_same_terms(start.transforms.contract, dataset.contract, str(self.start_from), dataset.name)
        conventions = self.conventions(dataset, start)
        policy = Policy.build(self.model, conventions, self.lanes.stride, start.model if start else None)
        if any(parameter.is_meta for parameter in policy.model.parameters()):
            raise ValueError(
                "model.backbone.pretrained describes a model without its weights, as an imported policy does; set "
                "start_from to that policy"
            )
        if start is None:
            policy.model.calibrate(_mean_image(dataset, conventions))
        model = policy.model.to(world.device)
        if self.training.activation_checkpointing:
            model.backbone.checkpoint_activations()
        if self.training.feature_cache_gib:
            hold_features(model.backbone, self.training.feature_cache_gib)
        memory = model.initial_memory(self.lanes.lanes)
        wrapped = world.wrap(model, self.training.sharding)
        optimizer = self.optimizer.build(model)
        protection = None
        if self.protected_by is not None:
            backbone = self.model.backbone.get_choice_name(type(self.model.backbone))
            protection = self.protected_by.build(
                model,
                backbone,
                optimizer,
                policy.transforms,
                self.artifacts,
                self.probes,
                self.seed,
                policy_sha256(self.start_from) if self.start_from else None,
            )
        scaler = loss_scaler(self.training.precision, world.device)
        if scaler.is_enabled():
            _require_scalable(model)
        state = TrainingState(model, wrapped, optimizer, memory, protection=protection, scaler=scaler)
        lanes = self.lanes.build(dataset, policy.transforms, world.rank, world.size, self.data.augmentation)
        return Experiment(policy, state, lanes)

    def _begun(self, start: Policy) -> Policy:
        """The policy that training begins with: merged, and in 4 bits if these are the same bits here."""
        own, there = self.model.nf4, start.config.nf4
        start = start.merged()
        if own is None or start.config.nf4 is None or not own.same_bits(start.config.nf4):
            start = start.dequantised()
            if there is not None:
                end = "they stay so" if own is None else "they are quantised anew, which changes them"
                logger.warning("start_from: its weights in 4 bits were turned into ordinary ones, and %s", end)
        return start

    def conventions(self, dataset: Dataset, start: Policy | None = None) -> Conventions:
        """The dataset's units, or those that `start` was trained in; the rest as the settings have it."""
        chosen: dict[str, Any] = {
            "cameras": self.data.cameras,
            "image_size": self.data.image_size,
            "chunk": self.model.chunk,
            "proprio_index": self.data.proprio,
            "past_end": self.data.past_end,
            "recorded": dataset.contract.pictures_alone,
            "points": self.points(dataset),
        }
        if start is not None:
            began = start.transforms.conventions
            named = set(dataset.mixed() or (dataset.name,))
            return replace(began, **chosen, mixed=began.mixed if named <= began.mixed.keys() else {})
        return Conventions(
            statistics=dataset.statistics(),
            normalisation=self.data.normalisation,
            absolute=dataset.standard.absolute,
            gripper=dataset.standard.gripper,
            mixed=dataset.mixed(),
            **chosen,
        )


@dataclass(frozen=True)
class Experiment:
    """What a training worker works with."""

    policy: Policy
    state: TrainingState
    lanes: LaneReader


def _require_scalable(model: IPVLA) -> None:
    """ValueError if weights in float16 are trained: their updates would be lost, however the loss is scaled."""
    if any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
        raise ValueError(
            "training.precision is fp16, and weights in float16 are trained; set model.backbone.dtype to float32, "
            "or train adapters alone (model.lora)"
        )


def _require_same_terms(policy: Contract, data: Contract, directory: str, dataset: str) -> None:
    """ContractError if a policy's normalisation does not apply to the data that it is trained on further."""
    for name in ("action_size", "state_size", "gripper"):
        if getattr(policy, name) != getattr(data, name):
            remedy = "train it on data like its own, or start afresh"
            if name == "state_size" and abs(more := policy.state_size - data.state_size) == 1:
                remedy = f"of LIBERO and Bridge set --data.padded_state {str(more > 0).lower()}; else {remedy}"
            raise ContractError(
                f"start_from: the policy in {directory} has {name} {getattr(policy, name)!r}, and dataset "
                f"{dataset} has {getattr(data, name)!r}; {remedy}"
            )


#: What a step feature is called where it is missing, and how a dataset gets it.
_REQUIRED = {
    "reasoning": (
        "plans (step feature `reasoning`)",
        "collect it again, give a file of them (data.reasoning)",
    ),
    "question": ("questions (step features `question`, `answer`)", "collect it again"),
}


def _require_coverage(dataset: Dataset) -> None:
    """DatasetError if there is a file of reasoning, and it says nothing about any of the datasets."""
    covered = dataset.coverage()
    if covered and not any(coverage.found for _, coverage in covered):
        name, coverage = covered[0]
        example = f" ({coverage.unmatched.example})" if coverage.unmatched else ""
        raise DatasetError(
            f"data.reasoning: {name}: {coverage}{example}; give the reasoning file of this dataset, or set "
            "data.reasoning to null"
        )
    for name, coverage in covered:
        log = logger.info if coverage.found else logger.warning
        log("%s: %s", name, coverage)


def _recorded(dataset: Dataset, feature: str) -> bool:
    """Whether steps have such texts. Questions may be missing from an episode, plans may not."""
    if feature == "reasoning":
        # an episode that its file leaves out says nothing of the others
        return bool(_first_readable(dataset).reasoning or dataset.coverage())
    return feature in dataset.step_features


def _first_readable(dataset: Dataset) -> EncodedEpisode:
    for index in range(len(dataset)):
        try:
            return dataset.episode(index)
        except BrokenEpisodeError:
            if not dataset.skips_bad_episodes:
                raise
    raise DatasetError(f"{dataset.location}: no episode can be read; copy or collect it again")


def _mean_image(dataset: Dataset, conventions: Conventions, samples: int = 500) -> torch.Tensor:
    """float32 [3, H, W]: the mean of frames spread evenly over the dataset, in pixel values.

    Where broken episodes are skipped, so are frames that cannot be read.
    """
    episodes = np.linspace(0, len(dataset) - 1, samples).astype(int)
    fraction = np.random.default_rng(0).random(samples)
    steps = (fraction * dataset.lengths[episodes]).astype(int)
    pairs = zip(episodes.tolist(), steps.tolist(), strict=True)
    seen = []
    for episode, step in pairs:
        try:
            seen.append(dataset.observation(episode, step, conventions.cameras))
        except BrokenEpisodeError:
            if not dataset.skips_bad_episodes:
                raise
    if not seen:
        raise DatasetError(f"{dataset.location}: no picture can be read; copy or collect it again")
    images = conventions.images(seen).float()
    return images.mean(dim=(0, 1)).permute(2, 0, 1)
