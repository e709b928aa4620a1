"""In what number format a worker computes."""

from __future__ import annotations

from typing import Final

import torch

PRECISIONS: Final = ("auto", "bf16", "fp32")


def autocasts(precision: str, device: torch.device) -> bool:
    """Is bfloat16 autocast on? "auto" takes it where the hardware multiplies bfloat16 itself.

    Elsewhere (CPUs without AVX512-BF16 or AMX, GPUs before Ampere such as the V100) it is emulated: many times
    slower than float32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
