"""What public evaluations do to a rendered picture before the policy sees it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ipvla.contract import Pictures

Picture = npt.NDArray[np.uint8]
_JPEG_QUALITY = 95  # tensorflow's default


def preprocess(picture: Picture, shown: Pictures) -> Picture:
    """From uint8 [S, S, 3], upright RGB, to what is shown: turned, through JPEG, resized, cropped.

    Raises:
        KeyError: nothing tells how they are turned.
    """
    turned = {
        "upright": picture,
        "mirrored": picture[:, ::-1],
        "upside_down": picture[::-1],
    }[shown.orientation]
    made = np.ascontiguousarray(turned)
    if shown.jpeg:
        made = _through_jpeg(made)
    if shown.size is not None and shown.size != len(made):
        made = _resized(made, shown.size, shown.resize)
    return _cropped(made, shown.crop_area) if shown.crop_area < 1 else made


def _through_jpeg(picture: Picture) -> Picture:
    import simplejpeg

    coded = simplejpeg.encode_jpeg(picture, quality=_JPEG_QUALITY, colorsubsampling="420")
    decoded: Picture = simplejpeg.decode_jpeg(coded)
    return decoded


def _resized(picture: Picture, size: int, method: str) -> Picture:
    from PIL import Image

    filters = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}
    return np.array(Image.fromarray(picture).resize((size, size), filters[method]))


def _cropped(picture: Picture, area: float) -> Picture:
    """Cut out around the centre and blown up, corners on corners, as tensorflow's crop_and_resize does it."""
    import torch
    import torch.nn.functional as F

    size, share = len(picture), area**0.5
    theta = torch.tensor([[[share, 0.0, 0.0], [0.0, share, 0.0]]])
    grid = F.affine_grid(theta, [1, 3, size, size], align_corners=True)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    blown_up = F.grid_sample(pixels, grid, mode="bilinear", align_corners=True)
    return blown_up[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
