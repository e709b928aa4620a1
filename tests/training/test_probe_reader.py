"""A reading sees the student as it is now, whatever was kept of the probe's records before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ipvla.experiment import ExperimentConfig
from ipvla.forgetting.drift import pool
from ipvla.models.adapters import LoRAConfig
from ipvla.models.backbones import Embedded
from ipvla.models.vla import IPVLA
from ipvla.training.parallel import World
from ipvla.training.readers import FeatureReader, ProbeReader
from tests.training.fine_tuning import PROBE

LAYERS = (3, 5)
#: What is trained, and whether it leaves alone what enters the language layers.
ADAPTED = {
    "adapters in the layers": (LoRAConfig(rank=2, last_layers=4), True),
    "adapters before the layers": (LoRAConfig(rank=2, last_layers=4, extra=("trunk.mix",)), False),
    "everything": (None, False),
}


def opened(config: ExperimentConfig, lora: LoRAConfig | None) -> tuple[IPVLA, ProbeReader]:
    config = replace(config, model=replace(config.model, lora=lora))
    policy = config.build(World()).policy
    return policy.model, ProbeReader(policy.model, policy.transforms, PROBE.build(config.probes))


def embeddings(model: IPVLA, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills up with how many records are embedded at a time."""
    sizes: list[int] = []
    embed = model.backbone.embed
    monkeypatch.setattr(
        model.backbone, "embed", lambda inputs: (sizes.append(len(inputs.images)), embed(inputs))[1]
    )
    return sizes


@pytest.mark.parametrize(("lora", "kept"), ADAPTED.values(), ids=list(ADAPTED))
def test_vectors_are_those_of_the_student_as_it_is_now(
    tuned: ExperimentConfig,
    lora: LoRAConfig | None,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, reader = opened(tuned, lora)
    transforms, probe = reader._transforms, reader._probe
    sizes = embeddings(model, monkeypatch)
    model.train()
    for records in ([0, 3, 4], [3, 5], [0, 3, 4, 5]):
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        found = reader.pool(records, LAYERS)
        before = len(sizes)
        expected, _ = pool(FeatureReader(model, "tiny"), probe.batch(transforms, records), LAYERS)
        del sizes[before:]
        assert list(found) == list(LAYERS)
        for layer in LAYERS:
            assert found[layer].dtype == torch.float64
            torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-5)
    assert sizes == ([24] if kept else [3, 2, 4]), "the probe is embedded once where that can never change"
    assert model.training


def test_blocks_with_longer_and_shorter_prompts_are_read_as_they_are_apart(
    tuned: ExperimentConfig,
) -> None:
    model, reader = opened(tuned, LoRAConfig(rank=2, last_layers=4))
    model.eval()
    short, long = reader._embed([0]), reader._embed([1])
    longer = replace(  # as if the second prompt were two tokens longer
        long,
        tokens=torch.cat([long.tokens, long.tokens[:, -2:]], 1),
        valid=torch.cat([long.valid, long.valid[:, -2:]], 1),
        instruction=torch.cat([long.instruction, long.instruction[:, -2:]], 1),
    )
    found = {}
    for name, kept in {"short": short, "longer": longer, "both": Embedded.joined([short, longer])}.items():
        reader._cached = kept
        found[name] = reader.pool(range(len(kept.tokens)), LAYERS)
    for layer in LAYERS:
        apart = torch.cat([found["short"][layer], found["longer"][layer]])
        torch.testing.assert_close(found["both"][layer], apart, rtol=1e-4, atol=1e-5)
    assert not model.training
