"""ECoT's datasets, RLDS episodes and a file of reasoning, as StarVLA's training reads them: docs/ecot.md."""

from ipvla.data.ecot.batches import FrameLoader, collate
from ipvla.data.ecot.config import EcotConfig, EcotSection, read_config
from ipvla.data.ecot.episodes import ReasonedSource
from ipvla.data.ecot.frames import FrameDataset
from ipvla.data.ecot.loader import get_vla_dataset_ecot, make_dataloader_ecot, save_dataset_statistics
from ipvla.data.ecot.store import ReasoningStore, open_store

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
