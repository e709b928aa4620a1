"""The GPU benchmark in small: every figure is of a real policy and a real training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.gpu import GPUStudy, measure_acting, measure_planned, measure_tuning, targets
from benchmarks.rollout_scaling import forward_on_gpu
from benchmarks.tables import record_table


@pytest.fixture
def study(tmp_path: Path) -> GPUStudy:
    small = GPUStudy(quick=True, storage_root=tmp_path, batches=(1, 3), repeats=2, lanes=2, window=2, probe=16)
    small = replace(small, memories=("gru",), costs=replace(small.costs, rounds=2, warmup=1, draws=20))
    small.prepare()
    return small


def test_answers_are_timed_by_memory_and_batch(study: GPUStudy) -> None:
    figures = {"acting": {**measure_acting(study, Console(quiet=True)), **told()}}
    gru = figures["acting"]["memories"]["gru"]
    assert {batch: len(ms) for batch, ms in gru["ms"].items()} == {"1": 2, "3": 2}
    assert gru["memory_bytes"] > 0
    assert "| gru | " in record_table({"figures": figures}, "acting")
    assert forward_on_gpu(figures)(2) == pytest.approx((gru["fixed_ms"] + 2 * gru["per_row_ms"]) / 1e3)
    assert targets(figures) == []


def test_protection_is_compared_with_a_training_without(study: GPUStudy) -> None:
    figures = {"tuning": {**measure_tuning(study, Console(quiet=True)), **told()}}
    assert figures["tuning"]["frames"] == 4
    assert "4 frames per step" in record_table({"figures": figures}, "tuning")
    names = [target.name for target in targets(figures)]
    assert names == ["hsw_step_ratio_gpu", "thermostat_step_ratio_gpu"]


def test_weights_in_bits_are_measured_beside_the_plan(study: GPUStudy) -> None:
    figures = measure_planned(replace(study, planned_batches=(1, 2), repeats=1), Console(quiet=True))
    plain, bits = figures["smallest, bfloat16"], figures["smallest, NF4"]
    for part in ("answers", "steps"):
        assert list(plain[part]) == list(bits[part]) == ["1", "2"]
        assert all(one["ms"] > 0 for one in (*plain[part].values(), *bits[part].values()))
        assert bits[part]["2"]["planned_gib"] < plain[part]["2"]["planned_gib"]


def told() -> dict[str, object]:
    return {"device": "CPU", "run": {"commit": "a" * 40, "machine": {"cpu": "x", "os": "y"}}}


def test_what_cannot_be_measured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"parts: \['speed'\] cannot be measured"):
        GPUStudy(quick=True, parts=("speed",))
    with pytest.raises(ValueError, match=r"batches is .*; give two or more ascending"):
        GPUStudy(quick=True, batches=(4, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        GPUStudy()
