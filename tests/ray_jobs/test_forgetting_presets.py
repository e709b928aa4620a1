"""Presets of the forgetting study: baseline and method are one experiment with a switch."""

from dataclasses import replace
from itertools import pairwise

import pytest

from ipvla.experiment import ExperimentConfig
from ipvla.forgetting.thermostat import ThermostatConfig
from ipvla.storage import SOURCE_TREE
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.settings import parse
from ray_jobs.running.attempts import Attempt
from ray_jobs.subspaces import SubspacesConfig

EXPERIMENTS = SOURCE_TREE / "ray_jobs" / "experiments"


def preset(kind, name, tmp_path, *more):
    path = EXPERIMENTS / f"{name}.yaml"
    return parse(kind, ["--config_path", str(path), "--storage_root", str(tmp_path), *more])


@pytest.fixture
def baseline(tmp_path):
    return preset(ExperimentConfig, "baseline_lora", tmp_path)


@pytest.fixture
def method(tmp_path):
    return preset(ExperimentConfig, "method_icsm_hsw_thermostat", tmp_path)


def test_baseline_and_method_differ_in_the_methods_section_alone(baseline, method):
    assert baseline.forgetting is None
    assert isinstance(method.forgetting.thermostat, ThermostatConfig)
    assert replace(method, forgetting=None, name=baseline.name) == baseline


def test_the_switch_makes_the_method_the_baseline(baseline, tmp_path):
    off = preset(ExperimentConfig, "method_icsm_hsw_thermostat", tmp_path, "--forgetting.enabled", "false")
    assert off.protected_by is None
    assert off.identity == baseline.identity


def test_fine_tuning_fits_the_policy_that_pretraining_leaves(baseline, tmp_path):
    pretraining = preset(ExperimentConfig, "forgetting/pretrain", tmp_path)
    for part in ("backbone", "memory", "head", "chunk"):
        assert getattr(pretraining.model, part) == getattr(baseline.model, part), part
    assert pretraining.lanes.stride == baseline.lanes.stride
    assert pretraining.model.questions is not None, "there is more than actions to forget"


def test_the_method_reads_the_probe_that_its_directions_came_from(method, tmp_path):
    subspaces = preset(SubspacesConfig, "forgetting/subspaces", tmp_path)
    assert subspaces.probe == method.forgetting.probe
    assert method.forgetting.artifact == "icsm_tiny", "the name that ray_jobs.subspaces gives by default"
    adapters = method.model.lora
    assert subspaces.adapters.targets is not None
    assert subspaces.adapters.last_layers == adapters.last_layers
    assert subspaces.adapters.modules == adapters.modules


def test_probe_and_new_task_share_no_layout_with_pretraining(tmp_path):
    names = ("collect_pretraining", "collect_new_task", "collect_probe")
    ranges = []
    for name in names:
        config = preset(CollectConfig, f"forgetting/{name}", tmp_path)
        attempts = 50 * max(config.demonstrations.values())  # the expert succeeds far more often than this
        ranges.append([Attempt("any", index, config.seed).layout for index in (0, attempts)])
    for (_, end), (start, _) in pairwise(sorted(ranges)):
        assert end < start


def test_replay_is_one_old_demonstration_in_twenty_of_those_that_were_learned(tmp_path):
    pretraining = preset(CollectConfig, "forgetting/collect_pretraining", tmp_path)
    new = preset(CollectConfig, "forgetting/collect_new_task", tmp_path)
    replay = preset(CollectConfig, "forgetting/collect_replay", tmp_path)
    old = {task: n for task, n in replay.demonstrations.items() if task in pretraining.demonstrations}
    assert replay.seed == pretraining.seed
    assert sum(old.values()) / sum(replay.demonstrations.values()) == 0.05
    assert sum(replay.demonstrations.values()) == sum(new.demonstrations.values())
