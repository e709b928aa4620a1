import multiprocessing
import os
import resource
import signal
import sqlite3
import time
from dataclasses import fields, replace

import numpy as np
import pytest

from ipvla.rollout import journal as journal_module
from ipvla.rollout.journal import Journal, JournalError
from ipvla.types import EpisodeResult, EpisodeSpec, EpisodeTrace

FINGERPRINT = {"protocol": "held-out-1", "policy": "abc", "suite_version": "1"}


def result(trial: int, outcome: str = "success", attempt: int = 0) -> EpisodeResult:
    spec = EpisodeSpec("recall", "ground_red", seed=1000 + trial, trial=trial, attempt=attempt)
    return EpisodeResult(spec, outcome, 10, 5, 0.5, 0.1, details={"pressed": "red", "at": [1, 2]})


def test_a_record_reads_back_as_it_was_written(tmp_path):
    with Journal(tmp_path / "new" / "j.sqlite", FINGERPRINT) as journal:
        assert journal.record(result(3))
        assert journal.results() == [result(3)]


def test_an_episode_has_one_record_whatever_the_attempt(tmp_path):
    with Journal(tmp_path / "j.sqlite", FINGERPRINT) as journal:
        assert journal.record(result(0, "success"))
        assert not journal.record(result(0, "failure", attempt=1))
        assert [r.outcome for r in journal.results()] == ["success"]


def test_missing_keeps_order_and_survives_reopening(tmp_path):
    specs = [result(trial).spec for trial in (4, 1, 3, 2)]
    with Journal(tmp_path / "j.sqlite", FINGERPRINT) as journal:
        journal.record(result(3))
    with Journal(tmp_path / "j.sqlite", FINGERPRINT) as journal:
        assert [spec.trial for spec in journal.missing(specs)] == [4, 1, 2]


def test_results_of_some_episodes_are_those_that_are_recorded(tmp_path):
    with Journal(tmp_path / "j.sqlite", FINGERPRINT) as journal:
        for trial in (1, 2, 3):
            journal.record(result(trial))
        wanted = [result(trial).spec for trial in (3, 4, 1)]
        assert [r.spec.trial for r in journal.results(wanted)] == [1, 3]
        assert journal.results([]) == []


def test_another_study_is_refused_by_what_differs_and_left_alone(tmp_path):
    path = tmp_path / "j.sqlite"
    with Journal(path, FINGERPRINT) as journal:
        journal.record(result(0))
    with pytest.raises(JournalError, match=r"policy: journal has 'abc', this study 'def'.*a journal of their own"):
        Journal(path, FINGERPRINT | {"policy": "def"})
    with Journal(path, FINGERPRINT) as journal:
        assert len(journal.results()) == 1


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    path = tmp_path / "j.sqlite"
    path.write_bytes(b"not a database, but long enough to look like one" * 10)
    with pytest.raises(JournalError, match="not a readable journal"):
        Journal(path, FINGERPRINT)
    assert path.read_bytes().startswith(b"not a database")


LATE = {"latency": np.full(5, 1, np.int32), "call": np.repeat(np.arange(5, dtype=np.int32), 2)}


@pytest.mark.parametrize("late", [{}, LATE])
def test_what_was_played_is_kept_too_and_moves_along_when_journals_merge(tmp_path, late):
    trace = EpisodeTrace(
        actions=np.linspace(-1, 1, 70, dtype=np.float32).reshape(10, 7),
        step_s=np.full(10, 0.01, np.float32),
        asked_t=np.arange(0, 10, 2, dtype=np.int32),
        answer_s=np.full(5, 0.02, np.float32),
        **late,
    )
    with Journal(tmp_path / "j.sqlite", FINGERPRINT) as journal:
        journal.record(replace(result(0), trace=trace))
        journal.record(result(1))
        assert not journal.record(replace(result(1), trace=trace))
        assert journal.results() == [result(0), result(1)]
        assert journal.trace(result(1).spec) is None, "the first record counts"
    with Journal.merged([tmp_path / "j.sqlite"], tmp_path / "all.sqlite") as merged:
        kept = merged.trace(result(0).spec)
        for field in fields(EpisodeTrace):
            written, read = getattr(trace, field.name), getattr(kept, field.name)
            if written is None:
                assert read is None, "as earlier versions wrote it"
                continue
            assert read.dtype == written.dtype
            np.testing.assert_array_equal(read, written)


def test_a_journal_can_be_opened_without_knowing_its_study(tmp_path):
    with Journal(tmp_path / "j.sqlite", FINGERPRINT) as journal:
        journal.record(result(0))
    with Journal.existing(tmp_path / "j.sqlite") as journal:
        assert (journal.fingerprint, journal.results()) == (FINGERPRINT, [result(0)])
    with pytest.raises(JournalError, match="there is no journal"):
        Journal.existing(tmp_path / "k.sqlite")


