"""The data benchmark's arithmetic, and that its own readers read what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data import Collection, DataStudy, at_scale, summary, targets
from benchmarks.data_readers import lookup_us
from benchmarks.tables import record_table

WRITTEN = Path(__file__).parents[1] / "data" / "tensorflow" / "libero_spatial_no_noops" / "1.0.0"


def rival(rate: float, rss: int, first_s: float) -> dict[str, float]:
    """One that is slower in its first epoch, which does not count."""
    first = {"pictures": 100, "cpu_s": 900 / rate, "rss": rss // 2}
    later = {"pictures": 100, "cpu_s": 100 / rate, "rss": rss}
    return summary([{"first_s": first_s, "epochs": (first, later, later)}])


def test_targets_are_against_the_better_of_the_others_in_each_figure() -> None:
    readers = {
        "ipvla": rival(3000, 100, 1.0),
        "tfds": rival(500, 1000, 40.0),
        "dlimp": rival(2000, 800, 20.0),
    }
    values = {target.name: target.value for target in targets({"reading": readers, "lookup_us": 3.0}, 5)}
    assert values == pytest.approx(
        {"frames_per_cpu_s_ratio": 1.5, "rss_ratio": 0.125, "first_batch_ratio": 0.05, "lookup_us_1m": 3.0}
    )


def test_our_reader_decodes_every_picture_of_every_epoch() -> None:
    command = [sys.executable, "-m", "benchmarks.data_readers", "ipvla", str(WRITTEN), "2"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [epoch["pictures"] for epoch in told["epochs"]] == [2 * 15, 2 * 15]
    assert told["first_s"] > 0


def test_a_lookup_is_measured(tmp_path: Path) -> None:
    assert 0 < lookup_us(tmp_path, 1000) < 1000


def test_an_epoch_at_scale_adds_up() -> None:
    collection = Collection(episodes=5000, median_steps=60, spread=0.0, cameras=2, pixels=256)
    costs = 4000 / 128**2, 1e-4 / 128**2
    scale = at_scale(collection, *costs, 8, np.random.default_rng(0))
    pictures = 5000 * 59 * 2  # exp(log 60) is a little less than 60
    assert scale["requests"] == 5000
    assert scale["terabytes"] == pytest.approx(pictures * 16000 / 1e12, rel=0.02)
    assert scale["cpu_hours"] == pytest.approx(pictures / 4 * 4e-4 / 3600, rel=0.02)
    assert 0 <= scale["idle_share"] < 0.05
    double = at_scale(replace(collection, episodes=10_000), *costs, 8, np.random.default_rng(0))
    assert double["terabytes"] == pytest.approx(2 * scale["terabytes"])


def test_the_tables_show_every_reader_and_size() -> None:
    figures = {
        "reading": {"ipvla": rival(3000, 100, 1.0), "tfds": rival(500, 1000, 40.0)},
        "dataset": {"episodes": 5, "steps": 10, "cameras": 2, "pixels": 64},
        "lanes_rss_mb": [300.0, 301.0, 301.0],
        "lookup_us": 2.5,
        "scale": [
            {"workers": 64, "windows": 10, "idle_share": 0.01, "terabytes": 1.0, "requests": 5, "worker_mb": 9.0}
            | {"cpu_hours": 2.0, "planning_s": 0.5}
        ],
    }
    assert "| tfds | 500 (500 to 500) |" in record_table({"figures": figures}, "reading")
    assert "| 64 | 10 | 1.00% |" in record_table({"figures": figures}, "scale")


def test_a_python_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="nowhere/python is no file"):
        DataStudy(tensorflow_python=Path("nowhere/python"))
