"""What simulators need of the machine is checked before a process starts one, and said in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluators.success import SuccessConfig
from ipvla.rollout.sim_pool import simulator_environment
from ipvla.sim.environment import SimulatorError, renderer, require_simulators
from ipvla.storage import SOURCE_TREE


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MUJOCO_GL": "glfw"}, "MUJOCO_GL is 'glfw', which does not draw without a display; set it to osmesa"),
        ({"MUJOCO_GL": "wgl"}, "MUJOCO_GL is 'wgl'"),
        (
            {"PYOPENGL_PLATFORM": "egl"},
            r"PYOPENGL_PLATFORM is 'egl', MUJOCO_GL 'osmesa' \(the default\); set both",
        ),
        (
            {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"},
            "PYOPENGL_PLATFORM is 'osmesa', MUJOCO_GL 'egl'; set",
        ),
    ],
)
def test_a_renderer_that_cannot_draw_here_is_refused_by_the_driver(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for check in (require_simulators, simulator_environment, lambda: SuccessConfig().build(tmp_path)):
        with pytest.raises(SimulatorError, match=message) as caught:
            check()
        assert "\n" not in str(caught.value)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = simulator_environment()
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.setenv(name, "")
    assert renderer() == "osmesa"
    assert simulator_environment() == expected
    monkeypatch.setenv("MUJOCO_GL", "EGL")
    assert simulator_environment()["MUJOCO_EGL_DEVICE_ID"] == "0"
    assert simulator_environment()["PYOPENGL_PLATFORM"] == "egl"


def test_a_clone_of_libero_on_the_path_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_simulators()
    package = tmp_path / "LIBERO" / "libero" / "libero"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os\n")
    (package.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parents[1])
    with pytest.raises(
        SimulatorError, match=f"finds LIBERO in {package.parent}, .*take that directory off PYTHONPATH"
    ):
        require_simulators()


@pytest.mark.slow
def test_simulators_open_with_variables_that_are_set_but_empty(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ipvla.sim.suites import load_suite\n"
        "suite = load_suite('recall', Path(sys.argv[1]))\n"
        "print(suite.simulator('ground_red').observe().images['agentview'].std() > 0)"
    )
    empty = dict.fromkeys(("MUJOCO_GL", "PYOPENGL_PLATFORM", "LIBERO_CONFIG_PATH"), "")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=SOURCE_TREE,
        env=os.environ | empty,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
