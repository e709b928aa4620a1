import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import tables
from evaluators.forgetting import SequenceRun, sequence_figures
from evaluators.step_response import CLOSED, OPEN, Response, response_figures
from ipvla.storage import SOURCE_TREE
from studies.fronts import figures, groups, plot_fronts, targets
from studies.tables import FORGETTING, measured, study_table
from tests.evaluators.made_up import RATES, comparison

DOCS = SOURCE_TREE / "docs" / "forgetting.md"


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    """As a full run has them."""
    run = SequenceRun(np.array([[0.8, 0.2], [0.6, 0.9]]), np.array([[0.5, 0.8], [0.6, 0.9]]))
    sequence = sequence_figures(
        {"recall": 0.3, "place": 0.0}, {"lora": {0: run, 1: run}, "ours": {0: run, 1: run}}
    )
    ratio = {"value": 1.03, "low": 1.02, "high": 1.06}
    costs = {
        "clock": "cpu",
        "rounds": 120,
        "every": 10,
        "baseline_ms": 100.0,
        "method_ms": 103.0,
        "reading_ms": 20.0,
    }
    costs |= {f"{of}_step_ratio{clock}": ratio for of in ("hsw", "thermostat") for clock in ("", "_wall")}
    seen = Response(0.1, 0.4, 0.2, 0.5, 0.3, 0.2, 0.7)
    answers = response_figures("ours", {seed: {OPEN: seen, CLOSED: replace(seen, peak_d=0.6)} for seed in (0, 4)})
    made = {"sequence": sequence, "costs": costs, "response": answers}
    return {**figures(comparison(), draws=100), **made}


def record(full: dict[str, Any]) -> dict[str, Any]:
    machine = {"cpu": "2 x CPU", "os": "Linux"}
    told = [target.to_dict() for target in targets(full)]
    return {"commit": "0123456789ab", "machine": machine, "seeds": [0, 4], "figures": full, "targets": told}


def test_every_method_has_a_row_in_every_table(full: dict[str, Any]) -> None:
    _, methods, fronts, *_ = measured(full, FORGETTING)
    for name in RATES:
        assert f"\n| {name} | " in methods
        assert f"\n| {name} | " in fronts
    assert "\n| before fine-tuning |  | 0.20 (" in methods
    assert "\n| ours | teacher's pass over the probe, probe at training | 0.80 (" in methods
    assert "\n| replay | replay | 0.80 (" in methods
    assert "| ground | recall | place | questions | KL | drift d |" in methods
    assert "200 episodes of the new task and 800 of the old skills per row." in methods
    assert "most frequent answer: 0.40." in methods


def test_fronts_stand_by_their_area_below_the_plot(full: dict[str, Any]) -> None:
    fronts = study_table(full, "fronts")
    assert fronts.startswith("![new task against old skills](forgetting.png)\n\n| method |")
    names = [line.split(" | ")[0][2:] for line in fronts.splitlines() if line.startswith("| ")]
    assert names == ["method", "replay", "ours", "shuffled", "wise_ft", "lora"]
    lora = next(line for line in fronts.splitlines() if line.startswith("| lora |"))
    assert lora.endswith("|  |  |  |  |"), "it is not compared with itself"
    assert "| 2 | 0.39 (" in lora
    assert " to " in lora, "a gap's interval may reach below 0"


def test_the_loops_and_the_sequences_tables(full: dict[str, Any]) -> None:
    loop, sequence = study_table(full, "loop"), study_table(full, "sequence")
    assert "| the same trace, time-shuffled | shuffled | 2 | 0.80 (" in loop
    assert "| BWT | forgetting | FWT | LIBERO FWT | LIBERO NBT | LIBERO AUC |" in sequence
    assert "\n| lora | -0.20 (-0.20 to -0.20) |" in sequence
    assert "Tasks in this order: recall, place; training seeds: 2." in sequence
    assert "\n| lora | place | 0.60 | 0.90 |" in sequence, "R after the last task"


def test_what_every_base_could_do_stands_beside_chance(full: dict[str, Any]) -> None:
    bases = study_table(full, "bases").splitlines()
    assert bases[2].startswith("| 0 | ")
    assert bases[-2] == "| 4 | 12/40 | 40/40 | 40/40 | 40/40 | 40/40 |"
    assert bases[-1] == "| chance | 0.33 | 0.33 | 0.33 | 0.33 | 0.00 |"


def test_the_step_responses_and_the_costs_tables(full: dict[str, Any]) -> None:
    answers, costs = study_table(full, "response"), study_table(full, "step_costs")
    assert answers.startswith("![answer to a step](forgetting_step.png)\n\n| gains | d before |")
    assert f"\n| {CLOSED} | 0.10 (0.10 to 0.10) | 0.40 (0.40 to 0.40) | 0.60 (0.60 to 0.60) |" in answers
    assert "The loop of ours; training seeds: 2," in answers
    assert "\n| with HSW | 103.0 | 1.030 (1.020-1.060) |" in costs
    assert "\n| with the Thermostat too, a reading every 10 steps | 105.0 |" in costs
    assert "\n| with the Thermostat too, a reading every 25 steps, the default | 103.8 |" in costs


