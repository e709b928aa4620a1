"""Statistics agree with numpy and with OpenVLA's; normalisations map and come back; files of others are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ipvla.data.normalisation import FeatureStatistics, Normalisation
from ipvla.data.statistics import Statistics

#: LeRobot's and openpi's, which do not clip, have golden figures in tests/checkpoints.
OPENVLAS: tuple[Normalisation, ...] = ("bounds_q99", "bounds", "normal")

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


@settings(deadline=None)
@given(_values)
def test_bounds_q99_is_to_the_bit_what_saved_policies_were_trained_with(values: np.ndarray) -> None:
    s = _all_scaled(values)
    formula = (2 * (values - s.q01) / (s.q99 - s.q01 + 1e-8) - 1).clip(-1, 1)
    expected = np.where((s.min == s.max) | (s.q01 == s.q99), 0.0, formula)
    np.testing.assert_array_equal(s.normalise(values), expected)
    np.testing.assert_array_equal(s.normalise(values, "bounds_q99"), expected)
    back = np.where(s.min == s.max, s.min, 0.5 * (expected + 1) * (s.q99 - s.q01) + s.q01)
    np.testing.assert_array_equal(s.denormalise(expected), back)


def _openvla(x: np.ndarray, s: FeatureStatistics, kind: str) -> np.ndarray:
    """As OpenVLA's `normalize_action_and_proprio` defines it, in double precision."""
    rows = {row: getattr(s, row).astype(np.float64) for row in ("mean", "std", "min", "max", "q01", "q99")}
    if kind == "normal":
        return np.where(s.mask, (x - rows["mean"]) / (rows["std"] + 1e-8), x)
    low, high = (rows["min"], rows["max"]) if kind == "bounds" else (rows["q01"], rows["q99"])
    scaled = np.where(s.mask, np.clip(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1), x)
    return np.where(s.min == s.max, 0, scaled)


def _spread(mask: list[bool]) -> tuple[np.ndarray, FeatureStatistics]:
    rng = np.random.default_rng(3)
    values = rng.normal([0, 5, -0.2, 0.5], [1, 3, 0.01, 0.2], (6000, 4)).astype(np.float32)
    return values, FeatureStatistics.compute(values, np.array(mask))


@pytest.mark.parametrize("kind", OPENVLAS)
@pytest.mark.parametrize("mask", [[True] * 4, [True, True, True, False]])
def test_every_normalisation_is_openvlas(kind: Normalisation, mask: list[bool]) -> None:
    values, s = _spread(mask)
    y = s.normalise(values, kind)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, _openvla(values, s, kind), atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "low", "high", "mean", "std"),
    [("bounds", -1, 1, None, None), ("normal", -6, 6, 0, 1), ("bounds_q99", -1, 1, None, None)],
)
def test_normalised_values_lie_where_they_should(
    kind: Normalisation, low: float, high: float, mean: float | None, std: float | None
) -> None:
    values, s = _spread([True] * 4)
    y = s.normalise(values, kind)
    assert low <= y.min() < y.max() <= high
    if mean is not None:
        np.testing.assert_allclose(y.mean(0), mean, atol=1e-3)
        np.testing.assert_allclose(y.std(0), std, atol=1e-3)


@pytest.mark.parametrize("kind", ["bounds", "normal"])
def test_without_clipping_everything_comes_back(kind: Normalisation) -> None:
    values, s = _spread([True, True, False, True])
    for x in (values, torch.from_numpy(values)):
        back = s.denormalise(s.normalise(x, kind), kind)
        np.testing.assert_allclose(np.asarray(back), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OPENVLAS)
def test_a_constant_dimension_is_zero_in_every_normalisation(kind: Normalisation) -> None:
    values = np.stack([np.full(50, 0.3, np.float32), np.arange(50, dtype=np.float32)], 1)
    s = FeatureStatistics.compute(values, np.array([True, True]))
    assert (s.normalise(values, kind)[:, 0] == 0).all()
    np.testing.assert_array_equal(s.denormalise(np.ones((3, 2), np.float32), kind)[:, 0], np.float32(0.3))


