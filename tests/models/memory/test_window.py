"""The window of past observations: which ones it keeps, and that nothing older acts."""

import pytest
import torch

from ipvla.models.memory import WindowMemoryConfig
from tests.models.memory.episodes import build, changed, features, run


def small(length: int, stride: int = 1) -> WindowMemoryConfig:
    return WindowMemoryConfig(length=length, stride=stride, tokens=2, token_width=3, attention=4, heads=2)


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (3, 1), (2, 3), (1, 4)])
def test_a_step_acts_on_later_ones_while_it_is_among_the_last_kept(length: int, stride: int) -> None:
    module, x = build(small(length, stride)), features(1, 12)
    plain = run(module, x)[0].cognition
    for step in range(12):
        other = run(module, changed(x, step))[0].cognition
        for later in range(step + 1, 12):
            kept = [k for k in range(later) if k % stride == 0][-length:]
            assert torch.equal(other[:, later], plain[:, later]) == (step not in kept), (step, later)


def test_its_timesteps_are_those_of_the_kept_steps() -> None:
    memory = run(build(small(3, stride=2)), features(1, 8))[1]
    assert memory["entries_t"].tolist() == [[8, 16, 24]]


def test_a_window_longer_than_the_episode_is_partly_empty() -> None:
    x = features(2, 5)
    short, long = (run(build(small(length)), x) for length in (5, 100))
    torch.testing.assert_close(short[0].cognition, long[0].cognition)
    assert not long[1]["entries"][:, :95].any()
    torch.testing.assert_close(short[1]["entries"], long[1]["entries"][:, 95:])


def test_an_episodes_first_step_passes_untouched() -> None:
    x = features(2)
    module = build(small(4))
    enriched, _ = module.step(x, module.initial(2), torch.zeros(2, dtype=torch.long))
    assert torch.equal(enriched.cognition, x.cognition)


def test_the_gradient_ends_where_the_window_ends() -> None:
    module, x = build(small(3)), features(1, 8)
    x.cognition.requires_grad_(True)
    (gradient,) = torch.autograd.grad(run(module, x)[0].cognition[0, 7].square().sum(), x.cognition)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [False] * 4 + [True] * 4


def test_age_and_not_date_is_encoded() -> None:
    module, x = build(small(3)), features(1, 6)
    early, late = (run(module, x, first_t=t)[0].cognition for t in (0, 1000))
    torch.testing.assert_close(early, late, rtol=1e-4, atol=1e-5)
