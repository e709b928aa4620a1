"""A sweep that is killed: what counts as repeated, and what is recorded."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.service import targets
from benchmarks.tables import record_table
from ipvla.rollout.journal import Journal
from ipvla.tracking import JsonlSink, MLflowSink, RunIdentity
from ipvla.types import EpisodeResult, EpisodeSpec
from ray_jobs.command_line.settings import parse
from ray_jobs.tuning.sweep import SweepConfig
from tests.endurance.__main__ import EnduranceStudy
from tests.endurance.killed_sweep import KilledSweep, SweepStudy, evidence, figures

DONE = EpisodeResult(EpisodeSpec("recall", "ground_red", 0, 0), "success", 10, 2, 1.0, 0.5)


def training(**changes: Any) -> dict[str, Any]:
    interval = {"value": 1.01, "low": 1.0, "high": 1.02}
    mlflow = {"open_s": 3.0, "logging_s": 0.4, "training_s": 80.0, "calls": 32, "steps": 600, "log_every": 20}
    sizes = {"turns": 40, "steps_of_a_turn": 20, "same_weights": True}
    times = {"step_ms": {"trainer": 101.0, "bare": 100.0}, "ratio": interval, "ratio_cpu": interval}
    return {**times, **sizes, "mlflow": mlflow, **changes}


def swept(ended: dict[str, Any], again: dict[str, Any], names: tuple[str, ...] = ("s-a", "s-b", "s-c")) -> Any:
    told = {"new": 0.8, "old": 0.7, "score": 0.7}
    trials = [
        {"name": name, "status": "finished", "step": 150, "values": {"optimizer.lr": 1e-3}, "told": told}
        for name in names
    ]
    seen = {"ended": ended, "interrupted": "s-c", "seconds": 900.0}
    whole = {
        "trials": trials,
        "best": "s-a",
        "importances": {"optimizer.lr": 0.9},
        "confirmation": {side: {"1": told, "2": told} for side in ("best", "default")},
        "best_minus_default": {name: {"value": 0.1, "low": -0.1, "high": 0.3} for name in told},
    }
    return {**figures(whole, seen, again, 1800.0), "prepared_s": 600.0}


def test_the_targets_are_those_that_were_promised() -> None:
    left = {"s-a": 1, "s-b": 2}
    found = {one.name: one for one in targets({"training": training(), "sweep": swept(left, left)})}
    assert {name: (one.value, one.met) for name, one in found.items()} == {
        "trainer_ratio": (1.01, True),
        "mlflow_share": (0.005, True),
        "sweep_trials": (3, False),
        "sweep_wall_s": (1800.0, True),
        "sweep_repeated_trials": (0, True),
    }
    other = targets({"training": training(same_weights=False)})[0]
    assert (other.value, other.met) == (None, False), "another step has no ratio"


def test_the_tables_say_how_it_went() -> None:
    left = {"s-a": 1, "s-b": 2}
    found = {"training": training(), "sweep": swept(left, left)}
    assert "| worker of Ray Train | 101.0 | 1.010 (1.000 to 1.020) |" in record_table(
        {"figures": found}, "training"
    )
    sweep = record_table({"figures": found}, "sweep")
    assert "| best minus default | 0.100 (-0.100 to 0.300) |" in sweep
    assert "killed after 15 of 30 minutes, with 2 trials behind it" in sweep
    assert "| `optimizer.lr` | 0.001 | 90% |" in sweep


def test_a_trial_that_left_something_else_or_has_a_double_was_repeated() -> None:
    left = {"s-a": 1, "s-b": 2}
    assert swept(left, left)["repeated"] == []
    assert swept(left, {"s-a": 1, "s-b": 3})["repeated"] == ["s-b"]
    assert swept(left, left, ("s-a", "s-b", "s-b", "s-c"))["repeated"] == ["s-b"]
    assert swept(left, left, ("s-a", "s-b"))["interrupted_went_on"] is False


def test_whatever_is_done_again_changes_what_a_trial_left(tmp_path: Path) -> None:
    run, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    checkpoint = run / "trainer" / "step_000003" / "training.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("{}")
    sink = JsonlSink(run / "metrics.jsonl")
    sink.log({"train/loss": 1.0}, 1)
    tracked = MLflowSink(RunIdentity(uri, "s", "run", str(run)), tmp_path / "spool")
    tracked.flush()
    with Journal(run / "episodes_000003_0.sqlite", {}) as journal:
        journal.record(DONE)
        seen = [evidence(run, uri)]
        assert evidence(run, uri) == seen[0], "looking changes nothing"
        sink.log({"train/loss": 1.0}, 1)
        seen.append(evidence(run, uri))
        journal.record(replace(DONE, spec=replace(DONE.spec, trial=1, seed=1)))
        seen.append(evidence(run, uri))
    tracked.log({"train/loss": 1.0}, 1)
    tracked.close()
    seen.append(evidence(run, uri))
    checkpoint.write_text("{ }")
    seen.append(evidence(run, uri))
    assert all(one != other for one, other in pairwise(seen))


def test_trials_start_from_the_base_of_the_forgetting_study(tmp_path: Path) -> None:
    for quick in (False, True):
        study = SweepStudy(storage_root=tmp_path, quick=quick)
        sweep = parse(SweepConfig, study.arguments())
        sweep.require_usable()
        trained = sweep.trained("x", {})
        assert trained.start_from == study.forgetting.base(study.seed)
        assert trained.forgetting is not None
        assert trained.forgetting.artifact == study.forgetting.subspaces(study.seed)[0].name
        assert sweep.concurrent == 1, "all trials but the newest have ended"
    assert EnduranceStudy().trials >= 24


def test_the_newest_trial_is_under_way(tmp_path: Path) -> None:
    sweep = KilledSweep(SweepStudy(storage_root=tmp_path).arguments())
    directory = sweep.config.directory
    for number, name in enumerate(("b", "a", "best")):
        record = directory.with_name(f"sweep-{name}") / "experiment.json"
        record.parent.mkdir(parents=True)
        record.write_text("{}")
        if number < 2:
            (directory / "tune" / name).mkdir(parents=True)
        time.sleep(0.01)
    assert [path.name for path in sweep.trials] == ["sweep-b", "sweep-a"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"parts": ["sweeps"]}, r"parts: \['sweeps'\] cannot be measured; choose among chaos, soak, sweep"),
        ({"trials": 1}, "trials is 1; it must be at least 2"),
    ],
)
def test_a_study_that_cannot_be(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        EnduranceStudy(**values)
