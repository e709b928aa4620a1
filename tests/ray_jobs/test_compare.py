"""Runs of a real MLflow store, side by side."""

from __future__ import annotations

import io
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from rich.console import Console

from evaluators.tracked_runs import RunStore, TrackingError
from ipvla.sim.protocols import ProtocolError
from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.settings import SettingError, parse
from ray_jobs.compare import CompareConfig, compare, select


def tracked(client: MlflowClient, study: str, name: str, lr: float, success: float, protocol: str) -> None:
    known = client.get_experiment_by_name(study)
    run = client.create_run(known.experiment_id if known else client.create_experiment(study), run_name=name)
    params = {"optimizer.lr": lr, "seed": 0, "fingerprint.protocol": protocol}
    points = [
        (metric, value, step)
        for step in (1, 2)
        for metric, value in (
            ("train/loss", 1 / step),
            ("success/new", success * step / 2),
            ("forgetting/bwt", -lr),
        )
    ]
    points += [("success/new/low", success - 0.1, 2), ("success/new/high", success + 0.1, 2)]
    client.log_batch(
        run.info.run_id,
        [Metric(metric, value, 0, step) for metric, value, step in points],
        [Param(key, str(value)) for key, value in params.items()],
    )
    client.set_terminated(run.info.run_id)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    root = tmp_path_factory.mktemp("tracked")
    (root / "runs").mkdir()
    uri = f"sqlite:///{root}/runs/mlflow.db"
    client = MlflowClient(uri)
    for name, lr, success in (("gentle", 0.1, 0.5), ("it's bold", 0.3, 0.8)):
        tracked(client, "sweep", name, lr, success, "recall-1")
    tracked(client, "other", "gentle", 0.1, 0.6, "recall-2")
    client.create_experiment("empty")
    return CompareConfig(storage_root=root, tracking_uri=uri, study="sweep")


def printed(config: CompareConfig) -> str:
    console = Console(file=io.StringIO(), width=120)
    compare(config, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_runs_are_compared_by_what_they_share_and_where_they_differ(config: CompareConfig) -> None:
    told = printed(config)
    for part in ("gentle", "it's bold", "finished", "0.50 (0.40-0.60)", "0.80 (0.70-0.90)", "lr", "-0.3"):
        assert part in told
    assert "seed" not in told
    assert "train/loss" not in told


def test_files_and_plots_are_written_where_asked_for(config: CompareConfig, tmp_path: Path) -> None:
    told = printed(replace(config, out=tmp_path / "out"))
    files = {"runs.md", "runs.csv", "runs.json", "scatter.png", "parallel.png", "curves.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert "scatter.png" in told
    for plot in ("scatter", "parallel", "curves"):
        assert (tmp_path / "out" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_found_by_study_name_id_and_filter(config: CompareConfig) -> None:
    store = RunStore(config.tracking_uri or "")

    def names(**settings: object) -> list[str]:
        return [f"{run.study}/{run.name}" for run in select(store, replace(config, **settings))]  # type: ignore[arg-type]

    both = ["sweep/gentle", "sweep/it's bold"]
    assert names() == both
    assert names(order_by="metrics.`success/new` DESC") == both[::-1]
    assert names(limit=1) == both[:1]
    assert names(names=("it's bold", "gentle")) == both[::-1]
    assert names(study=None, names=("gentle",)) == ["sweep/gentle", "other/gentle"]
    (other,) = select(store, replace(config, study="other"))
    assert names(study=None, names=(other.run_id,)) == ["other/gentle"]
    assert names(filter="metrics.`success/new` > 0.7") == both[1:]
    assert names(study=None, filter="params.`optimizer.lr` = '0.1'", names=("gentle",)) == [
        "sweep/gentle",
        "other/gentle",
    ]


def test_curves_have_their_points_in_order(config: CompareConfig) -> None:
    store = RunStore(config.tracking_uri or "")
    run = select(store, config)[0]
    assert store.curve(run, "train/loss") == [(1, 1.0), (2, 0.5)]


def test_what_was_played_by_other_protocols_is_refused_unless_asked_for(config: CompareConfig) -> None:
    both = replace(config, study=None, names=("gentle",))
    with pytest.raises(ProtocolError, match=r"same protocol: recall-1 \(sweep/gentle\); recall-2 .* --across"):
        printed(both)
    assert "protocol is not the same for all" in printed(replace(both, across_protocols=True))


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"study": "sweap"}, TrackingError, "study: 'sweap' is no experiment .* did you mean 'sweep'"),
        ({"study": "empty"}, TrackingError, "study empty has no run"),
        ({"filter": "params.seed = '9'"}, TrackingError, "study sweep has no run that fits filter"),
        ({"filter": "seed is 9"}, TrackingError, "does not understand filter or order_by"),
        ({"study": None}, TrackingError, "by study, names or filter; studies: .*sweep"),
        ({"names": ("gentel",)}, TrackingError, "there is no run 'gentel' .* did you mean 'gentle'"),
        ({"metrics": ("sucess/new",)}, SettingError, "metrics: none of these runs has .* mean 'success/new'"),
        ({"parameters": ("lr*",)}, SettingError, "parameters: none of these runs has 'lr\\*'"),
        ({"scatter": ("success/new", "bwt")}, SettingError, "scatter: none of these runs has 'bwt'"),
        ({"colour_by": "loss"}, SettingError, "colour_by: none .* mean 'train/loss'"),
        ({"curves": ("loss",)}, SettingError, "curves: none .* mean 'train/loss'"),
        ({"tracking_uri": "http://127.0.0.1:9"}, TrackingError, "MLflow at http://127.0.0.1:9 does not answer"),
        ({"tracking_uri": "ftp://x"}, TrackingError, "does not understand the store's address"),
        ({"tracking_uri": "sqlite:////no/where.db"}, TrackingError, "there is no MLflow database /no/where.db"),
    ],
)
def test_what_cannot_be_compared_is_told_and_nothing_is_written(
    config: CompareConfig, tmp_path: Path, settings: dict[str, object], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        printed(replace(config, out=tmp_path / "out", **settings))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_database_of_something_else_is_left_as_it_is(config: CompareConfig, tmp_path: Path) -> None:
    path = tmp_path / "episodes.sqlite"
    sqlite3.connect(path).execute("CREATE TABLE episodes (id)").connection.close()
    before = path.read_bytes()
    with pytest.raises(TrackingError, match="is no database of MLflow's"):
        printed(replace(config, tracking_uri=f"sqlite:///{path}"))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        (["--limit", "0"], SettingError, "limit is 0"),
        (["--scatter", "[a]"], SettingError, "name two metrics"),
        (["--out", str(SOURCE_TREE / "docs")], SettingError, "lies inside the source tree"),
    ],
)
def test_settings_that_cannot_be(arguments: list[str], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        parse(CompareConfig, arguments)
