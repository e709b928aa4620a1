"""A world that does not wait: success against the latency of answers, by the way in which they are taken.

    python -m studies.speeds [--quick] [--storage_root DIR] [--ways "[hold, guided]"] [--seeds "[0, 1, 2]"]

Per training seed two policies with a flow head, one of which has learned to go on from given actions. They play
the Recall families in which things move and cues are short (chase, glimpse, shuffle), and one in which nothing
does, on held-out layouts of the seed's own. `hold` and `rest` are plain chunks: an answer is played from its
arrival on, and meanwhile the robot keeps still or plays the last chunk's rest; `ensemble` averages; `guided` and
`trained` are Real-Time Chunking (`ipvla.rollout.chunking`).

With every way, `benchmarks/results/speeds.json` and `docs/speeds.png` are written. Seeds of the same recipe that
are there already stay and count. `--quick` takes about two minutes, in a temporary directory; its results mean
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Final

from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from evaluators.plots import whiskers
from evaluators.success_table import SuccessTable
from ipvla.experiment import ExperimentConfig
from ipvla.sim.suites import load_suite
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.cli import run
from ray_jobs.command_line.settings import parse
from ray_jobs.evaluate import EvaluateConfig, evaluate
from ray_jobs.running.cluster import connect
from studies.engine import DOCS, Runner, Study, as_json, entries, placed, publish
from studies.memory import join_rows, success_figures, training_recipe
from studies.record import Figures, Target
from studies.tables import SPEEDS, measured

#: Plain chunks as they are by default, those whose rest is played meanwhile, and those that go on from it.
PLAIN: Final = "hold"
PLAYED_ON: Final = "rest"
REAL_TIME: Final = ("guided", "trained")
#: Control steps at which plain chunks and the others are compared.
COMPARED_AT: Final = 4
#: Way -> latency -> family -> its row.
Success = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]


@dataclass(frozen=True)
class SpeedsStudy(Study):
    """What is compared.

    Attributes:
        ways: names of `studies/speeds.yaml`; empty for all, or some if quick.
        latencies: in control steps, 0 among them.
    """

    title: ClassVar[str] = "speeds"
    grid: ClassVar[str] = "ways"
    in_small: ClassVar[tuple[str, ...]] = ("rest", "trained")
    ways: tuple[str, ...] = ()
    latencies: tuple[int, ...] = (0, 2, 4, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 not in self.latencies or min(self.latencies) < 0 or len(set(self.latencies)) < len(self.latencies):
            raise ValueError(f"latencies is {list(self.latencies)}; give 0 and others above it, all different")

    @property
    def complete(self) -> bool:
        return super().complete and COMPARED_AT in self.latencies

    @property
    def collection(self) -> CollectConfig:
        return self.collected("collect")

    @property
    def policies(self) -> list[str]:
        """Those that the ways need."""
        return list(dict.fromkeys(entries("speeds")[way]["policy"] for way in self.names))

    def arguments(self, policy: str, seed: int) -> list[str]:
        """`ray_jobs.train` for one of them."""
        return self.run_arguments(self.preset(policy), policy, seed)

    def evaluation(self, way: str, latency: int, seed: int) -> EvaluateConfig:
        """A policy played in one way with one latency, on the seed's own held-out layouts."""
        flags = dict(entries("speeds")[way])
        policy = f"seed{seed}-{flags.pop('policy')}"
        late = {"label": f"{way}_{latency}", "success.latency_steps": latency, **flags}
        return self.evaluate_config("evaluate", [policy], seed, **late)

    @property
    def recipe(self) -> Figures:
        """All that two runs must share for their seeds to be counted together."""
        evaluation = self.evaluation(self.names[0], 0, 0).success
        trained = {name: parse(ExperimentConfig, self.arguments(name, 0)) for name in self.policies}
        return as_json(
            {
                "suite_version": load_suite(self.collection.suite, self.cache).version,
                "demonstrations": self.collection.demonstrations,
                "ways": dict(entries("speeds")),
                "latencies": self.latencies,
                "training": {name: training_recipe(one) for name, one in trained.items()},
                "episodes_per_seed": evaluation.episodes,
                "first_layout": evaluation.first_layout,
            }
        )


