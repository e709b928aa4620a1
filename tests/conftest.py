"""Quiet, offline and small: settings that every test shares, one local Ray cluster, and how a job refuses."""

import os
import shutil
import sys
import tempfile

os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",  # or Ray writes a token into the home directory
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    OMP_NUM_THREADS="1",
)

import hypothesis
import pytest

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("ipvla", deadline=None)
hypothesis.settings.load_profile("ipvla")

pytest_plugins = ("tests.synthetic", "tests.training.fine_tuning")


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray cluster of this test session's own, with two CPUs."""
    import ray

    directory = tempfile.mkdtemp(prefix="ipvla-ray-")  # pytest's own directories are too long for Ray's sockets
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        num_cpus=2,
        object_store_memory=200 * 2**20,
        _temp_dir=directory,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def standard_cache(tmp_path_factory):
    """A cache directory; LIBERO's own suites find their assets in the packages that `make assets` installs."""
    return tmp_path_factory.mktemp("standard")


@pytest.fixture
def refused(monkeypatch, capfd):
    """Runs a job that must end with exit code 2; returns what it said, one line but for warnings."""
    from ray_jobs.command_line.cli import run

    def refuse(config_class, main, *arguments):
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        with pytest.raises(SystemExit) as stop:
            run(config_class, main, "A job.")
        error = capfd.readouterr().err
        assert stop.value.code == 2, error
        (line,) = [line for line in error.splitlines() if not line.startswith("WARNING")]
        assert line.startswith("error: ")
        return line

    return refuse
