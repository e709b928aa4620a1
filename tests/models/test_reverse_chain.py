"""Keyframe first: the public transformer and stop to 1e-5, keyframes without labels, motions as poses and back."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ipvla.models.features import Features
from ipvla.models.heads import ReverseChainConfig
from ipvla.models.heads.reverse_chain import ReverseChain, ReverseChainHead, keyframes, reached

BATCH, CHUNK, ACTIONS = 6, 8, 7
SMALL = ReverseChainConfig(hidden=32, ffn=32, layers=1)
ABSOLUTE = ReverseChainConfig(hidden=32, ffn=32, layers=1, encoder_layers=1, poses="absolute")


class Sizes(NamedTuple):
    """What a head needs to know of a backbone."""

    width: int = 8
    perception_size: int = 6


def features(seed: int = 0, batch: int = BATCH) -> Features:
    random = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(batch, 8, generator=random),
        torch.randn(batch, 5, 6, generator=random),
        torch.randn(batch, 3, generator=random),
    )


def chunks(seed: int = 0, batch: int = BATCH) -> Tensor:
    """Steady motions; the gripper closes within some chunks."""
    random = torch.Generator().manual_seed(seed)
    motion = torch.rand(batch, 1, ACTIONS, generator=random) * 0.8 + 0.1
    motion = motion.expand(-1, CHUNK, -1).clone()
    closes = torch.randint(2, 2 * CHUNK, (batch, 1), generator=random)
    motion[..., -1] = (torch.arange(CHUNK) >= closes).float() * 2 - 1
    return motion


def build(config: ReverseChainConfig = SMALL) -> ReverseChainHead:
    torch.manual_seed(0)
    return config.build(Sizes(), 3, CHUNK, ACTIONS).eval()  # type: ignore[arg-type, return-value]


def renamed(name: str, names: dict[str, str]) -> str:
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


class TestParity:
    @pytest.fixture(scope="class")
    def io(self) -> dict[str, Tensor]:
        return load_file(Path(__file__).with_name("reverse_chain.safetensors"))

    @pytest.fixture(scope="class")
    def chain(self, io: dict[str, Tensor]) -> ReverseChain:
        config = ReverseChainConfig(hidden=32, heads=4, ffn=48, encoder_layers=1, layers=2, futures=2)
        ours = {
            "transformer.encoder.layers": "encoder",
            "transformer.encoder.norm": "encoder_norm",
            "transformer.decoder.mtp_layer": "futures",
            "transformer.decoder.sos_embedding": "start",
            "transformer.decoder.": "",
        }
        state = {"places": io["tgt_pos"]}
        for name, value in io.items():
            if name.startswith("w/"):
                state[renamed(name[2:], ours)] = value
        chain = ReverseChain(config, 8, 12)
        chain.load_state_dict(state)
        return chain.eval()

    @pytest.fixture(scope="class")
    def memory(self, io: dict[str, Tensor], chain: ReverseChain) -> tuple[Tensor, Tensor]:
        observed = torch.cat([io["obs"].transpose(0, 1), chain.action2embed(io["proprio"])], 1)
        places = io["mem_pos"].transpose(0, 1)
        return chain.encode(observed, places).detach(), places

    def test_keyframes(self, io: dict[str, Tensor]) -> None:
        for demo in range(4):
            velocity, gripper = (io[f"demo{demo}/{n}"].numpy() for n in ("joint_velocities", "gripper_open"))
            assert keyframes(velocity, gripper) == io[f"demo{demo}/keyframes"].tolist()

    def test_teacher_forcing_and_its_losses(
        self, io: dict[str, Tensor], chain: ReverseChain, memory: tuple[Tensor, Tensor]
    ) -> None:
        latents, there = chain.teacher_forced(io["actions"], *memory), ~io["is_pad"]
        torch.testing.assert_close(latents[there], io["teacher_forced/latents"][there], atol=1e-5, rtol=1e-5)
        actions = chain.embed2action(latents)
        torch.testing.assert_close(actions[there], io["teacher_forced/actions"][there], atol=1e-5, rtol=1e-5)
        off = (actions[:, :, 0] - io["actions"]).abs()[there].mean()
        torch.testing.assert_close(off, io["loss/action_l1_head0"])
        latent = (latents[:, :, 0] - chain.action2embed(io["actions"])).abs()[there].mean()
        torch.testing.assert_close(latent, io["loss/latent_l1_head0"])

    def test_rows_of_a_batch_end_where_each_ends_alone(
        self, io: dict[str, Tensor], chain: ReverseChain, memory: tuple[Tensor, Tensor]
    ) -> None:
        """The public code stops a batch when all rows stop at the same step, which these two never do."""
        made, lengths = chain.generate(memory[0], io["proprio"][:, 0, :3], 0.01, memory[1])
        assert lengths.tolist() == [4, 7]
        for row in range(2):
            expected = io[f"rollout{row}/actions_reversed"].view(-1, 8)
            torch.testing.assert_close(made[row, : lengths[row]], expected, atol=1e-5, rtol=1e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_every_change_of_the_gripper_is_a_keyframe_and_so_is_the_end(grip: list[bool]) -> None:
    gripper = np.array(grip)
    found = keyframes(np.ones((len(grip), 3)), gripper)
    last = len(grip) - 1
    changes = [i for i in range(1, last - 1) if grip[i] != grip[i - 1]]
    assert found == [*changes, last]


def test_a_chain_is_back_when_it_is_as_far_from_the_keyframe_as_the_hand() -> None:
    key, here = torch.tensor([[1.0, 0, 0]] * 3), torch.zeros(3, 3)
    current = torch.tensor([[0.5, 0, 0], [0.005, 0, 0], [2.0, 0, 0]])
    assert reached(key, here, current, 0.01).tolist() == [False, True, False]


class TestMotionsAsPoses:
    def test_a_chain_read_backwards_is_the_chunk_up_to_its_keyframe(self) -> None:
        head, actions = build(), chunks()
        chain, counted = head._target(actions, torch.ones(BATCH, CHUNK, dtype=torch.bool))
        lengths = counted.sum(1)
        assert len(set(lengths.tolist())) > 1, "keyframes at different steps"
        again = head._actions(chain, lengths)
        for row, length in enumerate((lengths - 1).tolist()):
            torch.testing.assert_close(again[row, :length], actions[row, :length], atol=1e-5, rtol=1e-5)
            assert not again[row, length:, :-1].abs().gt(1e-5).any(), "behind the keyframe the hand rests"
            assert (again[row, length:, -1] == actions[row, length - 1, -1]).all()
            assert not chain[row, length, :-1].any(), "the chain ends at the present"

    def test_absolute_poses_stay_what_they_are(self) -> None:
        head, poses = build(ABSOLUTE), chunks()
        chain, counted = head._target(poses, torch.ones(BATCH, CHUNK, dtype=torch.bool))
        again = head._actions(chain, counted.sum(1))
        for row, length in enumerate(counted.sum(1).tolist()):
            torch.testing.assert_close(again[row, :length], poses[row, :length])
            assert (again[row, length:] == poses[row, length - 1]).all()


def test_the_head_learns_where_a_chunk_leads_and_ends_there() -> None:
    head, x, target = build().train(), features(), chunks()
    weight = torch.ones_like(target, dtype=torch.bool)
    optimizer = torch.optim.Adam(head.parameters(), 4e-3)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / 250)
        optimizer.zero_grad()
        head.loss(x, target, weight).backward()
        optimizer.step()
    head.eval()
    made = head.sample(x)
    assert made.shape == target.shape
    ends = head._first_keyframes(target, weight.any(-1))
    way = torch.arange(CHUNK)[None, :, None] <= ends[:, None, None]
    led, meant = made[..., :-1].sum(1) / CHUNK, (target * way)[..., :-1].sum(1) / CHUNK
    assert (led - meant).abs().mean() < meant.abs().mean() / 5
    assert (head.sample(Features(-x.cognition, x.perception, x.proprio)) - made).abs().max() > 0.1


@pytest.mark.parametrize("config", [SMALL, ABSOLUTE], ids=lambda config: config.poses)
class TestProperties:
    def test_a_batch_is_made_as_its_rows_alone_are(self, config: ReverseChainConfig) -> None:
        head, x = build(config), features()
        together = head.sample(x)
        for row in range(BATCH):
            alone = head.sample(x.map(lambda t, r=row: t[r : r + 1]))
            torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)

    def test_gradient_reaches_every_parameter(self, config: ReverseChainConfig) -> None:
        head, target = build(config), chunks()
        head.loss(features(), target, torch.ones_like(target, dtype=torch.bool)).backward()
        assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_what_does_not_exist_has_no_influence(self, config: ReverseChainConfig) -> None:
        head, target, x = build(config), chunks(), features()
        weight = torch.ones_like(target, dtype=torch.bool)
        weight[0, 3:], weight[1], weight[..., 4] = False, False, False
        other = torch.where(weight, target, -target.roll(1, 0))
        assert head.loss(x, target, weight) == head.loss(x, other, weight)
        assert head.loss(x, target, torch.zeros_like(weight)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poses": "relative"}, r"head\.poses is 'relative'; choose one of motions, absolute"),
        ({"hidden": 30}, r"head\.hidden 30 is not a multiple of head\.heads 4"),
        ({"futures": 0}, r"head\.futures is 0; it must be at least 1"),
        ({"threshold": -0.1}, r"head\.threshold is -0\.1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReverseChainConfig(**settings)  # type: ignore[arg-type]


def test_actions_without_a_position_and_states_without_numbers_are_refused() -> None:
    with pytest.raises(
        ValueError, match="needs a position of 3 dimensions before the gripper, and actions have 2"
    ):
        SMALL.build(Sizes(), 3, CHUNK, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"head\.poses absolute reads the proprioception"):
        ABSOLUTE.build(Sizes(), 0, CHUNK, 7)  # type: ignore[arg-type]
