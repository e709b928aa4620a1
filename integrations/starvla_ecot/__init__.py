"""ECoT's datasets, RLDS episodes and a file of reasoning, as StarVLA's training reads them: docs/ecot.md."""

from integrations.starvla_ecot.batches import FrameLoader, collate
from integrations.starvla_ecot.config import EcotConfig, EcotSection, read_config
from integrations.starvla_ecot.frames import FrameDataset
from integrations.starvla_ecot.loader import get_vla_dataset_ecot, make_dataloader_ecot, save_dataset_statistics
from ipvla.data.reasoning.episodes import ReasonedSource
from ipvla.data.reasoning.store import ReasoningStore, open_store

__all__ = [
    "EcotConfig",
    "EcotSection",
    "FrameDataset",
    "FrameLoader",
    "ReasonedSource",
    "ReasoningStore",
    "collate",
    "get_vla_dataset_ecot",
    "make_dataloader_ecot",
    "open_store",
    "read_config",
    "save_dataset_statistics",
]
