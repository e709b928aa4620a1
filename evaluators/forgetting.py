"""What a sequence of tasks leaves of the earlier ones: transfer and forgetting, with intervals over seeds.

Scores are R[i, j], on task j after training on task i, both counted from 0 to T - 1; NaN where not measured. A
term of a mean that needs an unmeasured score is left out, and a mean of nothing is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluators.intervals import resampled

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and the bootstrap interval around it; the interval is NaN where there is but one seed."""

    value: float
    low: float
    high: float


def backward_transfer(scores: FloatArray) -> FloatArray:
    """BWT = mean_{j<T-1}(R[T-1, j] - R[j, j]) of scores [..., T, T]: float64 [...], negative where tasks are lost.

    Lopez-Paz and Ranzato, arXiv 1706.08840.
    """
    return _mean((scores[..., -1, :] - _diagonal(scores))[..., :-1])


def forgetting(scores: FloatArray) -> FloatArray:
    """mean_{j<T-1}(max_i R[i, j] - R[T-1, j]) of scores [..., T, T]: float64 [...], >= 0.

    Chaudhry et al., arXiv 1801.10112; here the maximum is over all rows, the last one included.
    """
    best = np.fmax.reduce(scores, axis=-2)
    return _mean((best - scores[..., -1, :])[..., :-1])


def forward_transfer(scores: FloatArray, chance: FloatArray) -> FloatArray:
    """FWT = mean_{j>0}(R[j-1, j] - chance[j]) of scores [..., T, T] and chance [T]: float64 [...].

    Lopez-Paz and Ranzato, arXiv 1706.08840.
    """
    return _mean(np.diagonal(scores, 1, -2, -1) - chance[1:])


def libero(scores: FloatArray, curves: FloatArray) -> dict[str, FloatArray]:
    """FWT, NBT and AUC of LIBERO (arXiv 2306.03310), whose own code computes but the first.

    c_k is the best of task k's curve. From the first evaluation that reached it the curve counts as c_k, since
    that model is the one kept. Over the K - k later rows of column k,

        FWT_k = mean of the curve,  NBT_k = mean(c_k - R[tau, k]),  AUC_k = (FWT_k + sum R[tau, k]) / (K - k + 1)

    and each is averaged over the tasks. The last task has no NBT; it is left out of that mean, not counted as 0.

    Args:
        scores: [..., T, T]; the diagonal is not used.
        curves: [..., T, E], score of task k in the E evaluations while training on it.

    Returns:
        "libero_fwt", "libero_nbt", "libero_auc": float64 [...].
    """
    best = np.fmax.reduce(curves, axis=-1)
    reached = np.logical_or.accumulate(curves == best[..., None], axis=-1)
    fwt = _mean(np.where(reached, best[..., None], curves))
    tasks = np.arange(scores.shape[-1])
    later = np.where(tasks[:, None] > tasks, scores, np.nan)
    column = np.where(tasks[:, None] == tasks, fwt[..., None, :], later)
    nbt = _mean(np.swapaxes(best[..., None, :] - later, -1, -2))
    auc = _mean(np.swapaxes(column, -1, -2))
    return {"libero_fwt": _mean(fwt), "libero_nbt": _mean(nbt), "libero_auc": _mean(auc)}


def summarise(
    scores: FloatArray,
    chance: FloatArray | None = None,
    curves: FloatArray | None = None,
    draws: int = 10_000,
) -> dict[str, Estimate]:
    """Every measure of this module over seeds.

    Args:
        scores: [S, T, T], S seeds, T >= 2 tasks.
        chance: [T], score of a policy that has learned nothing; None for 0.
        curves: [S, T, E], see `libero`; None leaves LIBERO's measures out.
        draws: of the bootstrap, see `interval`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if scores.ndim != 3 or scores.shape[1] != scores.shape[2] or scores.shape[1] < 2 or not len(scores):
        raise ValueError(f"scores have shape {scores.shape}; give [seeds, T, T] of at least two tasks")
    seeds, tasks, _ = scores.shape
    chance = np.zeros(tasks) if chance is None else chance
    if chance.shape != (tasks,):
        raise ValueError(f"chance has shape {chance.shape}; give one value for each of the {tasks} tasks")
    measures: dict[str, FloatArray] = {
        "bwt": backward_transfer(scores),
        "forgetting": forgetting(scores),
        "fwt": forward_transfer(scores, chance),
    }
    if curves is not None:
        if curves.ndim != 3 or curves.shape[:2] != (seeds, tasks) or not curves.shape[2]:
            raise ValueError(f"curves have shape {curves.shape}; give [{seeds}, {tasks}, evaluations]")
        measures |= libero(scores, curves)
    return {name: mean_over_seeds(values, draws=draws) for name, values in measures.items()}


def mean_over_seeds(
    values: FloatArray, *, confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Estimate:
    """The mean of values [S], one per seed, NaN left out, with its interval."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan)
    drawn = resampled(values, draws, seed).mean(1)
    return interval(float(values.mean()), drawn, len(values), confidence)


def interval(value: float, resampled: FloatArray, seeds: int, confidence: float = 0.95) -> Estimate:
    """The expanded percentile interval of a bootstrap over few seeds.

    Plain percentiles are too narrow there. The tails are widened as much as Student's t with S - 1 degrees is
    wider than a normal distribution of the plug-in variance: alpha/2 -> Phi(-t_{alpha/2} sqrt(S / (S - 1)))
    (Hesterberg, The American Statistician 69, 2015). Of normal values a 95 % interval holds the truth in 95 % of
    cases with 10 seeds, 93 % with 5, but 75 % with 3: it never reaches beyond the seeds seen. One seed: NaN.

    Args:
        value: of the data themselves.
        resampled: [draws], of the resampled data.
        seeds: S, from which was resampled.

    Raises:
        ValueError: confidence outside (0, 1), no draw, or no seed.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not in (0, 1); use e.g. 0.95")
    if not len(resampled) or seeds < 1:
        raise ValueError(f"{len(resampled)} draws from {seeds} seeds give no interval; have at least one of both")
    if seeds == 1:
        return Estimate(value, math.nan, math.nan)
    from scipy.stats import t as student_t  # type: ignore[import-untyped]  # takes a second

    t = float(student_t.ppf((1 + confidence) / 2, seeds - 1))
    tail = NormalDist().cdf(-t * math.sqrt(seeds / (seeds - 1)))
    low, high = np.quantile(resampled, [tail, 1 - tail]).tolist()
    return Estimate(value, low, high)


def _diagonal(scores: FloatArray) -> FloatArray:
    return np.diagonal(scores, 0, -2, -1)


def _mean(values: FloatArray) -> FloatArray:
    """Over the last axis, of what is not NaN; NaN where there is nothing."""
    known = ~np.isnan(values)
    count = known.sum(-1)
    total = np.where(known, values, 0.0).sum(-1)
    mean: FloatArray = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean


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
