"""The commands of a page, and a shell in which they run in small."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ipvla.storage import SOURCE_TREE

#: Environment variable: a file to which the pages' lines are added that were run, as the pages have them.
LOG: Final = "IPVLA_JOURNEYS_LOG"


def section(page: Path, heading: str) -> str:
    """What stands under `## heading`, up to the next of its kind."""
    text = page.read_text()
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no section {heading!r}"
    return found[1]


def commands(text: str) -> list[str]:
    """The lines of its code blocks, those that go on joined, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def python_code(text: str) -> str:
    """What its blocks of Python say."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


class Shell:
    """bash with a home of its own, where `ipvla JOB` gets further options, and other programs do nothing.

    Attributes:
        home: its home directory.
    """

    def __init__(
        self,
        home: Path,
        small: Mapping[str, Sequence[str]],
        absent: Sequence[str] = (),
        programs: Mapping[str, str] | None = None,
        ray_address: str | None = None,
        places: Mapping[str, Path | str] | None = None,
    ) -> None:
        """A new home.

        Args:
            small: pattern of the words behind `ipvla`, such as "train" or "train *new*" -> options behind those of
                the page; the first that fits counts, and a job's name alone fits all its commands.
            absent: programs, or programs and their first words, that do nothing here and do not count as run.
            programs: further ones, name -> a line of bash.
            ray_address: of a cluster without a token that the jobs join; None for one of each job's own.
            places: what the page names and lies elsewhere here, such as "/data/arms" -> the directory.
        """
        self.home, self._ray_address = home, ray_address
        self._places = {} if places is None else places
        self._variables: list[str] = []
        self._absent = tuple(f"{name} " for name in absent)
        (home / "bin").mkdir(parents=True)
        cases = "".join(f"  {_pattern(words)}) more={_quoted(options)};;\n" for words, options in small.items())
        run = f'exec {sys.executable} -m ray_jobs "$@" "${{more[@]}}"'
        self._program("ipvla", f'more=()\ncase "$*" in\n{cases}esac\n{run}\n')
        self._program("python", f'exec {sys.executable} "$@"\n')
        self._program("pip", f'exec {sys.executable} -m pip "$@"\n')
        for name in absent:
            self._program(name.split()[0], "exit 0\n")
        for name, line in (programs or {}).items():
            self._program(name, f"{line}\n")

    def _program(self, name: str, text: str) -> None:
        path = self.home / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}")
        path.chmod(0o755)

    def run(self, lines: Sequence[str], timeout_s: float) -> str:
        """All lines, in one shell that ends at the first that fails; what they print.

        A variable that a line sets stays set for what runs later.
        """
        script = ["set -x", *self._variables, *map(self._here, lines)]
        command = ["bash", "-euo", "pipefail", "-c", "\n".join(script)]
        with self._started(command, start_new_session=True) as process:
            try:
                shown, _ = process.communicate(timeout=timeout_s)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert process.returncode == 0, shown[-4000:]
        self._variables += [line for line in lines if re.fullmatch(r"\w+=\S+", line)]
        self._log(lines)
        return shown

    @contextmanager
    def running(self, line: str) -> Iterator[subprocess.Popen[str]]:
        """A command that does not end by itself, such as a server; it is interrupted at the end, and ends well."""
        with self._started(["bash", "-c", "\n".join([*self._variables, f"exec {self._here(line)}"])]) as process:
            try:
                yield process
            finally:
                process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        self._log([line])

    @contextmanager
    def killed(self, lines: Sequence[str]) -> Iterator[None]:
        """All lines in the background; they and what they started are killed at the end."""
        command = ["bash", "-euc", "\n".join(["exec > /dev/null 2>&1", *map(self._here, lines)])]
        process = self._started(command, start_new_session=True)
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        self._log(lines)

    def _log(self, lines: Sequence[str]) -> None:
        """For `benchmarks.journeys`, which counts what was run."""
        if path := os.environ.get(LOG):
            with open(path, "a") as file:
                file.writelines(f"{line}\n" for line in lines if not line.startswith(self._absent))

    def _here(self, line: str) -> str:
        for place, here in self._places.items():
            line = line.replace(place, str(here))
        return line

    def _started(self, command: Sequence[str], start_new_session: bool = False) -> subprocess.Popen[str]:
        ours = ("IPVLA_", "RAY_", "MLFLOW_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        path = f"{self.home / 'bin'}:{os.environ['PATH']}"
        address = self._ray_address
        joined = {} if address is None else {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        return subprocess.Popen(
            command,
            cwd=SOURCE_TREE,
            env={**kept, **joined, "HOME": str(self.home), "PATH": path, "PYTHONPATH": str(SOURCE_TREE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=start_new_session,
        )


def address(process: subprocess.Popen[str]) -> tuple[str, int]:
    """Where the server says it is."""
    shown: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        shown.append(line)
        if found := re.search(r"ws://([\d.]+):(\d+)", line):
            return found[1], int(found[2])
    raise AssertionError("".join(shown))


def _pattern(words: str) -> str:
    """`data show` -> `data\\ show|data\\ show\\ *`."""
    escaped = words.replace(" ", r"\ ")
    return escaped if "*" in words else rf"{escaped}|{escaped}\ *"


def _quoted(options: Sequence[str]) -> str:
    return f"({' '.join(map(shlex.quote, options))})"
