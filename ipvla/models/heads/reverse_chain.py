"""Keyframe first: a chain of poses from the next keyframe back to the present (Chain-of-Action, arXiv 2506.09990).

    p(a_1..a_n | o) = p(a_n | o) prod_t p(a_t | a_{t+1}..a_n, o),    n the next keyframe

A transformer decoder writes the chain in latents x_1, x_2, ..., read out as a = W x + b. In training the input is
the embedded chain (teacher forcing), in rollout its own latents, never decoded in between; so training draws a
latent to the embedding of its action: loss = |a_hat - a| + latent_weight |x_hat - embed(a)|. Further output layers
("futures") predict steps further back at once; rollout takes the first alone. A row stops where its chain has come
back to the present (`reached`); rows of a batch stop one by one.

Keyframes are found without labels (`keyframes`): where the gripper changes, where the hand has come to rest, and
at the end. Rest is measured in normalised actions: where a dimension's quantiles are lopsided, no motion is not 0
there, and rests are missed. A keyframe says something only as a pose, so actions are seen as poses:

    absolute: they are poses already; where the hand is now is read from the proprioception by a learned linear map
    motions:  pose_t = sum of the motions up to t, over the chunk's length C; the present is 0. What is written
              comes back as differences, in the same units. The gripper is no motion

The chain ends with the chunk at the latest: `model.chunk` bounds how far ahead a keyframe may lie. Behind the
keyframe the chunk holds still: no motion, or the keyframe's pose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.heads.protocol import Head, HeadConfig, masked_mean

_THRESHOLDS = {"motions": 0.2, "absolute": 0.01}
#: Dimensions that say where the hand is: x, y, z.
_POSITION = 3
#: Steps after a rest in which no other one begins.
_PAUSE = 4


@HeadConfig.register_subclass("reverse_chain")
@dataclass(frozen=True)
class ReverseChainConfig(HeadConfig):
    """Sizes, and how keyframes are found.

    Attributes:
        hidden, heads, ffn: width of the transformer, its attention heads, and inner width.
        encoder_layers, layers: over the observation's tokens, and over the chain.
        futures: output layers, at least 1: the first predicts the next step of the chain, the i-th i steps on.
        poses: "motions" for actions that move the hand by so much, as LIBERO's, or "absolute".
        gripper: the last dimension is a gripper's.
        still: normalised speed in every dimension up to which the hand rests.
        threshold: how near to the present a chain ends, in normalised actions: of motions, a share of a full step.
            None for 0.2 of motions and 0.01 of absolute poses.
        latent_weight: of latent consistency.
    """

    hidden: int = 128
    heads: int = 4
    ffn: int = 256
    encoder_layers: int = 0
    layers: int = 2
    futures: int = 2
    poses: str = "motions"
    gripper: bool = True
    still: float = 0.01
    threshold: float | None = None
    latent_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hidden", "heads", "ffn", "layers", "futures"):
            if getattr(self, name) < 1:
                raise ValueError(f"head.{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden % self.heads:
            raise ValueError(f"head.hidden {self.hidden} is not a multiple of head.heads {self.heads}")
        if self.poses not in _THRESHOLDS:
            raise ValueError(f"head.poses is {self.poses!r}; choose one of {', '.join(_THRESHOLDS)}")
        for name in ("encoder_layers", "still", "threshold", "latent_weight"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"head.{name} is {getattr(self, name)}; give 0 or more")

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> ReverseChainHead:
        if action_dim < _POSITION + self.gripper:
            raise ValueError(
                f"head.type reverse_chain needs a position of {_POSITION} dimensions before the gripper, and "
                f"actions have {action_dim}; choose another head, or set head.gripper to false"
            )
        if self.poses == "absolute" and not proprio:
            raise ValueError("head.poses absolute reads the proprioception, and there is none; set data.proprio")
        return ReverseChainHead(self, backbone, proprio, (chunk, action_dim))


class Layer(nn.Module):
    """Pre-norm attention to itself, to a memory, and a feed-forward part; positions are added to queries and keys.

    Args:
        cross: it reads a memory.
        further: the feed-forward part is two in a row, as in a future's layer.
    """

    def __init__(self, width: int, heads: int, ffn: int, cross: bool = True, further: bool = False) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross, self.further = cross, further
        if cross:
            self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
            self.norm3 = nn.LayerNorm(width)
        if further:
            self.linear3, self.linear4 = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(
        self,
        x: torch.Tensor,
        places: torch.Tensor,
        hidden: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        memory_places: torch.Tensor | float = 0.0,
    ) -> torch.Tensor:
        """x [B, T, D]; `hidden` bool [T, T] is True where a query (row) does not read."""
        y = self.norm1(x)
        x = x + self.self_attn(y + places, y + places, y, attn_mask=hidden, need_weights=False)[0]
        norm = self.norm2
        if self.cross and memory is not None:
            query, key = self.norm2(x) + places, memory + memory_places
            x = x + self.multihead_attn(query, key, memory, need_weights=False)[0]
            norm = self.norm3
        y = self.linear2(F.relu(self.linear1(norm(x))))
        if self.further:
            y = self.linear4(F.relu(self.linear3(y)))
        out: torch.Tensor = x + y
        return out


class ReverseChain(nn.Module):
    """The transformer. A memory is [B, M, D] with places broadcasting to it; a chain float32 [B, T, A]."""

    def __init__(self, config: ReverseChainConfig, action_dim: int, longest: int) -> None:
        super().__init__()
        sizes = (config.hidden, config.heads, config.ffn)
        self.action2embed, self.embed2action = nn.Linear(action_dim, sizes[0]), nn.Linear(sizes[0], action_dim)
        self.encoder = nn.ModuleList(Layer(*sizes, cross=False) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(sizes[0])
        self.layers = nn.ModuleList(Layer(*sizes) for _ in range(config.layers))
        self.futures = nn.ModuleList(Layer(*sizes, further=True) for _ in range(config.futures))
        self.norm = nn.LayerNorm(sizes[0])
        self.start = nn.Parameter(torch.randn(1, 1, sizes[0]))
        self.places = nn.Parameter(torch.randn(longest, sizes[0]))

    def encode(self, tokens: torch.Tensor, places: torch.Tensor | float = 0.0) -> torch.Tensor:
        """The memory of an observation's tokens [B, M, D]."""
        for layer in self.encoder:
            tokens = layer(tokens, places)
        encoded: torch.Tensor = self.encoder_norm(tokens)
        return encoded

    def teacher_forced(
        self, chain: torch.Tensor, memory: torch.Tensor, places: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """Latents [B, T, futures, D] that predict each step of a chain from those before it."""
        before = self.action2embed(chain[:, :-1])
        return self._decode(torch.cat([self.start.expand(len(chain), -1, -1), before], 1), memory, places)

    def generate(
        self,
        memory: torch.Tensor,
        here: torch.Tensor,
        threshold: float,
        places: torch.Tensor | float = 0.0,
        varies: torch.Tensor | float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chains [B, T, A] back to `here` [B, 3], and int64 [B], how many steps of each count, the last included.

        `varies` [A] is 0 for dimensions that are constant in the dataset, on which nothing was trained.
        """
        latents = self.start.expand(len(memory), -1, -1)
        lengths = torch.full((len(memory),), len(self.places), device=memory.device)
        for step in range(len(self.places)):
            latents = torch.cat([latents, self._decode(latents, memory, places, 1)[:, -1:, 0]], 1)
            chain = self.embed2action(latents[:, 1:]) * varies
            stops = reached(chain[:, 0, :_POSITION], here, chain[:, -1, :_POSITION], threshold)
            lengths = torch.where(stops & (lengths > step + 1), step + 1, lengths)
            if (lengths <= step + 1).all():
                break
        return chain, lengths

    def _decode(
        self,
        x: torch.Tensor,
        memory: torch.Tensor,
        memory_places: torch.Tensor | float,
        futures: int | None = None,
    ) -> torch.Tensor:
        length = x.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        read = (self.places[:length], hidden, memory, memory_places)
        for layer in self.layers:
            x = layer(x, *read)
        out: torch.Tensor = self.norm(torch.stack([layer(x, *read) for layer in self._futures(futures)], 2))
        return out

    def _futures(self, count: int | None) -> Iterator[nn.Module]:
        yield from list(self.futures)[:count]


class ReverseChainHead(Head):
    """See the module's docstring; the memory is the visual tokens, the cognition and the proprioception."""

    def __init__(
        self, config: ReverseChainConfig, backbone: Backbone, proprio: int, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.motions = config.poses == "motions"
        self.see, self.know = (
            nn.Linear(size, config.hidden) for size in (backbone.perception_size, backbone.width)
        )
        self.feel = nn.Linear(proprio, config.hidden)
        # of motions the chain ends with the present itself
        self.chain = ReverseChain(config, shape[1], shape[0] + self.motions)
        if not self.motions:
            self.here = nn.Linear(proprio, _POSITION)

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """L1 of the chain's actions and, weighted, of its latents, averaged over the steps that exist."""
        valid, varies = weight.any(-1), weight.flatten(0, 1).any(0)
        actions = actions.float().masked_fill(~(valid[..., None] & varies), 0.0)
        chain, counted = self._target(actions, valid)
        latents = self.chain.teacher_forced(chain, self._memory(features))
        loss = latents.new_zeros(())
        for i, latent in enumerate(latents.unbind(2)):
            target, there = chain[:, i:], counted[:, i:]
            if not target.shape[1]:
                break
            predicting = latent[:, : target.shape[1]]
            error = (self.chain.embed2action(predicting).float() - target).abs()
            loss = loss + masked_mean(error, there[..., None] & varies)
            distance = (predicting - self.chain.action2embed(target)).float().abs().mean(-1)
            loss = loss + self.config.latent_weight * masked_mean(distance, there)
        if not self.motions:
            off = (self.here(features.proprio) - actions[:, 0, :_POSITION]).float().abs()
            loss = loss + masked_mean(off, (valid[:, :1] & varies[:_POSITION]).expand_as(off))
        return loss

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        memory = self._memory(features)
        here = memory.new_zeros(len(memory), _POSITION) if self.motions else self.here(features.proprio)
        varies = 1.0 if self.action_varies is None else self.action_varies.to(memory.dtype)
        threshold = self.config.threshold if self.config.threshold is not None else _THRESHOLDS[self.config.poses]
        threshold /= self.shape[0] if self.motions else 1
        chain, lengths = self.chain.generate(memory, here, threshold, varies=varies)
        return self._actions(chain.float(), lengths)

    def _memory(self, features: Features) -> torch.Tensor:
        known = torch.stack([self.know(features.cognition), self.feel(features.proprio)], 1)
        return self.chain.encode(torch.cat([self.see(features.perception), known], 1))

    def _target(self, actions: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chains [B, T, A] back from the keyframes of chunks [B, C, A], and bool [B, T], the steps that exist."""
        poses = self._poses(actions)
        ends = self._first_keyframes(actions, valid)
        if self.motions:  # the present, whose gripper is that of the first action
            present = (
                F.pad(poses[:, :1, -1:], (poses.shape[2] - 1, 0)) if self.config.gripper else poses[:, :1] * 0
            )
            poses, ends = torch.cat([present, poses], 1), ends + 1
        place = ends[:, None] - torch.arange(poses.shape[1], device=poses.device)
        chain = poses.gather(1, place.clamp(min=0)[..., None].expand_as(poses))
        counted = (place >= 0) & valid.any(1, keepdim=True)
        return chain.masked_fill(~counted[..., None], 0.0), counted

    def _first_keyframes(self, actions: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """int64 [B], the step of each chunk's first keyframe; 0 for a chunk without valid steps."""
        found = []
        for chunk, length in zip(actions.cpu().numpy(), valid.sum(1).tolist(), strict=True):
            moves = chunk[:length, : -1 if self.config.gripper else None]
            velocity = moves if self.motions else np.gradient(moves, axis=0) if length > 1 else moves * 0
            gripper = chunk[:length, -1] > 0 if self.config.gripper else np.zeros(length)
            found.append(keyframes(velocity, gripper, self.config.still)[0] if length else 0)
        return torch.tensor(found, device=actions.device)

    def _poses(self, actions: torch.Tensor) -> torch.Tensor:
        if not self.motions:
            return actions
        poses = actions.cumsum(1) / self.shape[0]
        return torch.cat([poses[..., :-1], actions[..., -1:]], -1) if self.config.gripper else poses

    def _actions(self, chain: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Chunks [B, C, A] of generated chains; behind the keyframe they hold still."""
        steps = self.shape[0]
        first = 2 if self.motions else 1  # the chain's last step is the present itself
        place = (lengths[:, None] - first - torch.arange(steps, device=chain.device)).clamp(min=0)
        poses = chain.gather(1, place[..., None].expand(-1, -1, chain.shape[2]))
        if not self.motions:
            return poses
        actions = poses.diff(dim=1, prepend=torch.zeros_like(poses[:, :1])) * steps
        return torch.cat([actions[..., :-1], poses[..., -1:]], -1) if self.config.gripper else actions


def keyframes(
    velocity: npt.NDArray[np.floating], gripper: npt.NDArray[np.generic], still: float = 0.01
) -> list[int]:
    """The keyframes of an episode: where the gripper changes, where the hand has come to rest, and the last step.

    A rest has no gripper change near it, and no rest follows another within 4 steps. A keyframe next to the last
    step is left out.

    Args:
        velocity: [T, J], of joints or of the hand.
        gripper: [T], open or closed.
        still: velocity in every dimension up to which a step is at rest, in its units.
    """
    last, pause, found = len(gripper) - 1, 0, list[int]()
    rests = (np.abs(velocity) <= still).all(1)
    for i in range(1, last):
        unchanged = i < last - 1 and i >= 2 and (gripper[i - 2 : i + 2] == gripper[i]).all()
        stopped = bool(pause <= 0 and rests[i] and unchanged)
        pause = _PAUSE if stopped else pause - 1
        if stopped or gripper[i] != gripper[i - 1]:
            found.append(i)
    if found and found[-1] == last - 1:
        found.pop()
    return [*found, last]


def reached(key: torch.Tensor, here: torch.Tensor, current: torch.Tensor, threshold: float) -> torch.Tensor:
    """bool [B]: has a chain from `key` come back to `here`? All are positions [B, 3].

    It has if `current` is as far from the keyframe as `here` is, up to `threshold`, and on the same side of it.
    """
    whole, gone = key - here, key - current
    near: torch.Tensor = whole.norm(dim=-1) - gone.norm(dim=-1) < threshold
    return near & ((whole * gone).sum(-1) >= 0)
