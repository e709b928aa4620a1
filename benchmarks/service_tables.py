"""The tables of `benchmarks.service`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.markdown import head, line


def training_table(figures: Mapping[str, Any]) -> str:
    """Milliseconds per step, and MLflow's."""
    training = figures["training"]
    ms, mlflow = training["step_ms"], training["mlflow"]
    rows = head("", "ms per step", "against the bare loop", "the same by CPU time")
    rows += [
        line("bare PyTorch loop", f"{ms['bare']:.1f}", "", ""),
        line(
            "worker of Ray Train",
            f"{ms['trainer']:.1f}",
            _interval(training["ratio"]),
            _interval(training["ratio_cpu"]),
        ),
    ]
    logged = (
        f"MLflow, in a training of {mlflow['steps']} steps: {mlflow['calls']} calls and the sending "
        f"thread's CPU took {1e3 * mlflow['logging_s']:.0f} ms of {mlflow['training_s']:.0f} s."
    )
    return "\n".join([*rows, "", logged])


def sweep_table(figures: Mapping[str, Any]) -> str:
    """Best and default on fresh seeds and layouts, the difference, and how the sweep went."""
    sweep = figures["sweep"]
    names = ("new", "old", "score")
    rows = head("", *names)
    for side, by_seed in sweep["confirmation"].items():
        rows.append(line(side, *(_mean([told[name] for told in by_seed.values()]) for name in names)))
    rows.append(line("best minus default", *(_interval(sweep["best_minus_default"][name]) for name in names)))
    trials = sweep["trials"]
    seeds = len(next(iter(sweep["confirmation"].values())))
    minutes = {name: f"{sweep[name] / 60:.0f}" for name in ("seconds", "seconds_before_the_kill", "prepared_s")}
    told = (
        f"Means over {seeds} fresh seeds; differences with 95 % intervals over seeds and layouts. "
        f"{trials['finished']} trials finished, {trials['stopped']} were stopped, {trials['failed']} failed; "
        f"the driver was killed after {minutes['seconds_before_the_kill']} of {minutes['seconds']} minutes, with "
        f"{sweep['ended_before_the_kill']} trials behind it. Data, base policy and artifact, made before, took "
        f"{minutes['prepared_s']} minutes."
    )
    return "\n".join([*rows, "", told, *_best(sweep)])


def _best(sweep: Mapping[str, Any]) -> list[str]:
    """What the best trial was, and what made the difference."""
    (best,) = (trial for trial in sweep["played"] if trial["name"] == sweep["best"])
    shares = sweep["importances"]
    rows = head("setting", "of the best trial", "importance")
    for name, value in best["values"].items():
        share = f"{shares[name]:.0%}" if name in shares else ""
        rows.append(line(f"`{name}`", f"{value:.3g}" if isinstance(value, float) else str(value), share))
    return ["", *rows]


def _interval(one: Mapping[str, float]) -> str:
    return f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


SERVICE: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"training": training_table, "sweep": sweep_table}
