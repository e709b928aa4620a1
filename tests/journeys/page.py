"""The commands of a page, and a shell in which they run in small."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
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


class Shell:
    """bash with a home of its own, where `ipvla JOB` and `ipvla submit -- JOB` get further options.

    Attributes:
        home: its home directory.
    """

    def __init__(
        self,
        home: Path,
        small: Mapping[str, Sequence[str]],
        absent: Sequence[str] = (),
        programs: Mapping[str, str] | None = None,
    ) -> None:
        """`small`: job -> options behind those of the page; `absent`: programs that do nothing; others' text."""
        self.home = home
        (home / "bin").mkdir(parents=True)
        cases = "".join(f"  {job.split()[0]}) more={_quoted(options)};;\n" for job, options in small.items())
        self._program(
            "ipvla",
            'more=() line="$*"\njob="${line##*-- }"\ncase "${job%% *}" in\n'
            f'{cases}esac\nexec {sys.executable} -m ray_jobs "$@" "${{more[@]}}"\n',
        )
        for name, text in {**dict.fromkeys(absent, "exit 0\n"), **(programs or {})}.items():
            self._program(name, text)

    def _program(self, name: str, text: str) -> None:
        path = self.home / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}")
        path.chmod(0o755)

    def run(self, lines: Sequence[str], timeout_s: float) -> str:
        """All lines, in one shell that ends at the first that fails; what they print."""
        with self._started(lines, SOURCE_TREE, subprocess.PIPE) as process:
            try:
                shown, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired as late:
                raise AssertionError(f"not over after {timeout_s} s: {(late.output or b'')[-4000:]!r}") from None
        assert process.returncode == 0, shown[-4000:]
        return shown

    @contextlib.contextmanager
    def running(self, lines: Sequence[str]) -> Iterator[None]:
        """All lines in the background, in the home directory, until the block ends."""
        with self._started(lines, self.home, subprocess.DEVNULL):
            yield

    @contextlib.contextmanager
    def _started(self, lines: Sequence[str], directory: Path, output: int) -> Iterator[subprocess.Popen[str]]:
        """bash; it and what it started are killed when the block ends."""
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", "\n".join(["set -x", *lines])],
            cwd=directory,
            env=self._environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("IPVLA_", "RAY_", "MLFLOW_"))
        }
        path = f"{self.home / 'bin'}:{os.environ['PATH']}"
        return {**kept, "HOME": str(self.home), "PATH": path, "PYTHONPATH": str(SOURCE_TREE)}


def _quoted(options: Sequence[str]) -> str:
    return f"({' '.join(map(shlex.quote, options))})"
