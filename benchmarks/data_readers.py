"""Our side of `benchmarks.data`, as processes of their own, each of which prints one line of JSON.

python -m benchmarks.data_readers pictures DIRECTORY EPOCHS   # reads every picture: see `data.summary`
python -m benchmarks.data_readers lanes DIRECTORY             # resident MB after three epochs of windows
python -m benchmarks.data_readers lookup DIRECTORY ENTRIES    # median of 20,000 lookups, microseconds
"""

from __future__ import annotations

import time

_STARTED = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any  # noqa: E402

import psutil  # noqa: E402

#: Far less than the dataset decoded, so that what is cached has to be given up again.
_CACHE_BYTES = 32 << 20
_LOOKUPS = 20_000


def read_pictures(directory: str, epochs: int) -> dict[str, Any]:
    """Decodes every picture of an RLDS dataset."""
    from ipvla.data.rlds import RldsSource

    process, first_s, told = psutil.Process(), 0.0, []
    source = RldsSource(directory)
    cameras = [path for path, feature in source.features.items() if feature.kind == "image"]
    for _ in range(epochs):
        cpu, pictures = time.process_time(), 0
        for index in range(len(source)):
            trajectory = source.trajectory(index)
            for camera in cameras:
                encoded = trajectory.pictures(camera)
                pictures += sum(encoded.decode(t).ndim == 3 for t in range(len(encoded)))
            first_s = first_s or time.perf_counter() - _STARTED
        told.append({"pictures": pictures, "cpu_s": time.process_time() - cpu, "rss": process.memory_info().rss})
    return {"first_s": first_s, "epochs": told}


def resident_mb(directory: str) -> list[float]:
    """Of a process that reads windows of whole episodes, after each of three epochs."""
    from ipvla.data.conventions import Conventions
    from ipvla.data.dataset import open_dataset
    from ipvla.data.lanes import LaneConfig
    from ipvla.data.plan import PlanPosition
    from ipvla.data.transforms import PromptEncoder, Transforms

    dataset = open_dataset(directory, _CACHE_BYTES)
    conventions = Conventions(dataset.statistics(), dataset.cameras, image_size=224, chunk=8)
    transforms = Transforms(conventions, PromptEncoder(lambda text: [1], max_prompt_tokens=4))
    lanes = LaneConfig(lanes=4, window=8, stride=4).build(dataset, transforms)
    position, told = PlanPosition(), []
    for epoch in range(3):
        while position.epoch == epoch:
            lanes.batch(position)
            position = lanes.after(position)
        told.append(psutil.Process().memory_info().rss / 1e6)
    return told


def lookup_us(directory: Path, entries: int) -> float:
    """To find an episode at random in a large index that was saved and is mapped from its file."""
    import numpy as np

    from ipvla.data.rlds.index import EpisodeEntry, EpisodeIndex

    path = directory / "index.npy"
    made = (EpisodeEntry(n // 1000, 5_000_000 * n, 5_000_000, 100, f"task {n % 500}", "") for n in range(entries))
    EpisodeIndex.of(made).save(path)
    index = EpisodeIndex.load(path)
    assert index is not None
    times = []
    for number in np.random.default_rng(0).integers(0, entries, _LOOKUPS).tolist():
        start = time.perf_counter()
        index.place(number)
        times.append(time.perf_counter() - start)
    return 1e6 * median(times)


if __name__ == "__main__":
    kind, place, *numbers = sys.argv[1:]
    if kind == "pictures":
        print(json.dumps(read_pictures(place, int(numbers[0]))))
    else:
        print(json.dumps(resident_mb(place) if kind == "lanes" else lookup_us(Path(place), int(numbers[0]))))
