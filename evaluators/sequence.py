"""What a sequence of tasks leaves of the earlier ones: the forgetting study's R matrices and their summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluators.forgetting import FloatArray, summarise


@dataclass(frozen=True)
class SequenceRun:
    """One method's run through the tasks, with one training seed.

    Attributes:
        scores: float64 [T, T], R[i, j] = success on task j after training on task i; NaN where not measured.
        curves: float64 [T, E], success on task k in E evaluations while training on it, for LIBERO's measures;
            None for a single one, at its end: R's diagonal. All runs have as many evaluations.
    """

    scores: FloatArray
    curves: FloatArray | None = None


def sequence_figures(
    chance: Mapping[str, float], runs: Mapping[str, Mapping[int, SequenceRun]], draws: int = 10_000
) -> dict[str, Any]:
    """JSON values: the tasks in their order, and per method its matrices and measures with intervals over seeds.

    Args:
        chance: task -> success of a policy that has learned nothing, in the order of training.
        runs: method -> training seed -> run.

    Raises:
        ValueError: matrices or curves do not fit the tasks, or a method's runs have curves of different lengths.
    """
    methods = {}
    for name, seeds in runs.items():
        encoded = {
            str(seed): {"scores": _rows(run.scores), "curves": None if run.curves is None else _rows(run.curves)}
            for seed, run in sorted(seeds.items())
        }
        methods[name] = {
            "measures": _measures(list(chance.values()), list(seeds.values()), draws),
            "seeds": encoded,
        }
    return {"tasks": dict(chance), "methods": methods}


def joined_sequences(earlier: Mapping[str, Any], later: Mapping[str, Any], draws: int = 10_000) -> dict[str, Any]:
    """Figures of two sessions' runs together; one that both have counts once, as `later` has it.

    Raises:
        ValueError: the sessions played different tasks.
    """
    if list(earlier["tasks"].items()) != list(later["tasks"].items()):
        raise ValueError(
            f"one session's sequence is {list(earlier['tasks'])}, the other's {list(later['tasks'])}; "
            "only sequences of the same tasks can be joined"
        )
    runs: dict[str, dict[int, SequenceRun]] = {}
    for session in (earlier, later):
        for name, method in session["methods"].items():
            for seed, run in method["seeds"].items():
                curves = run["curves"] and np.array(run["curves"], np.float64)
                runs.setdefault(name, {})[int(seed)] = SequenceRun(np.array(run["scores"], np.float64), curves)
    return sequence_figures(later["tasks"], runs, draws)


def _measures(chance: list[float], runs: Sequence[SequenceRun], draws: int) -> dict[str, Any]:
    curves = [np.diagonal(run.scores)[:, None] if run.curves is None else run.curves for run in runs]
    if len({curve.shape for curve in curves}) > 1:
        raise ValueError(f"runs have curves of {[c.shape[1] for c in curves]} evaluations; make it as many in all")
    scores = np.stack([run.scores for run in runs])
    estimates = summarise(scores, np.array(chance), np.stack(curves), draws=draws)
    return {name: {of: _number(v) for of, v in asdict(one).items()} for name, one in estimates.items()}


def _rows(matrix: FloatArray) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in matrix.tolist()]


def _number(value: float) -> float | None:
    """Six significant digits, None for NaN."""
    return None if math.isnan(value) else float(f"{value:.6g}")
