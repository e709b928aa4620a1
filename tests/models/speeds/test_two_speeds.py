"""When the slow part thinks, what the fast part acts on, and how training meets the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.models.backbones import TinyConfig
from ipvla.models.heads import BinsConfig, HeadConfig, LayerwiseConfig, RegressionConfig, ReverseChainConfig
from ipvla.models.memory import (
    BankMemoryConfig,
    ChainMemoryConfig,
    KVMemoryConfig,
    LatentMemoryConfig,
    MemoryConfig,
    NoMemoryConfig,
    PromptMemoryConfig,
)
from ipvla.models.speeds import (
    FastInSlowConfig,
    LatentSpeedsConfig,
    SingleSpeedConfig,
    SlowPace,
    SpeedsConfig,
    TwoSpeedsConfig,
)
from ipvla.models.vla import IPVLA, IPVLAConfig
from ipvla.types import THOUGHT_T, Memory, ModelInputs
from tests.models.speeds.made_up import ACTIONS, CHUNK, GRU, SIDE, model, play, seen, two, window

LATENT = LatentSpeedsConfig(period=4, staleness=8, width=24, trunk_channels=8)
FIS = FastInSlowConfig(period=4, staleness=8, layers=2)
FORMS: list[TwoSpeedsConfig] = [LATENT, FIS]
by_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.kind)


def thought_times(memories: list[Memory]) -> list[int]:
    return [int(memory[THOUGHT_T][0]) for memory in memories]


def passes(of: IPVLA) -> list[int]:
    """Rows of every pass through the backbone's first language layer from now on."""
    rows: list[int] = []
    of.backbone.language_layers()[0].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    return rows


@by_form
class TestTheSlowPart:
    @pytest.mark.parametrize(
        ("pace", "calls", "expected"),
        [
            (SlowPace(period=1), [0, 2, 4, 6], [0, 2, 4, 6]),
            (SlowPace(period=4), [0, 2, 4, 6, 8], [0, 0, 4, 4, 8]),
            (SlowPace(period=4), [0, 3, 6, 9, 12], [0, 0, 6, 6, 12]),
            (SlowPace(period=4, deadline=2), [0, 2, 4, 6, 8, 10], [0, 0, 0, 4, 4, 8]),
            (SlowPace(period=4, deadline=4), [0, 2, 4, 6, 8, 10, 12], [0, 0, 0, 0, 4, 4, 8]),
        ],
    )
    def test_thinks_at_the_first_call_of_a_period_and_is_acted_on_after_its_deadline(
        self, form: TwoSpeedsConfig, pace: SlowPace, calls: list[int], expected: list[int]
    ) -> None:
        _, memories = play(model(form.paced(pace)), calls)
        assert thought_times(memories) == expected

    def test_thinks_at_once_where_the_thought_would_be_stale(self, form: TwoSpeedsConfig) -> None:
        late = model(form.paced(SlowPace(period=4, deadline=4)))
        assert thought_times(play(late, [0, 2, 10, 12])[1]) == [0, 0, 10, 10]

    def test_runs_for_the_rows_that_are_due_alone_in_one_batch(self, form: TwoSpeedsConfig) -> None:
        single, dual = model(SingleSpeedConfig()), model(form)
        for policy, expected in ((single, [4, 4]), (dual, [4, 2])):
            memory, rows = policy.initial_memory(4), passes(policy)
            _, memory = policy.act(seen(policy, 4), memory, torch.zeros(4, dtype=torch.long))
            policy.act(seen(policy, 4), memory, torch.tensor([2, 4, 2, 6]))
            assert rows == expected

    def test_a_row_neither_knows_nor_changes_its_neighbours(self, form: TwoSpeedsConfig) -> None:
        policy = model(form)

        @given(st.lists(st.lists(st.integers(1, 5), min_size=4, max_size=4), min_size=3, max_size=3))
        @settings(max_examples=10)
        def at_any_times(gaps: list[list[int]]) -> None:
            times = torch.tensor(gaps).cumsum(1)
            together, alone = policy.initial_memory(3), [policy.initial_memory(1) for _ in range(3)]
            for k in range(4):
                inputs = seen(policy, 3, seed=k)
                actions, together = policy.act(inputs, together, times[:, k])
                for i in range(3):
                    one = inputs.map(lambda x, i=i: x[i : i + 1])
                    own, alone[i] = policy.act(one, alone[i], times[i : i + 1, k])
                    torch.testing.assert_close(own[0], actions[i], rtol=1e-4, atol=1e-5)
                    assert together[THOUGHT_T][i] == alone[i][THOUGHT_T][0]

        at_any_times()


