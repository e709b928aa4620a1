"""The result of a sweep: table, importance of each setting, the plot, and the best one as an experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import draccus
import numpy as np
import yaml

from evaluators.console import markdown_table
from evaluators.forgetting import Estimate
from evaluators.pareto import Outcomes, front, gap
from evaluators.success_table import SuccessTable
from ipvla.experiment import ExperimentConfig
from ipvla.files import write_text
from ipvla.storage import StorageRoots
from ray_jobs.tuning.sweep import NEW, OLD, SCORE, Dimension, Scoring
from ray_jobs.tuning.trials import Trial, flat

#: Trials from which on importances say anything.
_ENOUGH = 8


def best(trials: Sequence[Trial]) -> Trial:
    """The finished trial of the highest score; of equal ones that of better retention, whatever their order.

    Raises:
        ValueError: none has finished.
    """
    finished = [trial for trial in trials if trial.status == "finished"]
    if not finished:
        failed = [trial for trial in trials if trial.error]
        reason = f"; the first that failed: {failed[0].error}" if failed else ""
        raise ValueError(f"none of {len(trials)} trials has finished{reason}")
    return max(finished, key=lambda trial: (trial.told[SCORE], trial.told[OLD], trial.name))


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials that no other matches or beats in new-task success and retention, by the former."""
    finished = [trial for trial in trials if trial.status == "finished"]
    if not finished:
        return []
    edge = {tuple(point) for point in front(_points(finished)).tolist()}
    chosen = {tuple(point): trial for point, trial in zip(_points(finished).tolist(), finished, strict=True)}
    return [chosen[point] for point in sorted(edge)]


def importances(trials: Sequence[Trial], space: Mapping[str, Dimension]) -> dict[str, float]:
    """Each setting's share in what makes the best quarter of the trials different; empty if there are too few.

    PED-ANOVA (Watanabe et al., arXiv 2304.10255), as Optuna has it.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    scored = [trial for trial in trials if trial.told]
    if len(scored) < _ENOUGH or len({trial.told[SCORE] for trial in scored}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    domains = {name: dimension.domain() for name, dimension in space.items()}
    distributions = OptunaSearch.convert_search_space(domains)
    for trial in scored:
        made = optuna.trial.create_trial(
            params=dict(trial.values), distributions=distributions, value=trial.told[SCORE]
        )
        study.add_trial(made)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in shares.items() if not math.isnan(share)}


def table(trials: Sequence[Trial], names: Sequence[str]) -> str:
    """Markdown, the best first."""
    rows = []
    for trial in sorted(trials, key=lambda one: -one.told.get(SCORE, -math.inf)):
        cells = ["", "", trial.error]
        if trial.told:
            low, high = trial.told[f"{SCORE}/low"], trial.told[f"{SCORE}/high"]
            score = f"{trial.told[SCORE]:.2f} ({low:.2f} to {high:.2f})"
            cells = [f"{trial.told[NEW]:.2f}", f"{trial.told[OLD]:.2f}", score]
        rows.append((trial.name, trial.status, str(trial.step), *cells, flat(trial.values, names)))
    return markdown_table(("trial", "status", "steps", "new", "old", "score (95 %)", "with"), rows)


def write_best(config: ExperimentConfig, trial: Trial, path: Path) -> Path:
    """The trial's experiment as a YAML file that `ray_jobs.train` takes as it is, apart from its directories."""
    own = {*StorageRoots.__dataclass_fields__, "name", "parent_run_key", "parent_run_id", "tracking"}
    tree = {name: value for name, value in draccus.encode(config).items() if name not in own}
    head = (
        f"# {trial.name}: new {trial.told[NEW]:.2f}, old {trial.told[OLD]:.2f}, score {trial.told[SCORE]:.2f}\n"
        f"#     python -m ray_jobs.train --config_path {path.name} --name NAME\n"
    )
    return write_text(path, head + yaml.safe_dump(tree, sort_keys=False, width=115))


def plot(trials: Sequence[Trial], chosen: Trial, path: Path) -> Path:
    """New-task success against retention: every trial that was looked at, the front, the best one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for status, marker, colour in (("finished", "o", "tab:blue"), ("stopped", "x", "tab:grey")):
        some = [trial for trial in trials if trial.status == status and trial.told]
        if some:
            points = _points(some)
            axes.scatter(points[:, 0], points[:, 1], marker=marker, color=colour, label=status)
    edge = _points(pareto(trials))
    axes.step(edge[:, 0], edge[:, 1], where="pre", color="tab:blue", linewidth=1)
    new, old = _points([chosen])[0]
    axes.scatter(new, old, s=140, facecolor="none", edgecolor="tab:red", label="highest score")
    axes.set(xlabel="success on the new task", ylabel="success on what was known", xlim=(-0.03, 1.03))
    axes.set_ylim(-0.03, 1.03)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


def difference(
    chosen: Mapping[int, SuccessTable], default: Mapping[int, SuccessTable], scoring: Scoring
) -> dict[str, Estimate]:
    """`new`, `old` and `score`: best minus default, with intervals over seeds and the layouts that both played."""
    first, second = (_outcomes(tables, scoring) for tables in (chosen, default))
    return {
        NEW: gap(lambda points: float(points[0, 0]), first, second),
        OLD: gap(lambda points: float(points[0, 1]), first, second),
        SCORE: gap(lambda points: scoring.score(float(points[0, 0]), float(points[0, 1])), first, second),
    }


def _outcomes(tables: Mapping[int, SuccessTable], scoring: Scoring) -> Outcomes:
    """[seeds, 1, episodes] of new and of old tasks, episodes in the order of their keys."""
    rows: dict[bool, list[list[float]]] = {True: [], False: []}
    for table in tables.values():
        results = sorted(table.results, key=lambda one: one.spec.key)
        for new, row in rows.items():
            row.append([float(one.success) for one in results if (one.spec.task in scoring.new_tasks) == new])
    return Outcomes(np.array(rows[True])[:, None], np.array(rows[False])[:, None])


def _points(trials: Sequence[Trial]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.array([[trial.told[NEW], trial.told[OLD]] for trial in trials], np.float64).reshape(-1, 2)
