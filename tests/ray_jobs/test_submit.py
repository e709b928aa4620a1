"""Jobs on a real cluster, as its users submit them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from ipvla.data.rlds import write_rlds
from ipvla.sim.fingerprint import commit
from ipvla.storage import SOURCE_TREE, StorageError
from ray_jobs.command_line.index import unknown
from ray_jobs.command_line.jobs import split
from ray_jobs.command_line.settings import SettingError
from ray_jobs.running.cluster import ClusterError
from ray_jobs.submit import SubmitConfig, submit
from tests.ray_jobs.head import ray_head
from tests.synthetic import cue_episode

TRAIN = (
    *("train", "--study", "jobs", "--data.dataset", "cue", "--data.image_size", "64", "--data.cache_gib", "0.1"),
    *("--model.backbone.width", "32", "--model.backbone.heads", "2", "--model.backbone.mlp", "32"),
    *("--model.backbone.trunk_channels", "8", "--training.precision", "fp32", "--training.log_every", "1"),
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_head() as found:
        yield found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    write_rlds(root / "datasets", "cue", [cue_episode(seed) for seed in range(8)], 16)
    return root


def submitting(address: str, *job: str) -> list[str]:
    return [sys.executable, "-m", "ray_jobs.submit", "--address", address, "--", *job]


@pytest.mark.long
@pytest.mark.slow
def test_who_stops_following_stops_the_job_which_can_go_on(address: str, root: Path) -> None:
    job = (*TRAIN, "--name", "stopped", "--training.steps", "150", "--storage_root", str(root))
    follower = subprocess.Popen(
        submitting(address, *job), cwd=SOURCE_TREE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    run = root / "runs" / "jobs" / "stopped"
    end = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text().count("\n") > 3:
        assert time.monotonic() < end
        assert follower.poll() is None
        time.sleep(0.2)
    follower.send_signal(signal.SIGINT)
    assert follower.wait(60) == 130
    jobs = JobSubmissionClient(address).list_jobs()
    stopped = [one for one in jobs if one.entrypoint is not None and "--name stopped" in one.entrypoint]
    assert [one.status for one in stopped] == [JobStatus.STOPPED]
    assert list((run / "trainer").glob("step_*")), "with a checkpoint of its last step"


@pytest.mark.long
@pytest.mark.slow
def test_a_job_that_was_stopped_is_followed_to_its_end(address: str, root: Path) -> None:
    job = (*TRAIN, "--name", "stopped", "--training.steps", "150", "--storage_root", str(root))
    done = subprocess.run(
        submitting(address, *job), cwd=SOURCE_TREE, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "150 steps at" in done.stdout, "its log is shown"
    assert (root / "runs" / "jobs" / "stopped" / "policy" / "policy.json").exists()


@pytest.mark.slow
def test_a_job_that_fails_ends_with_its_own_exit_code(address: str, root: Path) -> None:
    job = ("merge", "--journals", "[nothing.sqlite]", "--into", str(root / "all.sqlite"))
    done = subprocess.run(
        submitting(address, *job), cwd=SOURCE_TREE, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 2
    assert "error: " in done.stdout
    assert "nothing" in done.stdout


@pytest.mark.slow
def test_a_job_need_not_be_followed(
    address: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # --address comes first
    plain = address.removeprefix("http://")
    config = SubmitConfig(address=plain, follow=False, job=("merge", "--journals", "[a]", "--into", "b"))
    assert submit(config) == 0
    name = capfd.readouterr().out.strip()
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:9"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    assert JobSubmissionClient(address).get_job_info(name).entrypoint == (
        "python -m ray_jobs.merge --journals '[a]' --into b"
    )


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (("trian", "--name", "x"), "trian: there is no such job; did you mean 'train'"),
        (("train", "--nmae", "x"), "nmae: there is no such setting; did you mean 'name'"),
        (("train", "--training.steps", "0"), "training.steps is 0"),
        (("submit",), "no such job"),
    ],
)
def test_a_job_that_would_not_begin_is_not_shipped(job: tuple[str, ...], reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        submit(SubmitConfig(address="http://127.0.0.1:9", job=job))


def test_a_job_of_two_words_is_one_module() -> None:
    assert SubmitConfig(job=("data", "show", "cue")).entrypoint == "python -m ray_jobs.data.show cue"


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_a_cluster_that_does_not_answer(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "127.0.0.1:10")  # for Ray's own client that would be an address of another kind
    with pytest.raises(ClusterError, match=r"http://127.0.0.1:9 does not take the job"):
        submit(SubmitConfig(address="127.0.0.1:9", job=("train",)))
    assert os.environ[variable] == "127.0.0.1:10"


def test_a_job_with_an_address_for_a_directory_is_not_shipped() -> None:
    job = ("train", "--storage_root", "s3://bucket/x")
    with pytest.raises(StorageError, match="storage_root s3:/bucket/x is an address; give a directory"):
        submit(SubmitConfig(address="http://127.0.0.1:9", job=job))


def test_a_job_is_asked_for() -> None:
    with pytest.raises(ValueError, match="write it behind --"):
        SubmitConfig()


def test_what_the_job_runs_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shipped = SubmitConfig(job=("train",), env={"MUJOCO_GL": "egl"}).environment()
    assert shipped["working_dir"] == str(SOURCE_TREE)
    assert shipped["env_vars"]["MUJOCO_GL"] == "egl"
    assert ".venv" in shipped["excludes"]
    assert shipped["env_vars"]["IPVLA_COMMIT"] == commit(), ".git stays behind"
    elsewhere = "s3://packages/of_mine.zip"
    bare = SubmitConfig(job=("train",), runtime_env=None, working_dir=elsewhere)
    assert bare.environment() == {"working_dir": elsewhere, "env_vars": {}}
    wrong = tmp_path / "wrong.yaml"
    for text in ("[1, 2", "- a\n- b\n"):
        wrong.write_text(text)
        with pytest.raises(SettingError, match=r"runtime_env: .*wrong.yaml"):
            SubmitConfig(job=("train",), runtime_env=wrong).environment()


def test_where_no_repository_is_the_environment_tells_the_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ipvla.sim.fingerprint.SOURCE_TREE", tmp_path)
    assert commit() == "none"
    monkeypatch.setenv("IPVLA_COMMIT", "a" * 40)
    assert commit() == "a" * 40
    monkeypatch.setenv("PATH", "")
    assert commit() == "a" * 40, "and where there is no git"


def test_what_follows_two_dashes_is_the_jobs() -> None:
    assert split(["--address", "a", "--", "train", "--name", "x"]) == (
        ["--address", "a"],
        ["train", "--name", "x"],
    )
    assert split(["--address", "a"]) == (["--address", "a"], [])


def test_a_line_that_begins_with_a_job_needs_no_dashes() -> None:
    assert split(["data", "show", "cue"]) == ([], ["data", "show", "cue"])
    assert split(["trian", "--name", "x"]) == (["trian", "--name", "x"], [])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--address a:1 -- train --name x --model.memory.type gru", None),
        ("train --name x", None),
        ("--env.MUJOCO_GL egl -- data show cue", None),
        ("--adress a:1 -- train", "adress: there is no such setting; did you mean 'address'"),
        ("-- train --nmae x", "nmae: there is no such setting; did you mean 'name'"),
    ],
)
def test_the_options_of_both_are_checked_before_anything_is_imported(line: str, problem: str | None) -> None:
    found = unknown("submit", line.split())
    assert found is None if problem is None else found is not None and problem in found


@pytest.mark.parametrize(
    ("given", "variables", "dashboard"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("head:28265", {}, "http://head:28265"),
        ("https://head", {"RAY_ADDRESS": "other:6379"}, "https://head"),
        (None, {"RAY_API_SERVER_ADDRESS": "head:8265", "RAY_ADDRESS": "other:6379"}, "http://head:8265"),
        (None, {"RAY_ADDRESS": "http://head:1234"}, "http://head:1234"),
        (None, {"RAY_ADDRESS": "10.0.0.10:6379"}, "http://10.0.0.10:8265"),
        (None, {"RAY_ADDRESS": "auto"}, "http://127.0.0.1:8265"),
    ],
)
def test_where_the_cluster_is(
    monkeypatch: pytest.MonkeyPatch, given: str | None, variables: dict[str, str], dashboard: str
) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert SubmitConfig(address=given, job=("train",)).dashboard == dashboard


def test_the_tracking_server_of_this_shell_is_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert SubmitConfig(job=("train",)).environment()["env_vars"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    other = {"MLFLOW_TRACKING_URI": "http://other:5000"}
    assert SubmitConfig(job=("train",), env=other).environment()["env_vars"].items() >= other.items()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "MLFLOW_TRACKING_URI" not in SubmitConfig(job=("train",)).environment()["env_vars"]
