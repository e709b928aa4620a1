"""Sweeps: what may be varied, what a trial is worth, and a small real one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from ray.tune.search import BasicVariantGenerator
from rich.console import Console

from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable, tabulate
from ipvla.data.rlds import write_rlds
from ipvla.experiment import ExperimentConfig
from ipvla.sim.simulator import Task
from ipvla.storage import SOURCE_TREE
from ipvla.training.parallel import World
from ipvla.types import EpisodeResult, EpisodeSpec
from ray_jobs.command_line.settings import SettingError, parse, with_values
from ray_jobs.tune import tune
from ray_jobs.tuning import trials as running
from ray_jobs.tuning.sweep import Dimension, Scoring, SweepConfig, claim
from ray_jobs.tuning.sweep_report import best, difference, importances, pareto, plot, table, write_best
from ray_jobs.tuning.trials import SurelyWorse, Trial, rungs, searcher
from tests.synthetic import cue_episode

PRESETS = SOURCE_TREE / "ray_jobs" / "experiments"
FLAGS = ["--config_path", str(PRESETS / "method_icsm_hsw_thermostat.yaml")]
PLAYED = SuccessConfig(episodes={"ground_red": 1, "place": 1}, num_simulators=1)
SCORING = Scoring(new_tasks=("ground_red",))


def preset() -> SweepConfig:
    return parse(SweepConfig, ["--config_path", str(PRESETS / "forgetting" / "sweep.yaml")])


def trial(name: str, new: float, old: float, status: str = "finished", **values: Any) -> Trial:
    score = SCORING.score(new, old)
    told = {"new": new, "old": old, "score": score, "score/low": score - 0.1, "score/high": score + 0.1}
    return Trial(name, values, status, 150, told)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"low": 2.0, "high": 1.0}, "from 2.0 to 1.0; low must be below high"),
        ({"low": 1.0, "high": 1.0}, "low must be below high"),
        ({"low": 1.0}, "give both ends"),
        ({"low": 0.0, "high": 1.0, "log": True}, "begin above 0"),
        ({"low": 0.0, "high": math.inf}, "low must be below high"),
        ({"choices": ("a",)}, "at least two"),
        ({"choices": ("a", "b"), "low": 1.0}, "one of them"),
        ({}, "give both ends"),
    ],
)
def test_a_range_that_is_none_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Dimension(**values)


@given(st.integers(1, 50), st.integers(1, 50), st.booleans())
def test_whole_numbers_are_drawn_from_the_whole_range(low: int, width: int, log: bool) -> None:
    np.random.seed(0)
    drawn = [Dimension(low, low + width, log).domain().sample() for _ in range(20)]
    assert all(isinstance(value, int) or value == int(value) for value in drawn)
    assert all(low <= value <= low + width for value in drawn)


def test_drawn_values_lie_in_their_range() -> None:
    for dimension in (Dimension(0.1, 0.5), Dimension(1e-4, 1e-1, log=True)):
        assert dimension.low is not None
        assert dimension.high is not None
        assert all(dimension.low <= dimension.domain().sample() <= dimension.high for _ in range(50))
    assert {Dimension(choices=("a", "b")).domain().sample() for _ in range(50)} == {"a", "b"}


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        ({}, "space is empty"),
        ({"forgetting.thermostat.gama_min": Dimension(0.0, 1.0)}, r"no such setting; did you mean .*gamma_min"),
        (
            {"forgetting.thermostat.gamma_min": Dimension(0.0, 1.5)},
            r"gamma_min = 1.5: thermostat.gamma_min is 1.5",
        ),
        ({"forgetting.method.sites": Dimension(choices=("last4", "all"))}, "sites = all: .*choose one of"),
        ({"training.steps": Dimension(0.5, 2.5)}, "training.steps"),
    ],
)
def test_a_space_that_some_trial_would_be_refused_for(space: dict[str, Dimension], reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        replace(preset(), space=space).require_usable()


def test_the_preset_can_be_used() -> None:
    config = preset()
    config.require_usable()
    assert config.trials >= 24
    assert "forgetting.thermostat.gamma_min" in config.space
    assert rungs(config.trained("x", {})) == (75, 150)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"search": "grid"}, "search is 'grid'; choose one of optuna"),
        ({"objective": "pareto", "scheduler": "asha"}, "need one number"),
        ({"trials": 0}, "trials is 0"),
        ({"experiment": None}, "name the YAML file"),
        ({"scoring": Scoring(new_tasks=("ground_blue",))}, "name tasks of success.episodes"),
        ({"scoring": Scoring(new_tasks=("ground_red", "place"))}, "nothing can be forgotten"),
    ],
)
def test_a_sweep_that_cannot_be(values: dict[str, Any], reason: str) -> None:
    whole: dict[str, Any] = {"experiment": Path("x.yaml"), "success": PLAYED, "scoring": SCORING}
    with pytest.raises(ValueError, match=reason):
        SweepConfig(**{**whole, **values})


@pytest.mark.parametrize(
    ("search", "objective"),
    [("optuna", "score"), ("optuna", "pareto"), ("random", "score")],
)
def test_every_search_can_be_had(search: str, objective: str) -> None:
    assert searcher(replace(preset(), search=search, objective=objective)) is not None


@given(*[st.floats(0, 1)] * 4)
def test_a_score_never_falls_with_success_or_retention(new: float, old: float, more: float, kept: float) -> None:
    assert SCORING.score(max(new, more), max(old, kept)) >= SCORING.score(new, old)
    assert SCORING.score(1.0, old) == old, "where the new task is learned, retention is what counts"


def played(successes: dict[str, list[bool]]) -> SuccessTable:
    tasks = [Task(name, name.partition("_")[0], ("go",), 10, 0.0) for name in successes]
    results = [
        EpisodeResult(EpisodeSpec("recall", name, i, i), "success" if won else "timeout", 10, 2, 1.0, 0.5)
        for name, wins in successes.items()
        for i, won in enumerate(wins)
    ]
    return tabulate("x", tasks, results, {})


def test_new_and_old_tasks_are_told_apart_with_intervals() -> None:
    told = SCORING.of(played({"ground_red": [True, False], "place": [True, True, True, False]}))
    assert (told["new"], told["old"]) == (0.5, 0.75)
    assert told["score"] == pytest.approx(0.75 - 3 * 0.3)
    for name in ("new", "old", "score"):
        assert told[f"{name}/low"] < told[name] < told[f"{name}/high"]


def test_best_minus_default_is_paired() -> None:
    wins = {seed: played({"ground_red": [True] * 40, "place": [True] * 40}) for seed in (1, 2, 3)}
    losses = {seed: played({"ground_red": [True] * 40, "place": [True, False] * 20}) for seed in (1, 2, 3)}
    found = difference(wins, losses, SCORING)
    assert found["new"].value == 0
    assert found["old"].value == pytest.approx(0.5)
    assert found["score"].low > 0


def test_only_who_is_surely_worse_is_stopped() -> None:
    stop = SurelyWorse()
    look = {"step": 75, "score": 0.8, "score/low": 0.6, "score/high": 0.9}
    assert not stop("a", look)
    assert not stop("b", {**look, "score/low": 0.4, "score/high": 0.7}), "the intervals overlap"
    assert stop("c", {**look, "score/low": 0.1, "score/high": 0.5})
    assert not stop("c", {**look, "step": 150, "score/low": 0.1, "score/high": 0.5}), (
        "the first after so many steps"
    )


def test_the_best_is_a_finished_trial() -> None:
    trials = [trial("a", 0.9, 0.5), trial("b", 0.9, 0.7), trial("c", 1.0, 0.9, "stopped"), trial("d", 0.5, 0.9)]
    assert best(trials).name == "b"
    equal = [trial("x", 0.9, 0.5), trial("y", 0.9, 0.5)]
    assert best(equal) == best(equal[::-1]), "a sweep that goes on finds them in another order"
    assert [one.name for one in pareto(trials)] == ["d", "b"]
    with pytest.raises(ValueError, match="none of 1 trials has finished; the first that failed: it broke"):
        best([Trial("x", {}, "failed", error="it broke")])


def test_what_matters_is_found() -> None:
    rng = np.random.default_rng(0)
    drawn = [{"a.gain": g, "b.idle": i} for g, i in rng.uniform(size=(60, 2)).tolist()]
    trials = [trial(str(n), 1.0, values["a.gain"], **values) for n, values in enumerate(drawn)]
    space = {"a.gain": Dimension(0.0, 1.0), "b.idle": Dimension(0.0, 1.0)}
    found = importances(trials, space)
    assert found["a.gain"] > 0.8
    assert importances(trials[:5], space) == {}, "five trials tell nothing"


def test_the_best_is_an_experiment_that_training_takes(tmp_path: Path) -> None:
    config = with_values(parse(ExperimentConfig, FLAGS), {"forgetting.thermostat.gamma_min": 0.25})
    path = write_best(config, trial("a", 0.9, 0.8), tmp_path / "best.yaml")
    again = parse(ExperimentConfig, ["--config_path", str(path), "--name", config.name])
    assert again == config
    assert path.read_text().startswith("# a: new 0.90, old 0.80")


def test_every_trial_is_in_the_table_and_the_plot(tmp_path: Path) -> None:
    trials = [trial("a", 0.9, 0.5, x=0.1), Trial("b", {"x": 0.2}, "failed", error="loss | nan")]
    told = table(trials, ["x"])
    assert "| a | finished | 150 | 0.90 | 0.50 | 0.50 (0.40 to 0.60) | x 0.1 |" in told
    assert "| b | failed | 0 |  |  | loss / nan | x 0.2 |" in told
    assert plot(trials, trials[0], tmp_path / "p.png").stat().st_size > 5000


def in_mlflow(config: SweepConfig, finished: dict[str, Any], diverged: dict[str, Any]) -> None:
    """One experiment; the sweep with its table, and below it the trials that began, one of which is the best."""
    client = MlflowClient(config.mlflow_uri)
    experiment = client.get_experiment_by_name(config.study)
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"sweep", "sweep-start", finished["name"], diverged["name"]}
    assert runs.pop(diverged["name"]).info.status == "FAILED"
    before = runs.pop("sweep-start").data.metrics["forgetting/old"]
    sweep, trained = runs["sweep"], runs[finished["name"]]
    assert trained.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert finished["name"] in sweep.data.tags["mlflow.note.content"]
    for run in runs.values():
        assert run.data.metrics["forgetting/score"] == finished["told"]["score"]
    assert "success/recall/ground_red" in trained.data.metrics
    assert trained.data.metrics["forgetting/bwt"] == finished["told"]["old"] - before
    assert {file.path for file in client.list_artifacts(sweep.info.run_id)} >= {"report.md", "pareto.png"}
    assert {file.path for file in client.list_artifacts(trained.info.run_id)} >= {"experiment.json", "policy"}
    model = client.get_model_version_by_alias(f"{config.study}.{config.name}", "best")
    assert model.run_id == trained.info.run_id
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


#: A trial that raises, one whose loss is no number, and a sound one.
TRIED = (("nothing", 1e-3), ("cue", 1e30), ("cue", 1e-3))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_of_real_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that raises and one whose loss is not a number fail alone: that is told, and another is the best."""
    write_rlds(tmp_path / "datasets", "cue", [cue_episode(seed) for seed in range(8)], 16)
    roots = ["--storage_root", str(tmp_path)]
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(
        "data: {dataset: cue, image_size: 64, cache_gib: 0.1}\n"
        "lanes: {lanes: 2, window: 2}\n"
        "model: {backbone: {type: tiny, width: 32, heads: 2, mlp: 32, trunk_channels: 8}}\n"
        "optimizer: {warmup_steps: 1}\n"
        "training: {steps: 3, checkpoint_every: 3, log_every: 1, precision: fp32}\n"
    )
    start = tmp_path / "start"
    parse(ExperimentConfig, ["--config_path", str(experiment), *roots]).build(World()).policy.save(start)
    monkeypatch.chdir(tmp_path)
    points = [{"data.dataset": data, "optimizer.lr": lr} for data, lr in TRIED]
    monkeypatch.setattr(running, "searcher", lambda _: BasicVariantGenerator(points, max_concurrent=1))
    config = SweepConfig(
        storage_root=tmp_path,
        experiment=Path(experiment.name),
        settings={"start_from": str(start)},
        space={
            "data.dataset": Dimension(choices=("cue", "nothing")),
            "optimizer.lr": Dimension(choices=(1e-3, 1e30)),
        },
        trials=3,
        search="random",
        success=PLAYED,
        scoring=SCORING,
        confirm_seeds=(),
    )
    told = tune(config, Console(quiet=True))
    trials = {(*one["values"].values(),): one for one in told["trials"]}
    raised, diverged = trials["nothing", 1e-3], trials["cue", 1e30]
    assert (raised["status"], diverged["status"]) == ("failed", "failed")
    assert raised["error"].startswith("ipvla.data.source.")
    assert diverged["error"].startswith("ray_jobs.command_line.cli.TrainingError"), "not tried again"
    assert "lower optimizer.lr" in diverged["error"]
    finished = trials["cue", 1e-3]
    assert (finished["status"], told["best"]) == ("finished", finished["name"])
    trained = config.directory.with_name(finished["name"]) / "metrics.jsonl"
    before = trained.stat().st_mtime_ns
    assert tune(config, Console(quiet=True))["best"] == told["best"]
    assert trained.stat().st_mtime_ns == before, "nothing is repeated"
    assert json.loads((config.directory / "sweep.json").read_text())["best"] == told["best"]
    in_mlflow(config, finished, diverged)
    with pytest.raises(SettingError, match="holds a sweep with other settings"):
        tune(replace(config, trials=4), Console(quiet=True))


def test_a_trial_finds_relative_paths_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experiment.yaml").write_text("data: {dataset: ./data/cue}\n")
    config = SweepConfig(
        storage_root=Path("store"),
        experiment=Path("experiment.yaml"),
        settings={"start_from": "start/policy", "training.steps": 6},
        space={"optimizer.lr": Dimension(1e-4, 1e-2)},
        success=PLAYED,
        scoring=SCORING,
    ).absolute()
    config.require_usable()
    begun = claim(config)
    assert claim(config) == begun, "the same again goes on"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    trained = begun.trained("x", {"optimizer.lr": 1e-3})
    assert (trained.start_from, trained.data.dataset) == (tmp_path / "start/policy", str(tmp_path / "data/cue"))
    assert trained.run_directory == tmp_path / "store" / "runs" / "forgetting" / "sweep-x"
    assert (trained.optimizer.lr, trained.training.steps) == (1e-3, 6)
