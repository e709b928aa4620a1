"""In what number format a training step multiplies, and how small gradients survive it."""

from __future__ import annotations

from typing import Final

import torch

#: "fp16" for GPUs without bfloat16, such as the V100: its smallest number is 6e-8, so the loss is scaled up.
PRECISIONS: Final = ("auto", "bf16", "fp16", "fp32")
_FORMATS: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def autocast_format(precision: str, device: torch.device) -> torch.dtype | None:
    """Of autocast, None for float32 everywhere.

    "auto" takes bfloat16 on GPUs that multiply it, and on CPUs with AMX. Elsewhere it is emulated (GPUs before
    Ampere such as the V100, most CPUs), or gains nothing: with AVX512-BF16 alone a training step of the tiny
    backbone took 1.3 times as long as in float32.
    """
    if precision != "auto":
        return _FORMATS[precision]
    if device.type == "cuda":
        multiplies = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        multiplies = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if multiplies else None


def loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss up in float16, and leaves out steps whose gradients overflow; else it does nothing.

    Source: Micikevicius et al., arXiv 1710.03740. The scale begins at 65,536, halves when a gradient is not finite
    and doubles after 2,000 steps in which all were.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
