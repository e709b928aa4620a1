"""What workers ask of their machines."""

from __future__ import annotations

import time
from pathlib import Path

from ipvla.tracking import MLflowSink, RunIdentity
from ipvla.tracking.mlflow_spool import Spool, spooled
from ipvla.tracking.system_metrics import Place, SystemMonitor


def test_the_first_worker_passes_on_what_the_others_see(tmp_path: Path) -> None:
    spool, system = tmp_path / "mlflow_spool", tmp_path / "system"
    sink = MLflowSink(RunIdentity("http://127.0.0.1:9", "study", "gru", "runs/gru"), spool)
    with SystemMonitor(Place(1, first_of_node=False), system, 0.05, lambda: 7, None):
        time.sleep(0.2)
    with SystemMonitor(Place(), system, 3600, lambda: 8, sink):
        pass  # a training that ends before the first look is looked at once
    sink.close()
    (left,) = [taken for path in spooled(spool) if (taken := Spool.take(path))]
    lines = [record for record, _ in left.undelivered() if "metrics" in record]
    seen = {name: (line["step"], value) for line in lines for name, value in line["metrics"].items()}
    assert set(seen) == {
        "system/worker_0/cpu_percent",
        "system/worker_0/memory_mib",
        "system/worker_1/cpu_percent",
        "system/worker_1/memory_mib",
        "system/node_0/cpu_percent",
        "system/node_0/memory_percent",
    }
    assert (seen["system/worker_1/memory_mib"][0], seen["system/worker_0/memory_mib"][0]) == (7, 8)
    assert len(lines) >= 4
    assert 1 < seen["system/worker_0/memory_mib"][1] < 2**20
    assert 0 < seen["system/node_0/memory_percent"][1] <= 100
