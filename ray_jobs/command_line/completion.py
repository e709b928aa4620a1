"""Shell completion of `ipvla`: jobs, the names of their settings, and the values of those that have few."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import shtab

from ipvla.choices import did_you_mean
from ray_jobs.command_line.jobs import JOBS, config_class, summary
from ray_jobs.command_line.settings import CONFIG_PATH, options, positional_of


def complete(arguments: Sequence[str]) -> int:
    """Prints the completion of a shell; exit code 2 if it is none that we know."""
    shell = arguments[0] if arguments else "bash"
    if shell not in shtab.SUPPORTED_SHELLS:
        sys.stderr.write(f"error: {shell}: no completion; {did_you_mean(shell, shtab.SUPPORTED_SHELLS)}\n")
        return 2
    print(shtab.complete(parser(), shell))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line as argparse would have it: only to be completed, never to parse."""
    whole = argparse.ArgumentParser("ipvla", add_help=False)
    rooms = {"": whole.add_subparsers()}
    for job in JOBS:
        room, _, name = job.rpartition(" ")
        if room not in rooms:
            rooms[room] = rooms[""].add_parser(room, add_help=False).add_subparsers()
        one = rooms[room].add_parser(name, help=summary(job), add_help=False)
        if (positional := positional_of(config_class(job))) is not None:
            one.add_argument(positional, nargs="?").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        one.add_argument("--help", action="store_true")
        _takes(one, CONFIG_PATH, Path)
        for name, kind in options(config_class(job)):
            _takes(one, name, kind)
    return whole


def _takes(parser: argparse.ArgumentParser, name: str, kind: Any) -> None:
    argument = parser.add_argument(f"--{name}", choices=_values(kind))
    if Path in (kind, *typing.get_args(kind)):
        argument.complete = shtab.FILE  # type: ignore[attr-defined]


def _values(kind: Any) -> list[str] | None:
    if kind is bool:
        return ["true", "false"]
    if typing.get_origin(kind) is typing.Literal:
        return [str(value) for value in typing.get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.name for member in kind]
    return None