def test_openvlas_statistics_are_reproduced() -> None:
    """OpenVLA computes all rows in single precision."""
    rng = np.random.default_rng(1)
    actions = [rng.normal(0, 0.05, (n, 7)).astype(np.float32) for n in rng.integers(20, 60, 300)]
    proprios = [rng.uniform(-0.5, 0.5, (len(a), 8)).astype(np.float32) for a in actions]
    statistics = Statistics.compute(actions, proprios)
    for feature, parts in ((statistics.action, actions), (statistics.proprio, proprios)):
        x = np.concatenate(parts)
        theirs = {"mean": x.mean(0), "std": x.std(0), "min": x.min(0), "max": x.max(0)}
        theirs |= {row: np.quantile(x, q, axis=0) for row, q in (("q01", 0.01), ("q99", 0.99))}
        for row, expected in theirs.items():
            np.testing.assert_allclose(getattr(feature, row), expected, rtol=0, atol=1e-6, err_msg=row)
    assert statistics.num_transitions == sum(map(len, actions))
    assert statistics.num_trajectories == 300


def test_a_standard_may_say_which_dimensions_are_normalised() -> None:
    rng = np.random.default_rng(0)
    actions, proprios = [rng.normal(size=(30, 3)).astype(np.float32)], [np.zeros((30, 2), np.float32)]
    assert Statistics.compute(actions, proprios, (True, False, True)).action.mask.tolist() == [True, False, True]
    assert Statistics.compute(actions, proprios).action.mask.tolist() == [True, True, False]


@pytest.mark.parametrize("wrap", [False, True], ids=["dataset_statistics.json", "a model's config.json"])
def test_a_file_of_several_datasets_is_read_by_name(tmp_path: Path, wrap: bool) -> None:
    path = tmp_path / "s.json"
    several = {"bridge_orig": _statistics().to_dict(), "droid": _statistics(action_dim=8).to_dict()}
    path.write_text(json.dumps({"model_type": "openvla", "norm_stats": several} if wrap else several))
    assert Statistics.load(path, name="droid").action.dim == 8
    assert Statistics.load(path, 7, name="bridge_orig").to_dict() == several["bridge_orig"]
    with pytest.raises(ValueError, match=r"s\.json holds no statistics of 'kuka'; it has bridge_orig, droid"):
        Statistics.load(path, name="kuka")
    with pytest.raises(ValueError, match=r"s\.json holds statistics of several datasets; name one of bridge_orig"):
        Statistics.load(path)


def _openpi(path: Path, **changes: object) -> Path:
    rows = {"mean": [0.1, 0.2, 0.0], "std": [1.0, 2.0, 0.9], "q01": [-2.0, -4.0, -1.0], "q99": [2.0, 4.5, 1.0]}
    path.write_text(json.dumps({"norm_stats": {"state": rows | changes, "actions": rows | changes}}))
    return path


def test_openpis_file_is_read_and_normalises_as_its_quantiles_say(tmp_path: Path) -> None:
    statistics = Statistics.load(_openpi(tmp_path / "norm_stats.json"), expected_action_dim=3)
    x = np.array([[-2.0, 0.25, 1.0], [9.0, -9.0, 0.0]], np.float32)
    np.testing.assert_allclose(statistics.action.normalise(x), [[-1, 0, 1], [1, -1, 0]], atol=1e-6)
    np.testing.assert_allclose(statistics.action.denormalise(np.ones((1, 3), np.float32)), [[2, 4.5, 1]])
    np.testing.assert_allclose(
        statistics.proprio.normalise(x, "normal")[0], [(-2 - 0.1) / 1, (0.25 - 0.2) / 2, 1 / 0.9], rtol=1e-6
    )
    assert not statistics.constant.any()


def test_what_openpis_file_lacks_is_missed_when_it_is_needed(tmp_path: Path) -> None:
    complete = Statistics.load(_openpi(tmp_path / "a.json"))
    for kind in ("bounds_q99", "normal"):
        complete.action.require(kind)
    with pytest.raises(ValueError, match="no min and max; choose bounds_q99 or normal"):
        complete.action.require("bounds")
    without = Statistics.load(_openpi(tmp_path / "b.json", q01=None, q99=None))
    without.action.require("normal")
    with pytest.raises(ValueError, match="no q01 and q99; choose normal, or compute"):
        without.action.require("bounds_q99")


def test_unknown_rows_survive_json_as_null(tmp_path: Path) -> None:
    statistics = Statistics.load(_openpi(tmp_path / "norm_stats.json"))
    text = json.dumps(statistics.to_dict(), allow_nan=False)
    again = Statistics.from_dict(json.loads(text))
    assert np.isnan(again.action.min).all()
    np.testing.assert_array_equal(again.action.q99, statistics.action.q99)
