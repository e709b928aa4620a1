"""The auxiliary loss that reads the plan from the cognition."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ipvla.experiment import ExperimentConfig
from ipvla.models.auxiliary_losses import PlanReadoutConfig
from ipvla.models.memory import PromptMemoryConfig
from ipvla.training.parallel import World
from ipvla.types import NO_TOKEN


def test_it_teaches_the_cognition_what_the_plan_says() -> None:
    torch.manual_seed(0)
    readout = PlanReadoutConfig(tokens=3, weight=1.0).build(width=8, vocabulary=20)
    cognition = torch.randn(2, 8, requires_grad=True)
    plan = torch.tensor([[5, 7, NO_TOKEN], [0, NO_TOKEN, NO_TOKEN]])
    optimizer = torch.optim.Adam([*readout.parameters(), cognition], lr=0.05)
    first = float(readout.loss(cognition, plan).detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss = readout.loss(cognition, plan)
        loss.backward()
        optimizer.step()
    assert first > 2
    assert loss < 0.1


def test_padding_and_missing_plans_teach_nothing() -> None:
    readout = PlanReadoutConfig(tokens=3, weight=1.0).build(width=8, vocabulary=20)
    cognition = torch.randn(2, 8, requires_grad=True)
    readout.loss(cognition, torch.tensor([[5, 7, NO_TOKEN], [NO_TOKEN] * 3])).backward()
    assert cognition.grad is not None
    assert cognition.grad[0].any()
    assert not cognition.grad[1].any()
    assert readout.loss(cognition, torch.full((2, 3), NO_TOKEN)).item() == 0


def test_off_means_gone(make_experiment: Callable[..., ExperimentConfig]) -> None:
    """Without it there is no weight of it, batches carry no plans, and actions do not depend on it."""
    config = make_experiment()
    plain = config.build(World())
    assert not any("plan_readout" in name for name, _ in plain.state.model.named_parameters())
    assert plain.lanes.batch(plain.state.position).plan.shape[-1] == 0
    on = replace(config, model=replace(config.model, plan_readout=PlanReadoutConfig(tokens=12))).build(World())
    batch = on.lanes.batch(on.state.position)
    assert (batch.plan != NO_TOKEN).any()
    on.state.model.load_state_dict(plain.state.model.state_dict(), strict=False)
    memory = plain.state.model.initial_memory(4)
    one = (batch.inputs.map(lambda x: x[:, 0]), memory, batch.t[:, 0])
    assert torch.equal(plain.state.model.act(*one)[0], on.state.model.act(*one)[0])
    assert on.state.model.loss(batch, memory)[0] > plain.state.model.loss(batch, memory)[0]


def test_wrong_settings_are_refused(make_experiment: Callable[..., ExperimentConfig]) -> None:
    with pytest.raises(ValueError, match=r"model\.plan_readout\.tokens is 0"):
        PlanReadoutConfig(tokens=0)
    with pytest.raises(ValueError, match=r"model\.plan_readout\.weight is 0"):
        PlanReadoutConfig(weight=0)
    model = replace(
        make_experiment().model, memory=PromptMemoryConfig(plan_tokens=10), plan_readout=PlanReadoutConfig(12)
    )
    with pytest.raises(ValueError, match=r"plan_readout\.tokens 12 exceeds memory\.plan_tokens 10"):
        make_experiment(model=model).build(World())
