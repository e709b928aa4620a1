"""Published tables say what the results say, and the memory benchmark compares what it claims to compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import draccus
import pytest
import torch

from benchmarks import tables
from benchmarks.tables import PAGES, rendered
from evaluators.act_costs import CostConfig, costs, measure
from evaluators.reasoning import EVERY, ONCE, MeteredAct, plan_figures
from evaluators.success_table import SuccessTable, tabulate
from ipvla.experiment import ExperimentConfig
from ipvla.models.memory import MemoryConfig, PromptMemoryConfig
from ipvla.policy import Policy
from ipvla.sim.recall.tasks import TASKS
from ipvla.sim.simulator import Task
from ipvla.sim.suites import load_suite
from ipvla.training.parallel import World
from ipvla.types import EpisodeResult, EpisodeSpec
from studies.memory import (
    MemoryStudy,
    delay_figures,
    drop_memory,
    joined,
    mechanisms,
    plot_delays,
    reason_at_every_step,
    success_figures,
    targets,
    third_best,
)
from studies.record import Target, read_record
from studies.tables import MEMORY, measured

Make = Callable[..., ExperimentConfig]
STUDY = MemoryStudy(storage_root=Path("/storage"))
PLAYED = [task for task in TASKS if task.name.startswith("recall") or task.family in ("count", "ground")]


def results(tasks: list[Task], good: float, episodes: int = 10, first: int = 0) -> list[EpisodeResult]:
    """Episodes of every task, of which the share `good` succeeds."""
    costs = {"wall_s": 1 / good, "cpu_s": 0.5 / good, "tokens": 8}
    return [
        EpisodeResult(
            EpisodeSpec("recall", task.name, trial, trial),
            "success" if trial - first < good * episodes else "timeout",
            steps=20,
            policy_steps=5,
            wall_s=2.0,
            policy_s=1.0,
            details=costs,
        )
        for task in tasks
        for trial in range(first, first + episodes)
    ]


def played(rates: dict[str, float]) -> dict[str, dict[int, SuccessTable]]:
    """Mechanism -> seed -> table, two seeds on layouts of their own."""
    return {
        name: {seed: tabulate(name, PLAYED, results(PLAYED, good, first=1000 * seed), {}) for seed in (0, 1)}
        for name, good in rates.items()
    }


@pytest.fixture
def figures() -> dict[str, object]:
    """As a full run has them, of four mechanisms."""
    tabulated = played({"none": 0.2, "gru": 0.9, "latent": 0.8, "bank": 1.0})
    cost = {
        "parameters": 1_100_000, "memory_parameters": 100_000, "state_bytes": 512, "act_ms_batch1": 5.0,
        "act_ms_batch8": 16.0, "batch8_speedup": 2.5, "growth": 1.02, "frames_per_s": 300.0,
    }  # fmt: skip
    return {
        "success": success_figures(PLAYED, tabulated),
        "delays": delay_figures(PLAYED, tabulated),
        "plan": plan_figures(PLAYED, {ONCE: results(PLAYED, 1.0), EVERY: results(PLAYED, 0.1)}),
        "costs": dict.fromkeys(tabulated, cost),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_tables_are_those_of_the_results(page: Path) -> None:
    assert rendered(page) == page.read_text(), "run python -m benchmarks.tables"


def test_the_benchmarks_page_and_the_readme_have_tables() -> None:
    assert {"README.md", "benchmarks.md"} <= {page.name for page in PAGES}


def test_a_table_stays_as_it_is_until_there_are_results(
    figures: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- memory costs -->\nold\n<!-- /memory costs -->\nafter\n")
    assert rendered(page) == page.read_text()
    (tmp_path / "memory.json").write_text(json.dumps({"figures": figures}))
    assert "| gru |" in rendered(page)
    assert "old" not in rendered(page)
    assert rendered(page).startswith("before\n")
    assert rendered(page).endswith("\nafter\n")


def test_a_target_is_met_on_its_own_side_of_the_bound() -> None:
    assert Target("rate", 0.9, 0.85, at_least=True).met
    assert not Target("rate", 0.8, 0.85, at_least=True).met
    assert Target("cost", 5.0, 8.0, at_least=False).met
    assert not Target("cost", 9.0, 8.0, at_least=False).met


def test_rates_are_pooled_over_seeds_and_every_seeds_counts_are_kept() -> None:
    row = success_figures(PLAYED, played({"gru": 0.9}))["gru"]["recall"]
    assert (row["k"], row["n"]) == (18, 20)
    assert row["seeds"] == {"0": {"k": 9, "n": 10}, "1": {"k": 9, "n": 10}}
    assert row["wilson95"][0] < 0.9 < row["wilson95"][1]


def test_the_delay_curve_has_recall_itself_first_and_stays_out_of_the_families() -> None:
    tabulated = played({"gru": 0.9})
    assert list(delay_figures(PLAYED, tabulated)["gru"]) == ["10", "20", "50", "100", "200"]
    assert set(success_figures(PLAYED, tabulated)["gru"]) == {"ground", "recall", "count"}


def test_the_third_best_of_three_is_the_worst() -> None:
    success = success_figures(PLAYED, played({"a": 0.9, "b": 0.7, "c": 1.0}))
    assert third_best(success, "recall") == 0.7
    with pytest.raises(ValueError, match="at least 3"):
        third_best({"a": success["a"]}, "recall")


def test_the_targets_are_those_that_were_promised(figures: dict[str, object]) -> None:
    found = {target.name: target for target in targets(figures)}
    assert {name: round(target.value, 2) for name, target in found.items()} == {
        "recall_third_best": 0.8,
        "count_third_best": 0.8,
        "recall_none": 0.08,
        "delay100_best": 1.0,
        "plan_once_speedup": 10.0,
        "act_cost_growth": 1.02,
        "batch8_speedup": 2.5,
    }
    assert [name for name, target in found.items() if not target.met] == ["recall_third_best", "count_third_best"]


def test_a_loss_by_reasoning_once_is_told_only_where_it_is_significant() -> None:
    better, worse = results(PLAYED, 1.0), results(PLAYED, 0.1)
    lost = plan_figures(PLAYED, {ONCE: worse, EVERY: better})
    assert lost["once_loses_significantly"]
    assert lost["paired"]["only_every_step"] == 9 * len(PLAYED)
    assert lost["wall_speedup"] == pytest.approx(0.1)
    assert not plan_figures(PLAYED, {ONCE: better, EVERY: worse})["once_loses_significantly"]
    assert not plan_figures(PLAYED, {ONCE: better, EVERY: better})["once_loses_significantly"]


def test_every_mechanism_has_a_row_in_every_table(figures: dict[str, object], tmp_path: Path) -> None:
    families, delays, plan, cost = measured(figures, MEMORY)
    for table in (families, delays, cost):
        for name in ("none", "gru", "latent", "bank"):
            assert f"\n| {name} | " in table
    assert "| 0.90 (0.70-0.97) |" in families, "recall: 18 of 20"
    assert "n = 20 to 80 episodes per cell, over 2 training seeds" in families
    assert "10.0 times less wall time" in plan
    assert "no significant loss" in plan
    plot_delays(figures["delays"], tmp_path / "delays.png")
    assert (tmp_path / "delays.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_of_two_runs_are_counted_together_and_each_once() -> None:
    def run(good: float, seeds: tuple[int, ...], pairs: int, costs: str) -> dict[str, object]:
        tables = {"gru": {seed: played({"gru": good})["gru"][seed] for seed in seeds}}
        plan = {"paired": {"pairs": pairs}}
        rows = {"success": success_figures(PLAYED, tables), "delays": delay_figures(PLAYED, tables)}
        return {**rows, "plan": plan, "costs": costs}

    both = joined(run(0.9, (0,), 30, "earlier"), run(0.5, (1,), 3, "later"))
    recall = both["success"]["gru"]["recall"]
    assert recall["seeds"] == {"0": {"k": 9, "n": 10}, "1": {"k": 5, "n": 10}}
    assert (recall["k"], recall["n"], recall["rate"]) == (14, 20, 0.7)
    assert both["delays"]["gru"]["100"]["n"] == 20
    assert both["plan"]["paired"]["pairs"] == 30
    assert both["costs"] == "later"
    again = joined(both, run(0.2, (1,), 3, "again"))
    assert again["success"]["gru"]["recall"]["seeds"]["1"] == {"k": 2, "n": 10}, "a seed played again counts once"


def test_cells_of_a_seed_differ_in_name_and_memory_alone() -> None:
    cells = {name: draccus.encode(STUDY.training(name, 1)) for name in STUDY.names}
    for cell in cells.values():
        del cell["name"], cell["model"]["memory"]
    assert len(cells) == len(mechanisms())
    assert all(cell == cells["none"] for cell in cells.values())
    assert cells["none"]["lanes"]["seed"] == cells["none"]["seed"] == 1


def test_the_presets_name_mechanisms_and_tasks_that_exist(tmp_path: Path) -> None:
    for settings in mechanisms().values():
        assert MemoryConfig.get_choice_name(type(draccus.decode(MemoryConfig, settings))) == settings["type"]
    suite = load_suite("recall", tmp_path)
    for study in (STUDY, replace(STUDY, quick=True)):
        assert study.collection.counts(suite)
        for config in (study.evaluation(0), study.plan(0)):
            for task in config.success.episodes:
                assert suite.task(task)


def test_every_cell_is_judged_on_a_hundred_layouts_that_no_other_seed_played(tmp_path: Path) -> None:
    suite = load_suite("recall", tmp_path)
    episodes = STUDY.evaluation(0).success.episodes
    families = {suite.task(task).family for task in episodes}
    hurried = {"chase", "glimpse", "shuffle"}  # of studies.speeds
    assert families == {task.family for task in suite.tasks} - hurried
    for family in families - {"delay"}:
        assert len(STUDY.seeds) * sum(n for t, n in episodes.items() if suite.task(t).family == family) >= 100
    assert all(len(STUDY.seeds) * n >= 100 for task, n in episodes.items() if task.startswith("recall"))

    def layouts(config: object) -> set[int]:
        success = config.success  # type: ignore[attr-defined]
        return set(range(success.first_layout, success.first_layout + max(success.episodes.values())))

    slices = [layouts(make(seed)) for make in (STUDY.evaluation, STUDY.plan) for seed in STUDY.seeds]
    assert len(set.union(*slices)) == sum(map(len, slices))


def test_a_study_of_unknown_mechanisms_or_repeated_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match="'gruu' is unknown; did you mean 'gru'"):
        MemoryStudy(mechanisms=("gruu",))
    with pytest.raises(ValueError, match="all different"):
        MemoryStudy(seeds=(1, 1))
    assert STUDY.complete
    assert not MemoryStudy(mechanisms=("none", "gru")).complete


def test_a_start_without_its_memory_begins_every_memory_afresh(make_experiment: Make, tmp_path: Path) -> None:
    trained, bare = tmp_path / "start" / "policy", tmp_path / "start" / "bare"
    make_experiment(seed=1).build(World()).policy.save(trained)
    drop_memory(trained, bare)
    start = Policy.load(trained).model
    again = make_experiment(seed=2, start_from=bare).build(World()).policy.model
    for name, value in start.backbone.state_dict().items():
        assert torch.equal(value, again.backbone.state_dict()[name])
    fresh = dict(again.memory.named_parameters())
    assert any(not torch.equal(value, fresh[name]) for name, value in start.memory.named_parameters())


def test_costs_are_measured_once_per_policy(make_experiment: Make, tmp_path: Path) -> None:
    config = make_experiment()
    experiment = config.build(World())
    policy, dataset = experiment.policy, config.data.build(config.datasets)
    small = CostConfig(early=2, late=9, around=2, batch=3, steps=2, repeats=2)
    measured = measure(policy, dataset, small)
    assert measured.state_bytes == 16 * 4, "a hidden state of 16 float32"
    assert 0 < measured.memory_parameters < measured.parameters
    assert min(measured.act_ms_batch1, measured.act_ms_batch8, measured.growth, measured.batch8_speedup) > 0

    policy.save(tmp_path / "policy")
    first = costs(tmp_path / "policy", dataset, small, tmp_path / "costs.json")
    assert costs(tmp_path / "policy", dataset, small, tmp_path / "costs.json") == first
    told = json.loads((tmp_path / "costs.json").read_text())
    assert told["measured_on"]["late"] == 9
    costs(tmp_path / "policy", dataset, replace(small, late=8), tmp_path / "costs.json")
    assert json.loads((tmp_path / "costs.json").read_text())["measured_on"]["late"] == 8


def test_reasoning_at_every_step_writes_a_plan_at_every_step(make_experiment: Make, tmp_path: Path) -> None:
    once, every = tmp_path / "policy", tmp_path / "every"
    config = make_experiment()
    config = replace(config, model=replace(config.model, memory=PromptMemoryConfig(plan_tokens=6)))
    policy = config.build(World()).policy
    with torch.no_grad():
        policy.model.memory.trigger.bias.fill_(-100.0)  # the plan always holds
    policy.save(once)
    reason_at_every_step(once, every)
    dataset = config.data.build(config.datasets)
    written = {}
    for directory in (once, every):
        act = MeteredAct(Policy.load(directory))
        written[directory] = []
        for step in range(4):
            act(dataset.observation(0, 2 * step, ("agentview",)), step)
            written[directory].append(act.tokens)
        assert act.wall_s > 0
        assert act.cpu_s > 0
    assert len(set(written[once])) == 1, "only at the first step"
    assert sorted(set(written[every])) == written[every]
    make_experiment().build(World()).policy.save(tmp_path / "gru")
    with pytest.raises(ValueError, match=r"memory\.type prompt"):
        reason_at_every_step(tmp_path / "gru", tmp_path / "never")


def test_a_table_names_the_commits_of_all_runs_that_count() -> None:
    record = read_record("forgetting")
    assert record is not None
    commits = {run["commit"][:10] for run in record["runs"]}
    assert len(commits) > 1
    assert all(f"`{commit}`" in tables.record_table(record, "targets") for commit in commits)
