"""Reasoning of Embodied Chain-of-Thought beside the episodes of any dataset: docs/ecot.md."""

from ipvla.data.reasoning.episodes import Coverage, ReasonedSource, ReasoningConfig
from ipvla.data.reasoning.store import ReasoningStore, open_store

__all__ = ["Coverage", "ReasonedSource", "ReasoningConfig", "ReasoningStore", "open_store"]
