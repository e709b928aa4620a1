"""A sweep as users run it, whose driver is killed in the middle: does it go on, is any finished trial run again?

The sweep is `python -m ray_jobs.tune` in a process of its own. Once half of the trials have ended and the next one
is training, that process gets SIGKILL; its cluster dies with it, and the same command is given again. What every
trial that had ended left behind is compared before and after.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus
import psutil
import yaml
from rich.console import Console

from ipvla.files import write_text
from ipvla.storage import SOURCE_TREE, StorageRoots
from ray_jobs.command_line.settings import arguments, parse
from ray_jobs.quickstart import Stopwatch
from ray_jobs.running.cluster import connect
from ray_jobs.tuning.sweep import SweepConfig
from studies.forgetting import ForgettingRunner, ForgettingStudy

_POLL_S = 0.5
_END_S = 60.0
_PRESETS = SOURCE_TREE / "ray_jobs" / "experiments" / "forgetting"


@dataclass(frozen=True)
class SweepStudy(StorageRoots):
    """The sweep that is killed.

    Attributes:
        quick: trials that take seconds.
        seed: of the base policy that trials start from, and of the trials.
        trials: how many.
    """

    quick: bool = False
    seed: int = 100
    trials: int = 24

    @property
    def forgetting(self) -> ForgettingStudy:
        """The study whose data and base policy these are: one seed, and no second task."""
        one = {"methods": ("hsw_thermostat",), "seeds": (self.seed + 1,), "tuning_seed": self.seed}
        return ForgettingStudy(quick=self.quick, tune=True, **one, **self.directories)

    def make_ready(self, console: Console) -> float:
        """Data, base policy and artifact, where they are missing; the seconds that took, over all starts."""
        directory = self.runs / "service"
        directory.mkdir(parents=True, exist_ok=True)
        stopwatch = Stopwatch(directory / "prepared_s.txt")
        with connect(self):
            ForgettingRunner(self.forgetting, console).prepare(self.seed)
        return stopwatch.read()

    def arguments(self) -> list[str]:
        """`ray_jobs.tune` with the preset, from the base policy and the artifact of `forgetting`."""
        subspaces = self.forgetting.subspaces(self.seed)[0]
        settings: dict[str, Any] = {
            "seed": self.seed,
            "start_from": str(self.forgetting.base(self.seed)),
            "forgetting.artifact": subspaces.name,
            "forgetting.probe": draccus.encode(subspaces.probe),
        }
        flags: dict[str, Any] = {"study": "service", "name": "sweep", "trials": self.trials, **self.directories}
        if self.quick:
            settings |= yaml.safe_load((_PRESETS / "quick" / "train.yaml").read_text())
            settings["training"] = {"steps": 4, "checkpoint_every": 2, "log_every": 1}
            episodes = {"ground_yellow": 1, "ground_red": 1}
            flags |= {"success.episodes": episodes, "success.num_simulators": 1, "confirm_seeds": [self.seed + 1]}
        sweep = ["--config_path", str(_PRESETS / "sweep.yaml"), *arguments(flags)]
        return [*sweep, *arguments({"settings": settings})]


@dataclass(frozen=True)
class KilledSweep:
    """A sweep's command line, and where it stands.

    Attributes:
        arguments: of `ray_jobs.tune`; trials run one at a time, so all but the newest have ended.
    """

    arguments: Sequence[str]

    @property
    def config(self) -> SweepConfig:
        return parse(SweepConfig, self.arguments)

    @property
    def trials(self) -> list[Path]:
        """Run directories, in the order in which they began."""
        config = self.config
        begun = {path: path / "experiment.json" for path in _runs(config) if (path / "experiment.json").exists()}
        return sorted(begun, key=lambda path: begun[path].stat().st_mtime_ns)

    def run(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Sweeps, is killed, goes on; does what is missing of that if it was interrupted. What came of it.

        Raises:
            RuntimeError: the sweep ended before it could be killed, or failed.
        """
        config = self.config
        place = config.directory.with_name(f"{config.name}-killed")
        place.mkdir(parents=True, exist_ok=True)
        before = place / "before.json"
        stopwatch = Stopwatch(place / "seconds.txt")
        if not before.exists():
            self._run_until(lambda: self._is_halfway(config.trials), stopwatch)
            ended = {path.name: evidence(path, config.mlflow_uri) for path in self.trials[:-1]}
            seen = {"ended": ended, "interrupted": self.trials[-1].name, "seconds": stopwatch.read()}
            write_text(before, json.dumps(seen, indent=1))
        seen = json.loads(before.read_text())
        say(f"{len(seen['ended'])} trials had ended when the driver was killed; the same command again")
        stopwatch = Stopwatch(place / "seconds.txt")
        if not (place / "after.json").exists():
            self._run_until(lambda: False, stopwatch)
            write_text(place / "after.json", json.dumps({"seconds": stopwatch.read()}))
        after = json.loads((place / "after.json").read_text())
        again = {name: evidence(config.directory.with_name(name), config.mlflow_uri) for name in seen["ended"]}
        told = json.loads((config.directory / "sweep.json").read_text())
        return figures(told, seen, again, after["seconds"])

    def _is_halfway(self, trials: int) -> bool:
        begun = self.trials
        return len(begun) > trials // 2 and _lines(begun[-1] / "metrics.jsonl") > 0

    def _run_until(self, ends: Callable[[], bool], stopwatch: Stopwatch) -> None:
        """The sweep's process, up to its end or to when it is killed."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "ray_jobs.tune", *self.arguments]
        driver = subprocess.Popen(command, cwd=SOURCE_TREE, env=environment, start_new_session=True)
        wanted = False
        try:
            while driver.poll() is None and not wanted:
                time.sleep(_POLL_S)
                stopwatch.read()
                wanted = ends()
        except BaseException:
            _end(driver, signal.SIGINT)
            raise
        if wanted and driver.poll() is None:
            _end(driver, signal.SIGKILL)
        elif driver.returncode or wanted or not (self.config.directory / "sweep.json").exists():
            raise RuntimeError(
                f"the sweep ended with {driver.returncode}: {' '.join(command)}; look at its output above"
            )


def figures(
    told: Mapping[str, Any], seen: Mapping[str, Any], again: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Figures of the sweep, from its `sweep.json` and what ended trials had left before and after the kill."""
    names = [trial["name"] for trial in told["trials"]]
    repeated = [name for name, left in seen["ended"].items() if again[name] != left or names.count(name) != 1]
    statuses = [trial["status"] for trial in told["trials"]]
    return {
        "trials": {status: statuses.count(status) for status in ("finished", "stopped", "failed")},
        "ended_before_the_kill": len(seen["ended"]),
        "interrupted_went_on": names.count(seen["interrupted"]) == 1,
        "repeated": repeated,
        "seconds_before_the_kill": seen["seconds"],
        "seconds": seconds,
        **{name: told[name] for name in ("best", "importances", "confirmation", "best_minus_default")},
        "played": [
            {name: trial[name] for name in ("name", "status", "step", "values", "told")}
            for trial in told["trials"]
        ],
    }


