"""`python -m ray_jobs.compare`: MLflow runs side by side, as a table and as plots.

    ipvla compare --study forgetting                          # results that the runs share, and what differs
    ipvla compare --names "[gru, none]" --metrics "[success/*, train/loss]" --out ~/gru_or_none
    ipvla compare --study forgetting --filter 'params.`optimizer.lr` = "0.001" and attributes.status = "FINISHED"'
    ipvla compare --study forgetting --scatter "[success/ground_yellow, success/place]" --out ~/sweep
    ipvla compare --names "[gru]" --tracking_uri http://mlflow.example.org:5000

It only reads. Differences with intervals on the same layouts are `ray_jobs.evaluate`'s, from the journals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console

from evaluators.plots import draw_curves, parallel_coordinates, scatter
from evaluators.run_table import RunTable, differing_parameters, opposed, shared_metrics, without_ends
from evaluators.tracked_runs import PLAYED_BY, RunStore, TrackedRun, TrackingError, differing_fingerprints, labels
from ipvla.choices import did_you_mean
from ipvla.sim.protocols import ProtocolError
from ipvla.storage import SOURCE_TREE, StorageError, StorageRoots
from ray_jobs.command_line.cli import run
from ray_jobs.command_line.settings import SettingError

_METRICS = 12  # shown unless asked for
_CURVES = 8
_LOSS = "train/loss"


@dataclass(frozen=True)
class CompareConfig(StorageRoots):
    """Which runs to compare, and by what.

    Attributes:
        study: an MLflow experiment; all of them if names or a filter are given.
        names: of runs, or their ids; all of the study if left out.
        filter: what MLflow's search takes, e.g. 'metrics.`train/loss` < 0.1 and params.seed = "0"'.
        order_by: what MLflow's search takes, e.g. 'metrics.`success/place` DESC'; by default as they were started.
        limit: at most so many runs.
        tracking_uri: default `$MLFLOW_TRACKING_URI`, else the database in `run_root_dir`.
        metrics: names or patterns (`success/*`); by default results that at least two runs have.
        parameters: names or patterns; by default those in which the runs differ.
        scatter: two metrics, across and up; by default success on new and on old tasks, by their names.
        curves: metrics over steps, names or patterns; by default the loss and what else has several steps.
        colour_by: metric of the parallel coordinates; by default the second one of `scatter`.
        across_protocols: also sets results side by side that were played by different protocols or suites.
        out: directory for `runs.{md,csv,json}` and `scatter.png`, `curves.png`, `parallel.png`; none by default.
    """

    study: str | None = None
    names: tuple[str, ...] = ()
    filter: str = ""
    order_by: str = ""
    limit: int = 100
    tracking_uri: str | None = None
    metrics: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    scatter: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()
    colour_by: str | None = None
    across_protocols: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= 1000:
            raise ValueError(f"limit is {self.limit}; it must be in 1..1000")
        if len(self.scatter) not in (0, 2):
            raise ValueError(f"scatter is {list(self.scatter)}; name two metrics, the one across and the one up")
        if self.out is not None and self.out.expanduser().resolve().is_relative_to(SOURCE_TREE):
            raise StorageError(
                f"out: {self.out} lies inside the source tree {SOURCE_TREE}; give a directory outside"
            )


def compare(config: CompareConfig, console: Console) -> RunTable:
    """Prints the table, and writes the files if `out` is given.

    Raises:
        TrackingError: no such store, study or run, or a filter that MLflow does not understand.
        SettingError: no such metric or parameter.
        ProtocolError: results were played by different protocols or suites.
    """
    with console.status("reading"):
        store = RunStore(config.tracking_uri or config.mlflow_uri)
        runs = select(store, config)
        notes = _differences(runs, config.across_protocols)
        table = RunTable(tuple(runs), *_shown(config, runs, notes))
        plots = _plots(config, table)  # errors come before anything is written
    console.print(table.console(console.width, config.study or store.uri))
    for note in notes:
        console.print(note, style="yellow", markup=False, highlight=False)
    if config.out is not None:
        with console.status("drawing"):
            written = _write(config.out.expanduser(), store, table, plots)
        console.print(f"{config.out}: {', '.join(file.name for file in written)}", markup=False)
    return table


def select(store: RunStore, config: CompareConfig) -> list[TrackedRun]:
    """The runs that are asked for, at most `limit` and at least one."""
    studies = store.studies()
    if config.study is not None:
        if config.study not in studies:
            raise TrackingError(
                f"study: {config.study!r} is no experiment at {store.uri}; {did_you_mean(config.study, studies)}"
            )
        studies = {config.study: studies[config.study]}
    elif not (config.names or config.filter):
        raise TrackingError(f"name what to compare, by study, names or filter; studies: {', '.join(studies)}")

    def found(*conditions: str) -> list[TrackedRun]:
        condition = " and ".join(filter(None, (config.filter, *conditions)))
        return store.find(studies, condition, order_by=config.order_by, limit=config.limit)

    if not config.names:
        runs = found()
        if not runs:
            held = "has no run" if not config.filter else f"has no run that fits filter {config.filter!r}"
            raise TrackingError(f"{'study ' + config.study if config.study else store.uri} {held}")
        return runs
    by_id: dict[str, TrackedRun] = {}
    for name in config.names:
        some = found(f"attributes.run_name = {_quoted(name)}") or found(f"attributes.run_id = {_quoted(name)}")
        if not some:
            known = dict.fromkeys(run.name for run in store.find(studies, config.filter))
            raise TrackingError(f"names: there is no run {name!r} at {store.uri}; {did_you_mean(name, known)}")
        by_id |= {run.run_id: run for run in some}
    return list(by_id.values())[: config.limit]


def _quoted(text: str) -> str:
    return f'"{text}"' if "'" in text else f"'{text}'"


def _differences(runs: Sequence[TrackedRun], across_protocols: bool) -> list[str]:
    """Notes on what makes results hard to compare; ProtocolError for what makes them other quantities."""
    differing = {
        name: "; ".join(f"{value} ({_listed(names)})" for value, names in values.items())
        for name, values in differing_fingerprints(runs).items()
    }
    for name in PLAYED_BY:
        if name in differing and not across_protocols:
            raise ProtocolError(
                f"the runs were not played by the same {name}: {differing[name]}. Their difference is not one of "
                f"policies; choose runs by names or --filter 'params.`fingerprint.{name}` = \"...\"', or ask for "
                "--across_protocols"
            )
    return [f"{name} is not the same for all: {values}" for name, values in differing.items()]


def _listed(names: Sequence[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _shown(
    config: CompareConfig, runs: Sequence[TrackedRun], notes: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Metrics and parameters of the table."""
    known = _known_metrics(runs)
    if config.metrics:
        metrics = _matching("metrics", config.metrics, known)
    else:
        shared = shared_metrics(runs)
        metrics = shared[:_METRICS]
        if len(shared) > _METRICS:
            notes.append(
                f"{len(shared) - _METRICS} more metrics are shared, such as {shared[_METRICS]}: --metrics"
            )
        if not shared:
            notes.append(f"no results are shared; --metrics shows any of: {_listed(known, 8)}")
    parameters = differing_parameters(runs)
    if config.parameters:
        every = dict.fromkeys(name for one in runs for name in one.params)
        parameters = _matching("parameters", config.parameters, every)
    if len(runs) == config.limit:
        notes.append(f"there may be more runs; these are the first {config.limit}: --limit")
    return tuple(metrics), tuple(parameters)


