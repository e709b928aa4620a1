"""The commit that this source tree is at: every artifact and record says it."""

from __future__ import annotations

import os
import subprocess
from typing import Final

from ipvla.storage import SOURCE_TREE

#: Tells the commit where the tree travelled without its repository; `ray_jobs.submit` sets it for its jobs.
COMMIT_VARIABLE: Final = "IPVLA_COMMIT"


def commit() -> str:
    """Its hash; `$IPVLA_COMMIT`, or "none", outside of git."""
    try:
        commit_hash = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=SOURCE_TREE
        ).stdout.strip()
    except FileNotFoundError:  # no git here
        commit_hash = ""
    return commit_hash or os.environ.get(COMMIT_VARIABLE) or "none"
