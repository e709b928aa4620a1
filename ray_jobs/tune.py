"""`python -m ray_jobs.tune`: searches an experiment's settings, a Thermostat's gains say, by Ray Tune.

Ends with the best trial as an experiment that `ray_jobs.train` takes, a plot of new-task success against
retention, each setting's importance, and a comparison of the best with the default on fresh seeds and layouts.

    python -m ray_jobs.tune --config_path ray_jobs/experiments/forgetting/sweep.yaml --settings "{start_from: DIR}"
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from evaluators.forgetting import Estimate
from evaluators.success_table import SuccessTable
from ipvla.files import write_text
from ipvla.tracking import MLflowSink
from ray_jobs.command_line.cli import ending_at_sigterm, run
from ray_jobs.running.cluster import connect, supplied
from ray_jobs.running.display import TrainingDisplay
from ray_jobs.running.policy_run import BEST, policy_run, publish, training_run, warn_of_waiting
from ray_jobs.train import demand
from ray_jobs.tuning.sweep import SweepConfig, claim
from ray_jobs.tuning.sweep_report import best, difference, importances, pareto, plot, table, write_best
from ray_jobs.tuning.trials import Trial, logged, play, run_sweep, rungs, train_to


def tune(config: SweepConfig, console: Console) -> dict[str, Any]:
    """Runs what is missing of the sweep and of its confirmation; what `sweep.json` says.

    Raises:
        SettingError: the search space, or a sweep of the same name with other settings.
        ValueError: no trial has finished.
    """
    config = config.absolute()
    config.prepare()
    config.require_usable()
    config = claim(config)
    sink = policy_run(config, config.study, config.name, renews=True)
    try:
        with (
            ending_at_sigterm(),
            connect(config),
            supplied(demand(config.trained("check", {}))),
            TrainingDisplay(config.training, console, idle="no trial trains; they start, or play episodes"),
        ):
            trials = run_sweep(config)
            chosen = best(trials)
            summary = _summary(config, trials, chosen)
            console.print(Markdown(summary["table"]))
            summary |= _confirmed(config, chosen)
    except BaseException:
        sink.close("KILLED")
        raise
    _publish(config, summary, trials, chosen, sink)
    return summary


def _summary(config: SweepConfig, trials: list[Trial], chosen: Trial) -> dict[str, Any]:
    return {
        "best": chosen.name,
        "pareto": [trial.name for trial in pareto(trials)],
        "importances": importances(trials, config.space),
        "trials": [asdict(trial) for trial in trials],
        "table": table(trials, list(config.space)),
    }


def _confirmed(config: SweepConfig, chosen: Trial) -> dict[str, Any]:
    """Scores of best and default, trained with fresh seeds and played on fresh layouts, and their difference."""
    if not config.confirm_seeds:
        return {}
    success = replace(config.success, first_layout=config.confirm_first_layout)
    tables: dict[str, dict[int, SuccessTable]] = {"best": {}, "default": {}}
    scores: dict[str, dict[str, dict[str, float]]] = {"best": {}, "default": {}}
    for seed in config.confirm_seeds:
        for side, values in (("best", chosen.values), ("default", {})):
            run = config.trained(f"{side}-{seed}", values)
            run = replace(run, seed=seed, lanes=replace(run.lanes, seed=seed))
            last = rungs(run)[-1]
            played = play(run, train_to(run, last), last, success, config.scoring)
            tables[side][seed], scores[side][str(seed)] = played, config.scoring.of(played)
    gains = difference(tables["best"], tables["default"], config.scoring)
    return {"confirmation": scores, "best_minus_default": {name: asdict(one) for name, one in gains.items()}}


def _publish(
    config: SweepConfig, summary: Mapping[str, Any], trials: list[Trial], chosen: Trial, sink: MLflowSink
) -> None:
    """Files in the sweep's directory, and all of it in MLflow; the best policy becomes a version of the model."""
    place = config.directory
    experiment = replace(config.trained("best", chosen.values), name=chosen.name)
    text = report(config, summary)
    files = [
        write_best(experiment, chosen, place / "best.yaml"),
        plot(trials, chosen, place / "pareto.png"),
        write_text(place / "sweep.json", json.dumps(summary, indent=1)),
        write_text(place / "report.md", text + "\n"),
    ]
    sink.log_params({"trials": config.trials, "search": config.search, "scheduler": config.scheduler})
    sink.log(logged(chosen.told), chosen.step)
    for file in files:
        sink.log_artifact(file)
    sink.note(text)
    sink.close()
    trained = training_run(experiment, renews=True)
    publish(trained, experiment, register=True, alias=BEST)
    trained.close()


def report(config: SweepConfig, summary: Mapping[str, Any]) -> str:
    """Markdown: the comparison, what mattered, every trial."""
    parts = [f"# {config.name}: {summary['best']}"]
    if "best_minus_default" in summary:
        seeds = ", ".join(map(str, config.confirm_seeds))
        lines = [f"- {name}: {_interval(Estimate(**one))}" for name, one in summary["best_minus_default"].items()]
        parts += [f"Best minus default, on fresh seeds ({seeds}) and layouts:", "\n".join(lines)]
    if summary["importances"]:
        shares = [f"- `{name}`: {share:.0%}" for name, share in summary["importances"].items()]
        parts += ["What made the difference (PED-ANOVA):", "\n".join(shares)]
    return "\n\n".join([*parts, summary["table"]])


def _interval(one: Estimate) -> str:
    if math.isnan(one.low):
        return f"{one.value:+.3f} (one seed has no interval)"
    return f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f})"


def main(config: SweepConfig) -> None:
    """Searches, then prints the report and where the files lie."""
    console = Console()
    summary = tune(config, console)
    console.print(Markdown(report(config, {**summary, "table": ""})))
    console.print(f"{config.directory / 'report.md'}; the best: {config.directory / 'best.yaml'}", markup=False)


if __name__ == "__main__":
    run(SweepConfig, main, __doc__, warn_of_waiting)
