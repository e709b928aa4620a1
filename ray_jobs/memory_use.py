"""`python -m ray_jobs.memory_use`: success lost when the memory is reset, frozen, swapped or shuffled."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Column, Table

from evaluators.memory_use import InterventionConfig, MemoryUse
from evaluators.plots import plot_memory_use
from ipvla.policy import Policy
from ipvla.rollout.policy_actor import PolicySource
from ray_jobs.command_line.cli import run
from ray_jobs.evaluate import PlayedPolicies
from ray_jobs.running.cluster import connect, supplied
from ray_jobs.running.display import EpisodeProgress
from ray_jobs.running.policy_run import placed, policy_demand, warn_of_waiting


@dataclass(frozen=True)
class MemoryUseJobConfig(PlayedPolicies):
    """Which policies to probe, on what, how and when; results go to `run_root_dir/study/NAME/memory_use`.

    Attributes:
        probe: what is done to the memory, and at which control steps.
    """

    probe: InterventionConfig = field(default_factory=InterventionConfig)


def measure(config: MemoryUseJobConfig, console: Console) -> list[MemoryUse]:
    """Plays what the journals lack, for one policy after another; writes and logs what each of them loses.

    Raises:
        CheckpointError: a policy does not exist or cannot be loaded.
        ValueError: an unknown suite or task, or a t at or after a task's horizon.
        JournalError: results of another policy or protocol lie where these should go.
    """
    config.prepare()
    policies = {
        name: Policy.load(config.directory / name / "policy", slow=config.success.slow) for name in config.policies
    }
    for name, policy in policies.items():
        config.probe.require(name, policy)
    load, success = placed(config.success, config.use_gpu)
    measured = []
    opened = config.probe.build(success, config.cache)  # what it refuses, it refuses before Ray is started
    with (
        connect(config),
        supplied(policy_demand(success)),
        opened as evaluation,
        EpisodeProgress(console) as progress,
    ):
        for name, policy in policies.items():
            run_directory = config.directory / name
            bar = progress.add_task(name, total=None)
            use = evaluation.measure(
                name,
                policy,
                PolicySource(load, run_directory / "policy"),
                run_directory / "memory_use",
                on_progress=lambda what, done, total, bar=bar: progress.update(  # type: ignore[misc]
                    bar, description=what, completed=done, total=total
                ),
            )
            _publish(config, use)
            measured.append(use)
    return measured


def _publish(config: MemoryUseJobConfig, use: MemoryUse) -> None:
    """Numbers and pictures: beside the journals, and in the policy's MLflow run."""
    path = config.directory / use.policy / "memory_use" / f"memory_use{config.probe.suffix}"
    files = [use.write(path.with_suffix(".json")), *plot_memory_use(use, path)]
    sink = config.mlflow_run(use.policy)
    use.log(sink)
    for file in files:
        sink.log_artifact(file)
    sink.close()


def loss_table(use: MemoryUse) -> Table:
    """Per family, t and probe: success without and with the probe, success lost with its interval, McNemar's p."""
    notes = [f"{probe} left out: {reason}" for probe, reason in use.left_out.items()]
    numbers = (Column(heading, justify="right") for heading in ("t", "success", "touched", "lost (95 %)", "p"))
    title, caption = f"Is the memory of {use.policy} used?", "; ".join(notes) or None
    table = Table("family", "probe", *numbers, title=title, caption=caption, pad_edge=False)
    for row in sorted(use.families, key=lambda row: row.name):
        low, high = row.lost95
        table.add_row(
            row.name,
            row.intervention,
            str(row.t),
            f"{row.undisturbed}/{row.n} → {row.k}/{row.n}",
            str(row.touched),
            f"{row.lost:.2f} ({low:.2f}, {high:.2f})",
            f"{row.p_value:.1g}",
        )
    return table


def main(config: MemoryUseJobConfig) -> None:
    """Measures, prints a table per policy, and says where the plots are."""
    console = Console()
    for use in measure(config, console):
        console.print(loss_table(use))
        plot = config.directory / use.policy / "memory_use" / f"memory_use{config.probe.suffix}.png"
        console.print(f"plot: {plot}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(MemoryUseJobConfig, main, __doc__, warn_of_waiting)
