"""`training.precision`: number formats, and float16 whose loss is scaled."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipvla.experiment import Experiment, ExperimentConfig
from ipvla.forgetting import HSWConfig
from ipvla.models.backbones import PaliGemmaConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.training.checkpoint import load_checkpoint, save_checkpoint
from ipvla.training.loop import TrainingConfig
from ipvla.training.parallel import World
from ipvla.training.precision import autocast_format
from ipvla.training.step import training_step
from tests.training.fine_tuning import Log, equal, protected, trained, weights

CPU = torch.device("cpu")


def test_what_is_asked_for_by_name_is_done() -> None:
    assert autocast_format("bf16", CPU) is torch.bfloat16
    assert autocast_format("fp16", CPU) is torch.float16
    assert autocast_format("fp32", CPU) is None


@pytest.mark.parametrize("tiles", [False, True])
def test_auto_takes_bfloat16_on_cpus_that_multiply_tiles_of_it(
    monkeypatch: pytest.MonkeyPatch, tiles: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert autocast_format("auto", CPU) is (torch.bfloat16 if tiles else None)


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.precision is 'int8'; choose one of auto, bf16, fp16, fp32"):
        TrainingConfig(precision="int8")
    with pytest.raises(ValueError, match=r"training\.precision fp16 needs training\.sharding ddp"):
        TrainingConfig(precision="fp16", sharding="fsdp")


def halved(config: ExperimentConfig) -> ExperimentConfig:
    return replace(config, training=replace(config.training, precision="fp16"))


@pytest.mark.parametrize("method", [HSWConfig(), HSWConfig(beta=0.5, gamma=0.0)], ids=["idle", "cutting"])
def test_float16_trains_what_float32_does(tuned: ExperimentConfig, method: HSWConfig) -> None:
    """The gradient is cut while it is scaled: a cut is linear, so the scale passes through it."""
    whole, half = Log(), Log()
    config = protected(tuned, method)
    expected, ours = trained(config, whole), trained(halved(config), half)
    for (_, a), (_, b) in zip(whole.lines, half.lines, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=0.02)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=0.05)
        assert (b["train/skipped"], b["train/loss_scale"]) == (0, 65536)
        assert b["hsw/nonfinite"] == 0
    started = weights(tuned.build(World()))
    for name, value in weights(expected).items():
        if "lora_B" in name and (moved := (value - started[name]).norm()) > 0:
            away = (weights(ours)[name] - value).norm() / moved
            assert away < 0.25, name  # Adam gives small gradients a full step, whatever their sign


def one_step(experiment: Experiment) -> dict[str, float]:
    with closing(experiment.lanes.batches(experiment.state.position)) as batches:
        _, batch = next(batches)
    return training_step(experiment.state, [batch], 1e-3, 1.0, torch.float16)


def test_a_step_whose_gradient_overflows_is_left_out_and_the_scale_halves(tuned: ExperimentConfig) -> None:
    experiment = halved(protected(tuned, HSWConfig(beta=0.5, gamma=0.0))).build(World())
    state, before = experiment.state, weights(experiment)
    before = {name: value.clone() for name, value in before.items()}
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**60})
    told = one_step(experiment)
    assert (told["skipped"], told["loss_scale"]) == (1, 2.0**59)
    assert math.isfinite(told["loss"])
    assert "grad_norm" not in told, "no mean is spoiled"
    assert all(torch.equal(value, before[name]) for name, value in weights(experiment).items())
    assert state.protection is not None
    assert state.protection.readings()["hsw/nonfinite"] > 0
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 1.0})
    next(p for p in state.model.parameters() if p.requires_grad).register_hook(lambda g: g * float("nan"))
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is nan at step 0; lower optimizer\.lr"):
        one_step(experiment)


def test_a_run_that_stopped_goes_on_with_its_scale(tuned: ExperimentConfig, tmp_path: Path) -> None:
    config = halved(tuned)
    first = config.build(World())
    first.state.scaler.load_state_dict({**first.state.scaler.state_dict(), "scale": 2.0**60})
    one_step(first)
    save_checkpoint(tmp_path / "checkpoint", first.state, first.policy, World(), config.identity)
    resumed = config.build(World())
    load_checkpoint(tmp_path / "checkpoint", resumed.state, World(), config.identity)
    assert resumed.state.scaler.state_dict() == first.state.scaler.state_dict()
    for experiment in (first, resumed):
        one_step(experiment)
    assert equal(first, resumed)


def test_trained_weights_in_float16_are_refused(
    make_experiment: Callable[..., ExperimentConfig], paligemma_directory: Path
) -> None:
    backbone = PaliGemmaConfig(str(paligemma_directory), dtype="float16", max_prompt_tokens=24)
    config = make_experiment(model=IPVLAConfig(backbone=backbone), training=TrainingConfig(precision="fp16"))
    with pytest.raises(ValueError, match=r"weights in float16 are trained; set model\.backbone\.dtype to float32"):
        config.build(World())
