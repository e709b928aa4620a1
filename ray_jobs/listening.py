"""`python -m ray_jobs.listening`: success when a scene is played with another goal, or said in other words.

    ipvla listening --study goal --policies "[mine]" --success.suite libero_goal --success.protocol oft
    ipvla listening --study recall --policies "[gru]" --success.episodes "{ground_red: 50}" --said "[]"

Every scene is played with its own instruction (in the journal of `ipvla evaluate`), with that of another goal that
it allows, and with paraphrases (journal `POLICY/listening/episodes.sqlite`), on the same initial states. A policy
that does not hear goes on doing what the scene always wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from evaluators.episodes import VideoChoice
from evaluators.listening import Listening, listening, listening_table, write_listening
from evaluators.success import SuccessEvaluation
from evaluators.success_table import SuccessTable
from ipvla.choices import did_you_mean
from ipvla.sim.altered_tasks import said_name, swapped_name
from ipvla.sim.instructions.sets import DIFFICULTIES, InstructionsError, Wording, instruction_set
from ipvla.sim.simulator import Task
from ipvla.sim.suites import suite_entry
from ray_jobs.command_line.cli import run
from ray_jobs.evaluate import EvaluateConfig, checked_sources
from ray_jobs.running.cluster import connect, supplied
from ray_jobs.running.display import EvaluationDisplay
from ray_jobs.running.policy_run import placed, policy_demand, warn_of_waiting


@dataclass(frozen=True)
class ListeningConfig(EvaluateConfig):
    """Which policies, in which scenes, and what they are told.

    Attributes:
        success: `episodes` are those of each task whose scene is played, and of each thing that is said in it; by
            default of all that the suite's set of instructions knows (ipvla/sim/instructions).
        goals: other goals per scene, the first ones among its opposites there; 0 for none.
        said: kinds of paraphrases, of action and object; each episode has one of the kind.
        videos: as for `ray_jobs.evaluate`; none by default.
    """

    goals: int = 1
    said: tuple[str, ...] = DIFFICULTIES
    videos: VideoChoice = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.goals < 0:
            raise ValueError(f"goals is {self.goals}; it must be at least 0")
        if len(set(self.said)) < len(self.said):
            raise ValueError(f"said is {list(self.said)}; name none twice")
        for kind in self.said:
            if kind not in DIFFICULTIES:
                raise ValueError(f"said: {kind!r} is no kind of paraphrase; {did_you_mean(kind, DIFFICULTIES)}")
        if not self.goals and not self.said:
            raise ValueError("goals is 0 and said is empty; ask for one of them")
        if self.success.stop_width is not None:
            raise ValueError("success.stop_width: a mean over different goals says nothing; leave it out")
        instruction_set(self.success.suite)  # a suite without one is refused now

    def scenes(self) -> dict[str, tuple[Wording, int]]:
        """Task -> its words, and how many episodes of it are played.

        Raises:
            InstructionsError: the set of instructions does not know a task.
        """
        instructions, tasks = instruction_set(self.success.suite), self._tasks
        known = {task.name: found for task in tasks if (found := instructions.find(task.phrasings[0])) is not None}
        wanted = self.success.episodes or dict.fromkeys(known, self.success.played_by.trials)
        if strange := [name for name in wanted if name not in known]:
            raise InstructionsError(
                f"success.episodes: {instructions.path} has no words for {strange[0]!r}; "
                f"{did_you_mean(strange[0], known)}"
            )
        return {name: (known[name], count) for name, count in wanted.items()}

    def played(self) -> tuple[dict[str, int], dict[str, int]]:
        """Task -> episodes: of scenes with their own and other goals, and of scenes with paraphrases."""
        goals, said = dict[str, int](), dict[str, int]()
        by_text = {text: task.name for task in self._tasks for text in task.phrasings}
        for scene, (wording, count) in self.scenes().items():
            others = [by_text[text] for text in wording.opposites if text in by_text]
            goals |= dict.fromkeys([scene, *(swapped_name(goal, scene) for goal in others[: self.goals])], count)
            kinds = [kind for kind in self.said if kind in wording.synonyms]
            said |= dict.fromkeys([said_name(scene, kind) for kind in kinds], count)
        return goals, said

    @property
    def _tasks(self) -> tuple[Task, ...]:
        return suite_entry(self.success.suite).tasks()


def measure(config: ListeningConfig, console: Console) -> list[Listening]:
    """Plays what the journals lack, and compares. Raises as `ray_jobs.evaluate.evaluate` does."""
    config.prepare()
    load, success = placed(config.success, config.use_gpu)
    goals, said = config.played()
    evaluations: list[tuple[str, SuccessEvaluation]] = [("", replace(success, episodes=goals).build(config.cache))]
    if said:
        evaluations.append(("listening", replace(success, episodes=said).build(config.cache)))
    instructions = set().union(*(evaluation.instructions for _, evaluation in evaluations))
    sources = checked_sources(config, evaluations[0][1], load, console, instructions)
    tables: dict[str, list[SuccessTable]] = {name: [] for name in config.policies}
    with connect(config), supplied(policy_demand(success)), EvaluationDisplay(console) as display:
        for folder, evaluation in evaluations:
            with evaluation:  # its simulators play every policy
                for name, source in sources.items():
                    journal = config.journal(name)
                    journal = journal.parent / folder / journal.name
                    journal.parent.mkdir(parents=True, exist_ok=True)
                    label = f"{name}, other words" if folder else f"{name}, other goals"
                    table = evaluation.run(
                        name,
                        source,
                        journal,
                        conditions=config.conditions,
                        on_status=partial(display.update, label),
                    )
                    if config.videos:
                        evaluation.record(table, journal, config.videos, journal.parent / "videos")
                    display.tell(label, "played")
                    tables[name].append(table)
    return [listening(name, of_policy) for name, of_policy in tables.items()]


def publish(config: ListeningConfig, found: list[Listening]) -> Path:
    """Writes `listening.json`, and logs each policy's measures to its run."""
    path = write_listening(found, config.directory / config.labelled("listening.json"))
    for one in found:
        sink = config.mlflow_run(one.policy)
        sink.log(one.metrics(config.success.suite_name), 0)
        sink.log_artifact(path)
        sink.close()
    return path


def main(config: ListeningConfig) -> None:
    """Measures, prints a table per policy, and writes `listening.json`."""
    console = Console()
    found = measure(config, console)
    for one in found:
        console.print(listening_table(one))
    console.print(f"written: {publish(config, found)}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(ListeningConfig, main, __doc__, warn_of_waiting)
