"""Information-preserving mechanisms: one file each, chosen by `memory.type`."""

from ipvla.models.memory.bank import BankMemoryConfig
from ipvla.models.memory.chain import ChainMemoryConfig
from ipvla.models.memory.kv import KVMemoryConfig
from ipvla.models.memory.latent import LatentMemoryConfig
from ipvla.models.memory.prompt import PromptMemoryConfig
from ipvla.models.memory.protocol import MemoryConfig, MemoryModule, NoMemoryConfig
from ipvla.models.memory.recurrent import GRUMemoryConfig, LSTMMemoryConfig
from ipvla.models.memory.skill import SkillMemoryConfig
from ipvla.models.memory.window import WindowMemoryConfig

__all__ = [
    "BankMemoryConfig",
    "ChainMemoryConfig",
    "GRUMemoryConfig",
    "KVMemoryConfig",
    "LSTMMemoryConfig",
    "LatentMemoryConfig",
    "MemoryConfig",
    "MemoryModule",
    "NoMemoryConfig",
    "PromptMemoryConfig",
    "SkillMemoryConfig",
    "WindowMemoryConfig",
]
