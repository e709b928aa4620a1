"""What an answer goes on from, over the websocket."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ipvla.contract import Limits
from ipvla.rollout.episode import Answer
from ipvla.rollout.openpi.client import OpenpiClient
from ipvla.rollout.openpi.messages import ObservationError, ahead_message, from_message, pack, to_message, unpack
from ipvla.types import Ahead, Observation
from tests.rollout.openpi.served import serving

REST = np.array([[0.1], [0.2], [0.3]], np.float32)


def observation(cue: float, t: int = 0, ahead: Ahead | None = None) -> Observation:
    return Observation({}, np.array([0, cue], np.float32), "go", t, ahead=ahead)


def test_it_is_answered_with_the_whole_chunk_and_time_goes_on_by_what_is_played() -> None:
    seen: list[Observation] = []

    def watched(directory: Any) -> Any:
        from tests.rollout.point import PointPolicy

        class Watched(PointPolicy):
            def act(self, observations: Any, memory: Any) -> Any:
                seen.extend(observations)
                return super().act(observations, memory)

        return Watched()

    with serving(load=watched, action_dim=1) as (_, url):
        client = OpenpiClient(url)
        plain = client.act("a", observation(1.0), 0)  # type: ignore[arg-type]
        assert not isinstance(plain, Answer)
        assert plain.shape == (2, 1)
        late = client.act("a", observation(0.0, 2, Ahead(REST, 2, guidance=5.0)), 1)  # type: ignore[arg-type]
        assert isinstance(late, Answer)
        assert (late.chunk.shape, late.execute) == ((3, 1), 2)
        client.end("a")  # type: ignore[arg-type]
    told = seen[1].ahead
    assert told is not None
    np.testing.assert_array_equal(told.actions, REST)
    assert (told.delay, told.guidance, told.given) == (2, 5.0, False)
    assert seen[0].ahead is None


def test_what_is_played_of_an_answer_follows_the_last_action_that_is_played_meanwhile() -> None:
    with serving(limits=Limits(change=(0.25,)), action_dim=1) as (_, url):
        client = OpenpiClient(url)
        client.act("a", observation(0.0), 0)  # type: ignore[arg-type]
        ahead = Ahead(np.array([[0.1], [-0.5]], np.float32), 2)
        answer = client.act("a", observation(1.0, 2, ahead), 1)  # type: ignore[arg-type]
        assert isinstance(answer, Answer)
        assert answer.chunk.ravel().tolist() == pytest.approx([0.25, 0.5, -0.25])
        client.end("a")  # type: ignore[arg-type]


def test_it_arrives_as_it_was_sent() -> None:
    for ahead in (Ahead(REST, 2, 5.0), Ahead(REST, 3, given=True), Ahead(np.zeros((0, 0), np.float32), 1)):
        sent = {**to_message(observation(0.0)), "ahead": ahead_message(ahead)}
        found = from_message(unpack(pack(sent)), (), 2, 0, action_dim=1).ahead
        assert found is not None
        np.testing.assert_array_equal(found.actions, ahead.actions)
        assert (found.delay, found.guidance, found.given) == (ahead.delay, ahead.guidance, ahead.given)
        assert from_message(sent, (), 2, 0).ahead is None, "where nobody says what an action is"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"actions": np.zeros((3, 2), np.float32)}, r"ahead/actions is float32 \[3, 2\]; send float32 \[R, 1\]"),
        ({"actions": [[0.0]]}, r"ahead/actions is a list; send float32 \[R, 1\]"),
        ({"actions": np.full((2, 1), np.inf)}, r"ahead/actions has numbers that are not finite"),
        ({"delay": -1}, r"ahead/delay is -1; send control steps"),
        ({"guidance": -1.0}, r"ahead/guidance is -1\.0; send a finite number of at least 0"),
        ({"guidance": float("nan")}, r"ahead/guidance is nan"),
        ({"given": 3}, r"ahead/given is 3; send true or false"),
    ],
)
def test_what_is_wrong_with_it_is_told_in_one_line(changes: dict[str, Any], reason: str) -> None:
    sent = {**to_message(observation(0.0)), "ahead": {**ahead_message(Ahead(REST, 2)), **changes}}
    with pytest.raises(ObservationError, match=reason) as refused:
        from_message(sent, (), 2, 0, action_dim=1)
    assert "\n" not in str(refused.value)
    with pytest.raises(ObservationError, match=r"ahead is a int; send a map with actions and delay"):
        from_message({**sent, "ahead": 3}, (), 2, 0, action_dim=1)
