"""A dataset's card says what is in the dataset, whatever its format."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from evaluators.dataset_card import DatasetCard, card_tables, dataset_card
from evaluators.dataset_sample import Camera, evenly, take_sample
from ipvla.data.lerobot import VideoSettings
from ipvla.data.rlds import write_rlds
from ipvla.data.sources import open_source
from ipvla.data.standards import adjusted, standard_for
from ipvla.data.survey import surveyed
from tests.data.conftest import SIZE, random_episode
from tests.data.lerobot.conftest import FPS, LENGTHS, layout, trajectories
from tests.data.lerobot.writing import write_lerobot
from tests.evaluators.made_dataset import FEATURES, MadeSource, card_of, good_episode, good_episodes

TENSORFLOW = Path(__file__).parents[1] / "data" / "tensorflow" / "libero_spatial_no_noops" / "1.0.0"


def opened(location: Path, sample: int = 100, **settings: bool) -> DatasetCard:
    source = open_source(location)
    standard = adjusted(standard_for(source.name, source.features), **settings)
    survey = surveyed(source, standard, None)
    return dataset_card(source, standard, survey, take_sample(source, standard, survey, sample))


def printed(card: DatasetCard) -> str:
    console = Console(file=io.StringIO(), width=200)
    for part in card_tables(card):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_card_of_a_dataset_that_tensorflow_wrote() -> None:
    card = opened(TENSORFLOW, padded_state=True)
    assert (card.name, card.format, card.fps) == ("libero_spatial_no_noops", "RLDS, tfrecord", None)
    assert card.standard == "Libero: gripper open_is_one, state padded as OpenVLA's"
    assert (card.episodes, card.transitions, card.unlabelled, card.broken) == (3, 15, 0, ())
    assert (card.lengths.least, card.lengths.median, card.lengths.mean, card.lengths.most) == (4, 5, 5, 6)
    assert card.tasks == {f"pick up the bowl number {n}": 1 for n in range(3)}
    assert card.cameras == (
        Camera("agentview", "observation/image", "JPEG", {(32, 32): 3}),
        Camera("robot0_eye_in_hand", "observation/wrist_image", "JPEG", {(32, 32): 3}),
    )
    assert (card.statistics.action.dim, card.statistics.proprio.dim) == (7, 9)
    assert (card.noops, card.reasoning) == (0, 0)


@pytest.mark.parametrize(("video", "encoding"), [(None, "PNG"), (VideoSettings(), "video")])
def test_the_card_of_a_lerobot_dataset(tmp_path: Path, video: VideoSettings | None, encoding: str) -> None:
    card = opened(write_lerobot(tmp_path / "robot", layout(video), trajectories()))
    assert (card.format, card.fps, card.episodes) == ("LeRobotDataset v3", FPS, len(LENGTHS))
    assert [(camera.name, camera.encoding, camera.sizes) for camera in card.cameras] == [
        ("top", encoding, {(64, 96): 5}),
        ("wrist", encoding, {(48, 64): 5}),
    ]
    assert card.reasoning == 1
    assert card.noops is None


def test_the_card_of_a_dataset_of_this_project(tmp_path: Path) -> None:
    recorded = [random_episode(seed, length) for seed, length in enumerate((5, 17, 9, 30, 12, 1, 22))]
    card = opened(write_rlds(tmp_path, "synthetic", recorded, SIZE))
    assert (card.episodes, card.transitions) == (7, 96)
    assert card.tasks == {"task_0": 3, "task_1": 2, "task_2": 2}
    assert card.families == {"recall": 4, "ground": 3}
    assert card.reasoning == 1


def test_broken_and_unlabelled_episodes_are_told_apart() -> None:
    episodes = [replace(good_episode(n, 20), broken=n == 1, instruction="go" if n != 2 else "") for n in range(4)]
    card = card_of(MadeSource(episodes), standard_for("made", FEATURES))
    assert (card.episodes, card.unlabelled, card.broken) == (3, 1, ("episode 1 is corrupt",))
    assert card.tasks == {"go": 2, "": 1}
    assert card.transitions == 60


def test_shares_are_of_the_episodes_that_were_looked_at() -> None:
    episodes = [replace(good_episode(n, 10), reasoning=("PLAN: go",) * 10 if n < 2 else ()) for n in range(4)]
    standard = standard_for("made", FEATURES)
    whole, part = (card_of(MadeSource(episodes), standard, sample=count) for count in (4, 1))
    assert (whole.sampled, whole.reasoning) == (4, 0.5)
    assert (part.sampled, part.reasoning) == (1, 1)
    assert "steps with reasoning" in printed(whole)
    assert "100.0%, of 1 episodes that were looked at" in printed(part)


@given(count=st.integers(1, 50), of=st.integers(1, 200))
def test_a_sample_is_spread_over_all(count: int, of: int) -> None:
    chosen = evenly(range(of), count)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, of)
    assert chosen[0] == 0
    steps = np.diff([*chosen])
    assert not len(steps) or (steps.max() - steps.min() <= 1 and chosen[-1] == of - 1)


def test_the_console_shows_all_of_it() -> None:
    episodes = [replace(e, instruction=f"do [b]{n}[/b]", broken=n == 5) for n, e in enumerate(good_episodes())]
    told = printed(card_of(MadeSource(episodes), standard_for("made", FEATURES)))
    for shown in (
        "do [b]0[/b]",
        "5, and 1 broken",
        "1000 to 1000, median 1000, mean 1000.0",
        "8 x 8, PNG (observation/wrist_image)",
        "warning: 1 of 6 episodes cannot be used",
        "what to do: copy or collect them again",
        "broken: episode 5 is corrupt",
    ):
        assert shown in told
    assert "no warnings" in printed(card_of(MadeSource(good_episodes()), standard_for("made", FEATURES)))


def test_many_tasks_are_summed_up() -> None:
    episodes = [replace(good_episode(n, 2), instruction=f"task {n}") for n in range(15)]
    told = printed(card_of(MadeSource(episodes), standard_for("made", FEATURES)))
    assert "15 tasks" in told
    assert "3 more" in told
