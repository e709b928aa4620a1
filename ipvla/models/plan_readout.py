"""An auxiliary loss: the plan's words, read from the cognition that memory has enriched.

While a cue is shown and while the arm must wait, the action loss says nothing about what to remember.
Demonstrations that carry reasoning do: at every step, each token of the plan that holds then is predicted from
that step's enriched cognition z alone,

    logits of token i = (W_i norm(z)) . E / sqrt(D),   loss = mean cross-entropy over the plan's tokens

with one W_i [D, D] per place i and word embeddings E of its own. It is used in training only: a rollout does not
know it. That reasoning helps a policy that never writes it down in rollout is what ECoT-Lite found (Chen et al.,
arXiv 2505.08243).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.types import NO_TOKEN


@dataclass(frozen=True)
class PlanReadoutConfig:
    """tokens: longest plan, in the backbone's tokens; weight: of this loss beside the action's."""

    tokens: int = 16
    weight: float = 0.05

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"model.plan_readout.tokens is {self.tokens}; it must be at least 1")
        if self.weight <= 0:
            raise ValueError(
                f"model.plan_readout.weight is {self.weight}; it must be above 0, or set plan_readout to null"
            )

    def build(self, width: int, vocabulary: int) -> PlanReadout:
        return PlanReadout(self, width, vocabulary)


class PlanReadout(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: PlanReadoutConfig, width: int, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(width)
        self.place = nn.Linear(width, config.tokens * width)
        self.words = nn.Embedding(vocabulary, width)

    def loss(self, cognition: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
        """Of cognition [B, D] and plans int64 [B, Lp], NO_TOKEN past their ends; 0 if there is no plan at all."""
        asked = self.place(self.norm(cognition)).reshape(len(plan), -1, cognition.shape[-1])
        asked = asked[:, : plan.shape[1]]
        planned = plan != NO_TOKEN
        if not planned.any():
            return F.mse_loss(asked, asked)  # 0, with every weight in the graph
        logits = asked[planned] @ self.words.weight.T * cognition.shape[-1] ** -0.5
        loss: torch.Tensor = self.config.weight * F.cross_entropy(logits.float(), plan[planned])
        return loss
