"""The commit that this source tree is at: every artifact and record says it."""

from __future__ import annotations

import subprocess

from ipvla.storage import SOURCE_TREE


def commit() -> str:
    """Its hash, or "none" outside of git."""
    told = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=SOURCE_TREE
    )
    return told.stdout.strip() or "none"
