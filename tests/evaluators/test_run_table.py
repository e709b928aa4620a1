"""What a table of tracked runs shows, how it is written, and what is drawn of it."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from evaluators.plots import parallel_coordinates, scatter
from evaluators.run_table import (
    RunTable,
    differing_parameters,
    duration,
    metric_cell,
    opposed,
    shared_metrics,
    short_names,
)
from evaluators.tracked_runs import TrackedRun, differing_fingerprints, labels


def run(label: str, metrics: Mapping[str, float] | None = None, **params: str) -> TrackedRun:
    dotted = {key.replace("__", "."): value for key, value in params.items()}
    return TrackedRun(f"{label}-id-of-32", label, "study", "finished", 65.0, dotted, metrics or {})


PLAYED = {"success/place": 0.9, "success/place/low": 0.84, "success/place/high": 0.95}


@pytest.mark.parametrize(
    ("metrics", "cell"),
    [
        (PLAYED, "0.90 (0.84-0.95)"),
        ({"success/place": 0.9}, "0.9"),
        ({"success/place": 0.1, "success/place/low": -0.2, "success/place/high": 0.4}, "0.10 (-0.20 to 0.40)"),
        ({"success/place": math.nan}, "nan"),
        ({}, "-"),
    ],
)
def test_a_value_is_told_with_its_interval(metrics: dict[str, float], cell: str) -> None:
    assert metric_cell(run("a", metrics), "success/place") == cell


def test_shown_are_the_results_that_two_runs_have() -> None:
    a = run("a", {**PLAYED, "success/s/task": 1.0, "train/loss": 0.1, "probe/d": 0.2, "gain/beta": 1.0})
    b = run("b", {**PLAYED, "success/s/task": 0.0, "train/loss": 0.2, "probe/d": 0.1})
    parent = run("parent", {"forgetting/score": 0.3})
    assert shared_metrics([a, b, parent]) == ["success/place", "probe/d", "success/s/task"]
    assert shared_metrics([a])[2] == "gain/beta", "a single run shares all"


def test_shown_are_the_parameters_in_which_runs_differ() -> None:
    a = run("a", seed="0", lr="0.1", name="a", tmp_dir="/x", fingerprint__policy_sha256="1", forgetting="None")
    b = run("b", seed="0", lr="0.2", name="b", tmp_dir="/y", fingerprint__policy_sha256="2", forgetting__kp="0.5")
    runs = (a, b, run("parent", trials="2"))
    assert differing_parameters(runs) == ["lr", "forgetting"]
    assert RunTable(runs, (), ("lr", "forgetting")).markdown().splitlines()[2:] == [
        "| a      | finished | 1:05 | 0.1 | None       |",
        "| b      | finished | 1:05 | 0.2 | given      |",
        "| parent | finished | 1:05 | -   | -          |",
    ]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join), unique=True, max_size=6))
def test_short_names_can_be_told_apart_and_end_the_long_ones(names: list[str]) -> None:
    short = short_names(names)
    assert len({*short}) == len(names)
    assert all(name.endswith(end) for name, end in zip(names, short, strict=True))


def test_runs_of_one_name_are_told_apart() -> None:
    again = TrackedRun("0123456789", "a", "study")
    assert labels([run("a"), again, run("b")]) == ["a a-id-of-", "a 01234567", "b"]
    assert labels([run("a"), TrackedRun("1", "a", "other")]) == ["study/a", "other/a"]


def test_a_wall_time_is_short() -> None:
    assert [duration(s) for s in (7.4, 185, 3723)] == ["7 s", "3:05", "1:02:03"]


def table() -> RunTable:
    runs = (run("a|b", PLAYED, lr="0.001"), run("[c]", {"success/place": math.nan}, lr="0.002"))
    return RunTable(runs, ("success/place",), ("lr",))


@pytest.mark.parametrize("runs", [2, 6])
@pytest.mark.parametrize("width", [50, 80, 200])
def test_on_the_console_no_value_is_broken(runs: int, width: int) -> None:
    names = [f"success/{i}" for i in range(8)]
    metrics = {
        f"{name}{end}": value for name in names for end, value in (("", 0.9), ("/low", 0.8), ("/high", 1.0))
    }
    table = RunTable(tuple(run(f"run{i}", metrics) for i in range(runs)), tuple(names), ())
    console = Console(file=io.StringIO(), width=width)
    console.print(table.console(width))
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert told.count("0.90 (0.80-1.00)") == runs * len(names)
    assert max(map(len, told.splitlines())) <= width


def test_markdown_has_a_row_for_each_run() -> None:
    lines = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in table().markdown().splitlines()]
    assert lines[0] == ["run", "status", "wall", "success/place", "lr"]
    assert lines[2] == ["a\\|b", "finished", "1:05", "0.90 (0.84-0.95)", "0.001"]
    assert lines[3] == ["[c]", "finished", "1:05", "nan", "0.002"]
    assert len(lines) == 4


def test_csv_and_json_hold_the_numbers(tmp_path) -> None:
    assert [file.name for file in table().write(tmp_path)] == ["runs.md", "runs.csv", "runs.json"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "runs.csv").read_text())))
    assert (rows[0]["run"], rows[0]["lr"], rows[0]["success/place/high"]) == ("a|b", "0.001", "0.95")
    assert (rows[1]["success/place"], rows[1]["success/place/low"]) == ("nan", "")
    told = json.loads((tmp_path / "runs.json").read_text())
    assert told["runs"][0]["metrics"] == PLAYED
    assert told["runs"][1]["metrics"] == {"success/place": None}


def test_what_was_learned_is_set_against_what_was_kept() -> None:
    assert opposed(["success/place", "success/new", "forgetting/bwt"]) == ("success/new", "forgetting/bwt")
    assert opposed(["forgetting/new", "forgetting/old"]) == ("forgetting/new", "forgetting/old")
    assert opposed(["success/a", "success/b"]) == ("success/a", "success/b")
    assert opposed(["success/a"]) is None


def test_what_results_depend_on_is_compared_among_those_that_have_results() -> None:
    a, b = run("a", fingerprint__protocol="recall-1", seed="0"), run("b", fingerprint__protocol="recall-2")
    assert differing_fingerprints([a, b, run("c")]) == {"protocol": {"recall-1": ["a"], "recall-2": ["b"]}}
    assert differing_fingerprints([a, run("c")]) == {}


def test_a_scatter_has_a_point_for_each_run_with_both_metrics() -> None:
    runs = [run(str(n), {**PLAYED, "forgetting/bwt": -n / 10}) for n in range(3)]
    figure = scatter([*runs, run("twin", runs[0].metrics), run("parent")], "success/place", "forgetting/bwt")
    assert figure is not None
    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["0\ntwin", "1", "2"]
    assert axes.get_ylabel() == "forgetting/bwt"
    assert axes.get_xlabel().startswith("success/place (with")
    assert scatter([run("parent")], "success/place", "forgetting/bwt") is None


def test_parallel_coordinates_go_through_what_differs_in_order_and_by_value() -> None:
    runs = [
        run(str(n), {"score": n / 10}, a__lr=str(10.0**-n), b__sites=sites, c__seed="0")
        for n, sites in enumerate(["last4", "single", "last4"], start=1)
    ]
    figure = parallel_coordinates([*runs, run("parent")], ["a.lr", "b.sites", "c.seed"], "score")
    assert figure is not None
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["lr", "sites", "score"], (
        "seeds are all the same"
    )
    lines = [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == 3]
    assert lines == [[1.0, 0.0, 0.0], pytest.approx([0.5, 1.0, 0.5]), [0.0, 0.0, 1.0]]
    assert parallel_coordinates(runs[:1], ["a.lr"], "score") is None
    assert parallel_coordinates(runs, ["c.seed"], "score") is None