def _write_for_ever(path, acknowledged) -> None:
    with Journal(path, FINGERPRINT) as journal:
        for trial in range(100_000):
            journal.record(result(trial))
            acknowledged.value = trial + 1


@pytest.mark.slow
def test_a_killed_writer_loses_nothing_that_was_recorded(tmp_path):
    path = tmp_path / "j.sqlite"
    context = multiprocessing.get_context("spawn")
    acknowledged = context.Value("i", 0)
    writer = context.Process(target=_write_for_ever, args=(path, acknowledged))
    writer.start()
    deadline = time.monotonic() + 60
    while acknowledged.value < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    with Journal(path, FINGERPRINT) as journal:
        trials = [r.spec.trial for r in journal.results()]
        assert trials == list(range(len(trials)))
        assert 20 <= acknowledged.value <= len(trials) <= acknowledged.value + 1
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_two_connections_share_a_journal(tmp_path):
    with Journal(tmp_path / "j.sqlite", FINGERPRINT) as one, Journal(tmp_path / "j.sqlite", FINGERPRINT) as two:
        one.record(result(0))
        two.record(result(1))
        assert not two.record(result(0))
        assert len(one.results()) == len(two.results()) == 2


def test_journals_of_several_machines_become_one_with_one_record_per_episode(tmp_path):
    for name, trials in (("a", (0, 2)), ("b", (1, 2, 3))):
        with Journal(tmp_path / f"{name}.sqlite", FINGERPRINT) as journal:
            for trial in trials:
                journal.record(result(trial, "success" if name == "a" else "failure"))
    sources = [tmp_path / "a.sqlite", tmp_path / "b.sqlite"]
    for _ in range(2):  # merging again adds nothing
        with Journal.merged(sources, tmp_path / "all.sqlite") as merged:
            assert [(r.spec.trial, r.outcome) for r in merged.results()] == [
                (0, "success"), (1, "failure"), (2, "success"), (3, "failure"),
            ]  # fmt: skip


def test_journals_of_different_studies_do_not_mix(tmp_path):
    for name, policy in (("a", "abc"), ("b", "def")):
        with Journal(tmp_path / f"{name}.sqlite", FINGERPRINT | {"policy": policy}) as journal:
            journal.record(result(0))
    with pytest.raises(JournalError, match="holds the results of another study"):
        Journal.merged([tmp_path / "a.sqlite", tmp_path / "b.sqlite"], tmp_path / "all.sqlite")
    with Journal(tmp_path / "all.sqlite", FINGERPRINT | {"policy": "abc"}) as merged:
        assert merged.results() == [], "nothing was written before it was refused"
    with pytest.raises(JournalError, match="there is no journal"):
        Journal.merged([tmp_path / "c.sqlite"], tmp_path / "all.sqlite")
    (tmp_path / "d.sqlite").write_bytes(b"no database at all, though it is long enough" * 20)
    with pytest.raises(JournalError, match="not a readable journal"):
        Journal.merged([tmp_path / "d.sqlite"], tmp_path / "all.sqlite")
    with pytest.raises(JournalError, match="no journals to merge"):
        Journal.merged([], tmp_path / "all.sqlite")


def test_on_a_full_disk_what_was_recorded_stays_and_the_error_says_what_to_do(tmp_path):
    with Journal(tmp_path / "j.sqlite", FINGERPRINT) as journal:
        journal.record(result(0))
        pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
        journal._connection.execute(f"PRAGMA max_page_count = {pages}")  # what a full disk is to SQLite

        def fill() -> None:
            for trial in range(1, 200):
                journal.record(result(trial))

        with pytest.raises(JournalError, match=r"cannot be written \(database or disk is full\); free the disk"):
            fill()
    with Journal(tmp_path / "j.sqlite", FINGERPRINT) as journal:
        recorded = [r.spec.trial for r in journal.results()]
        assert recorded == list(range(len(recorded)))
        assert journal.record(result(len(recorded)))


def test_a_full_disk_is_no_damage_to_a_journal_that_is_opened(tmp_path):
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, allowed[1]))  # nothing can be written
    try:
        with pytest.raises(JournalError, match=r"j\.sqlite cannot be written \(.*\); free the disk"):
            Journal(tmp_path / "j.sqlite", FINGERPRINT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    Journal(tmp_path / "j.sqlite", FINGERPRINT).close()


def test_a_journal_that_somebody_keeps_locked_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "_BUSY_TIMEOUT_S", 0.1)
    with Journal(tmp_path / "j.sqlite", FINGERPRINT) as journal:
        other = sqlite3.connect(tmp_path / "j.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalError, match=r"j\.sqlite cannot be written \(database is locked\)"):
            journal.record(result(0))
        with pytest.raises(JournalError, match=r"cannot be written \(database is locked\).*was recorded stays"):
            Journal(tmp_path / "j.sqlite", FINGERPRINT)
        other.execute("COMMIT")
        assert journal.record(result(0))
