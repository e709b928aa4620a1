"""Settings files of the tests' environment."""

import copy

import pytest
import yaml

REACH = {
    "tasks": {
        "near": {
            "id": "ipvla_tests/Reach-v0",
            "instruction": "push the dot onto the mark",
            "horizon": 12,
            "expert": "tests.sim.gym.reach:expert",
        }
    },
    "modules": ["tests.sim.gym.reach"],
    "cameras": {"front": "render"},
    "state": ["dot"],
    "state_size": 2,
    "action_size": 2,
    "control_hz": 10,
    "success": {"info": "is_success"},
}


@pytest.fixture
def reach(tmp_path):
    """reach(changes..., name=...) -> the suite `gym:PATH`; `task` changes the one task."""

    def write(task=None, name="reach", **changes):
        settings = {**copy.deepcopy(REACH), **changes}
        settings["tasks"]["near"] |= task or {}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
        return f"gym:{path}"

    return write
