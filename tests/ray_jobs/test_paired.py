"""Evaluated policies against each other, from their journals alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ipvla.rollout.journal import Journal, JournalError
from ipvla.sim.protocols import ProtocolError, load_protocol
from ipvla.sim.simulator import Split
from ipvla.types import EpisodeResult, EpisodeSpec
from ray_jobs import paired as job
from ray_jobs.paired import PairedConfig, paired

SUITE, TASK = "libero_goal", "turn_on_the_stove"
OPENVLA = str(load_protocol("openvla"))


def evaluated(root: Path, name: str, outcomes: str, protocol: str = OPENVLA, **fingerprint: str) -> None:
    """A journal of one task; one character per trial: s(uccess) or f(ailure)."""
    told = {"suite": SUITE, "suite_version": "1", "protocol": protocol, "policy_sha256": name}
    with Journal(root / "runs" / name / "episodes.sqlite", told | fingerprint) as journal:
        for trial, outcome in enumerate(outcomes):
            spec = EpisodeSpec(SUITE, TASK, Split.HELD_OUT.seed(trial), trial)
            journal.record(EpisodeResult(spec, "success" if outcome == "s" else "timeout", 9, 3, 1.0, 0.1))


def told(root: Path, *evaluations: str, **settings: object) -> str:
    console = Console(width=140, record=True, file=(root / "console.txt").open("w"))
    paired(PairedConfig(storage_root=root, evaluations=evaluations, **settings), console)  # type: ignore[arg-type]
    return console.export_text()


def test_policies_are_compared_on_the_initial_states_that_both_played(tmp_path: Path) -> None:
    evaluated(tmp_path, "spring/gru", "ssssss", mujoco="3.3.2")
    evaluated(tmp_path, "spring/none", "fsfffssss", mujoco="3.3.3")
    text = told(tmp_path, "spring/gru", "spring/none", out=tmp_path / "paired.json")
    assert "6/6  1.00" in text
    (row,) = (line for line in text.splitlines() if "spring/gru against spring/none" in line)
    assert "+0.67" in row
    assert "mujoco: 3.3.2 for spring/gru, 3.3.3 for spring/none" in text
    assert "policy_sha256" not in text
    (comparison,) = json.loads((tmp_path / "paired.json").read_text())["comparisons"]
    assert (comparison["pairs"], comparison["only_first"], comparison["only_second"]) == (6, 4, 0)
    assert comparison["p_value"] == pytest.approx(0.125)


def test_a_journal_may_be_named_by_its_path(tmp_path: Path) -> None:
    evaluated(tmp_path, "spring/gru", "ss")
    evaluated(tmp_path, "spring/none", "sf")
    merged = tmp_path / "all.sqlite"
    Journal.merged([tmp_path / "runs" / "spring" / "none" / "episodes.sqlite"], merged).close()
    assert "+0.50" in told(tmp_path, "spring/gru", str(merged))


def test_across_protocols_is_refused_in_one_line_unless_asked_for(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    evaluated(tmp_path, "a/gru", "ss")
    evaluated(tmp_path, "a/oft", "sf", str(load_protocol("oft")))
    asked = ("--storage_root", str(tmp_path), "--evaluations", "[a/gru, a/oft]")
    assert "a/gru was played by protocol openvla-1+" in refused(PairedConfig, job.main, *asked)

    text = told(tmp_path, "a/gru", "a/oft", across_protocols=True)
    assert "+0.50" in text
    assert "execute: 1 for a/gru, 8 for a/oft" in text
    assert "cameras: ('agentview',) for a/gru" in text
    assert "jpeg" not in text, "what is the same is not told"


def test_worlds_that_wait_longer_are_compared_when_asked_for_and_ways_to_take_over_always(tmp_path: Path) -> None:
    evaluated(tmp_path, "a/plain", "ss")
    evaluated(tmp_path, "a/switch", "sf", latency="4, rest")
    evaluated(tmp_path, "a/guided", "ss", latency="4, rest", chunking='{"type": "guided", "weight": 5.0}')
    with pytest.raises(ProtocolError, match="a/plain was played with latency None, a/switch with 4, rest"):
        told(tmp_path, "a/plain", "a/switch")
    assert "latency: None for a/plain" in told(tmp_path, "a/plain", "a/switch", across_protocols=True)
    assert "chunking: None for a/switch" in told(tmp_path, "a/switch", "a/guided")


def test_a_protocol_that_has_changed_since_is_said_to_have(tmp_path: Path) -> None:
    evaluated(tmp_path, "a/gru", "ss")
    evaluated(tmp_path, "a/old", "sf", "openvla-0+000000000000")
    text = told(tmp_path, "a/gru", "a/old", across_protocols=True)
    assert "protocol openvla-0+000000000000 is openvla-1+" in " ".join(text.split())


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    evaluated(tmp_path, "a/gru", "ss")
    evaluated(tmp_path, "a/new", "ss", suite_version="2")
    evaluated(tmp_path, "a/empty", "")
    with pytest.raises(JournalError, match="there is no journal"):
        told(tmp_path, "a/gru", "a/gruu")
    with pytest.raises(JournalError, match="has no episodes yet"):
        told(tmp_path, "a/gru", "a/empty")
    with pytest.raises(ValueError, match="version 1 of the suite, a/new on 2"):
        told(tmp_path, "a/gru", "a/new")
    for wrong in ((), ("a/gru",), ("a/gru", "a/gru")):
        with pytest.raises(ValueError, match="name two or more, all different"):
            PairedConfig(storage_root=tmp_path, evaluations=wrong)