def test_what_tuning_chose_stands_by_area_with_its_points() -> None:
    def point(method: str, strength: str, checkpoint: int) -> dict[str, Any]:
        return {"method": method, "strength": strength, "checkpoint": checkpoint}

    weak, strong = point("lora", "lr 1e-4", 75), point("lora", "lr 1e-3", 150)
    ours = point("ours", "lambda 1", 150)
    points = {"lora": [strong, weak], "ours": [ours]}
    figures = {"choice": {"points": points, "areas": {"lora": 0.5, "ours": 0.75}}, "tried": [weak, strong, ours]}
    assert tables.record_table({"figures": figures}, "choice").splitlines()[2:] == [
        "| ours | 1 | 0.75 | lambda 1 at 150 |  |",
        "| lora | 2 | 0.50 | lr 1e-3 at 150 | lr 1e-4 at 75 |",
    ]


def test_tables_of_one_seed_have_no_intervals() -> None:
    told = figures(comparison(seeds=(0,), loop={}), draws=20)
    _, methods, fronts = measured(told, FORGETTING)
    assert "(" not in "".join(line for line in (methods + fronts).splitlines() if line.startswith("| "))
    assert "One training seed, so without intervals." in methods
    assert (
        study_table(told, "loop")
        == study_table(told, "sequence")
        == study_table(told, "response")
        == "Not measured yet."
    )


def test_the_targets_table_shows_intervals_and_says_what_values_are_of(full: dict[str, Any]) -> None:
    table = tables.record_table(record(full), "targets")
    assert "| hsw_step_ratio | 1.030 (1.020 to 1.060) | <= 1.050 | yes |" in table
    assert "| thermostat_step_ratio | 1.030 (1.020 to 1.060) | <= 1.020 | **no** |" in table
    assert "`thermostat_step_ratio`: a reading takes 0.19 of a training step, and is taken every 10 steps" in table
    assert "| > 0.000 | yes |" in table
    assert "`front_area_gap_to_best_rival`: ours against wise_ft." in table


def test_a_target_that_was_not_measured_is_not_met(full: dict[str, Any]) -> None:
    table = tables.record_table(record({**full, "costs": None}), "targets")
    assert "| thermostat_step_ratio | none | <= 1.020 | **no** |" in table
    assert "`thermostat_step_ratio`: not measured." in table


def test_the_page_has_every_table_and_is_filled_once_there_are_results(
    full: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {*FORGETTING, "targets"}
    text = DOCS.read_text()
    assert all(f"<!-- forgetting {kind} -->" in text and f"<!-- /forgetting {kind} -->" in text for kind in kinds)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "".join(f"<!-- forgetting {kind} -->\n<!-- /forgetting {kind} -->\n" for kind in sorted(kinds))
    )
    assert tables.rendered(page) == page.read_text(), "no results yet"
    (tmp_path / "forgetting.json").write_text(json.dumps(record(full), allow_nan=False))
    filled = tables.rendered(page)
    assert filled.count("\n|---") == len(kinds) + 1, "a sequence has two: measures, and R"
    page.write_text(filled)
    assert tables.rendered(page) == filled


def test_the_summary_has_the_baseline_at_the_success_of_ours(full: dict[str, Any]) -> None:
    text = study_table(full, "summary")
    rows = {row.split(" | ")[0].strip("|` "): row for row in text.splitlines()}
    assert set(rows) >= {"before fine-tuning", "lora"}
    assert not {"ours", "replay"} & set(rows)
    lost = full["methods"]["ours"]["equal_success"]["baseline_forgets"]["value"]
    assert f"| {lost:.2f} (" in rows["lora"]
    assert study_table({}, "summary") == "Not measured yet."


def test_the_readme_says_what_was_played_of_libero_by_how_many_seeds_and_how_long_it_took() -> None:
    played = {"all": {"k": 570, "n": 600, "wilson95": [0.93, 0.96]}, "seeds": [0, 1, 2], "minutes": 101.6}
    text = study_table({"assets": {}, "object": played}, "played")
    assert "| `libero_object` | 570/600 = 0.95 (0.93-0.96) | 3 | 102 |" in text


def test_the_plot_is_a_picture(full: dict[str, Any], tmp_path: Path) -> None:
    plot_fronts(full, tmp_path / "fronts.png")
    assert (tmp_path / "fronts.png").read_bytes().startswith(b"\x89PNG")


def test_the_legend_tells_apart_who_takes_more_than_the_new_task(full: dict[str, Any]) -> None:
    assert groups(full["methods"]) == {
        "ours": ["ours"],
        "rivals": ["lora", "wise_ft"],
        "rivals with replay or an extra loss": ["replay"],
        "controls": ["shuffled"],
    }
