"""Reasoning as a second target: next-token loss on the words that a policy should think, beside its actions'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from integrations.starvla_ecot.chat_labels import IGNORED, ChatBatch
from ipvla.models.backbones.protocol import Backbone, padded
from ipvla.types import ModelInputs


@dataclass(frozen=True)
class LossScale:
    """`trainer.loss_scale`: total = vla * action loss + vlm_cot * language-modelling loss.

    Attributes:
        vla: weight of the action loss.
        vlm_cot: weight of the reasoning's; 0 trains on actions alone, and the words are not even computed.
    """

    vla: float = 1.0
    vlm_cot: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vla", "vlm_cot"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"trainer.loss_scale.{name} is {getattr(self, name)}; give a number of 0 or more")

    def total(
        self, action_loss: torch.Tensor, lm: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss to minimise, and what to log of it; `lm` is called only where it counts."""
        told: dict[str, Any] = {"action_loss": action_loss.detach(), "loss_scale.vlm_cot": self.vlm_cot}
        total = self.vla * action_loss
        if self.vlm_cot:
            words = lm()
            told["lm_loss"] = words.detach()
            total = total + self.vlm_cot * words
        return total, told


def lm_loss(model: Any, batch: ChatBatch) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens, each predicted from what stands before it; 0 if there are none.

    Args:
        model: a Hugging Face causal or vision-language model.
        batch: of `chat_batch`, on the model's device.
    """
    asked = batch.labels[:, 1:]
    counts = asked != IGNORED
    if not counts.any():
        return torch.zeros((), device=asked.device)
    logits = model(**batch.inputs).logits[:, :-1]
    return F.cross_entropy(logits[counts].float(), asked[counts])


def reasoning_loss(backbone: Backbone, inputs: ModelInputs, reasoning: Sequence[str]) -> torch.Tensor:
    """The same for the project's own backbones, whose prompts are in `inputs` [B, ...].

    Samples with reasoning "" take no part; 0 if all are such. ValueError if a reply is too long for the backbone.
    """
    rows = [i for i, text in enumerate(reasoning) if text]
    if not rows:
        return torch.zeros((), device=inputs.input_ids.device)
    replies = padded([backbone.tokenize_text(reasoning[i]) for i in rows]).to(inputs.input_ids.device)
    return backbone.write_loss(inputs.map(lambda x: x[rows]), replies)
