"""Action tokenizers: one file each, chosen by `head.tokenizer.type`."""

from ipvla.models.action_tokens.bins import BinTokensConfig
from ipvla.models.action_tokens.fast import FastTokensConfig
from ipvla.models.action_tokens.protocol import ActionTokenError, ActionTokenizer, ActionTokenizerConfig
from ipvla.models.action_tokens.rvq import RVQTokensConfig

__all__ = [
    "ActionTokenError",
    "ActionTokenizer",
    "ActionTokenizerConfig",
    "BinTokensConfig",
    "FastTokensConfig",
    "RVQTokensConfig",
]
