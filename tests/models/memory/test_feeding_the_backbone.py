"""What holds for mechanisms that take part in the backbone's pass, and for chains; with a real backbone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipvla.models.backbones import Backbone, TinyConfig
from ipvla.models.features import Features
from ipvla.models.memory import (
    BankMemoryConfig,
    ChainMemoryConfig,
    GRUMemoryConfig,
    KVMemoryConfig,
    LatentMemoryConfig,
    MemoryConfig,
    MemoryModule,
    NoMemoryConfig,
    PromptMemoryConfig,
)
from ipvla.types import NO_TOKEN, Memory, StepBatch
from tests.models.conftest import inputs_for
from tests.models.memory.episodes import equal

BANK = BankMemoryConfig(length=3, tokens=2, token_width=4, attention=5, hidden=7)
RECURRENT: list[MemoryConfig] = [
    LatentMemoryConfig(tokens=2),
    KVMemoryConfig(length=3),
    KVMemoryConfig(length=2, tokens=2, recency=0),
    ChainMemoryConfig([LatentMemoryConfig(tokens=2), GRUMemoryConfig(hidden=5)]),
    ChainMemoryConfig([GRUMemoryConfig(hidden=5), BANK]),
]
#: A plan is generated in rollout and given in training, so the two cannot be compared step by step.
PROMPTED: list[MemoryConfig] = [
    PromptMemoryConfig(plan_tokens=6),
    PromptMemoryConfig(plan_tokens=6, refresh=2),
    ChainMemoryConfig([PromptMemoryConfig(plan_tokens=6), BANK]),
]
ALL = [*RECURRENT, *PROMPTED]


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    torch.manual_seed(0)
    return TinyConfig(width=32, heads=2, mlp=48, trunk_channels=8).build(5, 1, 28).eval()


def build(config: MemoryConfig, backbone: Backbone) -> MemoryModule:
    """The mechanism with no weight at zero, as after some training."""
    torch.manual_seed(0)
    module = config.build(backbone)
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def window(backbone: Backbone, batch: int, length: int, seed: int = 0, first_t: int = 0) -> StepBatch:
    """One uninterrupted window [batch, length] of random observations."""
    instructions = [["press", "press the red button"][i % 2] for i in range(batch) for _ in range(length)]
    inputs = inputs_for(backbone, instructions, seed).map(lambda x: x.unflatten(0, (batch, length)))
    on = torch.ones(batch, length, dtype=torch.bool)
    plan = torch.full((batch, length, 6), NO_TOKEN)
    plan[..., 0] = 40
    return StepBatch(
        inputs=inputs,
        actions=torch.zeros(batch, length, 2, 7),
        action_valid=on[..., None].expand(-1, -1, 2),
        is_first=~on,
        valid=on,
        t=torch.arange(length).expand(batch, length) * 4 + first_t,
        episode_key=torch.zeros(batch, length, dtype=torch.long),
        noise_seed=torch.zeros(batch, length, dtype=torch.long),
        plan=plan,
        last_plan=plan,
        question=plan[..., :0],
        answer=plan[..., :0],
    )


def play(
    module: MemoryModule, backbone: Backbone, batch: StepBatch, memory: Memory | None = None
) -> tuple[list[Features], Memory]:
    """The window as a rollout sees it, one `observe` after another."""
    memory = module.initial(len(batch.t)) if memory is None else memory
    seen = []
    with torch.inference_mode():
        for k in range(batch.t.shape[1]):
            features, memory = module.observe(
                backbone, batch.inputs.map(lambda x, k=k: x[:, k]), memory, batch.t[:, k]
            )
            seen.append(features)
    return seen, memory


def cut(batch: StepBatch, part: slice | tuple[slice, slice]) -> StepBatch:
    """Some rows and steps of a window."""
    return StepBatch(
        inputs=batch.inputs.map(lambda x: x[part]),
        **{name: value[part] for name, value in vars(batch).items() if name != "inputs"},
    )


def rows(memory: Memory, row: int) -> Memory:
    return {name: value[row : row + 1] for name, value in memory.items()}


@pytest.mark.parametrize("config", ALL, ids=str)
class TestEveryMechanismThatFeedsTheBackbone:
    def test_batched_equals_one_at_a_time(self, config: MemoryConfig, tiny: Backbone) -> None:
        module, batch = build(config, tiny), window(tiny, 3, 5)
        together, after = play(module, tiny, batch)
        for row in range(3):
            one = cut(batch, slice(row, row + 1))
            alone, alone_after = play(module, tiny, one)
            for a, b in zip(alone, together, strict=True):
                torch.testing.assert_close(a.cognition[0], b.cognition[row], rtol=1e-4, atol=1e-4)
            assert equal(alone_after, rows(after, row), atol=1e-4)

    def test_rows_never_mix(self, config: MemoryConfig, tiny: Backbone) -> None:
        module, a, b = build(config, tiny), window(tiny, 3, 4), window(tiny, 3, 4)
        b.inputs.images[1] = 255 - b.inputs.images[1]
        (seen_a, after_a), (seen_b, after_b) = play(module, tiny, a), play(module, tiny, b)
        for row in (0, 2):
            torch.testing.assert_close(seen_a[3].cognition[row], seen_b[3].cognition[row], rtol=1e-5, atol=1e-5)
            assert equal(rows(after_a, row), rows(after_b, row))

    def test_it_moves_between_actors_through_a_file(
        self, config: MemoryConfig, tiny: Backbone, tmp_path: Path
    ) -> None:
        module = build(config, tiny)
        _, half_way = play(module, tiny, window(tiny, 2, 3))
        save_file({name: value.contiguous() for name, value in half_way.items()}, tmp_path / "memory.safetensors")
        rest = window(tiny, 2, 3, seed=1, first_t=12)
        (seen, end), (again, end_again) = (
            play(module, tiny, rest, half_way),
            play(module, tiny, rest, load_file(tmp_path / "memory.safetensors")),
        )
        for a, b in zip(seen, again, strict=True):
            torch.testing.assert_close(a.cognition, b.cognition)
        assert equal(end, end_again)

    def test_its_size_does_not_grow_with_the_episode(self, config: MemoryConfig, tiny: Backbone) -> None:
        """A step returns the shapes it was given, so no number of steps can make them grow."""
        module = build(config, tiny)
        fresh = module.initial(1)
        memory = fresh
        for start in (0, 400_000):
            memory = play(module, tiny, window(tiny, 1, 8, first_t=start), memory)[1]
            assert {n: (v.shape, v.dtype) for n, v in memory.items()} == {
                n: (v.shape, v.dtype) for n, v in fresh.items()
            }
            assert all(value.isfinite().all() for value in memory.values())


@pytest.mark.parametrize("config", RECURRENT, ids=str)
class TestTrainingSeesWhatRolloutSees:
    def test_a_window_equals_its_steps_one_by_one(self, config: MemoryConfig, tiny: Backbone) -> None:
        module, batch = build(config, tiny), window(tiny, 2, 6)
        features, after, loss = module.window(tiny, batch, module.initial(2))
        steps, expected = play(module, tiny, batch)
        for k, step in enumerate(steps):
            torch.testing.assert_close(features.at(k).cognition, step.cognition, rtol=1e-4, atol=1e-4)
        assert equal(after, expected, atol=1e-4)
        assert loss is None

    def test_is_first_equals_a_fresh_start_and_idle_steps_leave_the_memory_alone(
        self, config: MemoryConfig, tiny: Backbone
    ) -> None:
        module, batch = build(config, tiny), window(tiny, 2, 6)
        batch.is_first[:, 2] = True
        batch.valid[0, 4:] = False
        _, before = play(module, tiny, window(tiny, 2, 3, seed=1))
        features, after, _ = module.window(tiny, batch, before)
        fresh, _ = play(module, tiny, window(tiny, 2, 6), module.initial(2))
        assert not torch.allclose(features.at(1).cognition, fresh[1].cognition, atol=1e-3)
        tail = cut(batch, (slice(None), slice(2, None)))
        steps, _ = play(module, tiny, tail)
        torch.testing.assert_close(features.at(3).cognition, steps[1].cognition, rtol=1e-4, atol=1e-4)
        stopped = cut(tail, (slice(1), slice(2)))
        assert equal(rows(after, 0), play(module, tiny, stopped)[1], atol=1e-4)

    def test_the_gradient_reaches_the_step_where_the_information_entered(
        self, config: MemoryConfig, tiny: Backbone
    ) -> None:
        module, batch = build(config, tiny), window(tiny, 2, 3)
        batch.inputs.proprio.requires_grad_(True)
        features, _, _ = module.window(tiny, batch, module.initial(2))
        (gradient,) = torch.autograd.grad(features.cognition[0, 2].square().sum(), batch.inputs.proprio)
        assert (gradient[0].abs().sum(-1) > 0).all()
        assert gradient[1].abs().sum() == 0, "another episode's"


def test_an_empty_cache_is_the_plain_model(tiny: Backbone) -> None:
    module, batch = KVMemoryConfig(length=3).build(tiny), window(tiny, 2, 1)
    assert not list(module.parameters()), "it works on a frozen model"
    (seen,), _ = play(module, tiny, batch)
    with torch.inference_mode():
        plain = tiny(batch.inputs.map(lambda x: x[:, 0])).features
    torch.testing.assert_close(seen.cognition, plain.cognition, rtol=1e-5, atol=1e-5)


def test_the_cache_is_first_in_first_out_and_remembers_when(tiny: Backbone) -> None:
    module = KVMemoryConfig(length=3).build(tiny)
    _, memory = play(module, tiny, window(tiny, 1, 5))
    assert memory["t"].tolist() == [[8, 12, 16]]
    a, b = window(tiny, 1, 5), window(tiny, 1, 5)
    b.inputs.images[:, 0] = 255 - b.inputs.images[:, 0]
    old, new = (play(module, tiny, batch)[0][4].cognition for batch in (a, b))
    assert not torch.allclose(play(module, tiny, a)[0][3].cognition, play(module, tiny, b)[0][3].cognition)
    assert not torch.allclose(old, new), "what step 0 said lives on in the entries that read it"


def test_activations_computed_again_give_the_same_gradients(backbone: Backbone) -> None:
    module, batch = build(KVMemoryConfig(length=3), backbone), window(backbone, 2, 3)

    def gradients() -> dict[str, torch.Tensor]:
        backbone.train().zero_grad()
        features, _, _ = module.window(backbone, batch, module.initial(2))
        features.cognition[:, -1].square().sum().backward()
        return {name: x.grad.clone() for name, x in backbone.named_parameters() if x.grad is not None}

    whole = gradients()
    backbone.checkpoint_activations()
    again = gradients()
    assert any(x.any() for x in whole.values())
    assert all(torch.equal(again[name], x) for name, x in whole.items())


def test_older_entries_weigh_less_the_more_so_with_recency(tiny: Backbone) -> None:
    memory = {**KVMemoryConfig(length=2).build(tiny).initial(1), "t": torch.tensor([[0, 40]])}
    bias = {
        r: KVMemoryConfig(2, recency=r).build(tiny).context(memory, torch.tensor([60])).past for r in (0, 1, 2)
    }
    biases = {r: past.bias[0] for r, past in bias.items() if past is not None}
    assert not biases[0].any()
    assert (biases[1][:, 0] < biases[1][:, 1]).all()
    torch.testing.assert_close(biases[2], 2 * biases[1])
    torch.testing.assert_close(biases[1][0], torch.tensor([-3.0, -1.0]) * 2**-4)


def test_a_chain_reads_what_the_part_before_has_enriched(tiny: Backbone) -> None:
    gru, chain = GRUMemoryConfig(hidden=5), ChainMemoryConfig([GRUMemoryConfig(hidden=5), NoMemoryConfig()])
    batch = window(tiny, 2, 4)
    alone, together = build(gru, tiny), build(chain, tiny)
    together.parts[0].load_state_dict(alone.state_dict())  # type: ignore[union-attr, operator]
    a, b = play(alone, tiny, batch)[0][3], play(together, tiny, batch)[0][3]
    assert torch.equal(a.cognition, b.cognition)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: LatentMemoryConfig(tokens=0), r"memory\.tokens is 0"),
        (lambda: LatentMemoryConfig(horizon=1), r"memory\.horizon is 1"),
        (lambda: KVMemoryConfig(length=0), r"memory\.length is 0"),
        (lambda: KVMemoryConfig(recency=-1), r"memory\.recency is -1"),
        (lambda: PromptMemoryConfig(plan_tokens=0), r"memory\.plan_tokens is 0"),
        (lambda: PromptMemoryConfig(refresh=-1), r"memory\.refresh is -1"),
        (lambda: PromptMemoryConfig(weight=0), r"memory\.weight is 0"),
        (lambda: ChainMemoryConfig([NoMemoryConfig()]), "1 mechanisms"),
    ],
)
def test_wrong_settings_are_refused(settings: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings()  # type: ignore[operator]


def test_only_the_first_of_a_chain_may_feed_the_backbone(tiny: Backbone) -> None:
    with pytest.raises(ValueError, match="'latent' feeds the backbone and must stand first"):
        ChainMemoryConfig([GRUMemoryConfig(), LatentMemoryConfig()]).build(tiny)
