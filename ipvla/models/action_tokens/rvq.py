"""Residual vector quantisation of chunks, as RDT2's action tokenizer (arXiv 2602.03310).

The action's dimensions form parts (position, rotation, gripper), each with a network of its own:

    z [T, Z] = encoder(x [C, A])                       T = C / 2^levels
    r_1 = z;  e_d = W_in r_d;  k_d = argmin_k |norm(e_d) - norm(c_k)|^2;  q_d = W_out c_{k_d};  r_{d+1} = r_d - q_d
    x' = decoder(q_1 + ... + q_D)

    loss = reconstruction + 0.25 mean |e_d - c_{k_d}|^2 summed over d,    straight-through in the codes' space
    N <- .99 N + .01 n,   m <- .99 m + .01 sum e,   c = m / N, N smoothed (moving averages instead of a gradient)

Reconstruction is the mean square, or for rotations in 6-D form the geodesic angle over pi. Tokens: part after
part, latent after latent, depth after depth, T * (sum of depths) in all. Every row of tokens means a chunk.

Of the published training three things differ. Encoder and decoder train alone first: small latents would all be
drawn to a few codes otherwise. Then a quantiser's projections begin at the principal directions of a batch, and
its codes at vectors of it, which stay, since the moving averages begin there too. What decides which codes are
dead is in the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ipvla.files import foreign_file, nearby, one_line, read_record
from ipvla.models.action_tokens.protocol import (
    ActionTokenError,
    ActionTokenizer,
    ActionTokenizerConfig,
    refuse_outside,
)
from ipvla.models.saved_size import no_larger_than

_COMMITMENT = 0.25
_DECAY = 0.99
_EPSILON = 1e-5
_NORM_EPSILON = 1e-6


#: Halvings of time: more than any chunk has.
_MOST_LEVELS = 16


@ActionTokenizerConfig.register_subclass("rvq")
@dataclass(frozen=True)
class RVQTokensConfig(ActionTokenizerConfig):
    """file: directory of a trained tokenizer, from `ray_jobs.fit_tokens`."""

    file: Path | None = None

    def build(self) -> RVQTokens:
        if self.file is None:
            raise ValueError(
                "head.tokenizer.file is not given; train a tokenizer with python -m ray_jobs.fit_tokens "
                "--tokenizer.type rvq"
            )
        return RVQTokens.load(self.file).requires_grad_(False)

    def beside(self, directory: Path) -> RVQTokensConfig:
        return replace(self, file=directory)


@dataclass(frozen=True)
class RVQPart:
    """Dimensions that one network compresses.

    Attributes:
        dims: which, of those that vary in the dataset.
        depth: D, tokens per latent.
        rotation: they are rotations in 6-D form, six dimensions each.
    """

    dims: tuple[int, ...]
    depth: int = 4
    rotation: bool = False

    def __post_init__(self) -> None:
        if not self.dims or self.depth < 1:
            raise ValueError(f"an RVQ part has dims {self.dims} and depth {self.depth}; give at least one of each")
        if self.rotation and len(self.dims) % 6:
            raise ValueError(f"an RVQ part of rotations has {len(self.dims)} dims; give a multiple of 6")


@dataclass(frozen=True)
class RVQSettings:
    """Sizes.

    Attributes:
        chunk: C, a multiple of 2^levels.
        parts: together they have every dimension once.
        codes: K, codes per codebook; code_dim: their size.
        latent: Z; channels: of the first convolution, doubled at each of `levels` halvings of time.
        dead_after: training steps without a hit after which a code begins again at a vector of the batch.
    """

    chunk: int
    parts: tuple[RVQPart, ...]
    codes: int = 256
    code_dim: int = 16
    latent: int = 64
    channels: int = 32
    levels: int = 3
    dead_after: int = 64

    def __post_init__(self) -> None:
        for name in ("codes", "code_dim", "latent", "channels", "levels", "dead_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"rvq.{name} is {getattr(self, name)}; it must be at least 1")
        if self.levels > _MOST_LEVELS:
            raise ValueError(f"rvq.levels is {self.levels}; it must be at most {_MOST_LEVELS}")
        if self.code_dim > self.latent:
            raise ValueError(f"rvq.code_dim {self.code_dim} exceeds rvq.latent {self.latent}; lower it")
        if self.chunk < 1 or self.chunk % 2**self.levels:
            raise ValueError(
                f"model.chunk is {self.chunk}, and RVQ with {self.levels} levels takes multiples of "
                f"{2**self.levels}; change the chunk, or lower levels"
            )
        if sorted(d for part in self.parts for d in part.dims) != list(range(self.action_dim)):
            raise ValueError(
                f"rvq.parts have dims {[part.dims for part in self.parts]}; give each of 0..{self.action_dim - 1} "
                "once"
            )

    @property
    def action_dim(self) -> int:
        return sum(len(part.dims) for part in self.parts)

    @property
    def latents(self) -> int:
        """T."""
        return self.chunk >> self.levels


class _Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), [B, in, T] -> [B, out, T]."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, inside, _NORM_EPSILON), nn.GroupNorm(1, outside, _NORM_EPSILON)
        self.conv1 = nn.Conv1d(inside, outside, 3, padding=1)
        self.conv2 = nn.Conv1d(outside, outside, 3, padding=1)
        if inside != outside:
            self.nin_shortcut = nn.Conv1d(inside, outside, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        out: torch.Tensor = y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return out


class _Down(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = _Residual(inside, outside), _Residual(outside, outside)
        self.downsample = nn.ModuleDict({"conv": nn.Conv1d(outside, outside, 3, stride=2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block_2(self.downsample["conv"](F.pad(self.block_1(x), (0, 1))))
        return out


class _Up(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = _Residual(inside, inside), _Residual(inside, outside)
        convolution = nn.ConvTranspose1d(inside, inside, 3, stride=2, padding=1, output_padding=1)
        self.upsample = nn.ModuleDict({"conv_transpose": convolution})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block_2(self.upsample["conv_transpose"](self.block_1(x)))
        return out


class _Encoder(nn.Module):
    def __init__(self, dims: int, settings: RVQSettings) -> None:
        super().__init__()
        widths = [settings.channels * 2**i for i in range(settings.levels + 1)]
        self.conv_in = nn.Conv1d(dims, widths[0], 3, padding=1)
        for i in range(settings.levels):
            setattr(self, f"down_{i + 1}", _Down(widths[i], widths[i + 1]))
        self.norm_out = nn.GroupNorm(1, widths[-1], _NORM_EPSILON)
        self.conv_out = nn.Conv1d(widths[-1], settings.latent, 3, padding=1)
        self.levels = settings.levels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for i in range(self.levels):
            x = getattr(self, f"down_{i + 1}")(x)
        out: torch.Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class _Decoder(nn.Module):
    def __init__(self, dims: int, settings: RVQSettings) -> None:
        super().__init__()
        widths = [settings.channels * 2**i for i in range(settings.levels, -1, -1)]
        self.norm_in = nn.GroupNorm(1, settings.latent, _NORM_EPSILON)
        self.conv_in = nn.Conv1d(settings.latent, widths[0], 3, padding=1)
        for i in range(settings.levels):
            setattr(self, f"up_{i + 1}", _Up(widths[i], widths[i + 1]))
        self.conv_out = nn.Conv1d(widths[-1], dims, 3, padding=1)
        self.levels = settings.levels

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(F.silu(self.norm_in(z)))
        for i in range(self.levels):
            x = getattr(self, f"up_{i + 1}")(x)
        out: torch.Tensor = self.conv_out(x)
        return out


class Quantiser(nn.Module):
    """One codebook. `sizes` and `sums` are N and m of the moving averages, `idle` the steps since a code's hit."""

    codebook: torch.Tensor
    sizes: torch.Tensor
    sums: torch.Tensor
    idle: torch.Tensor
    started: torch.Tensor

    def __init__(self, latent: int, codes: int, code_dim: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(latent, code_dim), nn.Linear(code_dim, latent)
        codebook = torch.randn(codes, code_dim)
        self.register_buffer("codebook", codebook)
        self.register_buffer("sizes", torch.ones(codes))
        self.register_buffer("sums", codebook.clone())
        self.register_buffer("idle", torch.zeros(codes, dtype=torch.long))
        self.register_buffer("started", torch.tensor(False))

    def nearest(self, e: torch.Tensor) -> torch.Tensor:
        """int64 [...], the codes of e [..., code_dim], by angle."""
        return (F.normalize(e, dim=-1) @ F.normalize(self.codebook, dim=-1).T).argmax(-1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """q [..., latent] of codes int64 [...]."""
        return self.mean(F.one_hot(codes, len(self.codebook)).to(self.codebook.dtype))

    def mean(self, shares: torch.Tensor) -> torch.Tensor:
        """q [..., latent] of codes with these shares [..., codes]."""
        mean: torch.Tensor = self.out_proj(shares @ self.codebook)
        return mean

    def forward(self, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of r [..., latent]: q, differentiable by passing straight through; the codes; the commitment; e."""
        e = self.in_proj(r)
        codes = self.nearest(e)
        chosen = self.codebook[codes]
        commitment = (e - chosen).square().mean()
        return self.out_proj(e + (chosen - e).detach()), codes, commitment, e.detach()

    @torch.no_grad()
    def update(self, e: torch.Tensor, codes: torch.Tensor, dead_after: int, generator: torch.Generator) -> None:
        """A training step's moving averages from e [N, code_dim]; dead codes begin again at some of these."""
        hits = F.one_hot(codes, len(self.codebook)).to(e.dtype)
        self.sizes.mul_(_DECAY).add_(hits.sum(0), alpha=1 - _DECAY)
        self.sums.mul_(_DECAY).add_(hits.T @ e, alpha=1 - _DECAY)
        total = self.sizes.sum()
        smoothed = (self.sizes + _EPSILON) / (total + len(self.codebook) * _EPSILON) * total
        self.codebook.copy_(self.sums / smoothed[:, None])
        self.idle.add_(1).masked_fill_(hits.any(0), 0)
        if (dead := self.idle >= dead_after).any():
            self._begin(dead, e, generator)

    @torch.no_grad()
    def start(self, r: torch.Tensor, generator: torch.Generator) -> None:
        """Once, from r [N, latent]: projections onto its principal directions and back, codes at vectors of it."""
        if self.started:
            return
        mean = r.mean(0)
        directions = torch.linalg.svd(r - mean, full_matrices=True)[2][: self.codebook.shape[1]]
        self.in_proj.weight.copy_(directions)
        self.in_proj.bias.copy_(-directions @ mean)
        self.out_proj.weight.copy_(directions.T)
        self.out_proj.bias.copy_(mean)
        self._begin(torch.ones_like(self.idle, dtype=torch.bool), self.in_proj(r), generator)
        self.started.fill_(True)

    def _begin(self, which: torch.Tensor, e: torch.Tensor, generator: torch.Generator) -> None:
        drawn = torch.randint(len(e), (int(which.sum()),), generator=generator).to(e.device)
        self.codebook[which] = self.sums[which] = e[drawn]
        self.sizes[which] = 1.0
        self.idle[which] = 0


class RVQNetwork(nn.Module):
    """Encoder, quantisers and decoder of one part; x float32 [B, C, dims], codes int64 [B, T, depth]."""

    def __init__(self, part: RVQPart, settings: RVQSettings) -> None:
        super().__init__()
        self.part, self.settings = part, settings
        self.encoder, self.decoder = _Encoder(len(part.dims), settings), _Decoder(len(part.dims), settings)
        self.quantizers = nn.ModuleList(
            Quantiser(settings.latent, settings.codes, settings.code_dim) for _ in range(part.depth)
        )

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, latent]."""
        latent: torch.Tensor = self.encoder(x.transpose(1, 2)).transpose(1, 2)
        return latent

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        left, codes = self.latent(x), []
        for quantiser in self._quantisers():
            codes.append(quantiser.nearest(quantiser.in_proj(left)))
            left = left - quantiser.values(codes[-1])
        return torch.stack(codes, -1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.expected(F.one_hot(codes, self.settings.codes).float())

    def expected(self, shares: torch.Tensor) -> torch.Tensor:
        """x of codes with these shares, float32 [B, T, depth, codes]."""
        pairs = zip(self._quantisers(), shares.unbind(-2), strict=True)
        return self._decoded(torch.stack([quantiser.mean(share) for quantiser, share in pairs]).sum(0))

    def loss(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Scalar; with a generator it is a training step, which moves the codes as well."""
        left = self.latent(x)
        z, commitment = torch.zeros_like(left), left.new_zeros(())
        for quantiser in self._quantisers():
            if generator is not None:
                quantiser.start(left.detach().flatten(0, -2), generator)
            q, codes, committed, e = quantiser(left)
            if generator is not None:
                quantiser.update(e.flatten(0, -2), codes.flatten(), self.settings.dead_after, generator)
            left, z, commitment = left - q, z + q, commitment + committed
        return self.reconstruction(self._decoded(z), x) + _COMMITMENT * commitment

    def continuous_loss(self, x: torch.Tensor) -> torch.Tensor:
        """Scalar loss of encoder and decoder without codes."""
        return self.reconstruction(self._decoded(self.latent(x)), x)

    def reconstruction(self, decoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Scalar distance of chunks [B, C, dims]."""
        return _angle(decoded, x) if self.part.rotation else F.mse_loss(decoded, x)

    def _decoded(self, z: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = self.decoder(z.transpose(1, 2)).transpose(1, 2)
        return decoded

    def _quantisers(self) -> Iterator[Quantiser]:
        for quantiser in self.quantizers:
            assert isinstance(quantiser, Quantiser)
            yield quantiser


class RVQTokens(ActionTokenizer):
    """See the module's docstring."""

    def __init__(self, settings: RVQSettings) -> None:
        super().__init__()
        self.settings, self.vocabulary = settings, settings.codes
        self.parts = nn.ModuleList(RVQNetwork(part, settings) for part in settings.parts)

    @property
    def identity(self) -> str:
        return f"RVQ {json.dumps(asdict(self.settings))}"

    def networks(self) -> Iterator[RVQNetwork]:
        for network in self.parts:
            assert isinstance(network, RVQNetwork)
            yield network

    def check(self, chunk: int, action_dim: int | None) -> None:
        fitted = (self.settings.chunk, self.settings.action_dim)
        if chunk != fitted[0] or action_dim not in (None, fitted[1]):
            now = f"{chunk} actions" + (f" with {action_dim} dimensions that vary" if action_dim else "")
            raise ValueError(
                f"the RVQ tokenizer was trained on chunks of {fitted[0]} actions with {fitted[1]} dimensions, and "
                f"model.chunk has {now}; train another, or change model.chunk"
            )

    def longest(self, chunk: int, action_dim: int) -> int:
        return self.settings.latents * sum(part.depth for part in self.settings.parts)

    @torch.no_grad()
    def encode(self, chunks: torch.Tensor) -> torch.Tensor:
        with torch.autocast(chunks.device.type, enabled=False):
            codes = [network.encode(chunks[..., list(network.part.dims)]) for network in self.networks()]
        return torch.cat([code.flatten(1) for code in codes], 1)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, chunk: int, action_dim: int) -> torch.Tensor:
        latents, depths = self.settings.latents, [part.depth for part in self.settings.parts]
        if tokens.shape[1] != latents * sum(depths):
            raise ActionTokenError(f"{tokens.shape[1]} tokens, and an RVQ chunk has {latents * sum(depths)}")
        refuse_outside(tokens, self.vocabulary)
        return self.expected(F.one_hot(tokens, self.vocabulary).float(), chunk, action_dim)

    def expected(self, shares: torch.Tensor, chunk: int, action_dim: int) -> torch.Tensor:
        latents, depths = self.settings.latents, [part.depth for part in self.settings.parts]
        actions = torch.zeros(len(shares), chunk, action_dim, device=shares.device)
        split = torch.split(shares, [latents * depth for depth in depths], 1)
        with torch.autocast(shares.device.type, enabled=False):
            for network, own in zip(self.networks(), split, strict=True):
                per_latent = own.reshape(len(own), latents, -1, self.vocabulary)
                actions[..., list(network.part.dims)] = network.expected(per_latent)
        return actions

    def fit(
        self,
        chunks: torch.Tensor,
        steps: int,
        batch: int = 256,
        lr: float = 1e-3,
        seed: int = 0,
        progress: Callable[[int, float], None] = lambda step, loss: None,
    ) -> None:
        """Trains on chunks float32 [N, C, A] with Adam; `progress` gets the step and its loss.

        The first fifth of the steps trains without codes, unless they have started.
        """
        generator = torch.Generator().manual_seed(seed)
        started = all(bool(quantiser.started) for net in self.networks() for quantiser in net._quantisers())
        optimizer = torch.optim.Adam(self.parameters(), lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            rows = torch.randint(len(chunks), (batch,), generator=generator)
            x = chunks[rows].to(next(self.parameters()).device)
            loss = torch.zeros((), device=x.device)
            for net in self.networks():
                own = x[..., list(net.part.dims)]
                coded = started or step >= steps // 5
                loss = loss + (net.loss(own, generator) if coded else net.continuous_loss(own))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            progress(step + 1, float(loss.detach()))

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps({"type": "rvq", **asdict(self.settings)}, indent=1))
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, directory / "model.safetensors")

    @classmethod
    def load(cls, directory: Path) -> Self:
        """What `save` wrote, moving averages and dead codes included. ValueError if it is missing or damaged."""
        try:
            described = read_record(path := directory / "config.json")
            described.pop("type")
            parts = tuple(RVQPart(**{**part, "dims": tuple(part["dims"])}) for part in described.pop("parts"))
            saved = load_file(path := directory / "model.safetensors")
            settings = RVQSettings(parts=parts, **described)
            with torch.device("meta"), no_larger_than(saved):
                cls(settings)  # takes no memory, and is refused if it would be too large
            tokenizer = cls(settings)
            tokenizer.load_state_dict(saved)
        except Exception as error:  # safetensors and torch raise their own
            found = nearby(directory, "config.json", "model.safetensors")
            reason = foreign_file(path) or one_line(error)
            meant = f"did you mean {found}? Otherwise " if found else ""
            raise ValueError(
                f"no RVQ tokenizer in {directory} ({path.name}: {reason}); {meant}give a "
                "directory that ray_jobs.fit_tokens wrote"
            ) from None
        return tokenizer


def one_part(action_dim: int, depth: int) -> tuple[RVQPart, ...]:
    """All dimensions in one network."""
    return (RVQPart(tuple(range(action_dim)), depth),)


def _rotation(x: torch.Tensor) -> torch.Tensor:
    """6-D rotations [..., 6] as matrices [..., 3, 3], by Gram-Schmidt (Zhou et al., arXiv 1812.07035)."""
    first = F.normalize(x[..., :3], dim=-1)
    second = x[..., 3:] - (first * x[..., 3:]).sum(-1, keepdim=True) * first
    second = F.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


def _angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean angle between 6-D rotations [..., 6 n] over pi; clamped, where its gradient would not be finite."""
    one, other = (_rotation(x.reshape(*x.shape[:-1], -1, 6)) for x in (a, b))
    cosine = ((one * other).sum((-2, -1)) - 1) / 2
    return cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos().mean() / torch.pi
