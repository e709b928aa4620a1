"""Chunks that go on from the last one's rest: guided at inference, and given as a head has learned it."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from ipvla.models.heads import FlowConfig, HeadConfig, LayerwiseConfig, Pi0HeadConfig, RegressionConfig, Sampling
from ipvla.models.heads.flow_matching import drawn_prefix
from ipvla.models.heads.guidance import pull, resumed, soft_mask
from ipvla.models.heads.integrators import INTEGRATORS, integrate
from ipvla.models.heads.protocol import Rest, draw_noise
from ipvla.models.vla import IPVLA
from tests.models.heads.test_every_head import (
    ACTIONS,
    CHUNK,
    EXPERT,
    HEADS,
    VARIES,
    demonstrations,
    loss_of,
    made,
)

EVERY = torch.ones(ACTIONS, dtype=torch.bool)
#: Every kind of head with a velocity.
FLOWS: dict[str, HeadConfig] = {
    "example": HEADS["example"],
    "flow": FlowConfig(16, steps=5),
    "flow shared": FlowConfig(16, attention="shared", heads=4, steps=5),
    "layerwise": LayerwiseConfig(16, mlp=32, steps=5),
    "layerwise as published": LayerwiseConfig(16, mlp=32, self_attention="odd", context_norm=False),
    "layerwise without self-attention": LayerwiseConfig(16, mlp=32, self_attention="none"),
    "pi0": Pi0HeadConfig(width=16, mlp=16, dims=8, **EXPERT),
    "pi05": Pi0HeadConfig(variant="pi05", width=16, mlp=16, dims=8, **EXPERT),
    "smolvla": Pi0HeadConfig(variant="smolvla", width=16, mlp=16, dims=8, **EXPERT),
}
#: Of them those that can go on from given actions: which have a time, and sight, for each.
TRAINED = {
    name: replace(config, prefix=2)  # type: ignore[type-var]
    for name, config in FLOWS.items()
    if name not in ("example", "layerwise without self-attention")
}


def rest(
    actions: torch.Tensor,
    left: list[int],
    frozen: list[int],
    guidance: list[float],
    given: list[int] | None = None,
) -> Rest:
    ints = (torch.tensor(x) for x in (left, frozen))
    return Rest(actions, *ints, torch.tensor(guidance), torch.tensor(given or [0] * len(left)))


def wanted(batch: int = 3) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    return (torch.rand(batch, CHUNK, ACTIONS, generator=random) * 2 - 1) * VARIES


def answer(model: IPVLA, last: Rest | None, rows: slice = slice(None)) -> torch.Tensor:
    """The chunks of three episodes, as a policy server asks for them."""
    inputs = demonstrations(model).inputs.map(lambda x: x[rows, 0])
    with torch.inference_mode():
        count = len(inputs.proprio)
        t = torch.zeros(count, dtype=torch.long)
        chunk, _ = model.act(inputs, model.initial_memory(count), t, [11, 12, 13][rows], last)
    return chunk


class TestTheMask:
    def test_is_one_on_what_is_frozen_then_fades_and_ends_with_the_rest(self) -> None:
        (mask,) = soft_mask(torch.tensor([6]), torch.tensor([2]), 8)
        c = [(6 - i) / (6 - 2 + 1) for i in range(2, 6)]
        fading = [x * (math.exp(x) - 1) / (math.e - 1) for x in c]
        torch.testing.assert_close(mask, torch.tensor([1, 1, *fading, 0, 0], dtype=torch.float32))

    @pytest.mark.parametrize(("left", "frozen"), [(0, 0), (8, 8), (3, 3), (5, 0)])
    def test_of_any_rest_lies_between_one_and_nothing(self, left: int, frozen: int) -> None:
        (mask,) = soft_mask(torch.tensor([left]), torch.tensor([frozen]), 8)
        assert (mask[:frozen] == 1).all()
        assert (mask[left:] == 0).all()
        assert (mask.diff() <= 0).all()
        assert mask[frozen:left].gt(0).all()

    def test_its_weight_is_clipped_and_least_in_the_middle(self) -> None:
        most = torch.tensor([5.0, 1.0])
        assert pull(0.0, most).tolist() == pull(1.0, most).tolist() == [5, 1]
        assert pull(0.5, most).tolist() == [2, 1]
        t = 0.75
        weight = (1 - t) / t * (t**2 + (1 - t) ** 2) / (1 - t) ** 2
        assert pull(t, most).tolist() == pytest.approx([weight, 1.0])


class TestOnAKnownField:
    """v = goal - noise on straight lines to a goal that does not depend on x: a is the goal, da/dx is 0 or 1."""

    GOAL = torch.full((1, 8, 2), 0.5)

    def towards(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        left = (1 - t).clamp(min=1e-3)
        return (self.GOAL - x) / (left[:, None, None] if t.ndim == 1 else left[..., None])

    def constant(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 0.5)

    def test_what_ends_where_it_must_cannot_be_pulled(self) -> None:
        last = rest(-torch.ones(1, 8, 2), [8], [4], [5.0])
        chunk = resumed(self.towards, torch.zeros(1, 8, 2), last, torch.ones(2, dtype=torch.bool), 5, "euler")
        torch.testing.assert_close(chunk, self.GOAL, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("steps", [4, 5, 10])
    def test_what_can_go_anywhere_is_pulled_to_the_rest(self, steps: int) -> None:
        """With da/dx = 1 the error shrinks by 1 - w h per step, exactly."""
        last = rest(-torch.ones(1, 8, 2), [8], [4], [5.0])
        noise = draw_noise([3], (8, 2))
        chunk = resumed(self.constant, noise, last, torch.ones(2, dtype=torch.bool), steps, "euler")
        share = math.prod(1 - float(pull(i / steps, torch.tensor([5.0]))) / steps for i in range(steps))
        error = -1 - (noise + 0.5)
        torch.testing.assert_close(-1 - chunk[:, :4], error[:, :4] * share, atol=1e-5, rtol=0)
        assert (error[:, :4] * share).abs().max() < 0.02 * error[:, :4].abs().max()

    @pytest.mark.parametrize("integrator", INTEGRATORS)
    def test_every_integrator_keeps_what_is_given_and_leaves_alone_who_has_nothing(self, integrator: str) -> None:
        actions, noise = torch.linspace(-1, 1, 32).view(2, 8, 2), draw_noise([3, 4], (8, 2))
        last = rest(actions, [6, 0], [3, 0], [0.0, 0.0], [3, 0])
        chunk = resumed(self.constant, noise, last, torch.ones(2, dtype=torch.bool), 4, integrator)
        torch.testing.assert_close(chunk[0, :3], actions[0, :3])
        torch.testing.assert_close(chunk[0, 3:], noise[0, 3:] + 0.5)
        torch.testing.assert_close(chunk[1], integrate(lambda x, t: x * 0 + 0.5, noise[1:], 4, integrator)[0])


@pytest.mark.parametrize("name", FLOWS)
class TestGuided:
    def test_the_frozen_prefix_is_kept_and_the_next_action_follows_it(self, name: str) -> None:
        """Random weights: a chunk that knows nothing of the last one jumps where it takes over."""
        model = made(FLOWS[name])
        actions, last = wanted(), rest(wanted(), [3] * 3, [2] * 3, [5.0] * 3)
        plain, guided = answer(model, None), answer(model, last)
        frozen = (guided - actions)[:, :2] * VARIES
        unguided = (plain - actions)[:, :2] * VARIES
        assert frozen.abs().max() < 0.25
        assert frozen.square().mean() < 0.02 * unguided.square().mean()
        # who arrives at the same plan as before has no jump where the answer begins, at action 2
        jump = ((guided - actions)[:, 2] * VARIES).square().mean()
        switch = ((plain - actions)[:, 2] * VARIES).square().mean()
        assert jump < 0.5 * switch

    def test_a_batch_answers_as_its_rows_do_alone_some_with_a_rest_and_some_without(self, name: str) -> None:
        model, last = made(FLOWS[name]), rest(wanted(), [3, 0, 2], [2, 0, 0], [5.0, 0.0, 3.0])
        together = answer(model, last)
        for row in range(3):
            one = slice(row, row + 1)
            alone = answer(model, Rest(**{f.name: getattr(last, f.name)[one] for f in fields(Rest)}), one)
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[1], answer(model, None)[1], rtol=1e-4, atol=1e-5)
        assert (together[2] - answer(model, None)[2]).abs().max() > 0.01

    def test_the_answer_is_the_same_every_time_and_leaves_no_gradient(self, name: str) -> None:
        model, last = made(FLOWS[name]), rest(wanted(), [3] * 3, [2] * 3, [5.0] * 3)
        first = answer(model, last)
        assert torch.equal(first, answer(model, last))
        assert first.dtype == torch.float32
        assert not first.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_constant_dimension_pulls_at_nothing(self, name: str) -> None:
        model, actions = made(FLOWS[name]), wanted()
        last = rest(actions, [3] * 3, [2] * 3, [5.0] * 3)
        other = replace(last, actions=actions + 9.0 * ~VARIES)
        torch.testing.assert_close(answer(model, last) * VARIES, answer(model, other) * VARIES)


@pytest.mark.parametrize("name", TRAINED)
class TestTrained:
    def test_given_actions_are_the_answers_own_and_the_others_depend_on_them(self, name: str) -> None:
        model, actions = made(TRAINED[name]), wanted()
        nothing = answer(model, None)
        one = answer(model, rest(actions, [2, 1, 0], [2, 1, 0], [0.0] * 3, [2, 1, 0]))
        for row, count in enumerate((2, 1, 0)):
            torch.testing.assert_close(one[row, :count] * VARIES, actions[row, :count] * VARIES)
        torch.testing.assert_close(one[2], nothing[2], rtol=1e-4, atol=1e-5)
        assert (one[0, 2:] - nothing[0, 2:]).abs().max() > 1e-3

    def test_a_batch_answers_as_its_rows_do_alone(self, name: str) -> None:
        model, last = made(TRAINED[name]), rest(wanted(), [2, 0, 1], [2, 0, 1], [0.0] * 3, [2, 0, 1])
        together = answer(model, last)
        for row in range(3):
            one = slice(row, row + 1)
            alone = answer(model, Rest(**{f.name: getattr(last, f.name)[one] for f in fields(Rest)}), one)
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)

    def test_one_time_for_each_action_is_one_time_for_all_where_they_are_the_same(self, name: str) -> None:
        model: Any = made(TRAINED[name])
        inputs = demonstrations(model).inputs.map(lambda x: x[:, 0])
        features, _ = model.memory.observe(model.backbone, inputs, model.initial_memory(3), torch.zeros(3).long())
        x, t = draw_noise([1, 2, 3], model.head.noise_shape), torch.tensor([0.1, 0.5, 0.9])
        if isinstance(TRAINED[name], Pi0HeadConfig):
            one, each = (model.head.velocity(features, x, times) for times in (t, t[:, None].expand(-1, CHUNK)))
        else:
            conditions = model.head.conditions(features)
            one, each = (model.head.velocity(x, times, conditions) for times in (t, t[:, None].expand(-1, CHUNK)))
        torch.testing.assert_close(one, each, rtol=1e-4, atol=1e-5)

    def test_training_gives_prefixes_which_carry_no_loss(self, name: str) -> None:
        with_prefixes, without = made(TRAINED[name]), made(FLOWS[name])
        without.load_state_dict(with_prefixes.state_dict())
        batch = demonstrations(with_prefixes)
        assert not torch.equal(loss_of(with_prefixes, batch), loss_of(without, batch))
        loss_of(with_prefixes, batch).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in with_prefixes.parameters())


def test_prefixes_of_every_length_are_drawn_alike() -> None:
    given = drawn_prefix(torch.randn(3000, generator=torch.Generator().manual_seed(0)), 2, 4)
    counts = given.sum(1).bincount(minlength=5).tolist()
    assert all(900 < count < 1100 for count in counts[:3])
    assert counts[3:] == [0, 0]
    assert (given.int().diff(dim=1) <= 0).all(), "the first ones"


def test_without_a_prefix_training_draws_and_loses_what_it_did() -> None:
    """The loss of a head before there were prefixes, written out."""
    model: Any = made(FlowConfig(16, draws=2))
    head, batch = model.head, demonstrations(model)
    assert head.loss_noise_shape == (2, CHUNK * ACTIONS + 1)
    inputs = batch.inputs.map(lambda x: x[:, 0])
    features, _ = model.memory.observe(model.backbone, inputs, model.initial_memory(3), torch.zeros(3).long())
    actions, weight = batch.actions[:, 0], (batch.action_valid[:, 0, :, None] & VARIES)
    noise = draw_noise([4, 5, 6], head.loss_noise_shape)
    rows = noise.flatten(0, 1)
    start, t = rows[:, :-1].reshape(-1, CHUNK, ACTIONS) * VARIES, torch.special.ndtr(rows[:, -1])
    actions2, weight2 = actions.repeat_interleave(2, 0), weight.repeat_interleave(2, 0)
    x = torch.lerp(actions2, start, (1 - t)[:, None, None])
    v = head.velocity(x, t, head.conditions(features).repeated(2))
    expected = ((v - (actions2 - start)).square() * weight2).sum() / weight2.sum()
    assert torch.equal(head.loss(features, actions, weight, noise), expected)


class TestRefusals:
    def test_a_head_without_a_velocity_says_what_to_change(self) -> None:
        model = made(RegressionConfig(16))
        with pytest.raises(
            ValueError, match=r"nothing can pull at it; choose success\.chunking\.type ensemble or"
        ):
            answer(model, rest(wanted(), [3] * 3, [2] * 3, [5.0] * 3))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (FlowConfig(16, prefix=4), r"head\.prefix is 4, and model\.chunk 4; set it to 0 for none, or"),
            (FlowConfig(16, prefix=-1), r"head\.prefix is -1"),
            (
                Pi0HeadConfig(width=16, mlp=16, dims=8, prefix=7, **EXPERT),
                r"head\.prefix is 7, and model\.chunk 4",
            ),
            (replace(HEADS["example"], prefix=1), r"type small_flow has one time for all actions; set it to 0"),  # type: ignore[call-arg]
        ],
    )
    def test_a_prefix_that_cannot_be_is_refused_before_training(self, config: HeadConfig, message: str) -> None:
        with pytest.raises(ValueError, match=message) as refused:
            made(config)
        assert "\n" not in str(refused.value)

    def test_actions_that_see_no_other_cannot_go_on_from_any(self) -> None:
        with pytest.raises(ValueError, match=r"with head\.self_attention none no action sees another"):
            LayerwiseConfig(16, self_attention="none", prefix=2)

    def test_a_student_of_whole_chunks_has_no_prefix(self) -> None:
        with pytest.raises(ValueError, match=r"head\.distil learns whole chunks, and head\.prefix is set"):
            FlowConfig(16, prefix=2, distil="reflow")
        assert FlowConfig(16, prefix=2).sampled(Sampling(2)).longest_prefix == 2
