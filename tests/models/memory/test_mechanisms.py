"""What holds for every mechanism that enriches features."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ipvla.models.backbones import TinyConfig
from ipvla.models.features import Features
from ipvla.models.memory import (
    BankMemoryConfig,
    GRUMemoryConfig,
    LSTMMemoryConfig,
    MemoryConfig,
    MemoryModule,
    NoMemoryConfig,
    SkillMemoryConfig,
    WindowMemoryConfig,
)
from tests.models.memory.episodes import build, equal, features, run, times

TRAINED: list[MemoryConfig] = [
    GRUMemoryConfig(hidden=5, tokens=2, token_width=3),
    GRUMemoryConfig(hidden=5, tokens=0),
    LSTMMemoryConfig(hidden=5),
    BankMemoryConfig(length=3, tokens=2, token_width=4, attention=5, hidden=7),
    BankMemoryConfig(length=3, tokens=2, token_width=4, attention=5, hidden=7, consolidation="fifo"),
    WindowMemoryConfig(length=7, tokens=2, token_width=3, attention=4, heads=2),
    WindowMemoryConfig(length=2, stride=3, tokens=2, token_width=3, attention=4, heads=2),
    SkillMemoryConfig(slots=6, top_k=2, key=5),
    SkillMemoryConfig(slots=6, top_k=2, key=5, refresh=3),
]
ALL: list[MemoryConfig] = [NoMemoryConfig(), *TRAINED]
flags = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=2, max_size=2)


@pytest.mark.parametrize("config", ALL, ids=str)
class TestEveryMechanism:
    def test_memory_has_one_row_per_episode(self, config: MemoryConfig) -> None:
        assert all(value.shape[0] == 3 for value in build(config).initial(3).values())

    def test_what_is_remembered_is_float32_or_counts_also_under_autocast(self, config: MemoryConfig) -> None:
        module = build(config)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = features(2, 5).map(lambda v: v.bfloat16())
            memory = run(module, half)[1]
            memory = module.step(half.at(0), memory, torch.full((2,), 20))[1]
        assert {name: value.dtype for name, value in memory.items()} == {
            name: value.dtype for name, value in module.initial(2).items()
        }
        assert all(value.dtype in (torch.float32, torch.int64, torch.bool) for value in memory.values())

    @given(is_first=flags, valid=flags, gaps=st.lists(st.integers(1, 9), min_size=7, max_size=7))
    @settings(max_examples=25, deadline=None)
    def test_a_window_equals_its_steps_one_by_one_whatever_starts_or_idles(
        self, config: MemoryConfig, is_first: list[list[bool]], valid: list[list[bool]], gaps: list[int]
    ) -> None:
        module, t = build(config), torch.tensor(gaps).cumsum(0).expand(2, 7) + 20
        before = run(module, features(2, 5, seed=1))[1]
        window = (features(2, 7), before, t, torch.tensor(is_first), torch.tensor(valid))
        scanned, after = module.scan(*window)
        stepped, expected = MemoryModule.scan(module, *window)
        torch.testing.assert_close(scanned.cognition, stepped.cognition, rtol=1e-4, atol=1e-5)
        assert equal(after, expected)

    def test_batched_equals_one_at_a_time(self, config: MemoryConfig) -> None:
        module, x, t = build(config), features(4), torch.arange(4) + 20
        memory = run(module, features(4, 5, seed=1))[1]
        together, after = module.step(x, memory, t)
        for row in range(4):
            one = {name: value[row : row + 1] for name, value in memory.items()}
            alone, alone_after = module.step(x.map(lambda v, r=row: v[r : r + 1]), one, t[row : row + 1])
            torch.testing.assert_close(alone.cognition[0], together.cognition[row])
            assert equal(alone_after, {name: value[row : row + 1] for name, value in after.items()})

    def test_rows_never_mix(self, config: MemoryConfig) -> None:
        module, x = build(config), features(3, 6)
        other = x.map(lambda v: torch.cat([v[:1], v[1:2] * -3 + 1, v[2:]]))
        (a, after_a), (b, after_b) = run(module, x), run(module, other)
        for row in (0, 2):
            assert torch.equal(a.cognition[row], b.cognition[row])
            assert all(torch.equal(after_a[name][row], after_b[name][row]) for name in after_a)

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
        before = run(module, features(1, 4, seed=1))[1]
        assert equal(module.scan(features(1, 5), before, times(1, 5) + 16, none, none)[1], before, atol=0)

    def test_two_windows_are_one_long_one(self, config: MemoryConfig) -> None:
        module, x = build(config), features(2, 8)
        whole, end = run(module, x)
        _, half_way = run(module, x.map(lambda v: v[:, :4]))
        rest, end_of_rest = run(module, x.map(lambda v: v[:, 4:]), half_way, first_t=16)
        torch.testing.assert_close(whole.cognition[:, 4:], rest.cognition)
        assert equal(end, end_of_rest)

    def test_an_episode_goes_on_from_a_saved_memory(self, config: MemoryConfig, tmp_path: Path) -> None:
        module, x = build(config), features(2, 5)
        _, memory = run(module, x)
        save_file({name: value.detach().contiguous() for name, value in memory.items()}, tmp_path / "memory")
        loaded = load_file(tmp_path / "memory")
        t = torch.full((2,), 20)
        (kept, after), (resumed, after_load) = (module.step(x.at(0), m, t) for m in (memory, loaded))
        assert torch.equal(kept.cognition, resumed.cognition)
        assert equal(after, after_load, atol=0)

    def test_it_is_as_large_after_10000_steps_as_at_the_start(self, config: MemoryConfig) -> None:
        module = build(config)
        memory = module.initial(1)
        shapes = {name: value.shape for name, value in memory.items()}
        with torch.inference_mode():
            for k in range(20):
                enriched, memory = run(module, features(1, 500, seed=k), memory, first_t=k * 2000)
        assert {name: value.shape for name, value in memory.items()} == shapes
        assert all(value.isfinite().all() for value in memory.values())
        assert enriched.cognition.abs().max() < 1000


def _gradients(module: MemoryModule, x: Features, of: int) -> Features:
    """d (row 0's cognition at step `of`) / d features."""
    inputs = [v.clone().requires_grad_(True) for v in (x.cognition, x.perception, x.proprio)]
    out = run(module, Features(*inputs))[0].cognition[0, of].square().sum()
    got = torch.autograd.grad(out, inputs, allow_unused=True)
    return Features(*(torch.zeros_like(v) if g is None else g for v, g in zip(inputs, got, strict=True)))


@pytest.mark.parametrize("config", TRAINED, ids=str)
def test_the_gradient_reaches_the_step_where_information_entered(config: MemoryConfig) -> None:
    last = 5 if getattr(config, "refresh", 0) == 0 else 2
    gradient = _gradients(build(config), features(2, 6), of=last)
    assert gradient.cognition[0, 0].abs().sum() > 0
    if isinstance(config, BankMemoryConfig | WindowMemoryConfig):
        assert gradient.perception[0, 0].abs().sum() > 0
    assert gradient.cognition[1].abs().sum() == 0, "another episode's"
    assert gradient.perception[1].abs().sum() == 0, "another episode's"


@pytest.mark.parametrize("config", TRAINED, ids=str)
def test_every_weight_is_trained(config: MemoryConfig) -> None:
    module = build(config)
    run(module, features(8, 8))[0].cognition.square().sum().backward()
    silent = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize(
    "config", [c for c in TRAINED if isinstance(c, BankMemoryConfig | WindowMemoryConfig)], ids=str
)
def test_a_timestep_is_the_control_step_in_training_and_in_rollout(config: MemoryConfig) -> None:
    module, x = build(config), features(1, 8)
    on = torch.ones(1, 8, dtype=torch.bool)
    t = torch.tensor([[0, 7, 11, 12, 20, 23, 30, 31]])
    memories = [module.scan(x, module.initial(1), t, ~on, on)[1], module.initial(1)]
    for k in range(8):
        memories[1] = module.step(x.at(k), memories[1], t[:, k])[1]
    trained, rolled_out = ({n: v for n, v in memory.items() if n.endswith("_t")} for memory in memories)
    assert trained.keys() == rolled_out.keys() != set()
    for name in trained:
        assert torch.equal(trained[name], rolled_out[name])
        assert set(trained[name].flatten().tolist()) <= set(t[0].tolist())
    late = module.scan(x, module.initial(1), t * 3, ~on, on)[0]
    assert not torch.allclose(late.cognition, module.scan(x, module.initial(1), t, ~on, on)[0].cognition)


def test_none_is_the_plain_model_bit_for_bit() -> None:
    module, x = build(NoMemoryConfig()), features(2)
    enriched, memory = module.step(x, {}, torch.zeros(2))
    assert enriched is x
    assert memory == {}
    assert not list(module.parameters())


def test_mechanisms_have_about_as_many_parameters_as_the_gru() -> None:
    backbone = TinyConfig().build(8, 1, 64)
    chosen = (LSTMMemoryConfig(), BankMemoryConfig(), WindowMemoryConfig(), SkillMemoryConfig())
    gru, *others = (sum(p.numel() for p in c.build(backbone).parameters()) for c in (GRUMemoryConfig(), *chosen))
    assert gru == 117_288
    assert all(0.9 * gru < other < 1.1 * gru for other in others), others


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (GRUMemoryConfig, {"hidden": 0}, r"memory\.hidden is 0"),
        (LSTMMemoryConfig, {"hidden": 0}, r"memory\.hidden is 0"),
        (LSTMMemoryConfig, {"tokens": -1}, r"memory\.tokens is -1; it must be at least 0"),
        (BankMemoryConfig, {"length": 0}, r"memory\.length is 0; it must be at least 1"),
        (BankMemoryConfig, {"tokens": 0}, r"memory\.tokens is 0"),
        (
            BankMemoryConfig,
            {"consolidation": "lru"},
            r'memory\.consolidation is \'lru\'; choose "merge" or "fifo"',
        ),
        (WindowMemoryConfig, {"length": 0}, r"memory\.length is 0"),
        (WindowMemoryConfig, {"stride": 0}, r"memory\.stride is 0"),
        (WindowMemoryConfig, {"attention": 6, "heads": 4}, r"memory\.attention 6 is not a multiple"),
        (SkillMemoryConfig, {"slots": 0}, r"memory\.slots is 0"),
        (SkillMemoryConfig, {"slots": 4, "top_k": 5}, r"memory\.top_k is 5; it must be at most memory\.slots, 4"),
        (SkillMemoryConfig, {"refresh": -1}, r"memory\.refresh is -1"),
    ],
)
def test_bad_settings_are_refused(config: type[MemoryConfig], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)
