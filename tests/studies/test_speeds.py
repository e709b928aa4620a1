"""The study of late answers compares what it claims to compare, and judges by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import draccus
import pytest

from ipvla.experiment import ExperimentConfig
from ipvla.policy import Policy
from ipvla.rollout.chunking import HeadFacts
from ray_jobs.command_line.settings import parse
from studies.engine import entries
from studies.speeds import SpeedsStudy, joined, main, plot, targets
from studies.tables import SPEEDS, measured

STUDY = SpeedsStudy(storage_root=Path("/storage"))


def row(k: int, seed: str = "0") -> dict[str, Any]:
    return {
        "k": k,
        "n": 100,
        "rate": k / 100,
        "wilson95": [0.0, 1.0],
        "chance": 0.3,
        "seeds": {seed: {"k": k, "n": 100}},
    }


def figures_of(at4: dict[str, int], seed: str = "0") -> dict[str, Any]:
    success = {
        way: {
            latency: {family: row(k, seed) for family in ("ground", "chase")}
            for latency, k in (("0", 90), ("4", late))
        }
        for way, late in at4.items()
    }
    return {"success": success, "differ_without_latency": 0}


LATE = {"hold": 40, "rest": 70, "ensemble": 60, "guided": 75, "trained": 82}


def test_real_time_chunking_is_judged_by_plain_chunks_as_they_are_by_default() -> None:
    judged = {target.name: target for target in targets(figures_of(LATE))}
    assert judged["rtc_loss_share"].value == pytest.approx(8 / 50)
    assert judged["rtc_loss_share"].met
    assert judged["rtc_loss_share"].note.startswith("trained against hold; ")
    assert "hold 0.500, rest 0.200" in judged["rtc_loss_share"].note
    assert judged["latency_zero_identical"].met
    assert targets(figures_of(LATE | {"hold": 90}))[0].value is None, "plain chunks lose nothing"
    assert not targets({**figures_of(LATE), "differ_without_latency": 3})[1].met


def test_seeds_of_two_runs_are_pooled() -> None:
    both = joined(figures_of(LATE), figures_of(LATE, seed="1"))
    assert both["success"]["hold"]["4"]["chase"]["n"] == 200
    assert both["success"]["hold"]["4"]["chase"]["seeds"].keys() == {"0", "1"}


def test_table_and_plot_have_every_way(tmp_path: Path) -> None:
    figures = figures_of(LATE)
    (table,) = measured(figures, SPEEDS)
    assert "| chase | trained | 0.90 (0.00-1.00) | 0.82 (0.00-1.00) |" in table
    assert "training seeds: 1" in table
    plot(figures["success"], tmp_path / "speeds.png")
    assert (tmp_path / "speeds.png").stat().st_size > 5000


def test_ways_differ_in_how_late_answers_are_taken_alone() -> None:
    plain = STUDY.evaluation("hold", 0, 2).success
    assert plain.first_layout == 42_000
    told = set()
    for way in STUDY.names:
        config = STUDY.evaluation(way, 4, 2)
        assert config.label == f"{way}_4"
        told.add((config.policies, str(config.success.pace.conditions())))
        how = {"latency_steps": 0, "meanwhile": plain.meanwhile, "chunking": plain.chunking}
        assert replace(config.success, **how) == plain
    assert len(told) == len(STUDY.names)


def test_the_two_policies_differ_in_what_the_head_learns_alone() -> None:
    flow, prefix = (draccus.encode(parse(ExperimentConfig, STUDY.arguments(name, 0))) for name in STUDY.policies)
    assert prefix["model"]["head"].pop("prefix") == 8
    assert flow["model"]["head"].pop("prefix") == 0
    assert flow.pop("name") != prefix.pop("name")
    assert flow == prefix


def test_every_way_can_be_played_at_every_latency() -> None:
    for way in STUDY.names:
        trained = parse(ExperimentConfig, STUDY.arguments(entries("speeds")[way]["policy"], 0))
        for latency in STUDY.latencies:
            pace = STUDY.evaluation(way, latency, 0).success.pace
            pace.require(trained.model.chunk, trained.lanes.stride, HeadFacts.of(trained.model.head))


@pytest.mark.parametrize("latencies", [(2, 4), (0, -1), (0, 4, 4)])
def test_latencies_without_zero_or_twice_are_refused(latencies: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latencies is \[.*\]; give 0 and others above it, all different"):
        SpeedsStudy(latencies=latencies)


@pytest.mark.long
def test_a_small_run_trains_and_plays_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(SpeedsStudy(storage_root=tmp_path, quick=True, latencies=(0, 4)))
    printed = capsys.readouterr().out
    assert "latency 4" in printed
    assert "trained" in printed
    policy = Policy.load(tmp_path / "runs" / "speeds-quick" / "seed0-prefix" / "policy")
    assert policy.config.head.longest_prefix == 8
