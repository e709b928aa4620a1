"""OpenVLA's uniform bins (arXiv 2406.09246): a token per action and dimension, row by row.

`numpy.digitize(a, linspace(-1, 1, 256))` gives d in 1..256, the token is d - 1, which stands at id 31999 - token
of OpenVLA's vocabulary (`vocabulary_ids` of 32,064 ids, 64 of them skipped). Decoding reads the centre of the bin:
there are 255, and token 255, which only 1.0 gets, reads as 254. A round trip errs by at most 1/255. OpenVLA reads
every other id as one of the outermost bins; here it is an `ActionTokenError`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ipvla.models.action_tokens.protocol import (
    ActionTokenError,
    ActionTokenizer,
    ActionTokenizerConfig,
    refuse_outside,
)

NUM_BINS = 256


def action_bins(actions: torch.Tensor) -> torch.Tensor:
    """Normalised actions -> bin index int64 0..255; values outside [-1, 1] go to the outermost bins."""
    edges = torch.linspace(-1, 1, NUM_BINS, device=actions.device, dtype=torch.float64)
    return torch.bucketize(actions.double().clamp(-1, 1), edges, right=True) - 1


def bin_centres(bins: torch.Tensor) -> torch.Tensor:
    """Bin index int64 -> the bin's centre, float32 in (-1, 1); index 255 holds only 1.0 and reads as 254."""
    return ((bins.clamp(0, NUM_BINS - 2).double() + 0.5) * 2 / (NUM_BINS - 1) - 1).float()


@ActionTokenizerConfig.register_subclass("bins")
@dataclass(frozen=True)
class BinTokensConfig(ActionTokenizerConfig):
    """Has no settings."""

    @property
    def bounded(self) -> bool:
        return True

    def build(self) -> BinTokens:
        return BinTokens()


class BinTokens(ActionTokenizer):
    """See the module's docstring; L = C * A."""

    vocabulary = NUM_BINS

    def longest(self, chunk: int, action_dim: int) -> int:
        return chunk * action_dim

    def encode(self, chunks: torch.Tensor) -> torch.Tensor:
        return action_bins(chunks).flatten(1)

    def decode(self, tokens: torch.Tensor, chunk: int, action_dim: int) -> torch.Tensor:
        if tokens.shape[1] != chunk * action_dim:
            raise ActionTokenError(
                f"{tokens.shape[1]} tokens, and a chunk of {chunk} actions with {action_dim} dimensions has "
                f"{chunk * action_dim}"
            )
        refuse_outside(tokens, NUM_BINS)
        return bin_centres(tokens).view(-1, chunk, action_dim)

    def expected(self, shares: torch.Tensor, chunk: int, action_dim: int) -> torch.Tensor:
        centres = bin_centres(torch.arange(NUM_BINS, device=shares.device))
        return (shares @ centres).view(-1, chunk, action_dim)

    def weight(self, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Those of actions that exist."""
        return valid.repeat_interleave(tokens.shape[1] // valid.shape[1], 1)
