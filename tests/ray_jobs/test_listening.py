"""Who hears and who does not, from one command to the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from rich.console import Console

from evaluators.listening import listening
from evaluators.success import SuccessConfig
from ipvla.models.backbones import TinyConfig
from ipvla.rollout.journal import Journal, JournalError
from ipvla.rollout.policy_actor import PolicySource
from ipvla.sim.instructions.sets import instruction_set, known_sets
from ipvla.types import Observation
from ray_jobs import listening as job
from ray_jobs.evaluate import EvaluateConfig, evaluate
from ray_jobs.listening import ListeningConfig
from ray_jobs.replay import ReplayConfig, replay

EPISODES = 3


def load_deaf(directory: Path) -> Any:
    """Plays what was played for the scene's own goal on the same initial state, whatever it is told."""

    class Deaf:
        execute = 1

        def initial_memory(self, batch: int) -> dict[str, Any]:
            return {}

        def act(self, observations: list[Observation], memory: Any) -> tuple[Any, dict[str, Any]]:
            played = np.load(directory / "played.npz")
            return np.stack([played[o.episode.rpartition("/")[2]][[o.t]] for o in observations]), {}

    return Deaf()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_expert_hears_and_its_recording_does_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    success = SuccessConfig(episodes={"ground_red": EPISODES}, num_simulators=1, camera_size=16)
    config = ListeningConfig(
        storage_root=tmp_path, study="ear", policies=("expert",), success=success, said=("object",)
    )
    job.main(config)
    assert "What expert does in scenes that it knows" in capfd.readouterr().out
    written = json.loads((config.directory / "listening.json").read_text())["expert"]["rows"]
    overall = {row["measure"]: (row["k"], row["n"]) for row in written if row["scene"] == "all"}
    assert overall == {"own": (3, 3), "other_goal": (3, 3), "old_goal": (0, 3), "object": (3, 3)}
    client = MlflowClient(config.mlflow_uri)
    (logged,) = client.search_runs([client.get_experiment_by_name("ear").experiment_id])
    assert logged.data.metrics["listening/recall/other_goal"] == 1
    assert logged.data.metrics["listening/recall/old_goal/ground_red"] == 0
    assert "success/recall" not in logged.data.metrics, "success is of scenes' own goals"

    journal = config.journal("expert")
    table = evaluate(
        EvaluateConfig(storage_root=tmp_path, study="ear", policies=("expert",), videos=0, success=success),
        Console(quiet=True),
    ).tables[0]
    assert [row.name for row in table.tasks] == ["ground_red"], "which lie in the journal already"
    with Journal.existing(journal) as records:
        own = [result for result in records.results() if result.spec.task == "ground_red"]
        traces = {str(result.spec.seed): trace.actions for result in own if (trace := records.trace(result.spec))}
    assert own == list(table.results)

    (tmp_path / "deaf").mkdir()
    np.savez(tmp_path / "deaf" / "played.npz", **traces)
    goals, _ = config.played()
    assert goals == {"ground_red": EPISODES, "ground_green-in-ground_red": EPISODES}
    with replace(success, episodes=goals).build(tmp_path / "cache") as evaluation:
        source = PolicySource(load_deaf, tmp_path / "deaf")
        found = listening("deaf", [evaluation.run("deaf", source, tmp_path / "deaf.sqlite")])
    assert found.overall("own").counts.rate == found.overall("old_goal").counts.rate == 1
    assert found.overall("other_goal").counts.rate == 0

    film = replay(
        ReplayConfig(
            storage_root=tmp_path, study="ear", policy="expert", task="ground_green-in-ground_red", every=20
        )
    )
    assert film.video.is_file(), "an episode with another goal goes the same way again"
    (again,) = job.measure(config, Console(quiet=True))
    assert again.to_dict()["rows"] == written, "nothing is played again"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_results_say_which_paraphrases_they_are_of(tmp_path: Path) -> None:
    """So other words, or none, have a journal of their own."""
    success = SuccessConfig(episodes={"ground_red": 1}, num_simulators=1, camera_size=16)
    config = EvaluateConfig(storage_root=tmp_path, policies=("expert",), videos=0, success=success)
    evaluate(config, Console(quiet=True))
    said = replace(config, success=replace(success, episodes={"ground_red-said-action": 1}))
    with pytest.raises(JournalError, match="instructions"):
        evaluate(said, Console(quiet=True))
    (table,) = evaluate(replace(said, label="said"), Console(quiet=True)).tables
    assert table.fingerprint["instructions"] == instruction_set("recall").fingerprint


def test_all_that_a_set_allows_is_played_by_default() -> None:
    config = ListeningConfig(policies=("p",), success=SuccessConfig(suite="libero_goal"), goals=2)
    goals, said = config.played()
    assert len(goals) == 10 * 3
    assert len(said) == 10 * 2
    assert set(goals.values()) == set(said.values()) == {50}
    assert goals["put_the_bowl_on_the_stove-in-put_the_bowl_on_the_plate"] == 50
    assert said["turn_on_the_stove-said-action"] == 50
    recall, _ = ListeningConfig(policies=("p",)).played()
    assert "ground_green-in-ground_red" in recall
    assert "recall" not in recall, "what is to be pressed is in no instruction"


@pytest.mark.parametrize("suite", known_sets())
def test_the_tiny_backbone_has_room_for_all_words(suite: str) -> None:
    """Words that it does not know are spelled."""
    backbone = TinyConfig().build(8, 1, 32)
    texts = [
        text
        for one in instruction_set(suite).wordings
        for text in (one.instruction, *one.all_synonyms, *one.opposites)
    ]
    longest = {text: len(backbone.tokenize(text)) for text in texts}
    limit = backbone.max_prompt_tokens if suite == "recall" else backbone.max_text_tokens
    assert not [text for text, tokens in longest.items() if tokens > limit]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--goals", "-1"), "goals is -1"),
        (("--said", "[colour]"), "said: 'colour' is no kind of paraphrase; choose one of: action, object"),
        (("--said", "[action, action]"), "name none twice"),
        (("--goals", "0", "--said", "[]"), "ask for one of them"),
        (("--success.suite", "libero_spatial"), "suite libero_spatial has no set of instructions"),
        (("--success.stop_width", "0.1"), "leave it out"),
        (("--success.episodes", "{recall: 3}"), "has no words for 'recall'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], told: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    given = ("--storage_root", str(tmp_path), "--policies", "[gru]", *arguments)
    assert told in refused(ListeningConfig, job.main, *given)
