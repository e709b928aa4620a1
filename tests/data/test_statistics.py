"""Statistics agree with numpy; BOUNDS_Q99 maps and comes back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ipvla.data.statistics import FeatureStatistics, Statistics

_values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 60), st.integers(1, 7)),
    elements=st.floats(-100, 100, width=32),
)


def _all_scaled(values: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics.compute(values, np.ones(values.shape[1], np.bool_))


def _statistics(action_dim: int = 7) -> Statistics:
    rng = np.random.default_rng(0)
    actions = [rng.normal(size=(n, action_dim)).astype(np.float32) for n in (30, 50)]
    return Statistics.compute(actions, [rng.normal(size=(n, 8)).astype(np.float32) for n in (30, 50)])


@given(_values)
def test_rows_agree_with_numpy(values: np.ndarray) -> None:
    statistics, x = _all_scaled(values), values.astype(np.float64)
    for name, expected in {
        "mean": x.mean(0),
        "std": x.std(0),
        "min": x.min(0),
        "max": x.max(0),
        "q01": np.percentile(x, 1, axis=0),
        "q99": np.percentile(x, 99, axis=0),
    }.items():
        np.testing.assert_allclose(getattr(statistics, name), expected, rtol=1e-6, atol=1e-6)


@given(_values)
def test_normalised_values_follow_the_formula(values: np.ndarray) -> None:
    s = _all_scaled(values)
    y = s.normalise(values)
    assert y.dtype == np.float32
    assert np.abs(y).max() <= 1
    q01, q99 = s.q01.astype(np.float64), s.q99.astype(np.float64)
    expected = np.clip(2 * (values - q01) / (q99 - q01 + 1e-8) - 1, -1, 1)
    np.testing.assert_allclose(y, np.where(q01 == q99, 0, expected), atol=1e-3)


@given(_values)
def test_values_between_the_quantiles_come_back(values: np.ndarray) -> None:
    s = _all_scaled(values)
    back = s.denormalise(s.normalise(values))
    np.testing.assert_allclose(back, np.clip(values, s.q01, s.q99), atol=1e-3)


@given(_values)
def test_torch_and_numpy_agree(values: np.ndarray) -> None:
    s = _all_scaled(values)
    y = s.normalise(values)
    np.testing.assert_allclose(s.normalise(torch.from_numpy(values)).numpy(), y, atol=1e-6)
    np.testing.assert_allclose(s.denormalise(torch.from_numpy(y)).numpy(), s.denormalise(y), rtol=1e-5, atol=1e-5)


@given(constant=st.floats(-10, 10, width=32), prediction=st.floats(-5, 5, width=32))
def test_a_constant_dimension_is_zero_and_comes_back_exactly(constant: float, prediction: float) -> None:
    values = np.stack([np.full(9, constant, np.float32), np.arange(9, dtype=np.float32)], 1)
    for mask in ([True, True], [False, True]):
        s = FeatureStatistics.compute(values, np.array(mask))
        assert s.constant.tolist() == [True, False]
        assert (s.normalise(values)[:, 0] == 0).all()
        assert s.denormalise(np.full((3, 2), prediction, np.float32))[:, 0].tolist() == [constant] * 3


def test_equal_quantiles_with_outliers_map_to_zero_and_are_not_constant() -> None:
    values = np.zeros((1000, 1), np.float32)
    values[0] = 5
    s = _all_scaled(values)
    assert not s.constant.any()
    assert (s.normalise(values) == 0).all()


def test_the_gripper_is_left_unscaled() -> None:
    statistics = _statistics()
    assert statistics.action.mask.tolist() == [True] * 6 + [False]
    action = np.array([[0.1] * 6 + [1.0], [0.2] * 6 + [-1.0]], np.float32)
    assert statistics.action.normalise(action)[:, 6].tolist() == [1.0, -1.0]
    assert statistics.action.denormalise(action)[:, 6].tolist() == [1.0, -1.0]


def test_the_file_has_openvlas_schema_and_loads_back(tmp_path: Path) -> None:
    statistics, path = _statistics(), tmp_path / "dataset_statistics.json"
    statistics.save(path, "synthetic")
    stored = json.loads(path.read_text())["synthetic"]
    assert {"action", "proprio", "num_transitions", "num_trajectories"} == set(stored)
    assert {"mean", "std", "min", "max", "q01", "q99", "mask"} == set(stored["action"])
    assert (stored["num_transitions"], stored["num_trajectories"]) == (80, 2)
    assert Statistics.load(path, expected_action_dim=7).to_dict() == statistics.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_without_masks_normalises_everything(tmp_path: Path) -> None:
    values = _statistics().to_dict()
    del values["action"]["mask"]
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"other": values}))
    assert Statistics.load(path).action.mask.all()


def test_another_action_size_names_both(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    _statistics(action_dim=14).save(path, "bimanual")
    with pytest.raises(ValueError, match="14 action dimensions, the episodes have 7") as caught:
        Statistics.load(path, expected_action_dim=7)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": {}}', '{"a": {"action": {"mean": [1]}}}'])
def test_a_file_that_is_no_statistics_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"s\.json does not hold one dataset's statistics"):
        Statistics.load(path)


def test_rows_of_different_lengths_are_refused(tmp_path: Path) -> None:
    values = _statistics().to_dict()
    values["action"]["q99"].pop()
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"broken": values}))
    with pytest.raises(ValueError, match="different lengths"):
        Statistics.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Statistics.load(tmp_path / "s.json")


def test_few_transitions_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    _statistics()
    assert "only 80 transitions" in caplog.text
