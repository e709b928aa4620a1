"""Whole commands of README.md and the pages, with their values, are settings that their jobs take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.jobs import JOBS, config_class, named
from ray_jobs.command_line.settings import parse

GENERATED = {"settings.md"}
PAGES = [
    SOURCE_TREE / "README.md",
    *(page for page in sorted((SOURCE_TREE / "docs").glob("*.md")) if page.name not in GENERATED),
]


def commands(page: Path) -> list[str]:
    """Those of its code blocks, in full, with the variables that the page sets: `...` leaves something out."""
    blocks = "".join(re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(), re.DOTALL))
    values: dict[str, str] = {}
    found = []
    for line in blocks.replace("\\\n", " ").splitlines():
        if re.match(r"\w+=", line):
            values |= dict(re.findall(r"(\w+)=(\S+)", line))
        full = re.sub(r"\$(\w+)", lambda name, known=dict(values): known.get(name[1], name[0]), line)
        if re.match(r"(ipvla|python -m ray_jobs\.\w+) ", full) and " ..." not in full:
            found.append(full)
    return found


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page)}))
def test_commands_are_taken(command: str) -> None:
    words = shlex.split(command.replace("python -m ray_jobs.", "ipvla "), comments=True)[1:]
    if words[0] in ("help", "submit"):
        return
    job, settings = named(words)
    assert job in JOBS
    if "/policy.train.yaml" not in command and "FILE" not in command:
        parse(config_class(job), settings)
