"""How long it takes to find an episode in a large index: a process of its own for `benchmarks.data`.

    python -m benchmarks.data_lookup DIRECTORY ENTRIES

prints the median of 20,000 lookups at random, microseconds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

from ipvla.data.rlds.index import EpisodeEntry, EpisodeIndex

_LOOKUPS = 20_000


def lookup_us(directory: Path, entries: int) -> float:
    """Of an index that was saved and is mapped from its file."""
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
    print(lookup_us(Path(sys.argv[1]), int(sys.argv[2])))
