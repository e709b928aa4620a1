"""`python -m ray_jobs.robustness`: success under LIBERO-Plus' perturbations, by dimension and level.

    ipvla robustness --study mine --policies "[lora]" --success.suite libero_object
    ipvla robustness --study mine --policies "[lora]" --success.suite libero_goal --dimensions "[camera, noise]"

Plays the unperturbed episodes first (the journal of `ipvla evaluate` serves), then the same initial states under
every perturbation, each into the journal `POLICY/robustness/DIMENSION_LEVEL/episodes.sqlite`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console

from evaluators.episodes import VideoChoice
from evaluators.robustness import Robustness, robustness, robustness_table, write_robustness
from evaluators.success import SuccessEvaluation
from evaluators.success_table import SuccessTable
from ipvla.choices import did_you_mean
from ipvla.sim.perturbations import LEVELS, PerturbationConfig, perturbation_config
from ipvla.sim.suites import suite_entry
from ray_jobs.command_line.cli import run
from ray_jobs.evaluate import EvaluateConfig, checked_sources
from ray_jobs.running.cluster import connect, supplied
from ray_jobs.running.display import EvaluationDisplay
from ray_jobs.running.policy_run import placed, policy_demand, policy_run, warn_of_waiting


@dataclass(frozen=True)
class RobustnessConfig(EvaluateConfig):
    """Which policies, on what, and how they are perturbed.

    Attributes:
        dimensions: camera, robot, language, light, noise; by default all that the suite can play.
        levels: of each, 1 to 5.
        perturbation_seed: another one draws all perturbations anew.
        videos: as for `ray_jobs.evaluate`, of every perturbation; none by default.
    """

    dimensions: tuple[str, ...] = ()
    levels: tuple[int, ...] = LEVELS
    perturbation_seed: int = 0
    videos: VideoChoice = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.success.perturbation is not None:
            raise ValueError("success.perturbation is set by this job; choose by dimensions and levels instead")
        playable = suite_entry(self.success.suite).facts.perturbations
        if not playable:
            raise ValueError(f"success.suite: {self.success.suite} cannot be perturbed; choose one of LIBERO's")
        for dimension in self.dimensions:
            if dimension not in playable:
                raise ValueError(
                    f"dimensions: {self.success.suite} has no {dimension!r}; {did_you_mean(dimension, playable)}"
                )
        for name in ("dimensions", "levels"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} is {list(getattr(self, name))}; name none twice")
        if not self.levels:
            raise ValueError(f"levels is empty; choose among {', '.join(map(str, LEVELS))}")
        _ = self.perturbations  # a level that there is not is refused now

    @property
    def perturbations(self) -> tuple[PerturbationConfig, ...]:
        """All that are played."""
        dimensions = self.dimensions or suite_entry(self.success.suite).facts.perturbations
        return tuple(
            perturbation_config(dimension, level, self.perturbation_seed)
            for dimension in dimensions
            for level in self.levels
        )


def measure(config: RobustnessConfig, console: Console) -> list[Robustness]:
    """Plays what the journals lack, and compares.

    Raises:
        AssetsError: a perturbation lacks its files.
        Everything else as `ray_jobs.evaluate.evaluate` does.
    """
    config.prepare()
    load, success = placed(config.success, config.use_gpu)
    evaluations: dict[PerturbationConfig | None, SuccessEvaluation] = {
        perturbation: replace(success, perturbation=perturbation).build(config.cache)
        for perturbation in (None, *config.perturbations)
    }
    instructions = set().union(*(evaluation.instructions for evaluation in evaluations.values()))
    sources = checked_sources(config, evaluations[None], load, console, instructions)
    tables: dict[str, dict[PerturbationConfig | None, SuccessTable]] = {name: {} for name in config.policies}
    with connect(config), supplied(policy_demand(success)), EvaluationDisplay(console) as display:
        for perturbation, evaluation in evaluations.items():
            with evaluation:  # its simulators play every policy
                for name, source in sources.items():
                    directory, label = config.directory / name, name
                    if perturbation is not None:
                        label = f"{name}, {perturbation.dimension} {perturbation.level}"
                        directory /= f"robustness/{perturbation.dimension}_{perturbation.level}"
                    directory.mkdir(parents=True, exist_ok=True)
                    journal = directory / config.journal(name).name
                    table = evaluation.run(name, source, journal, on_status=partial(display.update, label))
                    if config.videos:
                        evaluation.record(table, journal, config.videos, directory / "videos")
                    display.tell(label, "played")
                    tables[name][perturbation] = table
    tasks = evaluations[None].tasks
    found = []
    for name, by_perturbation in tables.items():
        perturbed = {config: table for config, table in by_perturbation.items() if config is not None}
        found.append(robustness(name, by_perturbation[None], perturbed, tasks))
    return found


def main(config: RobustnessConfig) -> None:
    """Measures, prints a table per policy, and writes `robustness.json`."""
    console = Console()
    found = measure(config, console)
    path = write_robustness(found, config.directory / config.labelled("robustness.json"))
    for one in found:
        console.print(robustness_table(one))
        sink = policy_run(
            config,
            config.study,
            one.policy,
            parent_run_key=config.parent_run_key,
            parent_run_id=config.parent_run_id,
            renews=True,
        )
        sink.log(one.metrics(config.success.suite), 0)
        sink.log_artifact(path)
        sink.close()
    console.print(f"written: {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(RobustnessConfig, main, __doc__, warn_of_waiting)
