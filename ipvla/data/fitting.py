"""How a picture of any size becomes the square that a model sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

#: "stretch": height and width each. "crop": the shorter side, then the centre is cut out. "pad": bars first.
Shape: TypeAlias = Literal["stretch", "crop", "pad"]
Filter: TypeAlias = Literal["lanczos", "bicubic"]
_FILTERS: Final = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Fitting:
    """Both filters are PIL's, antialiased; a picture of the right size stays as it is.

    Attributes:
        shape: what becomes of pictures that are not square.
        filter: by which they get their size.
        fill: RGB of the bars.
    """

    shape: Shape = "stretch"
    filter: Filter = "lanczos"
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        for name, known in (("shape", get_args(Shape)), ("filter", get_args(Filter))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")

    def __call__(self, picture: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3] -> uint8 [size, size, 3]."""
        if picture.shape[:2] == (size, size):
            return picture
        image = Image.fromarray(picture)
        width, height = image.size
        if self.shape == "pad" and width != height:
            side = max(width, height)
            square = Image.new("RGB", (side, side), self.fill)
            square.paste(image, ((side - width) // 2, (side - height) // 2))
            image = square
        if self.shape == "crop":
            shorter = min(width, height)
            new = (size * width // shorter, size * height // shorter)
            left, top = (round((side - size) / 2) for side in new)
            whole = image.resize(new, _FILTERS[self.filter])
            return np.asarray(whole.crop((left, top, left + size, top + size)))
        return np.asarray(image.resize((size, size), _FILTERS[self.filter]))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "fill": list(self.fill)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(values["shape"], values["filter"], tuple(values["fill"]))
