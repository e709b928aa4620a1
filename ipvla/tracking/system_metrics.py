"""CPU, memory and GPU of every training worker and its machine, looked at by a thread while the worker trains.

The first worker alone speaks to MLflow (a SQLite file wants one writer): the others write lines beside the run's
own metrics, in storage that all share, and the first one passes them on.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from ipvla.tracking.mlflow_sink import MLflowSink

_MIB = 2**20


@dataclass(frozen=True)
class Place:
    """Which worker it is.

    Attributes:
        rank: among all workers.
        node: its machine's number.
        first_of_node: whether it speaks for its machine.
        gpu: index of its own GPU, if it has one.
    """

    rank: int = 0
    node: int = 0
    first_of_node: bool = True
    gpu: int | None = None


class SystemMonitor:
    """Logs while it is entered, from a thread of its own; a look takes a quarter of a millisecond of CPU.

    `system/worker_<rank>/{cpu_percent, memory_mib, gpu_memory_mib, gpu_percent}`, of one core and of its own GPU,
    and `system/node_<number>/{cpu_percent, memory_percent}` of the whole machine.

    Args:
        directory: `worker_<rank>.jsonl` of all but the first.
        every_s: between two looks.
        step: the metrics' step: how far the worker has trained.
        sink: of the first worker.
    """

    def __init__(
        self,
        place: Place,
        directory: Path,
        every_s: float,
        step: Callable[[], int],
        sink: MLflowSink | None,
    ) -> None:
        self._place, self._directory, self._every_s = place, directory, every_s
        self._step, self._sink = step, sink
        self._process = psutil.Process()
        self._passed_on: dict[Path, int] = {}  # bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)

    def __enter__(self) -> Self:
        if self._sink is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._own.write_text("")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def _own(self) -> Path:
        return self._directory / f"worker_{self._place.rank}.jsonl"

    def _work(self) -> None:
        self._process.cpu_percent()  # shares of time are counted from here on, by psutil for each thread
        psutil.cpu_percent()
        while not self._stop.wait(self._every_s):
            self._look()
        self._look()

    def _look(self) -> None:
        with contextlib.suppress(OSError, psutil.Error, RuntimeError):  # monitoring must not end the training
            line = {"step": self._step(), "time": int(time.time() * 1000), "metrics": self._metrics()}
            if self._sink is None:
                with self._own.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                return
            for one in (line, *self._others()):
                self._sink.log(one["metrics"], one["step"], one["time"])

    def _others(self) -> Iterator[dict[str, Any]]:
        """What the other workers have written since the last look."""
        for path in sorted(self._directory.glob("worker_*.jsonl")):
            text = path.read_bytes()
            begin = self._passed_on.get(path, 0)
            begin = begin if begin <= len(text) else 0  # its worker was started again
            self._passed_on[path] = end = text.rfind(b"\n") + 1
            yield from map(json.loads, text[begin:end].splitlines())

    def _metrics(self) -> dict[str, float]:
        worker = {
            "cpu_percent": self._process.cpu_percent(),
            "memory_mib": self._process.memory_info().rss / _MIB,
            **({} if self._place.gpu is None else _gpu_metrics(self._place.gpu)),
        }
        values = {f"system/worker_{self._place.rank}/{name}": value for name, value in worker.items()}
        if self._place.first_of_node:
            node = f"system/node_{self._place.node}"
            values[f"{node}/cpu_percent"] = psutil.cpu_percent()
            values[f"{node}/memory_percent"] = psutil.virtual_memory().percent
        return values


def _gpu_metrics(index: int) -> dict[str, float]:
    """Of the whole device, with all its users; its load only where NVIDIA's own library is installed for torch."""
    import torch

    free, total = torch.cuda.mem_get_info(index)
    values = {"gpu_memory_mib": (total - free) / _MIB}
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):
        values["gpu_percent"] = float(torch.cuda.utilization(index))
    return values
