"""LeRobotDataset v3: read from local disks and object storage, and written as lerobot reads it."""

from ipvla.data.lerobot.encoder import VideoSettings
from ipvla.data.lerobot.format import TASK, Layout
from ipvla.data.lerobot.source import LeRobotSource

__all__ = ["TASK", "Layout", "LeRobotSource", "VideoSettings"]
