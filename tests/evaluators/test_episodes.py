"""What was played can be read by whoever has never heard of this project."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from evaluators.episodes import write_episodes
from evaluators.success_table import tabulate
from ipvla.sim.simulator import Task
from ipvla.types import EpisodeResult, EpisodeSpec

TASK = Task("press", "ground", ("press it",), horizon=10, chance=0.0)


def test_every_policys_episodes_are_rows_of_one_file(tmp_path: Path) -> None:
    def played(policy: str, outcomes: str) -> object:
        results = [
            EpisodeResult(EpisodeSpec("s", "press", 2**31 + trial, trial), outcome, 7, 2, 0.5, 0.1, 0.3)
            for trial, outcome in enumerate(outcomes.split())
        ]
        return tabulate(policy, [TASK], results, {"protocol": "recall-1", "policy_sha256": policy * 3})

    path = tmp_path / "study" / "episodes.parquet"
    for _ in range(2):
        write_episodes([played("gru", "success timeout"), played("none", "failure")], path)  # type: ignore[list-item]
    rows = pq.read_table(path).to_pylist()
    assert [(row["policy"], row["trial"], row["success"]) for row in rows] == [
        ("gru", 0, True),
        ("gru", 1, False),
        ("none", 0, False),
    ]
    assert rows[0]["seed"] == 2**31
    assert (rows[2]["outcome"], rows[2]["sim_cpu_s"], rows[2]["protocol"]) == ("failure", 0.3, "recall-1")
    assert sorted(p.name for p in path.parent.iterdir()) == ["episodes.parquet"]
