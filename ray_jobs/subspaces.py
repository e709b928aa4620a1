"""`python -m ray_jobs.subspaces`: the teacher's fragile directions (ICSM), once, before fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ipvla.data.probe import ProbeConfig, ProbeSet
from ipvla.forgetting.distillation import TeacherOutputs
from ipvla.forgetting.drift import DriftProbe
from ipvla.forgetting.fisher import DiagonalFisher, FisherConfig
from ipvla.forgetting.icsm import ICSMConfig
from ipvla.forgetting.module_statistics import collect
from ipvla.forgetting.subspaces import Subspaces
from ipvla.models.adapters import LoRAConfig
from ipvla.policy import Policy
from ipvla.rollout.policy_actor import PolicySource
from ipvla.sim.fingerprint import commit
from ipvla.storage import StorageRoots
from ipvla.training.readers import FeatureReader
from ipvla.training.target import VLM
from ray_jobs.command_line.cli import run
from ray_jobs.running.cluster import Demand, connect, supplied


@dataclass(frozen=True)
class SubspacesConfig(StorageRoots):
    """From a trained policy and a probe to `artifact_dir/NAME`.

    Attributes:
        teacher: directory of the policy that fine-tuning will start from; its LoRA adapters are merged, as there.
        name: of the artifact; by default icsm_, the backbone's name and, of a control, _ and its order.
        probe: records to read the teacher on. A probe is collected once, on layouts of its own:
            python -m ray_jobs.collect --dataset recall_probe --seed 7 --data_root_dir STORAGE_ROOT/probe ...
        icsm: how directions are found and scored.
        adapters: the modules that get second moments (two_sided, input_decay, gpm, corda), or None for none.
        fisher: of which weights the diagonal Fisher information is measured for ewc, or None for none.
        batch: records per forward pass.
        use_gpu: the teacher takes one GPU.
        show_masks: records whose instruction tokens are shown; then nothing is computed.
    """

    teacher: Path | None = None
    name: str | None = None
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    icsm: ICSMConfig = field(default_factory=ICSMConfig)
    adapters: LoRAConfig | None = field(default_factory=LoRAConfig)
    fisher: FisherConfig | None = None
    batch: int = 32
    use_gpu: bool = False
    show_masks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be at least 1")
        if self.fisher is not None and self.fisher.weights == "adapters" and self.adapters is None:
            raise ValueError(
                'fisher.weights is "adapters", but adapters is null; name modules, or set fisher.weights to "all"'
            )


@dataclass(frozen=True)
class Teacher:
    """The policy and the probe, opened."""

    policy: Policy
    directory: Path
    probe: ProbeSet

    @property
    def backbone(self) -> str:
        config = self.policy.config.backbone
        return str(config.get_choice_name(type(config)))

    @classmethod
    def open(cls, config: SubspacesConfig, device: str = "cpu") -> Teacher:
        """CheckpointError or DatasetError if policy or probe are missing or damaged.

        ValueError for OSF, and for the Fisher information of weights in 4 bits.
        """
        if config.teacher is None:
            raise ValueError(
                "teacher is not given; name a policy's directory, e.g. --teacher runs/STUDY/NAME/policy"
            )
        policy = Policy.load(config.teacher, device).merged()
        if config.fisher is not None and policy.config.nf4 is not None:
            raise ValueError(
                f"fisher is set, and the weights of {config.teacher} are in 4 bits (model.nf4), which have no "
                "gradient; set fisher to null, or read a teacher without model.nf4"
            )
        return cls(policy, config.teacher, config.probe.build(config.probes))


def find(config: SubspacesConfig) -> tuple[Path, Subspaces]:
    """Reads the teacher on the probe and writes the artifact: its directory, and what is in it.

    Raises:
        CheckpointError, DatasetError: policy or probe are missing or damaged.
        ValueError: the probe is too small for the rank, or no instruction token reaches the output.
    """
    config.prepare(writes=("artifact_dir",))
    teacher = Teacher.open(config)  # errors come before Ray is started
    order = "" if config.icsm.order == "sensitivity" else f"_{config.icsm.order}"
    directory = config.artifacts / (config.name or f"icsm_{teacher.backbone}{order}")
    resources = {"num_cpus": 1, "num_gpus": int(config.use_gpu)}
    reader = Demand("1 reader", {"CPU": 1, "GPU": int(config.use_gpu)}, 1, "set use_gpu to false")
    with connect(config), supplied(reader):
        return directory, ray.get(ray.remote(**resources)(read_teacher).remote(config, directory))


def read_teacher(config: SubspacesConfig, directory: Path) -> Subspaces:
    """`find` in this process: writes all that was asked for and, last, the subspaces."""
    teacher = Teacher.open(config, "cuda" if config.use_gpu else "cpu")
    model = FeatureReader(teacher.policy.model, teacher.backbone)
    batches = teacher.probe.batches(teacher.policy.transforms, config.batch)
    meta: dict[str, Any] = {
        "probe_sha256": teacher.probe.sha256,
        "commit": commit(),
        "teacher_sha256": PolicySource(Policy.load, teacher.directory).sha256(),
    }
    subspaces = config.icsm.build().fit(model, batches, meta)
    drift = DriftProbe.measure(model, batches, sorted(subspaces.layers))
    identity = {"backbone": teacher.backbone, "width": model.width, "num_layers": len(model.layers)}
    drift.save(directory, meta | identity)
    TeacherOutputs.measure(model, batches, meta).save(directory)
    if config.fisher is not None:
        records = (
            teacher.probe.batch(teacher.policy.transforms, [record]) for record in range(len(teacher.probe))
        )
        DiagonalFisher.measure(model, records, _weights(config, teacher), meta, config.fisher).save(directory)
    if config.adapters is not None:
        targets = config.adapters.targets(teacher.policy.model.backbone)
        collect(model, batches, targets, meta | identity).save(directory)
    subspaces.save(directory)
    return subspaces


def _weights(config: SubspacesConfig, teacher: Teacher) -> dict[str, nn.Parameter]:
    """Those whose Fisher information is measured, by name in the teacher's model."""
    model = teacher.policy.model
    if config.fisher is None or config.adapters is None or config.fisher.weights == "all":
        return dict(model.named_parameters())
    return {f"{VLM}{name}": weight for name, weight in config.adapters.weights(model.backbone).items()}


