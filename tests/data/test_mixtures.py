"""A weight says how often each episode is seen, and so multiplies a dataset's share of the control steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.data.mixtures import OXE_MIXTURES, Mixture, mixture_named
from ipvla.data.source import DatasetError

_WEIGHTS = st.floats(0.01, 5)
_SEED = st.integers(0, 2**31)
_LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(lambda x: np.array(x, np.int64))


@settings(deadline=None)
@given(weight=_WEIGHTS, lengths=_LENGTHS, seed=_SEED, epoch=st.integers(0, 50))
def test_an_episode_is_seen_floor_or_ceiling_of_the_weight_times(
    weight: float, lengths: np.ndarray, seed: int, epoch: int
) -> None:
    counts = Mixture({"a": weight}).repeats({"a": lengths}, seed, epoch)["a"]
    assert (counts.shape, counts.dtype) == (lengths.shape, np.int64)
    assert set(counts.tolist()) <= {math.floor(weight), math.ceil(weight)}


@settings(deadline=None)
@given(weight=st.integers(1, 4), lengths=_LENGTHS, seed=_SEED)
def test_a_whole_weight_is_exact(weight: int, lengths: np.ndarray, seed: int) -> None:
    assert (Mixture({"a": float(weight)}).repeats({"a": lengths}, seed, 0)["a"] == weight).all()


@settings(deadline=None)
@given(weights=st.tuples(_WEIGHTS, _WEIGHTS), lengths=st.tuples(_LENGTHS, _LENGTHS), seed=_SEED)
def test_a_draw_depends_on_seed_epoch_dataset_and_episode_alone(
    weights: tuple[float, float], lengths: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    alone = Mixture({"b": weights[1]}).repeats({"b": lengths[1]}, seed, 3)["b"]
    beside = Mixture(dict(zip("ab", weights, strict=True))).repeats(dict(zip("ab", lengths, strict=True)), seed, 3)
    np.testing.assert_array_equal(beside["b"], alone)
    longer = np.append(lengths[1], 7)
    np.testing.assert_array_equal(Mixture({"b": weights[1]}).repeats({"b": longer}, seed, 3)["b"][:-1], alone)
    assert list(beside) == ["a", "b"]


def test_seeds_epochs_and_datasets_draw_differently() -> None:
    lengths = np.full(200, 10)
    draws = [
        tuple(Mixture({name: 0.5}).repeats({name: lengths}, seed, epoch)[name].tolist())
        for name in ("a", "b")
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("weight", [0.06, 0.54087122203, 1.0, 2.3])
def test_over_epochs_an_episode_is_seen_weight_times_on_average(weight: float) -> None:
    epochs = 400
    counts = sum(Mixture({"a": weight}).repeats({"a": np.full(50, 5)}, 0, epoch)["a"] for epoch in range(epochs))
    error = 5 * math.sqrt((weight % 1) * (1 - weight % 1) / epochs)  # five standard deviations of each mean
    assert np.abs(counts / epochs - weight).max() <= error


def test_a_weight_multiplies_the_share_of_control_steps() -> None:
    rng = np.random.default_rng(0)
    lengths = {"a": rng.integers(20, 60, 4000), "b": rng.integers(100, 300, 1000)}
    mixture = Mixture({"a": 0.25, "b": 1.5})
    counts = mixture.repeats(lengths, seed=5, epoch=2)
    seen = {name: int(counts[name] @ lengths[name]) for name in lengths}
    weighed = {name: mixture.weights[name] * int(each.sum()) for name, each in lengths.items()}
    for name, steps in weighed.items():
        assert seen[name] / sum(seen.values()) == pytest.approx(steps / sum(weighed.values()), abs=0.01)


def test_episodes_of_no_steps_are_never_seen() -> None:
    counts = Mixture({"a": 3.0}).repeats({"a": np.array([4, 0, 9, 0])}, 0, 0)["a"]
    assert counts.tolist() == [3, 0, 3, 0]


def test_published_mixtures_are_there_under_their_names() -> None:
    assert mixture_named("bridge").weights == {"bridge_orig": 1.0}
    assert mixture_named("bridge_rt_1").weights == {"bridge_orig": 1.0, "fractal20220817_data": 1.0}
    soup = mixture_named("oxe_magic_soup").weights
    assert (len(soup), soup["language_table"], soup["kuka"]) == (23, 0.1, 0.8341046294)
    plus = mixture_named("oxe_magic_soup_plus").weights
    assert set(plus) - set(soup) == {"bc_z", "fmb_dataset", "dobbe", "droid"}
    assert len(mixture_named("libero_4_task_suites_no_noops").weights) == 4
    assert all(mixture_named(name).weights == OXE_MIXTURES[name] for name in OXE_MIXTURES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("oxe_magic_soups", "no mixture 'oxe_magic_soups'; did you mean oxe_magic_soup or oxe_magic_soup_plus"),
        ("zzz", "no mixture 'zzz'; there are bridge, bridge_rt_1, rtx"),
    ],
)
def test_an_unknown_mixture_suggests_others(name: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        mixture_named(name)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_senseless_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="the weight of b is"):
        Mixture({"a": 1.0, "b": weight})


def test_a_mixture_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no datasets"):
        Mixture({})
