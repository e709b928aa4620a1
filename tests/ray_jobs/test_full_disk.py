"""A file system that really fills up during a training: told in a line; the training goes on with more room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ipvla.data.rlds import write_rlds
from ipvla.storage import SOURCE_TREE
from tests.synthetic import SIZE, cue_episode

_MIB = 160
#: Trains on a disk of its own; once it has logged, another writes until nothing is left; then again, with room.
_SCRIPT = """
mount -t tmpfs -o size={mib}m none {disk}
fill() {{
    while [ ! -s {run}/metrics.jsonl ]; do sleep 0.2; done
    dd if=/dev/zero of={disk}/another bs=1M 2> /dev/null
    dd if=/dev/zero of={disk}/last bs=1 2> /dev/null
}}
fill &
{train}
echo "exit $?"
wait
rm {disk}/another {disk}/last
exec {train}
"""


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    disk, data = tmp_path / "disk", tmp_path / "data"
    disk.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", disk], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    write_rlds(data, "cues", [cue_episode(seed) for seed in range(4)], SIZE)
    flags = [
        *("--storage_root", disk, "--data_root_dir", data, "--tmp_dir", tmp_path / "tmp"),
        *("--study", "full", "--name", "run", "--data.dataset", "cues", "--data.image_size", SIZE),
        *("--training.steps", 400, "--training.log_every", 1, "--training.checkpoint_every", 20),
        *("--training.precision", "fp32", "--lanes.lanes", 2, "--lanes.window", 2),
    ]
    train = " ".join([sys.executable, "-m", "ray_jobs", "train", *map(str, flags)])
    script = _SCRIPT.format(disk=disk, run=disk / "runs" / "full" / "run", train=train, mib=_MIB)
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], cwd=SOURCE_TREE, capture_output=True, text=True, check=False
    )
    first, _, second = done.stdout.partition("exit 2\n")
    told = done.stderr  # Ray writes there too
    assert second, done.stdout + told
    assert "no space is left on the disk" in first + told
    assert "Traceback" not in first + told
    assert done.returncode == 0, second + told
    assert "400 steps" in second