def evidence(run: Path, mlflow_uri: str) -> dict[str, Any]:
    """What a trial left that running it again would change: JSON values.

    Every line that training logged with its time, when each checkpoint was written, every episode with the time at
    which it was recorded, and the runs and points in MLflow's SQLite store.
    """
    metrics, checkpoints = run / "metrics.jsonl", (run / "trainer").glob("step_*/training.json")
    return {
        "metrics": hashlib.sha256(metrics.read_bytes()).hexdigest() if metrics.exists() else None,
        "checkpoints": {path.parent.name: path.stat().st_mtime_ns for path in checkpoints},
        "episodes": {
            path.name: _rows(path, "SELECT key, recorded_at FROM episodes ORDER BY key")
            for path in sorted(run.glob("episodes_*.sqlite"))
        },
        "mlflow": _mlflow(run, mlflow_uri),
    }


def _mlflow(run: Path, uri: str) -> Any:
    """Run -> number of its points, as MLflow's schema has them; None where the store is no file here."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:") or not path.exists():
        return None
    query = (
        "SELECT t.run_uuid, COUNT(m.key) FROM tags t LEFT JOIN metrics m ON m.run_uuid = t.run_uuid "
        "WHERE t.key = 'ipvla.run_key' AND t.value = ? GROUP BY t.run_uuid ORDER BY t.run_uuid"
    )
    return _rows(path, query, str(run))


def _rows(path: Path, query: str, *values: str) -> list[list[Any]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
        return [list(row) for row in database.execute(query, values)]


def _runs(config: SweepConfig) -> list[Path]:
    """Directories that trials of this sweep train in, and not the comparison's."""
    tuned = config.directory / "tune"
    return [run for run in config.directory.parent.glob(f"{config.name}-*") if _is_trial(tuned, config, run)]


def _is_trial(tuned: Path, config: SweepConfig, run: Path) -> bool:
    return (tuned / run.name.removeprefix(f"{config.name}-")).is_dir()


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def _end(driver: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Ends the driver alone; its cluster follows. What has not after a minute is ended too."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            driver.wait(_END_S)
        _, left = psutil.wait_procs(children, timeout=_END_S)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
