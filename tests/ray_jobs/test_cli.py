"""How a job ends: exit codes, one line for what the user can mend, a traceback for what only we can."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import ray

from ipvla.policy import CheckpointError
from ipvla.storage import SOURCE_TREE
from ipvla.types import EpisodeSpec
from ray_jobs.collect import CollectConfig, collect
from ray_jobs.command_line.cli import Terminated, run

PRESET = ["--config_path", str(SOURCE_TREE / "ray_jobs" / "experiments" / "quickstart" / "smoke" / "collect.yaml")]


@dataclass(frozen=True)
class Config:
    """A job.

    Attributes:
        count: how many.
    """

    count: int = 1


@pytest.fixture
def ending(monkeypatch, capfd):
    """Runs a job; its exit code and what it wrote to stderr."""

    def end(main, *arguments, config=Config, at_end=None):
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        with pytest.raises(SystemExit) as stop:
            run(config, main, "Does a job.", at_end)
        return stop.value.code or 0, capfd.readouterr().err

    return end


def test_main_gets_the_configuration_and_decides_the_exit_code(ending):
    seen = []
    assert ending(seen.append, "--count", "3") == (0, "")
    assert seen == [Config(count=3)]
    assert ending(lambda config: config.count, "--count", "7") == (7, "")


def test_a_wrong_setting_is_one_line_and_main_never_runs(ending):
    code, err = ending(lambda config: pytest.fail("ran"), "--cuont", "3")
    assert (code, err) == (2, "error: cuont: there is no such setting; did you mean 'count'?\n")


def test_an_error_of_ours_is_one_line(ending):
    def main(config):
        raise CheckpointError("checkpoint x is of another model;\n give --policy y")

    assert ending(main) == (2, "error: checkpoint x is of another model; give --policy y\n")
    code, err = ending(lambda config: config.build(), config=CollectConfig)
    assert code == 2
    assert err.startswith("error: demonstrations: none are asked for; give")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "note"),
    [
        (None, 0, ""),
        (CheckpointError("give --policy y"), 2, "error: give --policy y\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue\n"),
        (Terminated(), 143, "terminated; run the same command again to continue\n"),
    ],
)
def test_what_waits_is_said_last_however_a_job_ends(ending, raised, code, note):
    def main(config):
        if raised is not None:
            raise raised

    def last(config):
        sys.stderr.write(f"{config.count} records wait\n")

    assert ending(main, "--count", "3", at_end=last) == (code, f"{note}3 records wait\n")
    assert "wait" not in ending(main, "--cuont", "3", at_end=last)[1], "without settings there is no run"


def test_an_error_of_ours_in_a_worker_is_one_line(ending):
    def main(config):
        cause = CheckpointError("checkpoint x is of another model; give --policy y")
        raise ray.exceptions.RayTaskError("work", "a long remote traceback", cause).as_instanceof_cause()

    assert ending(main) == (2, "error: checkpoint x is of another model; give --policy y\n")


@pytest.mark.parametrize(
    "defect",
    [
        lambda config: np.zeros(3).reshape(2, 2),  # a ValueError, but raised by a library that we called wrongly
        lambda config: EpisodeSpec(),
        lambda config: {}["x"],
    ],
)
def test_a_defect_keeps_its_traceback(monkeypatch, defect):
    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises((ValueError, TypeError, KeyError)):
        run(Config, defect, "Does a job.")


def test_control_c_says_how_to_continue(ending):
    def main(config):
        raise KeyboardInterrupt

    assert ending(main) == (130, "interrupted; run the same command again to continue\n")


def test_help_is_printed_and_nothing_runs(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["job", "--count", "3", "--help"])
    with pytest.raises(SystemExit) as stop:
        run(Config, lambda config: pytest.fail("ran"), "Does a job.")
    assert stop.value.code == 0
    assert "  --count INT (default: 1)\n      how many." in capfd.readouterr().out


def test_collect_refuses_before_it_writes(ending, tmp_path):
    store = tmp_path / "store"
    for setting, told in [
        ("--num_simulators=0", "error: num_simulators: 0 simulators cannot collect anything; give 1 or more\n"),
        ("--demonstrations.grount_red=3", "Did you mean 'ground_red'?\n"),
        ("--suite=recal", "Did you mean 'recall'?\n"),
    ]:
        code, err = ending(collect, *PRESET, f"--storage_root={store}", setting, config=CollectConfig)
        assert code == 2
        assert err.endswith(told)
        assert err.count("\n") == 1
    assert not store.exists()


@pytest.mark.slow
def test_a_job_is_a_module_to_run(tmp_path):
    command = [sys.executable, "-m", "ray_jobs.collect", "--help"]
    done = subprocess.run(command, cwd=SOURCE_TREE, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("usage: python -m ray_jobs.collect [--config_path FILE]")
    assert "--storage_root PATH" in done.stdout
