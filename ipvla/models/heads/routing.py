"""Which language layer a block of the head reads: a fixed map f, or a mix that is learned and begins as f.

With h_l the states of the L layers that are read, and rho_i in [0, 1] a learned number per block that starts at 0:

    w_i = (1 - rho_i) onehot(f(i)) + rho_i m_i         the weights of block i, which sum to 1
    c_i = sum_l w_il LN(h_l)                           what it attends to

    static   m_i = softmax(W_i), the same for every observation (ELMo, arXiv 1802.05365, with a row per block)
    sample   m_i = softmax of an MLP of [mean of LN(h_f(i)) over the tokens, cognition]
    topk     the same with all but the k largest left out, and a term of the loss that spreads the use of layers
             (Shazeer et al., arXiv 1701.06538; in the form of arXiv 2101.03961): L sum_l share_l probability_l

LN stands before the mix, because the size of the residual stream grows with depth. A linear step of rho beyond
[0, 1] is cut off in the forward pass alone, so that it can return.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from ipvla.choices import did_you_mean

ROUTINGS: Final = ("fixed", "static", "sample", "topk")


@dataclass(frozen=True)
class RoutingConfig:
    """How blocks choose among layers.

    Attributes:
        type: fixed, static, sample or topk.
        k: layers that a block reads at most, for topk.
        balance: weight of the term that spreads the use of layers, for topk; 0 for none.
        hidden: width of the MLP, for sample and topk.
    """

    type: str = "fixed"
    k: int = 2
    balance: float = 0.01
    hidden: int = 64

    def __post_init__(self) -> None:
        if self.type not in ROUTINGS:
            raise ValueError(f"head.routing.type: {self.type!r} is unknown; {did_you_mean(self.type, ROUTINGS)}")
        if self.k < 1 or self.hidden < 1 or self.balance < 0:
            raise ValueError(
                f"head.routing.k {self.k} and hidden {self.hidden} must be at least 1, balance {self.balance} at "
                "least 0"
            )

    @property
    def learned(self) -> bool:
        return self.type != "fixed"

    def build(self, chosen: tuple[int, ...], layers: int, width: int) -> Routing:
        """A router for `layers` states of this width, f(i) = chosen[i]. ValueError if k exceeds the layers."""
        if self.type == "topk" and self.k > layers:
            raise ValueError(f"head.routing.k is {self.k}, and only {layers} layers are read; lower it")
        return Routing(self, chosen, layers, width)


@dataclass(frozen=True)
class Routes:
    """One batch's choice.

    Attributes:
        weights: w, float32 [B, blocks, L], each row a distribution.
        probabilities: of the layers before the k largest are taken, the same shape; None if all are mixed.
    """

    weights: torch.Tensor
    probabilities: torch.Tensor | None = None

    def balance(self, rows: torch.Tensor) -> torch.Tensor:
        """The term that spreads the use of layers, over rows bool [B]: 1 if all are used alike, L at most."""
        assert self.probabilities is not None
        layers = self.weights.shape[-1]
        chosen = (self.weights > 0).float()
        share = chosen / chosen.sum(-1, keepdim=True)
        of_rows = rows[:, None, None] / (rows.sum().clamp(min=1) * self.weights.shape[1])
        used, probable = ((x * of_rows).sum((0, 1)) for x in (share, self.probabilities))
        return layers * (used * probable).sum()

    @property
    def entropy(self) -> torch.Tensor:
        """Mean over rows and blocks, in nats: 0 for one layer each, log L for all alike."""
        entropy: torch.Tensor = -torch.special.xlogy(self.weights, self.weights).sum(-1).mean()
        return entropy


class Routing(nn.Module):
    """See the module's docstring; states float [B, L, N, D] as they were normalised, cognition [B, D]."""

    map: torch.Tensor

    def __init__(self, config: RoutingConfig, chosen: tuple[int, ...], layers: int, width: int) -> None:
        super().__init__()
        self.config, self.chosen = config, list(chosen)
        blocks, places = len(chosen), torch.tensor(chosen)
        self.register_buffer("map", nn.functional.one_hot(places, layers).float(), persistent=False)
        if config.learned:
            self.share = nn.Parameter(torch.zeros(blocks))
        if config.type == "static":
            self.logits = nn.Parameter(torch.zeros(blocks, layers))
        elif config.learned:
            self.ask = nn.Linear(2 * width, config.hidden)
            self.block = nn.Parameter(torch.randn(blocks, config.hidden) * 0.02)
            self.answer = nn.Linear(config.hidden, layers)

    def routes(self, states: torch.Tensor, valid: torch.Tensor, cognition: torch.Tensor) -> Routes:
        """The weights for states of which bool [B, N] are no padding."""
        if not self.config.learned:
            return Routes(self.map.expand(len(states), -1, -1))
        if self.config.type == "static":
            mixed, probabilities = self.logits.softmax(-1).expand(len(states), -1, -1), None
        else:
            mean = (states[:, self.chosen] * valid[:, None, :, None]).sum(2) / valid.sum(1)[:, None, None]
            asked = torch.cat([mean, cognition[:, None].expand_as(mean)], -1)
            logits = self.answer(nn.functional.gelu(self.ask(asked) + self.block)).float()
            mixed, probabilities = logits.softmax(-1), None
            if self.config.type == "topk":
                least = logits.topk(self.config.k, -1).values[..., -1:]
                probabilities, mixed = mixed, logits.masked_fill(logits < least, -torch.inf).softmax(-1)
        share = self.share + (self.share.clamp(0, 1) - self.share).detach()
        return Routes(self.map + share[:, None] * (mixed - self.map), probabilities)

    def mix(self, states: torch.Tensor, routes: Routes) -> torch.Tensor:
        """[B, blocks, N, D]."""
        if not self.config.learned:
            return states[:, self.chosen]
        return torch.einsum("bil,blnd->bind", routes.weights.to(states.dtype), states)
