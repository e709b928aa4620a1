"""docs/data.md names commands and settings that exist."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields

import pytest

from ipvla.data.lanes import LaneConfig
from ipvla.experiment import DataConfig
from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.jobs import JOBS, config_class, named
from ray_jobs.command_line.settings import parse

PAGE = (SOURCE_TREE / "docs" / "data.md").read_text()
BLOCKS = "".join(re.findall(r"```\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [line for line in BLOCKS.replace("\\\n", " ").splitlines() if line.startswith("ipvla ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_taken(command: str) -> None:
    job, settings = named(shlex.split(command, comments=True)[1:])
    assert job in JOBS
    parse(config_class(job), settings)


@pytest.mark.parametrize(("group", "config"), [("data", DataConfig), ("lanes", LaneConfig)])
def test_its_settings_exist(group: str, config: type) -> None:
    told = set(re.findall(rf"`{group}\.(\w+)`", PAGE))
    assert told
    assert told <= {field.name for field in fields(config)}


def test_it_names_every_setting_of_how_data_are_read() -> None:
    known = {field.name for field in fields(DataConfig)} - {"image_size", "proprio", "cache_gib"}
    assert known <= set(re.findall(r"`data\.(\w+)`", PAGE))
