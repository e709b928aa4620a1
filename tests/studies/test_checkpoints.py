"""The study of published checkpoints: random models in published layouts, a race against a bare loop, targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvla.data.normalisation import FeatureStatistics
from ipvla.data.statistics import Statistics
from ipvla.policy import Policy
from ipvla.types import Observation
from ray_jobs.command_line.settings import arguments, parse
from ray_jobs.import_policy import ImportConfig, imported
from studies.bare_loop import BareModel
from studies.checkpoints import CheckpointStudy, all_pass, targets
from studies.engine import entries
from studies.random_checkpoints import PI_TOKENIZER, Sizes, write_openvla_oft, write_pi0

SIZES = Sizes(width=16, layers=2, vision_width=16, vision_layers=2, side=32, patch=16)


def statistics() -> Statistics:
    random = np.random.default_rng(0)
    action, state = (FeatureStatistics.compute(random.random((9, n)), np.ones(n, np.bool_)) for n in (7, 8))
    return Statistics(action, state, 9, 1)


@pytest.fixture(params=["openvla_oft", "pi0"])
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> Policy:
    given = {
        "source": tmp_path / "model",
        "policy": tmp_path / "policy",
        "cameras": ["agentview"],
        "dtype": "float32",
    }
    given |= {"model.memory.type": "gru", **entries("checkpoints")["layouts"][request.param]["import"]}
    if request.param == "pi0":
        write_pi0(tmp_path / "model", SIZES, statistics(), 0)
        given["pi.tokenizer"] = PI_TOKENIZER
    else:
        write_openvla_oft(tmp_path / "model", SIZES, statistics(), "recall", 0)
    return imported(parse(ImportConfig, arguments(given)))


def seen(value: int) -> Observation:
    picture = np.full((32, 32, 3), value, np.uint8)
    return Observation({"agentview": picture}, np.zeros(8, np.float32), "press the red button", 0)


def test_a_random_checkpoint_is_imported_and_sees(policy: Policy) -> None:
    memory = policy.initial_memory(2)
    actions, _ = policy.act([seen(0), seen(250)], memory)
    assert actions.shape == (2, 4, 7)
    assert np.isfinite(actions).all()
    assert not np.allclose(actions[0], actions[1])


@pytest.mark.parametrize("policy", ["openvla_oft"], indirect=True)
def test_the_bare_loop_computes_what_ours_does(policy: Policy) -> None:
    inputs, memory = policy.transforms.inputs([seen(0), seen(250)]), policy.initial_memory(2)
    ours, _ = policy.model.act(inputs, memory, torch.zeros(2, dtype=torch.long))
    with torch.no_grad():
        torch.testing.assert_close(BareModel(policy).chunks(inputs), ours, rtol=1e-5, atol=1e-6)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="side 30 is no multiple of patch 16"):
        replace(SIZES, side=30)


def test_what_was_not_measured_meets_nothing() -> None:
    assert not any(target.met for target in targets({}))
    figures = {
        "formats": dict.fromkeys(map(str, range(12)), True),
        "families": {"tiny": {"gru": True, "kv": False}, "run": {"commit": "1"}},
    }
    met = {target.name: (target.value, target.met) for target in targets(figures)}
    assert met["formats_exact"] == (12, True)
    assert met["memory_families"] == (0.5, False)


def test_formats_name_tests_that_there_are() -> None:
    for name, one in entries("checkpoints")["formats"].items():
        for test in one["tests"]:
            path, _, function = test.partition("::")
            assert function.rpartition("::")[2] in Path(path).read_text(), name


def test_a_test_that_fails_or_is_missing_is_not_passed(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    assert all_pass([f"{tmp_path}/test_one.py::test_good"])
    assert not all_pass([f"{tmp_path}/test_one.py"])
    assert not all_pass([f"{tmp_path}/test_two.py"])


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="cannot be measured"):
        CheckpointStudy(parts=("speed",))
    with pytest.raises(ValueError, match="rounds is 0"):
        CheckpointStudy(rounds=0)
