"""The record that a benchmark's full run leaves in `benchmarks/results`: where, on what, figures, targets."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ipvla.sim.fingerprint import fingerprint
from ray_jobs.commit import commit

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


def write_record(
    name: str,
    seeds: Sequence[int],
    figures: Mapping[str, Any],
    targets: Sequence[Target],
    earlier: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes `results/NAME.json` with commit, machine and library versions of this run.

    Args:
        seeds: all that the figures are of.
        earlier: runs that gave some of the figures, as `read_record(name)["runs"]` tells.
    """
    machine = {"cpu": cpu_name(), "system": platform.platform(), **fingerprint()}
    run = {"commit": commit(), "machine": machine}
    record = {
        **run,
        "seeds": list(seeds),
        "figures": figures,
        "targets": [target.to_dict() for target in targets],
        **({"runs": [*earlier, run]} if earlier else {}),
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def read_record(name: str) -> dict[str, Any] | None:
    """What `results/NAME.json` says, with `runs` if it was left out for being one; None if there is none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return {"runs": [{key: record[key] for key in ("commit", "machine")}], **record}


def cpu_name() -> str:
    """Number and model name of the processors, where Linux tells them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
