"""What holds for every memory mechanism."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.models.features import Features
from ipvla.models.memory import GRUMemoryConfig, MemoryConfig, MemoryModule, NoMemoryConfig
from ipvla.types import Memory

WIDTH = 6
ALL: list[MemoryConfig] = [NoMemoryConfig(), GRUMemoryConfig(hidden=5)]


def build(config: MemoryConfig) -> MemoryModule:
    torch.manual_seed(0)
    return config.build(WIDTH)


def features(*shape: int, seed: int = 0) -> Features:
    random = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(*shape, WIDTH, generator=random),
        torch.randn(*shape, 4, 3, generator=random),
        torch.randn(*shape, 2, generator=random),
    )


def times(*shape: int) -> torch.Tensor:
    return torch.arange(shape[-1]).expand(shape) * 4


def equal(a: Memory, b: Memory, atol: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=atol) for name in a)


@pytest.mark.parametrize("config", ALL, ids=lambda c: type(c).__name__)
class TestEveryMechanism:
    def test_memory_has_one_row_per_episode(self, config: MemoryConfig) -> None:
        assert all(value.shape[0] == 3 for value in build(config).initial(3).values())

    def test_a_window_equals_its_steps_one_by_one(self, config: MemoryConfig) -> None:
        module, x, t = build(config), features(3, 7), times(3, 7)
        no, yes = torch.zeros(3, 7, dtype=torch.bool), torch.ones(3, 7, dtype=torch.bool)
        scanned, after = module.scan(x, module.initial(3), t, no, yes)
        memory = module.initial(3)
        for k in range(7):
            stepped, memory = module.step(x.at(k), memory, t[:, k])
            torch.testing.assert_close(scanned.at(k).cognition, stepped.cognition)
        assert equal(after, memory)

    def test_batched_equals_one_at_a_time(self, config: MemoryConfig) -> None:
        module, x, t = build(config), features(4), torch.arange(4)
        memory = module.step(features(4, seed=1), module.initial(4), t)[1]
        together, after = module.step(x, memory, t + 4)
        for row in range(4):
            one = {name: value[row : row + 1] for name, value in memory.items()}
            alone, alone_after = module.step(x.map(lambda v, r=row: v[r : r + 1]), one, t[row : row + 1] + 4)
            torch.testing.assert_close(alone.cognition[0], together.cognition[row])
            assert equal(alone_after, {name: value[row : row + 1] for name, value in after.items()})

    def test_is_first_equals_a_fresh_start(self, config: MemoryConfig) -> None:
        module, x, t = build(config), features(2, 6), times(2, 6)
        first = torch.zeros(2, 6, dtype=torch.bool)
        first[:, 2] = True
        valid = torch.ones_like(first)
        whole, end = module.scan(x, module.initial(2), t, first, valid)
        tail, end_of_tail = module.scan(
            x.map(lambda v: v[:, 2:]), module.initial(2), t[:, 2:], first[:, 2:], valid[:, 2:]
        )
        torch.testing.assert_close(whole.cognition[:, 2:], tail.cognition)
        assert equal(end, end_of_tail)

    @given(idle=st.lists(st.booleans(), min_size=5, max_size=5).filter(lambda idle: not all(idle)))
    @settings(max_examples=15, deadline=None)
    def test_idle_steps_leave_the_memory_alone(self, config: MemoryConfig, idle: list[bool]) -> None:
        module, x, t = build(config), features(1, 5), times(1, 5)
        valid = ~torch.tensor([idle])
        no = torch.zeros_like(valid)
        after = module.scan(x, module.initial(1), t, no, valid)[1]
        keep = valid[0].nonzero()[:, 0]
        kept = x.map(lambda v: v[:, keep])
        assert equal(after, module.scan(kept, module.initial(1), t[:, keep], no[:, keep], valid[:, keep])[1])

    def test_an_idle_window_leaves_the_memory_alone(self, config: MemoryConfig) -> None:
        module, none = build(config), torch.zeros(1, 5, dtype=torch.bool)
        assert equal(module.scan(features(1, 5), module.initial(1), times(1, 5), none, none)[1], module.initial(1))

    def test_its_size_does_not_grow_with_the_episode(self, config: MemoryConfig) -> None:
        module = build(config)
        memory = module.initial(2)
        shapes = {name: value.shape for name, value in memory.items()}
        with torch.no_grad():
            for k in range(1000):
                memory = module.step(features(2, seed=k % 7), memory, torch.full((2,), 4 * k))[1]
        assert {name: value.shape for name, value in memory.items()} == shapes
        assert all(value.isfinite().all() for value in memory.values())


def test_gru_carries_information_and_gradient_through_time() -> None:
    module = build(GRUMemoryConfig(hidden=5))
    x = features(2, 8)
    x.cognition.requires_grad_(True)
    no, yes = torch.zeros(2, 8, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    scanned, _ = module.scan(x, module.initial(2), times(2, 8), no, yes)
    (gradient,) = torch.autograd.grad(scanned.cognition[0, 7].square().sum(), x.cognition)
    assert gradient[0, 0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0, "another episode's"


def test_none_is_the_plain_model_bit_for_bit() -> None:
    module, x = build(NoMemoryConfig()), features(2)
    enriched, memory = module.step(x, {}, torch.zeros(2))
    assert enriched is x
    assert memory == {}
    assert not list(module.parameters())


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"memory\.hidden is 0"):
        GRUMemoryConfig(hidden=0)
