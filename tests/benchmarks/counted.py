"""Counts to 20 in a file, with a process below it, and goes on where it was killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    path = Path(sys.argv[1])
    with subprocess.Popen(["sleep", "60"]) as below:
        for number in range(len(path.read_text().split()), 20):
            with path.open("a") as file:
                file.write(f"{number}\n")
            time.sleep(0.1)
        below.kill()
