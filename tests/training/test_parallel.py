"""Workers: `training.precision`."""

import pytest
import torch

from ipvla.training.loop import TrainingConfig
from ipvla.training.parallel import autocasts

CPU = torch.device("cpu")


def test_what_is_asked_for_by_name_is_done() -> None:
    assert autocasts("bf16", CPU)
    assert not autocasts("fp32", CPU)


@pytest.mark.parametrize("tiles", [False, True])
def test_auto_takes_bfloat16_on_cpus_that_multiply_tiles_of_it(
    monkeypatch: pytest.MonkeyPatch, tiles: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert autocasts("auto", CPU) is tiles


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.precision is 'fp16'; choose one of auto, bf16, fp32"):
        TrainingConfig(precision="fp16")
