"""Statistics as LeRobotDataset v3 keeps them: per episode, and of the dataset as the aggregate of its episodes.

Definitions: lerobot 0.4, `datasets/compute_stats.py`. Numbers: over the steps, one value per dimension. Pictures:
over the pixels of a sample of frames, one value per channel, [3, 1, 1], in [0, 1]. A dataset's quantiles are the
means of its episodes' quantiles, weighted by their counts. Two things differ: an episode's quantiles are exact
here and estimated there, and the standard deviation of pictures is right here (there, squares of uint8 overflow).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from ipvla.data.pictures import EncodedPictures, Pictures
from ipvla.data.source import Steps

QUANTILES: Final = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
#: Frames of an episode whose pixels are counted.
SAMPLED_FRAMES = 16

Row: TypeAlias = "npt.NDArray[np.float64]"
#: min, max, mean, std, count and the quantiles of one feature.
Moments: TypeAlias = "dict[str, Row]"


def episode_statistics(steps: Mapping[str, Steps], depths: Collection[str] = ()) -> dict[str, Moments]:
    """Of one episode's features; texts have none.

    Args:
        depths: names of those that are depth, whose one channel counts as a share of 65535 units, [1, 1, 1].

    Raises:
        ValueError: a picture cannot be decoded.
    """
    moments = {}
    for name, values in steps.items():
        if isinstance(values, np.ndarray):
            moments[name] = _of_numbers(values)
        elif name in depths and isinstance(values, EncodedPictures):
            moments[name] = _of_depth(values)
        elif not isinstance(values, tuple):
            moments[name] = _of_pictures(values)
    return moments


def aggregate(parts: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Moments]:
    """Of several episodes, or aggregates, together; all have the same features."""
    return {name: _aggregate([part[name] for part in parts]) for name in parts[0]}


def json_values(moments: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of numbers; counts are whole."""
    return {
        name: np.asarray(value, np.int64 if name == "count" else np.float64).tolist()
        for name, value in moments.items()
    }


def _of_numbers(values: npt.NDArray[Any]) -> Moments:
    rows = np.asarray(values, np.float64).reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
    return {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": rows.mean(0),
        "std": rows.std(0),
        "count": np.array([len(values)], np.float64),
        **{name: np.quantile(rows, q, axis=0) for name, q in QUANTILES.items()},
    }


def _sampled(pictures: Pictures) -> npt.NDArray[np.int64]:
    return np.unique(
        np.linspace(0, len(pictures) - 1, min(len(pictures), SAMPLED_FRAMES)).round().astype(np.int64)
    )


def _of_depth(pictures: EncodedPictures) -> Moments:
    sampled = _sampled(pictures)
    units = np.concatenate([pictures.depth(int(t)).ravel() for t in sampled])
    moments = {
        name: value.reshape(1, 1, 1) for name, value in _of_numbers(units / 65535).items() if name != "count"
    }
    return {**moments, "count": np.array([len(sampled)], np.float64)}


def _of_pictures(pictures: Pictures) -> Moments:
    sampled = _sampled(pictures)
    levels = np.zeros((3, 256), np.int64)
    for t in sampled:
        frame = pictures.decode(int(t))
        for channel in range(3):
            levels[channel] += np.bincount(frame[..., channel].ravel(), minlength=256)
    channels = [_of_levels(each) for each in levels]
    moments = {name: np.array([channel[name] for channel in channels]).reshape(3, 1, 1) for name in channels[0]}
    return {**moments, "count": np.array([len(sampled)], np.float64)}


def _of_levels(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """Of a histogram of the 256 levels."""
    level = np.arange(256) / 255
    share = counts / counts.sum()
    mean = float(level @ share)
    cumulative = share.cumsum()
    present = np.flatnonzero(counts)
    return {
        "min": float(level[present[0]]),
        "max": float(level[present[-1]]),
        "mean": mean,
        "std": float(np.sqrt(((level - mean) ** 2) @ share)),
        **{name: float(level[np.searchsorted(cumulative, q).clip(max=255)]) for name, q in QUANTILES.items()},
    }


def _aggregate(parts: Sequence[Mapping[str, Any]]) -> Moments:
    stacked = {name: np.stack([np.asarray(part[name], np.float64) for part in parts]) for name in parts[0]}
    count = stacked.pop("count")
    weight = (count / count.sum()).reshape(-1, *(1 for _ in stacked["mean"].shape[1:]))
    mean = (stacked["mean"] * weight).sum(0)
    variance = ((stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2) * weight).sum(0)
    return {
        "min": stacked["min"].min(0),
        "max": stacked["max"].max(0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": count.sum(0),
        **{name: (stacked[name] * weight).sum(0) for name in QUANTILES if name in stacked},
    }
