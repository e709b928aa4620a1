"""The expert's benchmark tells successes per task, with intervals."""

from __future__ import annotations

import pytest

from evaluators.success_table import tabulate
from ipvla.sim.simulator import Task
from ipvla.types import EpisodeResult, EpisodeSpec
from studies.expert import ExpertStudy, suite_figures, targets
from studies.tables import study_table


def test_rates_are_per_task_and_steps_of_those_that_succeeded() -> None:
    tasks = [Task(name, "libero_object", (name,), 280, 0.0) for name in ("pick_up_soup", "pick_up_milk")]
    outcomes = {"pick_up_soup": ("success", "success", "timeout", "success"), "pick_up_milk": ("timeout",) * 4}
    results = [
        EpisodeResult(
            EpisodeSpec("libero_object", task, i, i), outcome, 280 if outcome == "timeout" else 80 + i, 9, 1, 0
        )
        for task, ends in outcomes.items()
        for i, outcome in enumerate(ends)
    ]
    figures = {"libero_object": suite_figures(tabulate("expert", tasks, results, {"protocol": "openvla v1"}))}
    (target,) = targets(figures)
    assert (target.name, target.value, target.met) == ("expert_libero_object", 3 / 8, False)
    table = study_table(figures, "expert")
    assert "| `libero_object` | pick up soup | 3/4 | 0.30-0.95 | 81 |" in table
    assert "| `libero_object` | pick up milk | 0/4 | 0.00-0.49 |  |" in table
    assert "| `libero_object` | **all** | 3/8 | 0.14-0.69 |  |" in table


def test_there_are_fifty_initial_states() -> None:
    with pytest.raises(ValueError, match="trials: 51 of 50"):
        ExpertStudy(trials=51)
