"""Our side of `benchmarks.data`: reads every picture of an RLDS dataset and says what it took.

    python -m benchmarks.data_reading DIRECTORY EPOCHS

prints one line of JSON, the fields of `Reading`.
"""

from __future__ import annotations

import time

_STARTED = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import psutil  # noqa: E402

from ipvla.data.rlds import RldsSource  # noqa: E402


@dataclass(frozen=True)
class Epoch:
    """One pass over a dataset.

    Attributes:
        pictures: that were decoded.
        cpu_s: CPU seconds of the process, all threads.
        rss: resident bytes of the process at its end.
    """

    pictures: int
    cpu_s: float
    rss: int


@dataclass(frozen=True)
class Reading:
    """What a process that does nothing but read took.

    Attributes:
        first_s: seconds from its start, imports included, to the first whole episode decoded.
        epochs: one after another.
    """

    first_s: float
    epochs: tuple[Epoch, ...]

    @property
    def pictures_per_cpu_s(self) -> float:
        """In the epochs after the first, which also builds what is built once."""
        later = self.epochs[1:] or self.epochs
        return sum(epoch.pictures for epoch in later) / sum(epoch.cpu_s for epoch in later)

    @property
    def rss(self) -> int:
        """The largest."""
        return max(epoch.rss for epoch in self.epochs)


def main() -> None:
    """As the module says."""
    directory, epochs = sys.argv[1], int(sys.argv[2])
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
    print(json.dumps({"first_s": first_s, "epochs": told}))


if __name__ == "__main__":
    main()
