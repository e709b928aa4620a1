"""The record that a full run of a study or benchmark leaves: where it ran, on what, figures, targets."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ipvla.files import write_text
from ipvla.sim.suites import fingerprint
from ipvla.storage import SOURCE_TREE
from ray_jobs.running.commit import commit

RESULTS: Final = SOURCE_TREE / "benchmarks" / "results"


@dataclass(frozen=True)
class Target:
    """A figure that was promised.

    Attributes:
        value: None where it was not measured or means nothing; that never meets.
        at_least: on which side of `bound` it should lie.
        beyond: `bound` itself does not meet.
        interval: (low, high) around the value.
        note: what it is of, or why there is no value.
    """

    name: str
    value: float | None
    bound: float
    at_least: bool
    beyond: bool = False
    interval: tuple[float, float] | None = None
    note: str = ""

    @property
    def met(self) -> bool:
        if self.value is None or (self.beyond and self.value == self.bound):
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `beyond`, `low` and `high`, and `note` only where they say something."""
        values: dict[str, Any] = {n: getattr(self, n) for n in ("name", "value", "bound", "at_least", "met")}
        if self.beyond:
            values["beyond"] = True
        if self.interval is not None:
            values["low"], values["high"] = self.interval
        return values | ({"note": self.note} if self.note else {})


def write_record(
    name: str,
    seeds: Sequence[int],
    figures: Mapping[str, Any],
    targets: Sequence[Target],
    earlier: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes `benchmarks/results/NAME.json` with commit, machine and library versions of this run.

    Args:
        seeds: all that the figures are of.
        earlier: runs that gave some of the figures, the `runs` of `read_record`.
    """
    run = this_run()
    runs = {"runs": [*earlier, run]} if earlier else {}
    results = {"figures": figures, "targets": [target.to_dict() for target in targets]}
    record = {**run, "seeds": list(seeds), **results, **runs}
    return write_text(RESULTS / f"{name}.json", laid_out(record) + "\n")


def read_record(name: str) -> dict[str, Any] | None:
    """What `write_record` wrote, with `runs` if it was left out for being one; None if there is none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return {"runs": [{key: record[key] for key in ("commit", "machine")}], **record}


def this_run() -> dict[str, Any]:
    """Commit and machine, as records have them."""
    machine = {"cpu": cpu_name(), "os": platform.platform(), **fingerprint()}
    return {"commit": commit(), "machine": machine}


def where(run: Mapping[str, Any]) -> str:
    """A sentence on the run that gave some figures; `commit` is a list where it is not known which one it was."""
    commits = [run["commit"]] if isinstance(run["commit"], str) else run["commit"]
    named = " or ".join(f"`{one[:10]}`" for one in commits)
    return f"Commit {named}, {run['machine']['cpu']}, {run['machine']['os']}."


def laid_out(value: Any, indent: str = "") -> str:
    """JSON of two spaces' indentation; a list or object of nothing but plain values stands on one line."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if not any(isinstance(part, Mapping | list | tuple) for part in parts):
        return json.dumps(value)
    deeper = indent + "  "
    if isinstance(value, Mapping):
        lines = [f"{deeper}{json.dumps(str(name))}: {laid_out(part, deeper)}" for name, part in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + laid_out(part, deeper) for part in value) + f"\n{indent}]"


def cpu_name() -> str:
    """Number and model name of the processors, where Linux knows them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
