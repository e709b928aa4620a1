"""The worked example of docs/forgetting.md, a method outside of the package, trains as those inside do."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import draccus
import pytest

from ipvla.experiment import Experiment, ExperimentConfig
from ipvla.forgetting import MethodConfig
from ipvla.models.adapters import adapters
from tests.training.fine_tuning import PROBE, SENSITIVE, Log, equal, protected, trained

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "adapter_decay.py"


@pytest.fixture(scope="module")
def example() -> Any:
    """Its file, as a module."""
    module = ModuleType("ipvla_forgetting_example")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(EXAMPLE.read_text(), str(EXAMPLE), "exec"), module.__dict__)
    return module


def norm(experiment: Experiment) -> float:
    found = adapters(experiment.state.model.backbone).values()
    return sum(float(adapter.b.detach().norm()) for adapter in found)


def test_it_is_chosen_in_an_experiments_settings(example: Any, tuned: ExperimentConfig) -> None:
    settings = draccus.encode(tuned) | {
        "forgetting": {"method": {"type": "adapter_decay", "kappa": 0.5}, "probe": draccus.encode(PROBE)}
    }
    config = draccus.decode(ExperimentConfig, settings)
    assert config.forgetting.method == example.AdapterDecayConfig(0.5)
    log = Log()
    experiment = trained(config, log)
    baseline = trained(tuned)
    assert 0 < norm(experiment) < 0.5 * norm(baseline)
    _, line = log.lines[-1]
    assert line["gain/kappa"] == 0.5
    assert line["adapter_decay/norm"] == pytest.approx(norm(experiment))


def test_its_idle_gain_leaves_every_bit(example: Any, tuned: ExperimentConfig) -> None:
    assert equal(trained(protected(tuned, example.AdapterDecayConfig())), trained(tuned))


def test_a_thermostat_drives_its_gain(example: Any, tuned: ExperimentConfig) -> None:
    thermostat = replace(SENSITIVE, kappa_max=0.5)
    log = Log()
    experiment = trained(protected(tuned, example.AdapterDecayConfig(), thermostat=thermostat), log)
    gains = [line["gain/kappa"] for _, line in log.lines if "probe/d" in line]
    assert gains[:2] == [0, 0], "calibration"
    assert max(gains) > 0
    assert norm(experiment) < norm(trained(tuned))


def test_its_gain_is_checked_and_its_name_is_its_own(example: Any, tuned: ExperimentConfig) -> None:
    with pytest.raises(ValueError, match=r"kappa is 1; it must be in \[0, 1\)"):
        example.AdapterDecayConfig(1)
    fsdp = replace(tuned.training, sharding="fsdp")
    with pytest.raises(ValueError, match=r"forgetting\.method\.type adapter_decay cannot"):
        replace(protected(tuned, example.AdapterDecayConfig()), training=fsdp)
    assert MethodConfig.get_choice_name(example.AdapterDecayConfig) == "adapter_decay"
