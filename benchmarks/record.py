"""The record that a benchmark's full run leaves in `benchmarks/results`: where, on what, figures, targets."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ipvla.sim.fingerprint import fingerprint

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Target:
    """A figure that was promised; `at_least` says on which side of `bound` it should lie."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """JSON values: name, value, bound, at_least, met."""
        return asdict(self) | {"met": self.met}


def write_record(name: str, seeds: Sequence[int], figures: Mapping[str, Any], targets: Sequence[Target]) -> Path:
    """Writes `results/NAME.json` with commit, machine and library versions."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS)
    record = {
        "commit": commit.stdout.strip() or "none",
        "machine": {"cpu": cpu_name(), "system": platform.platform(), **fingerprint()},
        "seeds": list(seeds),
        "figures": figures,
        "targets": [target.to_dict() for target in targets],
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def cpu_name() -> str:
    """Number and model name of the processors, where Linux tells them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
