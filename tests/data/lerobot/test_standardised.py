"""What a standard made of a dataset can be written as a LeRobotDataset."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ipvla.data.episode import EncodedEpisode
from ipvla.data.lerobot import LeRobotSource, VideoSettings, write_lerobot
from ipvla.data.lerobot.standardised import standardised_layout, standardised_trajectory
from tests.data.lerobot.conftest import FPS, TOP, trajectory


def standardised(seed: int) -> EncodedEpisode:
    """Without the first step of six, as Bridge's standard has it."""
    raw = trajectory(seed, 6)
    return EncodedEpisode(
        task=f"task_{seed}",
        family="recall",
        instruction=f"press button {seed}",
        seed=seed,
        pictures={"top": raw.pictures(TOP)},
        state=raw.numbers("observation.state")[1:],
        action=raw.numbers("action")[1:],
        raw_step=np.arange(1, 6),
        reasoning=raw.texts("reasoning")[1:],
    )


@pytest.mark.parametrize("video", [None, VideoSettings()], ids=["images", "video"])
def test_steps_that_were_left_out_stay_out(tmp_path, video):
    episodes = [standardised(seed) for seed in range(2)]
    layout = standardised_layout(episodes[0], FPS, video)
    source = LeRobotSource(write_lerobot(tmp_path / "d", layout, map(standardised_trajectory, episodes)))
    assert source.tasks == ("task_0", "task_1")
    for index, episode in enumerate(episodes):
        found = source.trajectory(index)
        np.testing.assert_array_equal(found.numbers("action"), episode.action)
        np.testing.assert_array_equal(found.numbers("observation.state"), episode.state)
        assert found.texts("reasoning") == episode.reasoning
        assert found.texts("task") == (episode.instruction,) * 5
        for t in range(5):
            difference = np.abs(found.pictures(TOP).decode(t).astype(int) - episode.image(t, "top"))
            assert difference.max() <= (0 if video is None else 9)


def test_episodes_without_texts_have_no_such_features():
    layout = standardised_layout(replace(standardised(0), reasoning=()), FPS)
    assert set(layout.features) == {TOP, "observation.state", "action"}


def test_pictures_of_a_video_are_chosen_without_being_decoded(tmp_path):
    layout = standardised_layout(standardised(0), FPS, VideoSettings())
    source = LeRobotSource(write_lerobot(tmp_path / "v", layout, [standardised_trajectory(standardised(0))]))
    pictures = source.trajectory(0).pictures(TOP)
    chosen = standardised_trajectory(
        replace(standardised(0), pictures={"top": pictures}, raw_step=np.array([4, 2]))
    ).pictures(TOP)
    assert (len(chosen), chosen.nbytes) == (2, pictures.nbytes)
    np.testing.assert_array_equal(chosen.decode(0), pictures.decode(4))
