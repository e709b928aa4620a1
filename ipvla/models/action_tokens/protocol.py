"""The ActionTokenizer protocol: chunks of normalised actions to tokens, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import draccus
import torch
from torch import nn


class ActionTokenError(ValueError):
    """Tokens that mean no action; the message names the row, the value and why."""


class ActionTokenizer(nn.Module):
    """Chunks float32 [B, C, A] in normalised units to tokens int64 [B, L], NO_TOKEN past their ends, and back.

    Only what varies in the dataset comes here: constant action dimensions are left out before.

    Attributes:
        vocabulary: V; tokens are 0..V-1.
        fixed: every chunk has `longest(C, A)` tokens; else a token V ends them, which `encode` leaves out.
    """

    vocabulary: int
    fixed: bool = True

    @property
    def identity(self) -> str:
        """What decides the meaning of its tokens, weights aside."""
        return type(self).__name__

    def check(self, chunk: int, action_dim: int | None) -> None:
        """ValueError in one line for chunks of so many actions, and dimensions if known, that it cannot take."""

    def longest(self, chunk: int, action_dim: int) -> int:
        """L, the most tokens that a chunk can have, without an end token."""
        raise NotImplementedError

    def encode(self, chunks: torch.Tensor) -> torch.Tensor:
        """Tokens of chunks, without an end token."""
        raise NotImplementedError

    def decode(self, tokens: torch.Tensor, chunk: int, action_dim: int) -> torch.Tensor:
        """The chunks that tokens mean. ActionTokenError for tokens that mean none: no action is made up."""
        raise NotImplementedError

    def expected(self, shares: torch.Tensor, chunk: int, action_dim: int) -> torch.Tensor:
        """Chunks of shares float32 [B, L, V] of the tokens at each place; differentiable. ValueError for none."""
        raise ValueError(
            f"{self.identity[:60]}: the mean of its tokens is no chunk, and a probe or Fisher information needs "
            "one; choose tokenizer bins or rvq, or a method without"
        )

    def weight(self, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """bool [B, L], the tokens that a loss counts, from valid bool [B, C]; by default a chunk's all or none."""
        return valid.any(1, keepdim=True).expand_as(tokens)

    def legal(self, tokens: torch.Tensor, chunk: int, action_dim: int) -> torch.Tensor | None:
        """bool [B, V + 1], which tokens may follow int64 [B, i]; None for all. Column V is the end."""
        return None

    def save(self, directory: Path) -> None:
        """Writes what `file` of its config reads; nothing if the config says it all."""


@dataclass(frozen=True)
class ActionTokenizerConfig(draccus.ChoiceRegistry):
    """A choice by `type`: one of the tokenizers of this folder."""

    @property
    def bounded(self) -> bool:
        """Does it give actions in [-1, 1] only?"""
        return False

    def build(self) -> ActionTokenizer:
        """ValueError in one line if its file is missing, damaged, or of another vocabulary."""
        raise NotImplementedError

    def beside(self, directory: Path) -> ActionTokenizerConfig:
        """The same with its file at `directory`, where `ActionTokenizer.save` wrote."""
        return self


def refuse_outside(tokens: torch.Tensor, vocabulary: int) -> None:
    """ActionTokenError if one of the tokens is outside 0..vocabulary-1."""
    wrong = (tokens < 0) | (tokens >= vocabulary)
    if wrong.any():
        row = int(wrong.flatten(1).any(1).nonzero()[0])
        found = int(tokens[row][wrong[row]][0])
        raise ActionTokenError(f"row {row} has token {found}, and action tokens are 0..{vocabulary - 1}")


def vocabulary_ids(tokens: torch.Tensor, vocabulary: int, skip: int = 0) -> torch.Tensor:
    """Token k -> id `vocabulary - 1 - skip - k`: the last ids of a language model's vocabulary, backwards.

    OpenVLA's layout with skip 64 of 32,064 ids (padding), pi0-FAST's with 128 of 257,152 (segmentation tokens),
    RDT2's with 0. The function is its own inverse.
    """
    return vocabulary - 1 - skip - tokens
