"""Pictures of success and of when episodes end."""

import io

import matplotlib.image
import numpy as np
import pytest

from evaluators.plots import failure_timeline, success_bars
from tests.evaluators.test_success_table import table


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png))


@pytest.mark.parametrize("draw", [success_bars, failure_timeline])
def test_a_picture_shows_what_was_played(draw):
    assert draw([table("nothing")]) is None
    one, other = (draw([table("gru", ground_a=o), table("none", recall_a="f")]) for o in ("ssss", "ttts"))
    assert not np.array_equal(pixels(one), pixels(other))


def test_outcomes_have_their_colours():
    def has(png: bytes, colour: tuple[int, int, int]) -> bool:
        return bool((np.abs(pixels(png)[..., :3] - np.array(colour) / 255) < 0.02).all(-1).any())

    red, green = (209, 73, 91), (42, 157, 85)
    won, lost = (failure_timeline([table("gru", ground_a=o)]) for o in ("ss", "ff"))
    assert (has(won, green), has(won, red)) == (True, False)
    assert (has(lost, green), has(lost, red)) == (False, True)
