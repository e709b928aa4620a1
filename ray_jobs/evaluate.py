"""`python -m ray_jobs.evaluate`: closed-loop success of trained policies on held-out layouts, with intervals."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from evaluators.compute import compute
from evaluators.console import comparison_table, result_note, success_table
from evaluators.episodes import Video, VideoChoice, write_episodes
from evaluators.intervals import minimum_detectable_difference
from evaluators.paired import PairedComparison, compare, write_success
from evaluators.plots import success_bars
from evaluators.report import Report
from evaluators.success import SuccessConfig, SuccessEvaluation
from evaluators.success_table import SuccessTable
from ipvla.models.heads import Sampling
from ipvla.policy import Policy
from ipvla.rollout.chunking import HeadFacts
from ipvla.rollout.endpoint import PolicyEndpoint
from ipvla.rollout.expert_policy import ExpertSource
from ipvla.rollout.journal import labelled
from ipvla.rollout.openpi.client import OpenpiSource
from ipvla.rollout.openpi.messages import TOKEN_VARIABLE
from ipvla.rollout.policy_actor import PolicySource
from ipvla.sim.suites import require_expert
from ipvla.storage import StorageRoots
from ipvla.tracking import MLflowSink, Sinks, WandbSink
from ray_jobs.command_line.cli import run
from ray_jobs.running.cluster import connect, supplied
from ray_jobs.running.display import EvaluationDisplay
from ray_jobs.running.policy_run import placed, policy_demand, policy_run, variant, warn_of_waiting

#: Shares of layouts on which only one of two policies succeeds: of similar ones, and of unlike ones.
_DISCORDANT = (0.1, 0.5)
#: The policy of this name is not a trained one.
EXPERT = "expert"


@dataclass(frozen=True)
class PlayedPolicies(StorageRoots):
    """Which policies play, and what.

    Attributes:
        study: the MLflow experiment; results go to `run_root_dir/study`.
        policies: names of trained runs of this study (`run_root_dir/study/NAME/policy`).
        success: suite, tasks, episodes, simulators.
        use_gpu: the policy actor takes one GPU.
        parent_run_key: the directory of the run that the policies' runs are nested under in MLflow, if any.
        parent_run_id: the same by its MLflow id, where another program made it.
    """

    study: str = "recall"
    policies: tuple[str, ...] = ()
    success: SuccessConfig = field(default_factory=SuccessConfig)
    use_gpu: bool = False
    parent_run_key: str | None = None
    parent_run_id: str | None = None

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError('policies is empty; name trained runs, for example --policies "[gru, none]"')

    @property
    def directory(self) -> Path:
        return self.runs / self.study

    def mlflow_run(self, name: str) -> MLflowSink:
        """That of a policy, which its training began."""
        parent = {"parent_run_key": self.parent_run_key, "parent_run_id": self.parent_run_id}
        return policy_run(self, self.study, name, renews=True, **parent)


@dataclass(frozen=True)
class EvaluateConfig(PlayedPolicies):
    """Which policies to evaluate, and what to show.

    Attributes:
        policies: names of trained runs of this study (`run_root_dir/study/NAME/policy`); "expert" is the suite's
            scripted expert, which sees the true state: whether the task can be done in time at all.
        servers: name -> `ws://host:port` of an openpi server (openpi's own, or `ray_jobs.serve`) that is asked for
            the actions of the policy of this name; its key is `$IPVLA_SERVE_TOKEN`.
        videos: of which episodes: "all", "failures", or so many successes and failures of every task; 0 for none.
        unnorm_key: the dataset whose statistics turn what policies say into actions, for policies that were
            trained on a mixture; by default its first.
        sampling: integration steps and integrator of flow heads; by default those of their training. Results of
            others lie in a journal of their own, and say so.
        label: names these results, so that a policy can have several, of other suites or protocols:
            `POLICY/episodes-LABEL.sqlite`, `report-LABEL.html`.
    """

    most_used: ClassVar[tuple[str, ...]] = (
        "study", "policies", "success.suite", "success.protocol", "success.episodes", "success.num_simulators",
        "use_gpu", "videos",
    )  # fmt: skip

    servers: dict[str, str] = field(default_factory=dict)
    videos: VideoChoice = 1
    unnorm_key: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    label: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.]*", self.label):
            raise ValueError(f"label is {self.label!r}; it is part of file names: give letters, digits, _ and .")
        if isinstance(self.videos, int) and self.videos < 0:
            raise ValueError(f"videos is {self.videos}; give all, failures, or how many of each kind per task")
        others = ", ".join(name for name in self.policies if name == EXPERT or name in self.servers)
        if str(self.sampling) and others:
            raise ValueError(f"sampling: {self.sampling} has no effect on {others}; leave them out")
        if str(self.success.slow) and others:
            raise ValueError(
                f"success.slow: {self.success.slow} has no effect on {others}, which think elsewhere; leave it out"
            )
        if EXPERT in self.policies:
            self.success.pace.require_plain(f"{EXPERT}, which sees the true state of now, is evaluated")
            require_expert(self.success.suite, "policies")
        unasked = [name for name in self.servers if name not in self.policies]
        if unasked:
            raise ValueError(f"servers: {unasked} are not evaluated; name them in policies as well")
        super().__post_init__()

    def source(self, name: str, load: Callable[..., Policy]) -> PolicyEndpoint:
        """Where the actions of the policy of this name come from."""
        if name == EXPERT:
            return ExpertSource(self.cache, self.success.entry)
        if name in self.servers:
            return OpenpiSource(self.servers[name], os.environ.get(TOKEN_VARIABLE))
        chosen = variant(self.unnorm_key, self.sampling)
        if chosen is not None:
            load = partial(load, unnorm_key=self.unnorm_key, sampling=self.sampling)
        return PolicySource(load, self.directory / name / "policy", variant=chosen)

    def journal(self, name: str) -> Path:
        """Where the episodes of the policy of this name are recorded."""
        sampling = "".join(f"-{part}" for part in str(self.sampling).split())
        return self.directory / name / self.labelled(f"episodes{sampling}.sqlite")

    def labelled(self, file: str) -> str:
        """The name of a file of these results."""
        return labelled(file, self.label)

    @property
    def conditions(self) -> dict[str, str]:
        """What results say of the settings that are none of the policy's."""
        return {"sampling": str(self.sampling)} if str(self.sampling) else {}


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    tables: tuple[SuccessTable, ...]
    comparisons: tuple[PairedComparison, ...]
    videos: tuple[Video, ...]
    run_ids: dict[str, str | None]


def evaluate(config: EvaluateConfig, console: Console) -> Evaluation:
    """Plays what the journals lack, for one policy after another, and records videos.

    Raises:
        CheckpointError: a policy does not exist or cannot be loaded.
        ContractError: a policy does not fit the suite.
        ValueError: an instruction is longer than a policy's prompts.
        JournalError: results of another policy or protocol lie where these should go.
        ClusterError: this machine lacks what the policy's actors ask for.
        OpenpiError: a server does not answer.
    """
    config.prepare()
    load, success = placed(config.success, config.use_gpu)
    directories = {name: config.directory / name for name in config.policies}
    built = success.build(config.cache)
    sources = checked_sources(config, built, load, console, built.instructions)
    tables: list[SuccessTable] = []
    videos: list[Video] = []
    run_ids: dict[str, str | None] = {}
    with (
        connect(config),
        supplied(policy_demand(success)),
        built as evaluation,
        EvaluationDisplay(console) as display,
    ):
        console.print(what_it_can_show(len(evaluation.specs)))
        for name, directory in directories.items():
            journal, show = config.journal(name), partial(display.update, name)
            sink = config.mlflow_run(name)
            wandb = WandbSink.found(directory, config.study, name)
            sinks = Sinks((sink,) if wandb is None else (sink, wandb))
            table = evaluation.run(
                name, sources[name], journal, conditions=config.conditions, sink=sinks, on_status=show
            )
            if config.videos:
                display.tell(name, "recording")
                recorded = evaluation.record(table, journal, config.videos, directory / config.labelled("videos"))
                for video in recorded:
                    sinks.log_artifact(video.path)
                videos += recorded
            _show(sink, [table], plot := directory / f"success_{config.success.suite_name}.png")
            if wandb is not None and plot.exists():
                wandb.log_artifact(plot)
            display.tell(name, "played")
            sinks.close()
            tables.append(table)
            run_ids[name] = sink.run_id
        comparisons = [c for a, b in combinations(tables, 2) for c in compare(a, b, evaluation.tasks)]
    return Evaluation(tuple(tables), tuple(comparisons), tuple(videos), run_ids)


def checked_sources(
    config: EvaluateConfig,
    evaluation: SuccessEvaluation,
    load: Callable[..., Policy],
    console: Console,
    instructions: Collection[str],
) -> dict[str, PolicyEndpoint]:
    """The policies by name, before any process starts; says what is converted for them.

    Raises:
        CheckpointError: a policy does not exist or cannot be loaded.
        ContractError: a policy does not fit the suite.
        ValueError: a policy has no such dataset or sampling, an instruction is longer than its prompts, or it
            cannot answer as late, or go on from the last chunk, as `success` wants it.
    """
    sources = {name: config.source(name, load) for name in config.policies}
    for name, source in sources.items():
        if isinstance(source, PolicySource):
            policy = Policy.load(
                source.directory,
                unnorm_key=config.unnorm_key,
                sampling=config.sampling,
                slow=config.success.slow,
            )
            policy.require_finite()
            if policy.config.speeds.two:
                console.print(f"{name}: {compute(policy, policy.blank())}", markup=False)
            policy.require_prompts(instructions)
            execute = config.success.played_by.execute or policy.execute
            config.success.pace.require(policy.config.chunk, execute, HeadFacts.of(policy.config.head))
        elif isinstance(source, OpenpiSource):
            source.require(config.success.pace, config.success.played_by.execute)
        if conversions := evaluation.conversions(source):
            console.print(f"{name}: {conversions}", markup=False)
    return sources


def _show(
    sink: MLflowSink, tables: Sequence[SuccessTable], plot: Path, comparisons: Sequence[PairedComparison] = ()
) -> None:
    """Table and bars of success in an MLflow run."""
    sink.note(result_note(tables, comparisons))
    if (png := success_bars(tables)) is not None:
        plot.write_bytes(png)
        sink.log_artifact(plot)


def log_comparison(config: EvaluateConfig, evaluation: Evaluation, sink: MLflowSink) -> None:
    """What the policies come to beside each other, in a run of its own or in that of the whole study."""
    names = {f"policy_{i}": table.policy for i, table in enumerate(evaluation.tables)}
    suite = config.success.suite_name
    sink.log_params({"suite": suite, **names})
    plot = config.directory / f"success_{suite}.png"
    _show(sink, evaluation.tables, plot, evaluation.comparisons)


def report(config: EvaluateConfig, evaluation: Evaluation, title: str, note: str = "") -> Path:
    """Writes `report.html` in the study's directory."""
    curves = {name: config.directory / name / "metrics.jsonl" for name in config.policies}
    return Report(
        title,
        evaluation.tables,
        note=note,
        comparisons=evaluation.comparisons,
        curves=curves,
        videos=evaluation.videos,
    ).write(config.directory / config.labelled("report.html"))


def what_it_can_show(layouts: int) -> str:
    """Which differences between two policies so many shared layouts are likely to show."""
    detectable = {share: minimum_detectable_difference(layouts, share) for share in _DISCORDANT}
    sizes = [f"{d:.2f} if they disagree on {share:.0%}" for share, d in detectable.items() if d < share]
    if not sizes:
        return f"{layouts} layouts are too few to tell two policies apart"
    return f"{layouts} layouts tell two policies apart (4 times of 5) that differ in success by {', '.join(sizes)}"


def main(config: EvaluateConfig) -> None:
    """Evaluates, prints the tables, writes `success.json`, `episodes.parquet` and `report.html`."""
    console = Console()
    evaluation = evaluate(config, console)
    console.print(success_table(evaluation.tables))
    if evaluation.comparisons:
        console.print(comparison_table(evaluation.comparisons))
    write_success(evaluation.tables, evaluation.comparisons, config.directory / config.labelled("success.json"))
    write_episodes(evaluation.tables, config.directory / config.labelled("episodes.parquet"))
    page = report(config, evaluation, f"Success: {config.study}")
    if len(evaluation.tables) > 1:
        sink = policy_run(
            config, config.study, "-".join(("evaluation", config.success.suite_name, *config.policies))
        )
        log_comparison(config, evaluation, sink)
        for path in (page, config.directory / config.labelled("success.json")):
            sink.log_artifact(path)
        sink.close()
    console.print(f"report: {page}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(EvaluateConfig, main, __doc__, warn_of_waiting)
