"""docs/serving.md: its servers answer openpi's client as the page says, and an evaluation asks one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.rollout_speed import save_untrained_policy
from ipvla.storage import SOURCE_TREE
from tests.journeys.page import Shell, address, commands, python_code

pytest.importorskip("openpi_client")
PAGE = SOURCE_TREE / "docs" / "serving.md"
TASK = "pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"
SMALL = {
    "serve": ["--use_gpu", "false", "--server.port", "0"],
    "evaluate": ["--success.episodes", f"{{{TASK}: 1}}", "--success.num_simulators", "1", "--videos", "0"],
}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_servers_and_who_asks_them(tmp_path: Path, ray_address: str) -> None:
    here, beyond, evaluate = [line for line in commands(PAGE.read_text()) if line.startswith("ipvla ")]
    places: dict[str, Any] = {}
    shell = Shell(tmp_path / "home", SMALL, ray_address=ray_address, places=places)
    runs = shell.home / "ipvla_storage" / "runs"
    for study in ("quickstart", "recall"):
        directory = save_untrained_policy(runs / study / "gru" / "policy")

    with shell.running(here) as process:
        host, port = address(process)
        names: dict[str, Any] = {
            "image": np.zeros((64, 64, 3), np.uint8),
            "wrist": np.zeros((64, 64, 3), np.uint8),
            "state": np.zeros(8, np.float32),
        }
        exec(python_code(PAGE.read_text()).replace("ws://127.0.0.1:8000", f"ws://{host}:{port}"), names)
        assert names["chunk"].shape == (8, 7)
        places["ws://gpu-box:8000"] = f"ws://{host}:{port}"
        shell.run([evaluate], 400)
    for policy in ("pi0", "gru"):
        assert (runs / "recall" / policy / "episodes.sqlite").exists()

    places["ipvla serve --policy DIR"] = f"env IPVLA_SERVE_TOKEN=secret ipvla serve --policy {directory}"
    with shell.running(beyond) as process:
        assert address(process)[0] == "0.0.0.0"
