"""README.md, docs/memory.md and docs/comparing.md: their commands in order, on the quickstart in small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ipvla.storage import SOURCE_TREE
from tests.journeys.page import Shell, commands, section

DOCS = SOURCE_TREE / "docs"
STUDY = ["--study", "quickstart-smoke"]
SMALL = {
    "train": [
        *(*STUDY, "--data.dataset", "recall_smoke", "--training.steps", "2", "--training.log_every", "1"),
        *("--lanes.lanes", "2", "--lanes.window", "4", "--training.checkpoint_every", "2"),
    ],
    "evaluate": [*STUDY, "--success.episodes", "{recall: 1}", "--success.num_simulators", "1", "--videos", "0"],
    "memory_use": [
        *(*STUDY, "--success.episodes", "{recall: 2}", "--success.num_simulators", "1"),
        *("--probe.kinds", "[reset]", "--probe.times", "[4]"),
    ],
    "compare --study forgetting": STUDY,
    "compare --study quickstart": STUDY,
}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_first_page_and_what_it_leads_to(tmp_path: Path, ray_address: str) -> None:
    start = commands(section(SOURCE_TREE / "README.md", "Start"))
    assert start[:2] == ["make quickstart", "make quickstart TIER=smoke"]
    memory = [line for line in commands((DOCS / "memory.md").read_text()) if line.startswith("ipvla ")]
    comparing = [line for line in commands((DOCS / "comparing.md").read_text()) if line.startswith("ipvla ")]
    jobs = [line.split()[1] for line in (*start[3:], *memory, *comparing)]
    assert jobs == [
        *("doctor", "memory_use", "train", "evaluate", "compare"),
        *("train", "evaluate", "memory_use"),
        *("compare", "compare", "compare"),
    ]

    quickstart = f"exec {sys.executable} -m ray_jobs.quickstart --tier smoke"
    places: dict[str, str] = {}
    shell = Shell(tmp_path / "home", SMALL, programs={"make": quickstart}, ray_address=ray_address, places=places)
    shown = shell.run([*start[:2], *start[3:]], 500)  # without the line that activates .venv
    assert "SMOKE RUN" in shown
    assert "is complete" in shown, "a second quickstart finds all of it done"
    study = shell.home / "ipvla_storage" / "runs" / "quickstart-smoke"
    assert (study / "bank" / "policy" / "policy.json").exists()

    # the page's bank has another length than the first page's: another policy, hence another run
    places.update({"--name bank ": "--name bank16 ", "bank]": "bank16]"})
    shell.run(memory, 300)
    shell.run(comparing, 200)
    assert list((shell.home / "gru_or_none").glob("*.md")), "the table is where the page says"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_an_installation_that_is_there_is_checked(tmp_path: Path) -> None:
    lines = commands((DOCS / "install.md").read_text())
    typed = [line for line in lines if not line.startswith(("source", "nvidia-smi"))]
    assert [line.split()[0] for line in typed] == ["python3.11", "make", "ipvla", "python"]
    shown = Shell(tmp_path / "home", {}).run(typed, 250)
    assert "Python 3.11" in shown
    assert "torch" in shown
