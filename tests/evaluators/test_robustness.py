"""Perturbed results against the unperturbed ones of the same initial states."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from evaluators.intervals import bootstrap_mean, wilson_interval
from evaluators.paired import compare
from evaluators.robustness import Robustness, robustness, robustness_table, write_robustness
from evaluators.success_table import SuccessTable, tabulate
from ipvla.sim.perturbations import perturbation_config
from ipvla.sim.protocols import ProtocolError
from ipvla.sim.simulator import Split, Task
from ipvla.types import EpisodeResult, EpisodeSpec

TASKS = tuple(Task(name, "libero_object", ("go",), 10, 0.0) for name in ("soup", "milk"))
CAMERA = {level: perturbation_config("camera", level) for level in (1, 5)}


def table(outcomes: Sequence[str], perturbation: object = None) -> SuccessTable:
    """Of both tasks; one character per trial: s(uccess) or f(ailure)."""
    results = [
        EpisodeResult(
            EpisodeSpec("libero_object", task.name, Split.HELD_OUT.seed(trial), trial),
            "success" if outcome == "s" else "timeout",
            *(9, 3, 1.0, 0.1),
        )
        for task, of_task in zip(TASKS, outcomes, strict=True)
        for trial, outcome in enumerate(of_task)
    ]
    depends_on = {"protocol": "p", "suite_version": "1"} | (
        {"perturbation": str(perturbation)} if perturbation else {}
    )
    return tabulate("lora", TASKS, results, depends_on)


def found() -> Robustness:
    perturbed = {CAMERA[1]: table(["sssf", "sssf"], CAMERA[1]), CAMERA[5]: table(["sfff", "ffff"], CAMERA[5])}
    return robustness("lora", table(["ssss", "sssf"]), perturbed, TASKS)


def test_levels_dimensions_and_all_have_their_rates_and_differences() -> None:
    one, five, both, total = found().rows
    assert [(row.dimension, row.level) for row in found().rows] == [
        ("camera", 1), ("camera", 5), ("camera", None), ("total", None)
    ]  # fmt: skip
    assert (one.success.k, one.success.n, one.pairs, one.difference) == (6, 8, 8, -1 / 8)
    assert one.success.wilson95 == wilson_interval(6, 8)
    assert (five.success.k, five.difference) == (1, -6 / 8)
    assert five.p_value == pytest.approx(2 * 0.5**6)
    assert one.p_value == 1
    assert five.difference95 is not None
    assert five.difference95[0] < five.difference < five.difference95[1] < 0
    assert (both.success.k, both.success.n, both.pairs) == (7, 16, 8), (
        "an initial state is one, with all its levels"
    )
    assert both.difference == pytest.approx((one.difference + five.difference) / 2)
    assert both.p_value is None
    assert (total.success.k, total.difference, total.difference95) == (
        both.success.k, both.difference, both.difference95
    )  # fmt: skip


def test_the_table_the_metrics_and_the_file_say_the_same(tmp_path: Path) -> None:
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(robustness_table(found()))
    text = console.export_text()
    assert "unperturbed 7/8" in text
    assert "1/8  0.12" in text
    assert "-0.75 (" in text
    metrics = found().metrics("libero_object")
    assert metrics["robustness/libero_object/camera/5"] == 1 / 8
    assert metrics["robustness/libero_object/camera/5/difference"] == -0.75
    assert metrics["robustness/libero_object/total/low"] == wilson_interval(7, 16)[0]
    written = json.loads(write_robustness([found()], tmp_path / "robustness.json").read_text())["lora"]
    assert written["rows"][1]["wilson95"] == list(wilson_interval(1, 8))
    assert written["fingerprints"][str(CAMERA[5])]["perturbation"] == str(CAMERA[5])


def test_initial_states_are_resampled_with_all_their_levels() -> None:
    """Four levels of the same two outcomes say no more than one of them."""
    outcomes = [[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]]
    interval = bootstrap_mean(outcomes)
    assert interval is not None
    assert interval[0] < 3 / 8 < interval[1]
    assert interval[1] - interval[0] > 0.5
    assert bootstrap_mean([[0.5], [1.0]]) is None, "one layout per task"
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean([[], []])


def test_policies_are_not_compared_across_perturbations_unless_asked() -> None:
    plain, perturbed = table(["ssss", "ssss"]), table(["sfff", "ffff"], CAMERA[5])
    with pytest.raises(
        ProtocolError, match=r"with perturbation None, .* with \{\"type\": \"camera\", \"level\": 5"
    ):
        compare(plain, perturbed, TASKS)
    assert compare(plain, perturbed, TASKS, across_protocols=True)[0].pairs == 8
    with pytest.raises(ValueError, match="no perturbed result"):
        robustness("lora", plain, {}, TASKS)