@by_form
class TestTheFastPart:
    def test_acts_on_what_it_sees_now_the_thought_and_its_age(self, form: TwoSpeedsConfig) -> None:
        policy = model(form)
        _, (memory,) = play(policy, [0])
        now, two_later = torch.tensor([2]), torch.tensor([3])
        actions = policy.act(seen(policy, 1, 5), memory, now)[0]
        other = {**memory, "held/cognition": memory["held/cognition"] + torch.randn(32)}
        for changed in (
            policy.act(seen(policy, 1, 6), memory, now)[0],
            policy.act(seen(policy, 1, 5), memory, two_later)[0],
            policy.act(seen(policy, 1, 5), other, now)[0],
        ):
            assert (changed - actions).abs().max() > 1e-4


BANK = BankMemoryConfig(length=3, tokens=2, token_width=4, attention=5, hidden=7)
#: Mechanisms, and where they sit.
SEATED: list[tuple[MemoryConfig, str]] = [
    (NoMemoryConfig(), "slow"),
    (GRU, "slow"),
    (GRU, "fast"),
    (GRU, "both"),
    (ChainMemoryConfig([BANK, GRU]), "both"),
    (KVMemoryConfig(length=2), "slow"),
    (LatentMemoryConfig(tokens=2), "slow"),
]


@by_form
class TestTraining:
    @pytest.mark.parametrize(
        ("memory", "place"), SEATED, ids=lambda value: value if isinstance(value, str) else type(value).__name__
    )
    def test_a_window_is_what_its_steps_are_one_by_one(
        self, form: TwoSpeedsConfig, memory: MemoryConfig, place: str
    ) -> None:
        policy = model(replace(form, memory=place), memory)
        speeds, batch = two(policy), window(policy, lanes=2, steps=6)
        thinks, _, times, _ = speeds._drawn(
            batch, *(policy.initial_memory(2)[name] for name in (THOUGHT_T, "due"))
        )
        features, after, _ = speeds.window(policy.backbone, batch, policy.initial_memory(2))
        state = policy.initial_memory(2)
        for k in range(6):
            state["due"] = torch.where(thinks[:, k], batch.t[:, k], batch.t[:, k] + 1)
            one, state = speeds.observe(
                policy.backbone, batch.inputs.map(lambda x, k=k: x[:, k]), state, batch.t[:, k]
            )
            torch.testing.assert_close(one.cognition, features.cognition[:, k], rtol=1e-4, atol=1e-5)
            assert torch.equal(state[THOUGHT_T], times[:, k])
        assert state.keys() == after.keys()
        for name in state.keys() - {"due"}:
            torch.testing.assert_close(after[name], state[name], rtol=1e-4, atol=1e-5)

    def test_passes_steps_that_think_alone_through_the_backbone(self, form: TwoSpeedsConfig) -> None:
        policy = model(form)
        batch, rows = window(policy, lanes=4, steps=8, stride=1), passes(policy)
        thinks, *_ = two(policy)._drawn(batch, *(policy.initial_memory(4)[name] for name in (THOUGHT_T, "due")))
        policy.loss(batch, policy.initial_memory(4))
        assert rows == [int(thinks.sum())]
        assert rows[0] < 20

    def test_goes_on_where_no_step_of_a_window_thinks(self, form: TwoSpeedsConfig) -> None:
        policy = model(form)
        batch = window(policy, lanes=2, steps=2, stride=1)
        _, state, _ = two(policy).window(policy.backbone, batch, policy.initial_memory(2))
        state["due"] = torch.full((2,), 99)
        later = replace(batch, t=batch.t + 2, is_first=torch.zeros(2, 2, dtype=torch.bool))
        features, after, _ = two(policy).window(policy.backbone, later, state)
        assert features.cognition.isfinite().all()
        for name in state:
            if not name.startswith("fast/"):
                torch.testing.assert_close(after[name], state[name])

    def test_meets_every_age_below_the_limit_and_no_other(self, form: TwoSpeedsConfig) -> None:
        policy = model(replace(form, staleness=6, period=2), NoMemoryConfig())
        batch = window(policy, lanes=40, steps=40, stride=1)
        state = policy.initial_memory(40)
        thinks, source, times, _ = two(policy)._drawn(batch, state[THOUGHT_T], state["due"])
        met = Counter((batch.t - times).flatten().tolist())
        assert set(met) == set(range(6))
        assert all(met[age] > met[age + 1] for age in range(5)), "older thoughts are rarer"
        assert torch.equal(batch.t[:, :1].expand(40, 40) + source, times), "of the step that it says"
        assert thinks[:, 0].all()

    def test_goes_on_with_the_thought_of_the_window_before(self, form: TwoSpeedsConfig) -> None:
        policy = model(form)
        whole = window(policy, lanes=2, steps=6)
        state, parts = policy.initial_memory(2), []
        for half in (slice(0, 3), slice(3, 6)):
            cut = replace(
                whole,
                inputs=whole.inputs.map(lambda x, half=half: x[:, half]),
                **{name: getattr(whole, name)[:, half] for name in vars(whole) if name not in ("inputs",)},
            )
            features, state, _ = two(policy).window(policy.backbone, cut, state)
            parts.append(features.cognition)
        together, after, _ = two(policy).window(policy.backbone, whole, policy.initial_memory(2))
        torch.testing.assert_close(torch.cat(parts, 1), together.cognition, rtol=1e-4, atol=1e-5)
        for name, value in after.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)

    def test_trains_the_slow_part_through_the_thought_alone(self, form: TwoSpeedsConfig) -> None:
        policy = model(form, NoMemoryConfig())
        loss, _ = policy.loss(window(policy), policy.initial_memory(3))
        loss.backward()
        layers = policy.backbone.language_layers()
        assert all(p.grad is not None and p.grad.any() for p in layers[0].parameters() if p.ndim > 1)
        assert all(p.grad is not None for p in policy.memory.parameters())


