"""Workers: `training.precision`."""

import time

import pytest
import torch

from ipvla.training.loop import TrainingConfig
from ipvla.training.parallel import autocasts

CPU = torch.device("cpu")


def test_what_is_asked_for_by_name_is_done() -> None:
    assert autocasts("bf16", CPU)
    assert not autocasts("fp32", CPU)


def test_auto_never_takes_an_emulated_bfloat16() -> None:
    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(512, 512).to(dtype)
        a @ a
        times = []
        for _ in range(7):
            started = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - started)
        return min(times)

    if autocasts("auto", CPU):
        assert seconds(torch.bfloat16) < 2 * seconds(torch.float32)
    else:
        assert seconds(torch.bfloat16) > seconds(torch.float32)


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.precision is 'fp16'; choose one of auto, bf16, fp32"):
        TrainingConfig(precision="fp16")
