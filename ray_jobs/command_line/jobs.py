"""The jobs by name, which `ipvla NAME` and `ray_jobs.submit -- NAME` run, and their completion in a shell.

Each is a module of this package. `data show` is two words on the command line: `ray_jobs.data.show`.
"""

from __future__ import annotations

import argparse
import ast
import sys
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import shtab

from ipvla.choices import did_you_mean
from ray_jobs.command_line.settings import CONFIG_PATH, options, positional_of

#: Job -> the class of its settings, by name: a job is imported only when it runs.
JOBS: Final[Mapping[str, str]] = {
    "doctor": "DoctorConfig",
    "quickstart": "QuickstartConfig",
    "collect": "CollectConfig",
    "statistics": "StatisticsConfig",
    "convert": "ConvertConfig",
    "data show": "ShowConfig",
    "import": "ImportConfig",
    "train": "ExperimentConfig",
    "fit_tokens": "FitTokensConfig",
    "subspaces": "SubspacesConfig",
    "export": "ExportConfig",
    "interpolate": "InterpolateConfig",
    "evaluate": "EvaluateConfig",
    "robustness": "RobustnessConfig",
    "listening": "ListeningConfig",
    "memory_use": "MemoryUseJobConfig",
    "open_loop": "OpenLoopConfig",
    "sensitivity": "SensitivityConfig",
    "compare": "CompareConfig",
    "replay": "ReplayConfig",
    "merge": "MergeConfig",
    "paired": "PairedConfig",
    "serve": "ServeConfig",
    "tune": "SweepConfig",
    "mlflow_sync": "SyncConfig",
    "submit": "SubmitConfig",
}
#: Jobs whose names are no names of modules.
_MODULES: Final[Mapping[str, str]] = {"import": "import_policy", "export": "export_policy"}


def named(words: Sequence[str]) -> tuple[str, list[str]]:
    """The job that a command line begins with, and the words behind it; its first word if that is no job."""
    first, *rest = words
    if rest and (both := f"{first} {rest[0]}") in JOBS:
        return both, rest[1:]
    return first, rest


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of `submit`, and the job behind `--`; a line that begins with a job needs no `--`."""
    words = list(arguments)
    if "--" in words:
        place = words.index("--")
        return words[:place], words[place + 1 :]
    return ([], words) if words and named(words)[0] in JOBS else (words, [])


def module(job: str) -> str:
    """The name of a job's module."""
    return f"ray_jobs.{_MODULES.get(job, job).replace(' ', '.')}"


def config_class(job: str) -> type[Any]:
    """The class of a job's settings; imports the job."""
    config_class: type[Any] = getattr(import_module(module(job)), JOBS[job])
    return config_class


def summary(job: str) -> str:
    """What a job does: the first line of its module, which is read, not imported."""
    path = Path(__file__).parents[1].joinpath(*_MODULES.get(job, job).split()).with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.splitlines()[0].removeprefix(f"`python -m {module(job)}`: ").rstrip(".")


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
