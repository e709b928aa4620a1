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

from ipvla.storage import SOURCE_TREE


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

    def __init__(self, home: Path, small: Mapping[str, Sequence[str]], absent: Sequence[str] = ()) -> None:
        """`small`: job -> options behind those of the page; `absent`: programs that are not here."""
        self.home, programs = home, home / "bin"
        programs.mkdir(parents=True)
        cases = "".join(f"  {job.split()[0]}) more={_quoted(options)};;\n" for job, options in small.items())
        self._program(
            "ipvla",
            f'more=()\ncase "$1" in\n{cases}esac\nexec {sys.executable} -m ray_jobs "$@" "${{more[@]}}"\n',
        )
        for name in absent:
            self._program(name, "exit 0\n")

    def _program(self, name: str, text: str) -> None:
        path = self.home / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}")
        path.chmod(0o755)

    def run(self, lines: Sequence[str], timeout_s: float) -> str:
        """All lines, in one shell that ends at the first that fails; what they print."""
        command = ["bash", "-euo", "pipefail", "-c", "\n".join(["set -x", *lines])]
        with self._started(command) as process:
            try:
                shown, _ = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == 0, shown[-4000:]
        return shown

    @contextmanager
    def running(self, line: str) -> Iterator[subprocess.Popen[str]]:
        """A command that does not end by itself, such as a server; it is interrupted at the end, and ends well."""
        with self._started(["bash", "-c", f"exec {line}"]) as process:
            try:
                yield process
            finally:
                process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0

    def _started(self, command: Sequence[str]) -> subprocess.Popen[str]:
        ours = ("IPVLA_", "RAY_", "MLFLOW_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        path = f"{self.home / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            command,
            cwd=SOURCE_TREE,
            env={**kept, "HOME": str(self.home), "PATH": path, "PYTHONPATH": str(SOURCE_TREE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _quoted(options: Sequence[str]) -> str:
    return f"({' '.join(map(shlex.quote, options))})"
