"""The doctor names what is wrong with a machine, and what to do about it."""

import json
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import pytest

from ipvla.storage import SOURCE_TREE
from ray_jobs import doctor
from ray_jobs.doctor import CHECKS, DoctorConfig, Finding, Status

Usage = namedtuple("Usage", "total used free")
GIB = 2**30


@pytest.fixture
def config(tmp_path):
    return DoctorConfig(storage_root=tmp_path / "store")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A source tree of the test's own."""
    tree = tmp_path / "sources"
    tree.mkdir()
    monkeypatch.setattr(doctor, "SOURCE_TREE", tree)
    return tree


@pytest.mark.slow
def test_this_machine_passes_and_every_check_reports(tmp_path):
    command = [sys.executable, "-m", "ray_jobs.doctor", "--json", f"--storage_root={tmp_path}"]
    done = subprocess.run(command, cwd=SOURCE_TREE, capture_output=True, text=True, timeout=280, check=False)
    findings = json.loads(done.stdout)
    assert list(findings) == list(CHECKS)
    failed = {name: finding for name, finding in findings.items() if finding["status"] == "fail"}
    assert failed == {}
    assert done.returncode == 0


def test_a_failing_check_sets_the_exit_code_and_shows_its_remedy(config, monkeypatch, capsys):
    def check_moon(config):
        return Finding(Status.FAIL, "the moon is down", "raise it")

    def check_sun(config):
        raise OSError("too hot")

    monkeypatch.setattr(doctor, "CHECKS", {"moon": check_moon, "sun": check_sun})
    assert doctor.main(config) == 1
    printed = capsys.readouterr().out
    for words in ("moon", "fail", "the moon is down", "raise it", "OSError: too hot"):
        assert words in printed


def test_brackets_in_a_finding_are_shown(config, monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "CHECKS", {"moon": lambda config: Finding(Status.OK, "of [cheese]", "try [bold]x")}
    )
    doctor.main(config)
    printed = capsys.readouterr().out
    assert "of [cheese]" in printed
    assert "try [bold]x" in printed


def test_a_warning_is_no_failure(config, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {"moon": lambda config: Finding(Status.WARN, "half", "wait")})
    assert doctor.main(replace(config, json=True)) == 0
    assert json.loads(capsys.readouterr().out) == {"moon": {"status": "warn", "detail": "half", "remedy": "wait"}}


def test_storage_among_the_sources_fails(config):
    finding = doctor.check_storage(replace(config, tmp_dir=SOURCE_TREE / "never"))
    assert finding.status is Status.FAIL
    assert "lies inside the source tree" in finding.detail
    assert finding.remedy.startswith("pass --storage_root")
    assert doctor.check_storage(config).status is Status.OK


@pytest.mark.parametrize(("free_gib", "status"), [(11, Status.OK), (9, Status.WARN), (0.5, Status.FAIL)])
def test_disk_space(config, monkeypatch, free_gib, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free_gib * GIB))
    finding = doctor.check_disk(config)
    assert finding.status is status
    assert f"{free_gib:.1f} GiB free" in finding.detail
    assert bool(finding.remedy) == (status is not Status.OK)


def test_a_large_file_among_the_sources_is_named(config, sources):
    for name in (".venv/libtorch.so", ".git/pack", "runs/model.safetensors"):
        (sources / name).parent.mkdir()
        with (sources / name).open("w") as file:
            file.truncate(GIB + 1)
    finding = doctor.check_source_tree(config)
    assert finding.status is Status.WARN
    assert finding.detail == "large files among the sources: runs/model.safetensors"
    assert str(config.root) in finding.remedy


def test_packages_are_compared_with_their_pins(config, sources):
    (sources / "requirements-libero.txt").write_text("")
    pinned = sources / "requirements.txt"
    pinned.write_text("# a comment\ntorch==0.0.1\nray[train]==2.60.0\n")
    assert doctor.check_packages(config).status is Status.WARN
    assert "torch 2." in doctor.check_packages(config).detail
    pinned.write_text("no-such-package==1.0\n")
    finding = doctor.check_packages(config)
    assert (finding.status, finding.detail, finding.remedy) == (
        Status.FAIL,
        "not installed: no-such-package 1.0",
        "make setup",
    )


@pytest.mark.slow
def test_a_gl_back_end_that_is_not_there_fails(config, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.delenv("DISPLAY", raising=False)
    finding = doctor.check_gl(config)
    assert finding.status is Status.FAIL
    assert finding.detail.startswith("MUJOCO_GL is 'glfw'")
    assert finding.remedy.startswith("set it to osmesa")


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_fails(config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    finding = doctor.check_ray(config)
    assert finding.status is Status.FAIL
    assert "nothing answers at '127.0.0.1:1'" in finding.detail
    assert "RAY_ADDRESS=127.0.0.1:1" in finding.remedy


def test_a_process_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.5)
    assert doctor._failure("import time; time.sleep(60)", {}) == "no answer in 0 s"


def test_a_busy_port_is_named_with_its_setting(config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = doctor.check_ports(replace(config, mlflow_port=port))
    assert finding.status is Status.WARN
    assert f"{port} (mlflow_port)" in finding.detail
    assert finding.remedy == "choose other ports, or end what listens there"


def test_only_suites_with_published_initial_states_have_premises(config):
    finding = doctor.check_premises(replace(config, premises=("recall",)))
    assert finding.status is Status.FAIL
    assert "recall: only LIBERO's own suites" in finding.detail
    assert doctor.check_premises(config).status is Status.OK
