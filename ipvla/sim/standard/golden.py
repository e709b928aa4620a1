"""LIBERO's scenes with the pinned versions, to find out where they are or look otherwise.

Stored is one picture per task: the first initial state at rest, 128 pixels wide, as a hash and in small. A hash
differs as soon as a renderer rounds otherwise, the small pictures where something is seen: from MuJoCo 3.3.3 on,
floors are darker. A picture says which assets it shows; only those of the same assets are compared. Stored are
also the initial states that never were what their tasks say: some of libero_10 and libero_90 begin with a bottle
that falls off the table.

Import only after `ipvla.sim.libero.configure`, e.g. once a simulator is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from ipvla.sim.simulator import Simulator, Split
from ipvla.sim.standard.premises import settle

_FILE: Final = Path(__file__).with_name("golden.npz")
_SIDE_PX, _SMALL_PX = 128, 16


@dataclass(frozen=True)
class Frame:
    """A picture.

    Attributes:
        sha256: hash of its pixels.
        small: uint8 [16, 16, 3], its pixels averaged.
        assets: `assets_version` of what it shows.
    """

    sha256: str
    small: npt.NDArray[np.uint8]
    assets: str = ""

    def difference(self, other: Frame) -> float:
        """Mean absolute difference of the small pictures, in [0, 255]."""
        return float(np.abs(self.small.astype(np.float64) - other.small).mean())


def take(simulator: Simulator, assets: str) -> Frame:
    """The picture of a task, drawn as "exact" with the assets of this version."""
    simulator.reset(Split.HELD_OUT.seed(0))
    settle(simulator)
    pixels = simulator.frame(_SIDE_PX)
    small = cv2.resize(pixels, (_SMALL_PX, _SMALL_PX), interpolation=cv2.INTER_AREA)
    return Frame(hashlib.sha256(pixels.tobytes()).hexdigest(), np.asarray(small, np.uint8), assets)


@dataclass(frozen=True)
class Golden:
    """The stored scenes.

    Attributes:
        frames: `SUITE/TASK` -> its picture.
        violated: `SUITE/TASK/TRIAL` of the initial states that are not what their tasks say.
    """

    frames: Mapping[str, Frame]
    violated: frozenset[str] = frozenset()


def golden() -> Golden:
    """With the pinned versions of everything."""
    if not _FILE.exists():
        return Golden({})
    with np.load(_FILE, allow_pickle=False) as stored:
        assets = stored["assets"] if "assets" in stored else [""] * len(stored["names"])
        frames = zip(stored["names"], stored["sha256"], stored["small"], assets, strict=True)
        return Golden(
            {str(name): Frame(str(sha256), small, str(of)) for name, sha256, small, of in frames},
            frozenset(map(str, stored["violated"])),
        )


def keep(found: Golden) -> Path:
    """Stores the findings of some tasks, beside those of others."""
    before = golden()
    frames = dict(sorted({**before.frames, **found.frames}.items()))
    others = {state for state in before.violated if state.rpartition("/")[0] not in found.frames}
    np.savez_compressed(
        _FILE,
        names=np.array(list(frames)),
        sha256=np.array([frame.sha256 for frame in frames.values()]),
        small=np.stack([frame.small for frame in frames.values()]),
        assets=np.array([frame.assets for frame in frames.values()]),
        violated=np.array(sorted(others | found.violated), dtype=np.str_),
    )
    return _FILE
