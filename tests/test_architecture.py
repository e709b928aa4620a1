"""The house rules that a machine can check: who imports whom (.importlinter), folder names, nothing large."""

import os
import subprocess
import sys

import pytest

from ipvla.storage import SOURCE_TREE

PACKAGES = ("ipvla", "evaluators", "ray_jobs", "studies", "benchmarks", "integrations")
LARGEST_KB = 1200  # the words of a published vocabulary, 32,064, of 8 numbers each


def test_imports_point_one_way():
    lint = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as lint; lint()",
        "--no-cache",
    ]
    done = subprocess.run(lint, cwd=SOURCE_TREE, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_folders_and_files_are_named_for_what_is_in_them():
    shapeless = {"utils", "util", "common", "helpers", "helper", "misc"}
    paths = [path for package in PACKAGES for path in (SOURCE_TREE / package).rglob("*")]
    assert len(paths) > 50
    assert [path for path in paths if path.stem in shapeless] == []


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("ray_jobs.train, ray_jobs.evaluate", {"transformers", "peft", "mlflow", "scipy", "statsmodels"}),
        ("ipvla.rollout.sim_worker, ipvla.rollout.policy_actor", {"torch", "pandas", "matplotlib"}),
    ],
    ids=["a command", "a simulator's process"],
)
def test_nothing_heavy_is_imported_that_is_not_needed(modules, heavy):
    listed = f"import {modules}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", listed], cwd=SOURCE_TREE, capture_output=True, text=True, timeout=120, check=True
    )
    assert not heavy & set(done.stdout.split())


def test_nothing_large_is_tracked():
    if not (SOURCE_TREE / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=SOURCE_TREE, capture_output=True, text=True, check=True)
    tracked = [SOURCE_TREE / name for name in listed.stdout.split("\0") if name]
    assert len(tracked) > 50
    assert [path for path in tracked if path.is_file() and os.path.getsize(path) > LARGEST_KB * 1024] == []
