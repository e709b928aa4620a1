"""RLDS datasets on disk or in object storage: read and written without TensorFlow."""

from ipvla.data.rlds.format import dataset_directory
from ipvla.data.rlds.source import RldsSource
from ipvla.data.rlds.writer import write_rlds

__all__ = ["RldsSource", "dataset_directory", "write_rlds"]
