"""Datasets that were opened before a fork are read in the forked process, as data loaders' workers do."""

from __future__ import annotations

import multiprocessing

import numpy as np

from ipvla.data.dataset import EpisodeDataset
from tests.data.conftest import LENGTHS


def test_a_forked_process_reads_what_its_parent_has_open(dataset: EpisodeDataset) -> None:
    expected = [dataset.standard.episode(dataset._source.trajectory(i)).action for i in range(len(LENGTHS))]

    def read(answers: multiprocessing.SimpleQueue[list[np.ndarray]]) -> None:
        answers.put([dataset._source.trajectory(i).numbers("action") for i in range(len(LENGTHS))])

    context = multiprocessing.get_context("fork")
    for _ in range(3):
        answers = context.SimpleQueue()
        process = context.Process(target=read, args=(answers,))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        for mine, theirs in zip(expected, answers.get(), strict=True):
            np.testing.assert_array_equal(mine, theirs)