def _known_metrics(runs: Sequence[TrackedRun]) -> list[str]:
    return without_ends(name for one in runs for name in one.metrics)


def _matching(setting: str, patterns: Sequence[str], known: Iterable[str]) -> list[str]:
    """Known names in the order of the patterns that they match."""
    known, chosen = list(known), dict[str, None]()
    for pattern in patterns:
        some = [name for name in known if name == pattern or fnmatchcase(name, pattern)]
        if not some:
            raise SettingError(f"{setting}: none of these runs has {pattern!r}; {did_you_mean(pattern, known)}")
        chosen |= dict.fromkeys(some)
    return list(chosen)


@dataclass(frozen=True)
class _Plots:
    """Metrics of the scatter plot and the colours, if there are any; and of the curves, if those are asked for."""

    pair: tuple[str, str] | None
    colour: str | None
    curves: Sequence[str]


def _plots(config: CompareConfig, table: RunTable) -> _Plots:
    known = _known_metrics(table.runs)
    pair = opposed(table.metrics)
    if config.scatter:
        x, y = (_matching("scatter", [name], known)[0] for name in config.scatter)
        pair = x, y
    colour = pair[1] if pair else next(iter(table.metrics), None)
    if config.colour_by:
        colour = _matching("colour_by", [config.colour_by], known)[0]
    return _Plots(pair, colour, _matching("curves", config.curves, known))


def _write(out: Path, store: RunStore, table: RunTable, plots: _Plots) -> list[Path]:
    """The table's files and the plots that there is something to draw of."""
    out.mkdir(parents=True, exist_ok=True)
    files = table.write(out)
    figures = {
        "scatter.png": scatter(table.runs, *plots.pair) if plots.pair else None,
        "parallel.png": plots.colour and parallel_coordinates(table.runs, table.parameters, plots.colour),
    }
    for name, figure in figures.items():
        if figure:
            figure.savefig(out / name, dpi=150)
            files.append(out / name)
    if curves := draw_curves(_curves(store, table, plots.curves), _CURVES):
        (out / "curves.png").write_bytes(curves)
        files.append(out / "curves.png")
    return files


def _curves(
    store: RunStore, table: RunTable, asked: Sequence[str]
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Metric -> run -> points; unless asked for, of those with several steps in the first run that has them."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for metric in asked or dict.fromkeys((_LOSS, *table.metrics)):
        runs = zip(labels(table.runs), table.runs, strict=True)
        having = {label: one for label, one in runs if metric in one.metrics}
        if len(curves) < _CURVES and having:
            first = store.curve(next(iter(having.values())), metric)
            if asked or len(first) > 1:
                curves[metric] = {label: store.curve(one, metric) for label, one in having.items()}
    return curves


def main(config: CompareConfig) -> None:
    """Compares on standard output."""
    compare(config, Console())


if __name__ == "__main__":
    run(CompareConfig, main, __doc__)
