"""`dataset_sheet.html`: a dataset's card with thumbnails, histograms of its actions and texts, in one file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluators.dataset_card import ROWS, DatasetCard, card_lines, statistics_rows
from evaluators.dataset_sample import DatasetSample
from ipvla.data.standards.standard import EncodedEpisode
from ipvla.files import write_text

#: Frames of a strip, and their height in pixels.
_FRAMES, _HEIGHT = 8, 112
_QUALITY = 80
_BINS = 48


@dataclass(frozen=True)
class Strip:
    """Some frames of one episode.

    Attributes:
        number: the source's.
        task, instruction, steps: of the episode; `steps` are those that are kept.
        t: the control steps that are shown, counted from the first that is kept.
        frames: camera -> one JPEG data URI per t, "" for a picture that cannot be decoded.
        texts: (t, reasoning, question, answer) wherever one of them is another than before; "" for none.
    """

    number: int
    task: str
    instruction: str
    steps: int
    t: tuple[int, ...]
    frames: dict[str, tuple[str, ...]]
    texts: tuple[tuple[int, str, str, str], ...]

    @classmethod
    def of(cls, number: int, episode: EncodedEpisode) -> Strip:
        shown = sorted(set(np.linspace(0, len(episode) - 1, _FRAMES).round().astype(int).tolist()))
        return cls(
            number=number,
            task=episode.task,
            instruction=episode.instruction,
            steps=len(episode),
            t=tuple(shown),
            frames={camera: tuple(_frame(episode, t, camera) for t in shown) for camera in episode.pictures},
            texts=_texts(episode, shown),
        )


@dataclass(frozen=True)
class Histogram:
    """How often values of one action dimension occur.

    Attributes:
        values: from where to where, in the dataset's units, in words.
        heights: of the bars, in [0, 1]: the logarithm of 1 + count over that of the fullest bin.
        q01, q99: where they stand between the ends, in [0, 1].
    """

    values: str
    heights: tuple[float, ...]
    q01: float
    q99: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float32], q01: float, q99: float) -> Histogram:
        """Of values [N]; a single value gets bins of its own width."""
        low, high = float(values.min()), float(values.max())
        range_text = f"always {low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        if low == high:
            low, high = low - 0.5, high + 0.5
        counts, _ = np.histogram(values, bins=_BINS, range=(low, high))
        heights = np.log1p(counts) / np.log1p(counts.max())
        q01, q99 = (float(np.clip((q - low) / (high - low), 0, 1)) for q in (q01, q99))
        return cls(range_text, tuple(heights.round(3).tolist()), q01, q99)


def histograms(card: DatasetCard, sample: DatasetSample) -> list[Histogram]:
    """One per action dimension, of the sampled episodes."""
    values, whole = np.concatenate(sample.actions), card.statistics.action
    return [Histogram.of(values[:, d], float(whole.q01[d]), float(whole.q99[d])) for d in range(whole.dim)]


def write_sheet(card: DatasetCard, strips: Sequence[Strip], bars: Sequence[Histogram], path: Path) -> Path:
    """Writes the HTML, all pictures inline, to be read offline; it appears whole or not at all."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("dataset_sheet.html.j2").render(
        card=card,
        lines=list(card_lines(card)),
        rows=ROWS,
        features={
            "action": statistics_rows(card.statistics.action),
            "proprioception": statistics_rows(card.statistics.proprio),
        },
        histograms=bars,
        strips=strips,
    )
    return write_text(path, html)


def _frame(episode: EncodedEpisode, t: int, camera: str) -> str:
    try:
        frame = episode.image(t, camera)
    except ValueError:
        return ""
    width = max(1, round(frame.shape[1] * _HEIGHT / frame.shape[0]))
    small = cv2.resize(frame, (width, _HEIGHT), interpolation=cv2.INTER_AREA)
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _texts(episode: EncodedEpisode, shown: Sequence[int]) -> tuple[tuple[int, str, str, str], ...]:
    found: list[tuple[int, str, str, str]] = []
    for t in shown:
        row = tuple(field[t] if field else "" for field in (episode.reasoning, episode.questions, episode.answers))
        if any(row) and (not found or found[-1][1:] != row):
            found.append((t, row[0], row[1], row[2]))
    return tuple(found)