def measure(study: SpeedsStudy, runner: Runner) -> Figures:
    """All stages; the figures."""
    runner.collect([study.collection])
    played: dict[str, dict[str, dict[int, SuccessTable]]] = {}
    for seed in study.training_seeds:
        runs = {f"seed {seed}, {name}": study.arguments(name, seed) for name in study.policies}
        runner.train(f"seed {seed}: training", runs)
        for way in study.names:
            with runner.stage(f"seed {seed}: {way}"):
                for latency in study.latencies:
                    (table,) = evaluate(study.evaluation(way, latency, seed), runner.console).tables
                    played.setdefault(way, {}).setdefault(str(latency), {})[seed] = table
    tasks = load_suite(study.collection.suite, study.cache).tasks
    figures: Figures = {
        "recipe": study.recipe,
        "success": {way: success_figures(tasks, of) for way, of in played.items()},
        "wall_s": runner.seconds,
    }
    if {PLAIN, PLAYED_ON} <= played.keys():
        figures["differ_without_latency"] = _differing(played[PLAIN]["0"], played[PLAYED_ON]["0"])
    return figures


def _differing(first: Mapping[int, SuccessTable], second: Mapping[int, SuccessTable]) -> int:
    """Episodes that two ways, which are one where the world waits, played otherwise."""

    def told(tables: Mapping[int, SuccessTable]) -> dict[tuple[int, str], tuple[Any, ...]]:
        return {
            (seed, one.spec.key): (one.outcome, one.steps, one.policy_steps, one.details)
            for seed, table in tables.items()
            for one in table.results
        }

    one, other = told(first), told(second)
    return sum(one[key] != other.get(key) for key in one)


def rate(success: Success, way: str, latency: int) -> float:
    """Mean over families."""
    return fmean(row["rate"] for row in success[way][str(latency)].values())


def lost(success: Success, way: str) -> float:
    """Success that the compared latency takes from a way."""
    return rate(success, way, 0) - rate(success, way, COMPARED_AT)


def targets(figures: Figures) -> list[Target]:
    """What was promised, from the figures of a run that compared all ways."""
    success = figures["success"]
    best = min(REAL_TIME, key=lambda way: lost(success, way))
    loses, at = lost(success, PLAIN), {way: f"{way} {lost(success, way):.3f}" for way in success}
    return [
        Target(
            "rtc_loss_share",
            max(lost(success, best), 0.0) / loses if loses > 0 else None,
            0.5,
            at_least=False,
            note=f"{best} against {PLAIN}; of success at latency {COMPARED_AT} are lost: {', '.join(at.values())}",
        ),
        Target("latency_zero_identical", float(figures["differ_without_latency"] == 0), 1.0, at_least=True),
    ]


def joined(earlier: Figures, later: Figures) -> Figures:
    """Figures of two runs of one recipe, over the seeds of both."""
    rows = {way: join_rows(earlier["success"][way], of) for way, of in later["success"].items()}
    differ = earlier["differ_without_latency"] + later["differ_without_latency"]
    return {**later, "success": rows, "differ_without_latency": differ}


def plot(success: Success, path: Path) -> None:
    """Success against latency, a panel per family, a line with Wilson intervals per way; PNG."""
    families = list(next(iter(next(iter(success.values())).values())))
    figure = Figure(figsize=(2.9 * len(families), 3.4), layout="constrained")
    panels: Sequence[Any] = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for panel, family in zip(panels, families, strict=True):
        for place, (way, of) in enumerate(success.items()):  # side by side, or intervals hide one another
            rows = [row[family] for row in of.values()]
            x = [int(latency) + 0.1 * (place - len(success) / 2) for latency in of]
            y = [row["rate"] for row in rows]
            error = whiskers(y, [row["wilson95"] for row in rows])
            panel.errorbar(x, y, error, label=way, marker="o", markersize=3, elinewidth=0.7)
        panel.set_title(family, fontsize=9)
        panel.set_xlabel("latency, control steps")
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("success on held-out layouts")
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main(study: SpeedsStudy) -> None:
    """Runs what is missing, shows the tables, and records them if they are complete."""
    console = Console()
    with placed(study, study.quick) as here, connect(here):
        figures = measure(here, Runner(here.directory, console))
    for table in measured(figures, SPEEDS):
        console.print(Markdown(table))
    if study.complete:
        figures = publish("speeds", study.training_seeds, figures, joined, targets, console)
        plot(figures["success"], DOCS / "speeds.png")


if __name__ == "__main__":
    run(SpeedsStudy, main, __doc__)
