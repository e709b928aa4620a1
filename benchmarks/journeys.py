"""Three newcomers' hours and the pages' commands: do they arrive, and how much of what is written is run?

    python -m benchmarks.journeys [--quick true]

Runs the tests of `tests/journeys`, which execute the pages' own commands in small and log each line that ran; then
times a typo, listens to a training for silence, and counts words, jobs with help and fields without. A full run
writes `benchmarks/results/journeys.json`; `--quick` leaves the journeys out, and writes nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final
from xml.etree import ElementTree

from rich.console import Console

from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.cli import run
from ray_jobs.command_line.index import settings
from ray_jobs.command_line.jobs import JOBS
from studies.record import Target, conclude

JOURNEYS: Final = ("student", "engineer", "operator")
_TESTS: Final = "tests/journeys"
#: Programs of which a line of a page is a command; other lines set variables or are Python.
_PROGRAMS: Final = frozenset(
    [
        "ipvla",
        "python",
        "python3.11",
        "make",
        "pip",
        "hf",
        "ray",
        "aws",
        "mlflow",
        "docker",
        "kubectl",
        "sbatch",
        "curl",
        "aloha-env/bin/pip",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false",
    ]
)
#: Commands that tests elsewhere execute, in small -> the test.
ELSEWHERE: Final[Mapping[str, str]] = {
    "python -m studies.libero": "tests/studies/test_libero.py::test_a_whole_run_in_small",
    "python -m tests.endurance": "tests/endurance/test_endurance.py::test_chaos_kills_and_compares",
    "python -m benchmarks.gpu": "tests/benchmarks/test_gpu.py::test_answers_are_timed_by_memory_and_batch",
}
_TYPOS: Final = (("train", "--training.stps", "5"), ("trian",), ("evaluate", "--polices", "[a]"))
_TRAINING: Final = (
    *("train", "--config_path", "ray_jobs/experiments/quickstart/smoke/train.yaml", "--study", "listened"),
    *("--name", "gru", "--training.steps", "60"),
)


@dataclass(frozen=True)
class JourneysStudy:
    """What to do.

    Attributes:
        quick: leaves the journeys out, and writes nothing.
    """

    quick: bool = False


def written() -> list[str]:
    """Every command in the pages' blocks, as `tests.journeys.page.commands` gives lines."""
    from tests.journeys.page import commands
    from tests.test_documentation import PAGES

    typed = [page for page in PAGES if page.name != "jobs_transcript.md"]  # which is written, not followed
    lines = [_bare(line) for page in typed for line in commands(page.read_text())]
    return [line for line in lines if line.split()[0] in _PROGRAMS]


def _bare(line: str) -> str:
    """Without the comment behind it."""
    return line.partition(" # ")[0]


def executed(lines: Sequence[str], ran: Sequence[str]) -> list[str]:
    """Those of the pages' lines that ran, here or by a test elsewhere."""
    here = set(map(_bare, ran))
    return [line for line in lines if line in here or any(line.startswith(one) for one in ELSEWHERE)]


def journeys(scratch: Path) -> dict[str, Any]:
    """Runs them all: who arrived, which of the pages' commands ran, and what took how long."""
    from tests.journeys.page import LOG

    log, report = scratch / "ran.txt", scratch / "report.xml"
    log.touch()
    pair = ["--numprocesses", "2", "--dist", "loadfile"]
    command = [sys.executable, "-m", "pytest", "-q", *pair, _TESTS, f"--junitxml={report}", "--durations", "30"]
    subprocess.run(command, cwd=SOURCE_TREE, env={**os.environ, LOG: str(log)}, check=False)
    arrived, stopped = set[str](), set[str]()
    seconds = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.attrib["classname"].rpartition(".")[2]
        seconds[f"{file}::{case.attrib['name']}"] = float(case.attrib["time"])
        (stopped if len(case) else arrived).add(file.removeprefix("test_"))  # failed or skipped, or neither
    lines, ran = written(), log.read_text().splitlines()
    run_here = executed(lines, ran)
    return {
        "journeys_done": len((arrived - stopped) & set(JOURNEYS)),
        "commands_in_docs_run": len(run_here) / len(lines),
        "commands": len(lines),
        "not_run": sorted(set(lines) - set(run_here)),
        "seconds": seconds,
    }


def typo_s() -> float:
    """Of wall time until a wrong job or setting is answered, the slowest kind's median."""

    def once(words: Sequence[str]) -> float:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "ray_jobs", *words], cwd=SOURCE_TREE, capture_output=True, check=False
        )
        assert done.returncode == 2, done.stderr
        return time.monotonic() - began

    return max(median(once(words) for _ in range(5)) for words in _TYPOS)


def silent_s_max(scratch: Path) -> float:
    """The longest pause between two lines of a job whose output is no terminal: demonstrations and a training."""
    root = ["--storage_root", str(scratch)]
    collect = ["collect", "--config_path", "ray_jobs/experiments/quickstart/smoke/collect.yaml"]
    return max(pause for words in (collect, _TRAINING) for pause in _pauses([*words, *root]))


def _pauses(words: Sequence[str]) -> Iterator[float]:
    command = [sys.executable, "-m", "ray_jobs", *words]
    last = time.monotonic()
    with subprocess.Popen(
        command, cwd=SOURCE_TREE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        assert job.stdout is not None
        for _ in job.stdout:
            now = time.monotonic()
            yield now - last
            last = now
    yield time.monotonic() - last
    assert job.returncode == 0, command


def help_jobs() -> int:
    """How many jobs answer `--help` with their settings."""
    answered = 0
    for job in JOBS:
        command = [sys.executable, "-m", "ray_jobs", *job.split(), "--help"]
        done = subprocess.run(command, cwd=SOURCE_TREE, capture_output=True, text=True, check=False)
        answered += done.returncode == 0 and re.search(r"^  --config_path", done.stdout, re.M) is not None
    return answered


def docs_words() -> int:
    """Of README.md and docs/, without generated tables."""
    from tests.test_documentation import PAGES, words_of

    return sum(map(words_of, PAGES))


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was aimed at."""
    return [
        Target("journeys_done", figures.get("journeys_done"), len(JOURNEYS), True),
        Target("commands_in_docs_run", figures.get("commands_in_docs_run"), 0.9, True),
        Target("typo_s", figures["typo_s"], 2.0, False),
        Target("silent_s_max", figures["silent_s_max"], 30.0, False),
        Target("help_jobs", figures["help_jobs"], len(JOBS), True),
        Target("fields_without_help", figures["fields_without_help"], 0, False),
        Target("docs_words", figures["docs_words"], 14_000, False),
    ]


def main(study: JourneysStudy) -> None:
    """Measures, prints, and on a full run records."""
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        figures = {} if study.quick else journeys(Path(scratch))
        figures |= {
            "typo_s": typo_s(),
            "silent_s_max": silent_s_max(Path(scratch)),
            "help_jobs": help_jobs(),
            "fields_without_help": sum(not setting.text for setting in settings()),
            "docs_words": docs_words(),
        }
    for line in figures.get("not_run", ()):
        console.print(f"not run: {line}", markup=False, soft_wrap=True)
    conclude("journeys", [], figures, targets(figures), console, quick=study.quick)


if __name__ == "__main__":
    run(JourneysStudy, main, __doc__)
