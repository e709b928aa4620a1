import json
from dataclasses import replace

import pytest
from rich.console import Console

from evaluators.console import comparison_table, result_note, success_table
from evaluators.paired import compare, write_success
from evaluators.report import Report
from evaluators.success import _metrics
from evaluators.success_table import tabulate
from ipvla.sim.simulator import Task
from ipvla.types import EpisodeResult, EpisodeSpec

TASKS = [
    Task("ground_a", "ground", ("a",), 10, chance=0.5),
    Task("ground_b", "ground", ("b",), 10, chance=0.25),
    Task("recall_a", "recall", ("c",), 10, chance=1 / 3),
]


def results(task: str, outcomes: str):
    """One character per trial: s(uccess), f(ailure), t(imeout)."""
    names = {"s": "success", "f": "failure", "t": "timeout"}
    return [
        EpisodeResult(EpisodeSpec("point", task, trial, trial), names[o], 5, 3, 1.0, 0.1)
        for trial, o in enumerate(outcomes)
    ]


def table(name: str, **outcomes: str):
    return tabulate(name, TASKS, [r for task, o in outcomes.items() for r in results(task, o)], {"protocol": "1"})


def test_rows_count_successes_by_task_and_by_family():
    made = table("gru", ground_a="ssft", ground_b="sf", recall_a="tttt")
    assert [(r.name, r.k, r.n) for r in made.tasks] == [("ground_a", 2, 4), ("ground_b", 1, 2), ("recall_a", 0, 4)]
    ground, recall = made.families
    assert (ground.k, ground.n, ground.rate) == (3, 6, 0.5)
    assert ground.chance == pytest.approx((4 * 0.5 + 2 * 0.25) / 6)
    assert recall.to_dict() == {
        "k": 0,
        "n": 4,
        "rate": 0.0,
        "wilson95": pytest.approx([0.0, 0.4899], abs=1e-4),
        "chance": pytest.approx(1 / 3),
    }
    assert list(made.to_dict()) == ["ground", "recall"]


def test_sub_goals_are_averaged_where_episodes_report_them():
    plain = table("gru", ground_a="ss")
    assert plain.subgoals == {}
    assert "subgoals" not in plain.record()
    reached = {"ground_a": (0, 3, 4), "recall_a": (2, 4)}
    told = tuple(
        replace(result, details={"subgoals_reached": count, "subgoals": 4})
        for task, counts in reached.items()
        for result, count in zip(results(task, "f" * len(counts)), counts, strict=True)
    )
    made = tabulate("gru", TASKS, told, {"protocol": "1"})
    assert made.subgoals == {"ground_a": pytest.approx(7 / 12), "recall_a": 0.75}
    assert made.record()["subgoals"] == made.subgoals
    assert "0.67" in str(success_table([made]).caption)
    assert _metrics(made, "success/point")["success/point/recall_a/subgoals"] == 0.75
    assert success_table([plain]).caption is None


def test_what_is_written_names_all_that_it_depends_on(tmp_path):
    none, gru = table("none", ground_a="sf", recall_a="fsft"), table("gru", recall_a="ssssss")
    gru = replace(gru, anytime95=(0.4, 0.9))
    path = write_success([none, gru], compare(none, gru, TASKS), tmp_path / "new" / "success.json")
    told = json.loads(path.read_text())
    assert told["policies"]["none"]["protocol"] == told["policies"]["none"]["fingerprint"]["protocol"] == "1"
    assert told["policies"]["none"]["families"]["recall"]["k"] == 1
    assert {name: row["n"] for name, row in told["policies"]["none"]["tasks"].items()} == {
        "ground_a": 2, "recall_a": 4,
    }  # fmt: skip
    assert [of["anytime95"] for of in told["policies"].values()] == [None, [0.4, 0.9]]
    (comparison,) = told["comparisons"]
    assert (comparison["first"], comparison["second"], comparison["pairs"]) == ("none", "gru", 4)
    assert comparison["p_value"] == pytest.approx(0.25)
    low, high = comparison["difference95"]
    assert low < comparison["difference"] == -0.75 < high
    assert [p.name for p in path.parent.iterdir()] == ["success.json"]


def test_a_report_says_which_interval_holds_after_an_early_stop(tmp_path):
    fixed = table("none", recall_a="fsft")
    stopped = replace(table("gru", recall_a="ssssss"), anytime95=(0.4123, 0.9))
    html = Report("Title", [fixed, stopped]).write(tmp_path / "report.html").read_text()
    assert html.count("do not hold for it") == 1
    assert "gru was played until enough was known" in html
    assert "0.41 to 0.90" in html


def test_a_family_without_episodes_has_no_row():
    assert [row.name for row in table("gru", recall_a="s").families] == ["recall"]


def test_policies_are_compared_on_shared_layouts_only():
    none = table("none", ground_a="sf", recall_a="fsft")
    gru = table("gru", recall_a="ssssss")
    (comparison,) = compare(none, gru, TASKS)
    assert (comparison.family, comparison.first, comparison.second) == ("recall", "none", "gru")
    assert (comparison.pairs, comparison.only_first, comparison.only_second) == (4, 0, 3)
    assert comparison.p_value == pytest.approx(0.25)
    assert comparison.difference == -0.75
    low, high = comparison.difference95
    assert -1 <= low < -0.75 < high <= 0


def test_of_one_layout_every_table_says_that_there_is_no_interval(tmp_path):
    none, gru = table("none", recall_a="s"), table("gru", recall_a="s")
    comparisons = compare(none, gru, TASKS)
    console = Console(width=160, record=True)
    console.print(comparison_table(comparisons))
    html = Report("Title", [none, gru], comparisons=comparisons).write(tmp_path / "report.html").read_text()
    for text in (console.export_text(), result_note([none, gru], comparisons), html):
        assert "+0.00 (no interval: one layout)" in text
    path = write_success([none, gru], comparisons, tmp_path / "success.json")
    (comparison,) = json.loads(path.read_text())["comparisons"]
    assert (comparison["pairs"], comparison["difference95"]) == (1, None)
    both = [table(name, ground_a="s", ground_b="f") for name in ("none", "gru")]
    assert "no interval: one layout per task" in result_note(both, compare(*both, TASKS))


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="none and gru share no layout"):
        compare(table("none", ground_a="s"), table("gru", recall_a="s"), TASKS)


def test_the_console_shows_counts_rate_interval_and_chance():
    console = Console(width=120, record=True)
    console.print(success_table([table("none", recall_a="sfff"), table("gru", recall_a="ssss", ground_a="s")]))
    shown = console.export_text()
    recall = next(line for line in shown.splitlines() if "recall" in line)
    assert "1/4  0.25 (0.05-0.70)" in recall
    assert "4/4  1.00 (0.51-1.00)" in recall
    assert "0.33" in recall
    assert any("ground" in line and " - " in line for line in shown.splitlines())
