"""RLDS datasets on disk: written and read through tfds in array_record format, without TensorFlow."""

from ipvla.data.rlds.episode import EncodedEpisode, Episode, EpisodeRecord
from ipvla.data.rlds.format import DatasetError, dataset_directory
from ipvla.data.rlds.reader import EpisodeDataset
from ipvla.data.rlds.writer import write_rlds

__all__ = [
    "DatasetError",
    "EncodedEpisode",
    "Episode",
    "EpisodeDataset",
    "EpisodeRecord",
    "dataset_directory",
    "write_rlds",
]
