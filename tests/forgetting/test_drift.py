"""Readings of drift agree with the covariances they stand for, and are silent while nothing has moved."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ipvla.forgetting.artifact import ArtifactError
from ipvla.forgetting.drift import DriftProbe, pool
from ipvla.forgetting.probed import Reading, instruction_mean

RECORDS, WIDTH, LAYERS = 500, 48, (1, 3)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def _teacher() -> dict[int, Tensor]:
    """Vectors whose covariance decays, as those of real layers do."""
    spectrum = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -0.5
    return {layer: 3 + _random(RECORDS, WIDTH, seed=layer) * spectrum for layer in LAYERS}


@functools.cache
def _probe(empty: tuple[int, ...] = ()) -> DriftProbe:
    mask = torch.zeros(RECORDS, dtype=torch.bool)
    mask[list(empty)] = True
    return DriftProbe(_teacher(), mask)


def _rows(vectors: dict[int, Tensor], indices: np.ndarray) -> dict[int, Tensor]:
    return {layer: v[torch.from_numpy(indices)] for layer, v in vectors.items()}


def _moved(size: float) -> dict[int, Tensor]:
    """A student: the teacher under a linear map that is `size` away from the identity."""
    return {layer: v + size * v @ _random(WIDTH, WIDTH, seed=9) / WIDTH**0.5 for layer, v in _teacher().items()}


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 100), st.integers(0, 2**40), st.integers(0, 10**6))
def test_a_student_that_is_the_teacher_reads_exactly_nothing(batch: int, seed: int, step: int) -> None:
    indices = (probe := _probe()).indices(batch, seed, step)
    assert probe.read(_rows(_teacher(), indices), indices).paired == 0.0


def test_readings_are_frobenius_distances_of_covariances() -> None:
    probe, student = _probe(), _moved(0.3)
    indices = probe.indices(64, 0, 0)
    s, t = _rows(student, indices), _rows(_teacher(), indices)
    drift = probe.read(s, indices)
    c_s, c_t = ({k: torch.cov(v[k].T) for k in LAYERS} for v in (s, t))
    whole = {k: torch.cov(v.T) for k, v in _teacher().items()}
    assert drift.paired == pytest.approx(np.mean([(c_s[k] - c_t[k]).norm() / c_t[k].norm() for k in LAYERS]))
    assert drift.unpaired == pytest.approx(np.mean([(c_s[k] - whole[k]).norm() for k in LAYERS]))
    assert drift.unpaired_relative == pytest.approx(
        np.mean([(c_s[k] - whole[k]).norm() / whole[k].norm() for k in LAYERS])
    )


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-9, 2))
def test_a_stretch_reads_as_what_it_does_to_the_covariance_however_small(stretch: float) -> None:
    indices = (probe := _probe()).indices(32, 0, 0)
    student = {layer: (1 + stretch) * v for layer, v in _rows(_teacher(), indices).items()}
    assert probe.read(student, indices).paired == pytest.approx(stretch * (2 + stretch), rel=1e-5)


def test_the_whole_probe_at_once_has_no_sampling_noise_in_either_form() -> None:
    indices = (probe := _probe()).indices(RECORDS, 0, 0)
    assert probe.read(_teacher(), indices).unpaired == pytest.approx(0, abs=1e-6)
    drift = probe.read(_moved(0.1), indices)
    assert drift.paired == pytest.approx(drift.unpaired_relative)


def test_pairing_sees_a_drift_that_sampling_hides() -> None:
    probe, student, same = _probe(), _moved(0.04), _teacher()
    draws = [probe.indices(64, 1, step) for step in range(40)]
    true = probe.read(student, np.arange(RECORDS)).paired
    moved = [probe.read(_rows(student, i), i) for i in draws]
    still = [probe.read(_rows(same, i), i) for i in draws]
    assert np.mean([d.paired for d in moved]) == pytest.approx(true, rel=0.2)
    floor = [d.unpaired_relative for d in still]
    assert min(floor) > 3 * true
    assert np.mean([d.unpaired_relative for d in moved]) < np.mean(floor) + np.std(floor)


def test_sigma_is_the_noise_of_sampling_and_pairing_all_but_removes_it() -> None:
    probe = _probe()
    sigma = probe.sigma(64, draws=30, seed=3)
    indices = [probe.indices(64, 3, draw) for draw in range(30)]
    readings = [probe.read(_rows(_teacher(), i), i).unpaired_relative for i in indices]
    assert sigma == pytest.approx(np.std(readings, ddof=1))
    assert 0 < probe.sigma(64, draws=30, seed=3, student=_moved(0.04)) < sigma / 3
    assert probe.sigma(256, draws=30, seed=3) < sigma
    assert probe.sigma(64, draws=5, seed=3, student=_teacher()) == 0.0


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(0, 2**40), st.integers(0, 10**6))
def test_a_draw_is_a_function_of_seed_and_step_and_never_takes_an_empty_record(
    batch: int, seed: int, step: int
) -> None:
    probe = _probe(empty=tuple(range(0, RECORDS, 7)))
    drawn = probe.indices(batch, seed, step)
    assert drawn.tolist() == probe.indices(batch, seed, step).tolist() == sorted(set(drawn.tolist()))
    assert len(drawn) == batch
    assert (drawn % 7 != 0).all()


def test_steps_and_seeds_draw_differently() -> None:
    draws = {tuple(_probe().indices(64, seed, step)) for seed in range(3) for step in range(3)}
    assert len(draws) == 9


def test_what_cannot_be_compared_is_refused() -> None:
    probe = _probe(empty=(0,))
    with pytest.raises(ValueError, match=r"500 records from a probe of 499 usable ones; lower the batch"):
        probe.indices(500, 0, 0)
    indices = probe.indices(8, 0, 0)
    with pytest.raises(ValueError, match=r"layer 3 are None"):
        probe.read({1: _random(8, WIDTH)}, indices)
    with pytest.raises(ValueError, match=r"layer 1 are \[7, 48\]; this reading compares \[8, 48\]"):
        probe.read({layer: _random(7, WIDTH) for layer in LAYERS}, indices)
    with pytest.raises(ValueError, match=r"cannot be read; take those that `indices` draws"):
        probe.read(_rows(_teacher(), np.array([0, 1])), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"1 of 500 probe records have instruction tokens"):
        _probe(empty=tuple(range(1, RECORDS)))
    with pytest.raises(ValueError, match=r"layer 0 have a covariance of norm 0"):
        DriftProbe({0: torch.ones(4, 3)}, torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"layer 0 are \[4, 3\]; give \[5, D\]"):
        DriftProbe({0: _random(4, 3)}, torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"norm nan; .* without NaN"):
        DriftProbe({0: torch.full((4, 3), math.nan)}, torch.zeros(4, dtype=torch.bool))


def test_a_broken_student_reads_nan_not_a_small_drift() -> None:
    indices = (probe := _probe()).indices(8, 0, 0)
    student = _rows(_teacher(), indices)
    student[1][0, 0] = math.nan
    assert math.isnan(probe.read(student, indices).paired)


def test_what_is_saved_reads_alike_and_another_probe_is_refused(tmp_path: Path) -> None:
    probe = _probe(empty=(5,))
    probe.save(tmp_path, {"backbone": "tiny", "probe_sha256": "abc"})
    again = DriftProbe.load(tmp_path, backbone="tiny", layers=LAYERS, probe_sha256="abc")
    indices = probe.indices(20, 4, 2)
    assert again.indices(20, 4, 2).tolist() == indices.tolist()
    assert again.read(_rows(_moved(0.2), indices), indices) == probe.read(_rows(_moved(0.2), indices), indices)
    with pytest.raises(ArtifactError, match="probe_sha256 abc, this run has xyz"):
        DriftProbe.load(tmp_path, backbone="tiny", layers=LAYERS, probe_sha256="xyz")
    with pytest.raises(ArtifactError, match="layers"):
        DriftProbe.load(tmp_path, backbone="tiny", layers=(1, 2))
    with pytest.raises(ArtifactError, match="cannot be read"):
        DriftProbe.load(tmp_path / "nowhere", backbone="tiny", layers=LAYERS)


class _Linear:
    """The smallest model that can be probed: layer l puts out the batch times a weight, l times over."""

    name, width, layers = "linear", WIDTH, ()

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(_random(WIDTH, WIDTH).float() / WIDTH**0.5)

    def read(self, batch: Any) -> Reading:
        hidden = [batch.tokens]
        for _ in range(4):
            hidden.append(hidden[-1] @ self.weight)
        return Reading(tuple(hidden[1:]), batch.mask, hidden[-1])

    def divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        raise NotImplementedError

    def sampled_loss(self, output: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


def _batch(tokens: Tensor, mask: Tensor) -> SimpleNamespace:
    return SimpleNamespace(tokens=tokens, mask=mask)


def test_a_probe_measured_batch_by_batch_holds_each_records_pooled_vectors() -> None:
    model, tokens = _Linear(), _random(20, 5, WIDTH).float()
    mask = _random(20, 5, seed=1) > -1
    mask[11] = False
    parts = [_batch(tokens[a : a + 8], mask[a : a + 8]) for a in (0, 8, 16)]
    probe = DriftProbe.measure(model, parts, LAYERS)
    for layer in LAYERS:
        whole = instruction_mean(model.read(_batch(tokens, mask)).hidden[layer], mask)
        assert probe.teacher[layer].dtype == torch.float64
        assert not probe.teacher[layer].requires_grad
        torch.testing.assert_close(probe.teacher[layer], whole.detach(), rtol=1e-5, atol=1e-6)
    assert probe.empty.nonzero().tolist() == [[11]]

    indices = probe.indices(10, 0, 0)
    drawn = _batch(tokens[torch.from_numpy(indices)], mask[torch.from_numpy(indices)])
    assert probe.read(pool(model, drawn, LAYERS)[0], indices).paired < 1e-5
    with torch.no_grad():
        model.weight *= 1.1
    assert probe.read(pool(model, drawn, LAYERS)[0], indices).paired > 0.4
