"""Memory of a process that reads windows of whole episodes: a process of its own for `benchmarks.data`.

    python -m benchmarks.data_lanes DIRECTORY

prints resident MB after each of three epochs, as a JSON list.
"""

from __future__ import annotations

import json
import sys

import psutil

from ipvla.data.conventions import Conventions
from ipvla.data.dataset import open_dataset
from ipvla.data.lanes import LaneConfig
from ipvla.data.plan import PlanPosition
from ipvla.data.prompt_encoder import PromptEncoder
from ipvla.data.transforms import Transforms

#: Far less than the dataset decoded, so that what is kept has to be given up again.
_CACHE_BYTES = 32 << 20


def resident_mb(directory: str) -> list[float]:
    """After each of three epochs."""
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


if __name__ == "__main__":
    print(json.dumps(resident_mb(sys.argv[1])))