def test_the_latent_forms_fast_part_reads_no_words() -> None:
    policy = model(LATENT)
    _, (memory,) = play(policy, [0])
    inputs = seen(policy, 1, 5)
    renamed: ModelInputs = inputs.with_prompt(torch.tensor([policy.backbone.tokenize("place the cube")]))
    now = torch.tensor([2])
    torch.testing.assert_close(policy.act(renamed, memory, now)[0], policy.act(inputs, memory, now)[0])


@by_form
@pytest.mark.parametrize(
    "head", [RegressionConfig(16), BinsConfig(16), ReverseChainConfig(gripper=False)], ids=str
)
def test_any_head_that_reads_no_layers_stands_behind_the_fast_part(
    form: TwoSpeedsConfig, head: HeadConfig
) -> None:
    config = replace(_config(form), head=head)
    policy = config.build(torch.ones(ACTIONS, dtype=torch.bool), 5, 1, SIDE)
    actions, _ = policy.act(seen(policy, 2), policy.initial_memory(2), torch.zeros(2, dtype=torch.long))
    assert actions.shape == (2, CHUNK, ACTIONS)


def _config(speeds: SpeedsConfig) -> IPVLAConfig:
    backbone = TinyConfig(width=32, heads=2, layers=3, mlp=32, trunk_channels=8)
    return IPVLAConfig(backbone=backbone, head=RegressionConfig(hidden=16), chunk=CHUNK, speeds=speeds)


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"period": 0}, r"model\.speeds\.period is 0; it must be at least 1"),
            ({"period": 17}, r"model\.speeds\.period is 17, .* set the period to at most 16"),
            ({"deadline": 12}, r"period is 8 and its deadline 12, .* set the period to at most 4"),
            ({"period": 2, "deadline": 3}, "before the one before it has ended"),
            ({"memory": "left"}, "choose one of slow, fast, both"),
            ({"trunk_channels": 12}, "give a multiple of 8"),
        ],
    )
    def test_a_form_refuses_it_in_one_line(self, settings: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message) as refused:
            LatentSpeedsConfig(**settings)  # type: ignore[arg-type]
        assert "\n" not in str(refused.value)

    def test_a_pace_above_the_staleness_limit_names_the_setting_of_rollout(self) -> None:
        with pytest.raises(ValueError, match=r"^slow\.period is 9, .* at most 8, or train with a larger"):
            LATENT.paced(SlowPace(period=9))
        with pytest.raises(ValueError, match=r"slow\.period is 0"):
            SlowPace(period=0)

    def test_a_pace_needs_a_slow_part(self) -> None:
        with pytest.raises(ValueError, match=r"slow: period=4, and the policy has no slow part"):
            SingleSpeedConfig().paced(SlowPace(period=4))
        assert SingleSpeedConfig().paced(SlowPace()) == SingleSpeedConfig()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"head": LayerwiseConfig()}, r"model\.head\.type layerwise reads them"),
            ({"memory": PromptMemoryConfig()}, r"memory\.type prompt chooses by itself when it thinks"),
            (
                {"memory": KVMemoryConfig(), "speeds": replace(LATENT, memory="both")},
                r"model\.speeds\.memory is both, and model\.memory\.type kv feeds language layers",
            ),
        ],
    )
    def test_parts_that_do_not_fit_are_refused_before_anything_is_built(
        self, changes: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message) as refused:
            replace(_config(LATENT), **changes)  # type: ignore[arg-type]
        assert "\n" not in str(refused.value)


def test_one_speed_is_nothing_at_all() -> None:
    plain, single = replace(_config(SingleSpeedConfig())), IPVLAConfig().speeds
    assert single == SingleSpeedConfig()
    assert "speeds" not in plain.to_dict()
    assert type(model(SingleSpeedConfig()).memory).__name__ == "GRUMemory"
    assert "speeds" in _config(LATENT).to_dict()
