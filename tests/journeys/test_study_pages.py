"""The studies and tables that pages name, in small; MLflow's servers on its pages; an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ipvla.storage import SOURCE_TREE
from tests.journeys.page import Shell, commands, section
from tests.ray_jobs.head import free_port
from tests.tracking.server import answers, until

DOCS = SOURCE_TREE / "docs"


def studies(page: str, study: str) -> list[str]:
    lines = commands((DOCS / page).read_text())
    return [line.partition(" # ")[0] for line in lines if line.startswith(f"python -m {study}")]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("pages", "study"), [("memory", "studies.memory"), ("forgetting", "studies.forgetting")])
def test_a_pages_study_in_small(pages: str, study: str, tmp_path: Path) -> None:
    lines = [
        line.partition(" # ")[0].strip() for page in (pages, "benchmarks") for line in studies(f"{page}.md", study)
    ]
    assert lines
    results = {path: path.read_bytes() for path in (SOURCE_TREE / "benchmarks" / "results").iterdir()}
    shell = Shell(tmp_path / "home", {}, places={f"python -m {study}": f"python -m {study} --quick true"})
    shell.run(lines, 850)
    assert results == {path: path.read_bytes() for path in results}, "a quick run records nothing"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_tables_are_those_of_the_records(tmp_path: Path) -> None:
    (line,) = studies("benchmarks.md", "benchmarks.tables")
    pages = {path: path.read_bytes() for path in DOCS.glob("*.md")}
    Shell(tmp_path / "home", {}).run([line], 250)
    assert pages == {path: path.read_bytes() for path in pages}


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("page", "heading"), [("mlflow.md", None), ("comparing.md", "In the browser")])
def test_mlflow_shows_the_runs_of_this_machine(page: str, heading: str | None, tmp_path: Path) -> None:
    text = (DOCS / page).read_text() if heading is None else section(DOCS / page, heading)
    (line,) = [one for one in commands(text) if "mlflow.db" in one]
    port = free_port()
    shell = Shell(
        tmp_path / "home",
        {},
        programs={"mlflow": f'exec {sys.executable} -m mlflow "$@"'},
        places={"$ROOT/runs": tmp_path, "mlflow.db": f"mlflow.db --port {port} --workers 1"},
    )
    with shell.killed([line]):
        until(lambda: answers(f"http://127.0.0.1:{port}"))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_environment_with_packages_of_its_own(tmp_path: Path) -> None:
    lines = commands(section(DOCS / "gymnasium.md", "Packages that conflict"))
    assert len(lines) == 2
    Shell(tmp_path / "home", {}, places={"aloha-env": tmp_path / "aloha-env"}).run(lines, 550)
    asked = [
        str(tmp_path / "aloha-env" / "bin" / "python"),
        "-c",
        "import gym_aloha, mujoco; print(mujoco.__version__)",
    ]
    shown = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert shown.strip() != "3.3.2", "another MuJoCo than ours"
