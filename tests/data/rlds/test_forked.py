"""Datasets that were opened before a fork are read in several processes at once, as data loaders' workers do."""

from __future__ import annotations

import multiprocessing

import numpy as np

from ipvla.data.rlds import RldsSource
from tests.data.conftest import LENGTHS


def test_forked_processes_read_at_once_what_their_parent_has_open(written: object) -> None:
    source = RldsSource(str(written))
    expected = [source.trajectory(index).numbers("action") for index in range(len(LENGTHS))]
    together = multiprocessing.get_context("fork").Barrier(4)

    def read(seed: int) -> None:
        together.wait()
        for index in np.random.default_rng(seed).integers(0, len(LENGTHS), 150):
            np.testing.assert_array_equal(source.trajectory(index).numbers("action"), expected[index])

    processes = [multiprocessing.get_context("fork").Process(target=read, args=(seed,)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one that hangs in a damaged read
    assert codes == [0] * 4
