"""Learning curves are drawn of what there is."""

from __future__ import annotations

from pathlib import Path

from evaluators.plots import learning_curves


def test_a_policy_that_was_not_trained_here_has_no_curve(tmp_path: Path) -> None:
    trained = tmp_path / "metrics.jsonl"
    trained.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.0}\n')
    runs = {"trained": trained, "copied": tmp_path / "nothing.jsonl"}
    assert (learning_curves(runs) or b"").startswith(b"\x89PNG")
    assert learning_curves({"copied": runs["copied"]}) is None
