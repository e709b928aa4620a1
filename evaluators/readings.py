"""How far a policy is from its teacher, and what it still answers: without a simulator, saved beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from evaluators.grounding import GroundingConfig, grounding
from evaluators.success_table import SuccessRow
from ipvla.data.probe import ProbeConfig
from ipvla.files import write_text
from ipvla.forgetting.drift import DriftProbe, pool
from ipvla.policy import Policy
from ipvla.training.feature_reader import FeatureReader

_BATCH = 64


@dataclass(frozen=True)
class ReadingsConfig:
    """What is read.

    Attributes:
        teacher: directory of the policy that fine-tuning started from.
        artifact: directory of its drift vectors.
        probe: the records that both are read on.
        questions: about held-out pictures.
    """

    teacher: Path
    artifact: Path
    probe: ProbeConfig
    questions: GroundingConfig


@dataclass(frozen=True)
class Readings:
    """Of one policy.

    Attributes:
        kl: mean KL(teacher || student) of the output over the probe, nats.
        drift: paired d over the whole probe.
        questions: the answers' rows, see `evaluators.grounding`.
    """

    kl: float
    drift: float
    questions: tuple[SuccessRow, ...]


def read(config: ReadingsConfig, policy: Path, probes: Path, cache: Path) -> Readings:
    """The readings of the policy in `policy`, from `readings.json` beside it if they were taken before."""
    kept = policy.parent / "readings.json"
    if not kept.exists():
        taken = _take(config, policy, probes, cache)
        write_text(kept, json.dumps(asdict(taken), indent=1))
    values = json.loads(kept.read_text())
    return Readings(values["kl"], values["drift"], tuple(SuccessRow(*row.values()) for row in values["questions"]))


def _take(config: ReadingsConfig, policy: Path, probes: Path, cache: Path) -> Readings:
    torch.set_num_threads(1)
    teacher, student = Policy.load(config.teacher), Policy.load(policy)
    probe = config.probe.build(probes)
    backbone = teacher.config.backbone
    name = backbone.get_choice_name(type(backbone))
    models = [FeatureReader(p.model, name) for p in (teacher, student)]
    batches = probe.batches(teacher.transforms, _BATCH)
    divergences = []
    with torch.no_grad():
        for batch in batches:
            theirs, ours = (model.read(batch).output for model in models)
            divergences.append(models[0].divergence(ours, theirs))
    drift = _drift(config, models[1], batches)
    return Readings(float(torch.cat(divergences).mean()), drift, grounding(student, config.questions.build(cache)))


def _drift(config: ReadingsConfig, student: FeatureReader, batches: Sequence[object]) -> float:
    meta = json.loads((config.artifact / "drift.json").read_text())
    probe = DriftProbe.load(config.artifact, backbone=student.name, layers=meta["layers"])
    vectors = [pool(student, batch, list(probe.teacher))[0] for batch in batches]
    whole = {layer: torch.cat([v[layer] for v in vectors])[probe.usable] for layer in probe.teacher}
    return probe.read(whole, np.asarray(probe.usable)).paired
