"""What a retry cannot mend ends a training at once; a training on a real cluster: test_tune.py."""

from __future__ import annotations

import pickle

import pytest

from ipvla.data.source import DatasetError
from ipvla.training.optimizer import OptimizerConfig
from ray_jobs.command_line.cli import TrainingError, end_at_once, lasting_failures


def refuse_settings() -> None:
    OptimizerConfig(lr=-1.0)


def find_no_data() -> None:
    raise DatasetError("dataset: nothing is there")


def diverge() -> None:
    raise FloatingPointError("the loss is nan at step 3; lower optimizer.lr")


def fill_the_disk() -> None:
    raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (fill_the_disk, "no space is left on the disk"),
        (refuse_settings, "optimizer.lr -1.0"),
        (find_no_data, "nothing is there"),
        (diverge, "the loss is nan"),
    ],
)
def test_what_would_come_again(fails, reason) -> None:
    with pytest.raises(TrainingError, match=reason) as caught, lasting_failures():
        fails()
    again = pickle.loads(pickle.dumps(caught.value))
    with pytest.raises(TrainingError, match=reason):
        end_at_once().after_exception(None, {0: RuntimeError("its peer is gone"), 1: again})


def test_a_lost_process_and_a_defect_may_be_tried_again() -> None:
    for error in (RuntimeError("connection reset"), OSError("disk"), KeyError("a")):
        with pytest.raises(type(error)), lasting_failures():
            raise error
        end_at_once().after_exception(None, {0: error})
    with pytest.raises(ValueError, match="invalid literal"), lasting_failures():
        int("library")
