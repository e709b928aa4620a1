"""Information-preserving mechanisms: one file each, chosen by `memory.type`."""

from ipvla.models.memory.gru import GRUMemoryConfig
from ipvla.models.memory.none import NoMemoryConfig
from ipvla.models.memory.protocol import MemoryConfig, MemoryModule

__all__ = ["GRUMemoryConfig", "MemoryConfig", "MemoryModule", "NoMemoryConfig"]