def energy_table(subspaces: Subspaces) -> Table:
    """Per language layer, what of the output's gradient goes through the instruction's positions."""
    table = Table(title="Gradient at instruction positions")
    for heading in ("layer", "share of energy", "fragility", "represents"):
        table.add_column(heading, justify="right")
    represents = {group.representative: group for group in subspaces.groups}
    for layer, row in subspaces.meta["energy"].items():
        group = represents.get(int(layer))
        nothing = " (carries nothing)" if row["carries_nothing"] else ""
        table.add_row(
            layer,
            f"{row['instruction_share']:.3g}{nothing}",
            f"{row['fragility']:.3g}",
            ", ".join(map(str, group.layers)) if group else "",
        )
    return table


def masked_tokens(teacher: Teacher, record: int) -> tuple[str, list[str]]:
    """A record's instruction, and those tokens of its prompt that the instruction mask holds."""
    terms = teacher.policy.transforms
    (observation,) = teacher.probe.observations([record], terms.cameras, terms.points)
    inputs = teacher.policy.transforms.inputs([observation])
    backbone = teacher.policy.model.backbone
    with torch.no_grad():
        embedded = backbone.embed(inputs.to(teacher.policy.model.action_varies.device))
    ids = inputs.input_ids[0, : int(inputs.attention_mask.sum())]
    end = int(embedded.last[0]) + 1
    mask = embedded.instruction[0, end - len(ids) : end].to(ids.device)
    return observation.instruction, [backbone.detokenize([int(i)]) for i in ids[mask]]


def main(config: SubspacesConfig) -> None:
    """Finds the subspaces, or shows the masks that were asked for."""
    console = Console()
    if config.show_masks:
        teacher = Teacher.open(config)
        for record in config.show_masks:
            if not 0 <= record < len(teacher.probe):
                raise ValueError(
                    f"show_masks: there is no record {record}; choose among 0..{len(teacher.probe) - 1}"
                )
            instruction, tokens = masked_tokens(teacher, record)
            console.print(f"{record}: {instruction!r} -> {' | '.join(tokens)}", markup=False)
        return
    directory, subspaces = find(config)
    console.print(energy_table(subspaces))
    if empty := subspaces.meta["empty_masks"]:
        console.print(f"{empty} of {subspaces.meta['records']} records were left out: no instruction tokens")
    for layer, agreement in subspaces.meta["agreement"].items():
        shown = "undefined: the scores are all the same" if agreement is None else f"{agreement:.2f}"
        console.print(f"layer {layer}: rank correlation of injection and Fisher scores {shown}")
    console.print(f"written to {directory}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(SubspacesConfig, main, __doc__)
