"""The only door to LIBERO, robosuite and MuJoCo: set-up, and a Simulator on one of their environments.

Importing this file imports none of them; `configure` prepares their import.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from ipvla.files import write_text
from ipvla.sim.environment import environment_variable, renderer, require_simulators
from ipvla.sim.simulator import StepOutcome, Task
from ipvla.types import Observation

if TYPE_CHECKING:
    from ipvla.sim.depth import DepthContext

CAMERA: Final = "agentview"
ACTION_SIZE: Final = 7
#: Name in results -> distribution package.
PACKAGES: Final[Mapping[str, str]] = {"mujoco": "mujoco", "robosuite": "robosuite", "libero": "hf-libero"}

_DIRECTORIES = {
    "benchmark_root": ".",
    "bddl_files": "bddl_files",
    "init_states": "init_states",
    "datasets": "datasets",
    "assets": "assets",
}


def configure(cache_dir: Path, assets: Path | None = None) -> Path:
    """Prepares the import of LIBERO so that it asks nothing, downloads nothing and warns about nothing.

    Environment variables that are already set win. A second call changes nothing.

    Args:
        assets: of LIBERO's own suites, for the worlds that are built from now on; the embedded suite needs none.

    Returns:
        The directory for LIBERO's files, `cache_dir/libero`.

    Raises:
        SimulatorError: see `ipvla.sim.environment.require_simulators`.
    """
    require_simulators()
    root = cache_dir.expanduser().resolve() / "libero"
    for name in _DIRECTORIES.values():
        (root / name).mkdir(parents=True, exist_ok=True)
    # Without this file LIBERO prompts on standard input when it is imported.
    os.environ["LIBERO_CONFIG_PATH"] = environment_variable("LIBERO_CONFIG_PATH", str(root))
    config_file = Path(os.environ["LIBERO_CONFIG_PATH"]) / "config.yaml"
    if not config_file.exists():
        write_text(config_file, "".join(f"{k}: {root / v}\n" for k, v in _DIRECTORIES.items()))
    os.environ["MUJOCO_GL"] = renderer()
    # Simulators run in parallel as processes; their small matrices and pictures gain nothing from threads.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    if "robosuite" not in sys.modules:
        # robosuite's own way to set macros: without such a module it warns and logs to /tmp/robosuite.log.
        macros = ModuleType("robosuite.macros_private")
        vars(macros).update(CONSOLE_LOGGING_LEVEL=None, FILE_LOGGING_LEVEL=None)
        sys.modules["robosuite.macros_private"] = macros

    if "mujoco" not in sys.modules:  # who imported it before may have built models, whose assets it then holds
        from ipvla.sim.build_memory import without_asset_cache

        without_asset_cache()
    import libero.libero

    # LIBERO downloads its assets from the Hugging Face hub unless it believes that it has a path already.
    if assets is not None or libero.libero._assets_path_cache is None:
        libero.libero._assets_path_cache = str(assets or root / "assets")
    return root


@dataclass(frozen=True)
class Hand:
    """float64: position [3] in metres, orientation [4] as w, x, y, z, joints of fingers [2] (m) and arm [7]."""

    position: npt.NDArray[np.float64]
    orientation: npt.NDArray[np.float64]
    fingers: npt.NDArray[np.float64]
    arm: npt.NDArray[np.float64]


class Problem(Protocol):
    """What `LiberoSimulator` needs of a LIBERO environment beyond robosuite's own interface.

    The environment is built with `ignore_done=True` and without camera observables.
    """

    @property
    def sim(self) -> Any: ...
    @property
    def robots(self) -> Any: ...
    @property
    def instruction(self) -> str: ...
    @property
    def t(self) -> int: ...

    def step(self, action: npt.NDArray[np.float64]) -> Any: ...
    def close(self) -> None: ...
    def begin(self, seed: int) -> None:
        """Starts the episode of this seed, bit for bit the same after any other."""

    def outcome(self) -> StepOutcome: ...
    def picture(self, camera: str, size: int) -> npt.NDArray[np.uint8]:
        """uint8 [size, size, 3], upright RGB."""

    def hand(self) -> Hand:
        """As pictures show it."""

    def episode_array(self) -> npt.NDArray[np.float64]: ...
    def load_episode_array(self, array: npt.NDArray[np.float64]) -> None: ...
    def details(self) -> Mapping[str, Any]: ...


class LiberoSimulator:
    """A Simulator on a robosuite environment with one arm under OSC_POSE control at 20 Hz.

    Args:
        problem: the environment.
        task: its task.
        camera_size: height and width of the policy's pictures, in pixels.
        cameras: of these pictures, by MuJoCo's names.
    """

    def __init__(
        self, problem: Problem, task: Task, camera_size: int = 64, cameras: Sequence[str] = (CAMERA,)
    ) -> None:
        if camera_size < 1:
            raise ValueError(f"camera_size {camera_size} is not positive; give the picture's side in pixels")
        self.task = task
        self.problem = problem
        self.camera_size = camera_size
        self.cameras = tuple(cameras)
        self._closed = False
        self._depth: DepthContext | None = None
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Starts the episode of this seed, bit for bit the same after any other.

        Raises:
            ValueError: the seed is outside [0, 2^32).
        """
        self.problem.begin(seed)

    def step(self, action: npt.NDArray[np.floating[Any]]) -> StepOutcome:
        """Plays one control step without rendering.

        Args:
            action: [7], position and rotation deltas in [-1, 1] and the gripper, -1 open, +1 close.

        Raises:
            ValueError: the action has another shape, or is not finite.
        """
        command = np.asarray(action, dtype=np.float64)
        if command.shape != (ACTION_SIZE,) or not np.isfinite(command).all():
            raise ValueError(f"action {action} is not {ACTION_SIZE} finite numbers; check the policy's statistics")
        self.problem.step(command)
        return self.problem.outcome()

    def observe(self, geometry: bool = False) -> Observation:
        """Renders a picture per camera and reads the arm; the world stays as it is.

        Args:
            geometry: render depth as well, of the same state and size.
        """
        images = {camera: self.problem.picture(camera, self.camera_size) for camera in self.cameras}
        if geometry and self._depth is None:
            from ipvla.sim.depth import DepthContext  # imports MuJoCo, which `configure` has prepared

            self._depth = DepthContext(self.problem.sim, self.camera_size)
        return Observation(
            images=images,
            proprio=self.proprio(),
            instruction=self.problem.instruction,
            t=self.problem.t,
            geometry=None if not geometry or self._depth is None else {c: self._depth.view(c) for c in images},
        )

    def proprio(self) -> npt.NDArray[np.float32]:
        """float32 [8], LIBERO's layout."""
        hand = self.problem.hand()
        return np.concatenate([hand.position, axis_angle(hand.orientation), hand.fingers]).astype(np.float32)

    @property
    def t(self) -> int:
        """Control steps since the reset."""
        return self.problem.t

    def joints(self) -> npt.NDArray[np.float32]:
        """float32 [9], as the picture shows them: the arm's joints in radians, the fingers' in metres."""
        hand = self.problem.hand()
        return np.concatenate([hand.arm, hand.fingers]).astype(np.float32)

    def frame(self, size: int = 256) -> npt.NDArray[np.uint8]:
        """uint8 [size, size, 3], upright RGB."""
        return self.problem.picture(CAMERA, size)

    def state(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """Everything that decides the future: physics, controller, gripper and the episode's own progress."""
        import mujoco

        model, robot = self.problem.sim.model._model, self.problem.robots[0]
        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(model, spec))
        mujoco.mj_getState(model, self._data, physics, spec)
        return {
            "physics": physics,
            "goal_position": np.array(robot.controller.goal_pos),
            "goal_rotation": np.array(robot.controller.goal_ori),
            "gripper": np.array(robot.gripper.current_action, dtype=np.float64),
            "episode": self.problem.episode_array(),
        }

    def restore(self, state: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Continues where `state` was called, in this process or another one with the same task.

        Raises:
            ValueError: the state is of another task.
        """
        import mujoco

        model, robot = self.problem.sim.model._model, self.problem.robots[0]
        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        size = mujoco.mj_stateSize(model, spec)
        if state["physics"].shape != (size,):
            raise ValueError(
                f"a state of {state['physics'].size} numbers does not fit task {self.task.name} ({size}); "
                "restore it in a simulator of the task that it was saved from"
            )
        self.problem.load_episode_array(state["episode"])
        mujoco.mj_setState(model, self._data, state["physics"], spec)
        mujoco.mj_forward(model, self._data)
        mujoco.mj_setState(model, self._data, state["physics"], spec)  # the forward pass moved the warm start
        robot.gripper.current_action = state["gripper"].copy()
        robot.controller.goal_pos = state["goal_position"].copy()
        robot.controller.goal_ori = state["goal_rotation"].copy()
        robot.controller.new_update = True

    def details(self) -> Mapping[str, Any]:
        return self.problem.details()

    def close(self) -> None:
        """Frees the world and its GL context; harmless when called again."""
        if not self._closed:
            self._closed = True
            if self._depth is not None:
                self._depth.free()
            self.problem.sim._render_context_offscreen.free()
            self.problem.close()

    @property
    def _data(self) -> Any:
        return self.problem.sim.data._data


def rendered(sim: Any, camera: str, size: int) -> npt.NDArray[np.uint8]:
    """uint8 [size, size, 3], upright RGB, of a robosuite simulation."""
    picture: npt.NDArray[np.uint8] = sim.render(camera_name=camera, width=size, height=size)
    return np.ascontiguousarray(picture[::-1])  # OpenGL's first row is the lowest


def hand_of(robot: Any, data: Any, qpos: npt.NDArray[np.float64]) -> Hand:
    """The hand of a robosuite robot: poses from MuJoCo's data, joints from qpos."""
    body = robot.sim.model.body_name2id(robot.robot_model.eef_name)
    return Hand(
        np.array(data.site_xpos[robot.eef_site_id]),
        np.array(data.xquat[body]),
        np.array(qpos[robot._ref_gripper_joint_pos_indexes]),
        np.array(qpos[robot._ref_joint_pos_indexes]),
    )


def axis_angle(wxyz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Axis times angle in [0, 2 pi], as LIBERO computes it: no flip to the shorter way round."""
    w = float(np.clip(wxyz[0], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(wxyz[1:] * 2.0 * np.arccos(w) / sine)
