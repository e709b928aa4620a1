"""The study of heads compares what it claims to compare, and judges by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import draccus
import pytest
import torch

from ipvla.data.dataset import open_dataset
from ipvla.data.sources import dataset_location
from ipvla.experiment import ExperimentConfig
from ipvla.models.heads import FlowConfig, HeadConfig, LayerwiseConfig
from ipvla.models.heads.routing import RoutingConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.training.parallel import World
from ray_jobs.command_line.settings import parse
from studies.engine import entries
from studies.heads import (
    MEMORIES,
    SAMPLINGS,
    HeadsStudy,
    bypassing,
    field_errors,
    joined,
    plot_errors,
    plot_routing,
    pooled,
    routing_weights,
    targets,
)
from studies.record import Target
from studies.tables import HEADS, measured

STUDY = HeadsStudy(storage_root=Path("/storage"))
FAMILIES = ("ground", "recall", "count", "place")


def row(k: int, n: int = 100) -> dict[str, Any]:
    return {"k": k, "n": n, "rate": k / n, "wilson95": [0.0, 1.0], "chance": 0.3, "seeds": {"0": {"k": k, "n": n}}}


def counts(both: int, lost: int, won: int, neither: int) -> dict[str, dict[str, int]]:
    names = ("both", "only_undisturbed", "only_changed", "neither")
    return {"0": {"touched": 100, **dict(zip(names, (both, lost, won, neither), strict=True))}}


@pytest.fixture
def figures() -> dict[str, Any]:
    """As a full run has them."""
    good = {"regression": 95, "bins": 80, "flow": 94, "layerwise": 90, "one_step": 93}
    use = {"reset": counts(30, 65, 0, 5), "swap": counts(20, 75, 0, 5)}
    cost = {"act_ms_batch8": 20.0, "parameters": 1000}
    ms = {"regression": 6.0, "bins": 6.0, "flow": 12.0, "layerwise": 14.0, "one_step": 7.0}
    return {
        "success": {head: {family: row(k) for family in FAMILIES} for head, k in good.items()},
        "without_memory": {"flow": {"recall": row(30)}},
        "samplings": {name: {family: row(94) for family in FAMILIES} for name in SAMPLINGS},
        "use": {head: dict.fromkeys(("gru", "bank"), use) for head in good},
        "heun4_euler8": counts(370, 10, 6, 14),
        "costs": {head: {"act_ms_batch1": value, "evaluations": 4, **cost} for head, value in ms.items()},
        "routing": {},
        "errors": {head: {"euler": {"1": 0.4, "4": 0.2}, "rk4": {"4": 0.1}} for head in ("flow", "layerwise")},
    }


def test_targets_are_judged_by_the_figures(figures: dict[str, Any]) -> None:
    judged = {target.name: target for target in targets(figures)}
    gap = replace(judged["generative_gap"], value=0.01)
    assert gap == Target("generative_gap", 0.01, 0.03, at_least=False, note="flow, its worst family")
    assert judged["generative_gap"].value == pytest.approx(0.01)
    solver = judged["heun4_minus_euler8"]
    assert solver.value == pytest.approx(-0.01)
    assert solver.interval is not None
    assert solver.interval[0] < -0.01 < solver.interval[1]
    assert not solver.met
    assert judged["one_step_share"].value == pytest.approx(93 / 94)
    assert judged["one_step_time_share"].value == pytest.approx(7 / 12)
    assert judged["flow_act_ratio"].value == pytest.approx(2)
    assert judged["recall_flow_bank"].value == pytest.approx(0.95)
    assert judged["memory_bypass_heads"].value == 0
    figures["use"]["bins"]["gru"] = {"reset": counts(90, 2, 3, 5)}
    assert bypassing(figures["use"]) == ["bins"]


def test_seeds_of_two_runs_are_pooled(figures: dict[str, Any]) -> None:
    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {("1" if name == "0" else name): moved(of) for name, of in value.items()}
        return value

    both = joined(figures, moved(figures))
    assert both["success"]["flow"]["recall"]["n"] == 200
    assert both["without_memory"]["flow"]["recall"]["seeds"].keys() == {"0", "1"}
    assert pooled(both["use"]["flow"]["bank"]["swap"], "swap").n == 200
    assert pooled(both["heun4_euler8"], "heun4").lost == pytest.approx(0.01)
    assert joined(figures, figures)["use"] == figures["use"], "a seed that both have counts once"


def test_every_table_can_be_made(figures: dict[str, Any]) -> None:
    tables = measured(figures, HEADS)
    assert len(tables) == len(HEADS)
    assert "| flow | bank | 95/100 | 30/100 | 20/100 |" in tables[2]
    assert "| flow | euler | 0.4000 | 0.2000 |" in tables[4]


def test_cells_of_a_seed_differ_in_head_and_memory_alone() -> None:
    runs = {
        cell: draccus.encode(parse(ExperimentConfig, STUDY.arguments(*cell, seed=2)))
        for cell in STUDY.cells
        if cell[0] != "one_step"
    }
    assert len(runs) == (len(entries("heads")) - 1) * len(MEMORIES)
    for run in runs.values():
        run["model"].pop("head"), run["model"].pop("memory"), run.pop("name")
    first = next(iter(runs.values()))
    assert all(run == first for run in runs.values())


def test_the_student_starts_from_its_teacher_with_a_head_of_its_size() -> None:
    student = parse(ExperimentConfig, STUDY.arguments("one_step", "gru", 1))
    teacher = parse(ExperimentConfig, STUDY.arguments("flow", "gru", 1))
    assert student.start_from == teacher.run_directory / "policy"
    assert student.model.backbone == teacher.model.backbone
    head = {"steps": 4, "time": "beta", "distil": None}
    assert replace(student.model.head, **head) == teacher.model.head


def test_heads_have_nearly_as_many_parameters() -> None:
    size = {}
    for name, settings in entries("heads").items():
        config = parse(ExperimentConfig, STUDY.arguments(name, "gru", 0)).model
        assert draccus.encode(config.head) == draccus.encode(draccus.decode(HeadConfig, settings))
        model = config.build(torch.ones(7, dtype=torch.bool), 5)
        size[name] = sum(p.numel() for p in model.parameters())
    assert size.pop("bins") < 1.7 * size["regression"]
    assert all(0.75 < one / size["regression"] < 1.3 for one in size.values()), size


def test_other_samplings_have_as_many_evaluations_as_their_names_say() -> None:
    head = FlowConfig()
    for name, sampling in SAMPLINGS.items():
        assert str(head.sampled(sampling).evaluations) == name.strip("abcdefghijklmnopqrstuvwxyz_")[-1]


def test_more_steps_come_nearer_to_the_exact_solution(
    make_experiment: Any, storage_root: Path, tmp_path: Path
) -> None:
    config = make_experiment()
    model = IPVLAConfig(
        config.model.backbone, config.model.memory, FlowConfig(16, layers=(-1,), time_scale=1.0), chunk=2
    )
    policy: Policy = replace(config, model=model).build(World()).policy
    with torch.no_grad():
        for parameter in policy.model.head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    policy.save(tmp_path / "policy")
    errors = field_errors(tmp_path / "policy", open_dataset(dataset_location(storage_root / "datasets", "cue")), 3)
    for of in errors.values():
        values = list(of.values())
        assert values[-1] < 0.5 * values[0]
        assert values[-1] > 0


def test_routing_is_read_from_a_policy_and_drawn(make_experiment: Any, storage_root: Path, tmp_path: Path) -> None:
    config = make_experiment()
    for routing in ("fixed", "sample"):
        head = LayerwiseConfig(16, heads=2, layers=(2, 6), routing=RoutingConfig(routing))
        experiment = replace(config, model=replace(config.model, head=head)).build(World())
        experiment.policy.save(tmp_path / routing)
    dataset = open_dataset(dataset_location(storage_root / "datasets", "cue"))
    assert routing_weights(tmp_path / "fixed", dataset, 2) == {}
    weights = routing_weights(tmp_path / "sample", dataset, 2)
    assert [[layer for layer, one in of.items() if one == 1] for of in weights.values()] == [["2"], ["6"]]
    plot_routing({"layerwise_sample": weights}, tmp_path / "routing.png")
    plot_errors({"flow": {"euler": {"1": 0.4, "4": 0.2}}}, tmp_path / "errors.png")
    assert (tmp_path / "routing.png").stat().st_size > 5000 < (tmp_path / "errors.png").stat().st_size


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"heads: 'flo' is unknown; did you mean 'flow'\?"):
        HeadsStudy(heads=("flo",))
    with pytest.raises(ValueError, match=r"heads: one_step learns from flow, which is not named; add it"):
        HeadsStudy(heads=("one_step",))
    with pytest.raises(ValueError, match=r"memories is \[\]; name at least one"):
        HeadsStudy(memories=())
