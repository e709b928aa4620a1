"""A task of LIBERO's own suites, bit for bit as LIBERO plays it, in a fraction of the time.

What LIBERO does and this does not, because nothing comes of it:

- it polls some hundred sensors every 2 ms, and renders every camera at every control step. Here whoever wants to
  see something asks. What is shown then is what LIBERO shows: the moment at which robosuite takes its samples, not
  a control step's end but the last but one of its 25 steps of physics (`_SampleClock`);
- every 2 ms it computes positions, velocities and contacts three times from the same state. The solver's warm
  start keeps what each of the three solutions found, so all three are solved here as well, on what was computed
  once;
- it builds the world anew for every episode. Here the world of the first one stays: physics, controller and
  gripper go back to where a new world has them, its solver's warm start included.

One thing is not as in a script that plays episode after episode in one environment: there the fixtures of tasks
with an open drawer or door move by millimetres from episode to episode, because every rebuilt world draws one more
random number than the one before. Here every episode has the fixtures that such a script has in its first one.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import mujoco
import numpy as np
import numpy.typing as npt
from libero.libero.envs import TASK_MAPPING
from libero.libero.envs.bddl_utils import get_problem_info, robosuite_parse_problem
from robosuite.controllers import load_controller_config
from robosuite.utils.errors import RandomizationError

from ipvla.sim.altered_tasks import SCENE_GOAL
from ipvla.sim.build_memory import release
from ipvla.sim.drawing import RenderContext, draw_collision_meshes
from ipvla.sim.libero import Hand, hand_of, rendered
from ipvla.sim.perturbations.perturbation import Change, Perturbation
from ipvla.sim.perturbations.scene import Scene
from ipvla.sim.simulator import Split, StepOutcome, Task
from ipvla.sim.standard.assets import AssetsError
from ipvla.sim.standard.variants import register_variants

#: Side of the shadow map in profile "fast"; LIBERO's is 4096.
_FAST_SHADOWS_PX: Final = 512
_PHYSICS: Final = mujoco.mjtState.mjSTATE_INTEGRATION
#: Of all bodies in their parents: float64 [n, 3] and quaternions [n, 4].
Poses = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


class StandardProblem:
    """A `Problem` of `ipvla.sim.libero`.

    Episodes of held-out seeds begin in the published initial states, those of training seeds in layouts drawn as
    LIBERO draws them; where there are no published ones, all are drawn.

    Args:
        bddl_file: the task's BDDL file.
        task: the same task as data.
        initial_states: float64 [n, state], the published ones; None where there are none.
        profile: how pictures are drawn, see `ipvla.sim.suites.PROFILES`.
        world_seed: as public evaluations seed an environment before its first reset.
        furnish: gives the scene's MJCF what LIBERO's has not; it is called while the world is built.
        goal_file: of the task whose goal is to be reached here in place of the scene's own; None for its own.

    Raises:
        AssetsError: the file is no task of LIBERO's, or the initial states are those of another world.
    """

    def __init__(
        self,
        bddl_file: Path,
        task: Task,
        initial_states: npt.NDArray[np.float64] | None,
        profile: str = "exact",
        world_seed: int = 0,
        furnish: Callable[[str], str] | None = None,
        goal_file: Path | None = None,
    ) -> None:
        self.task, self._initial_states = task, initial_states
        register_variants()
        self._env = _seen_on_demand(_problem_class(bddl_file), profile, furnish)(
            str(bddl_file),
            robots=["Panda"],
            controller_configs=load_controller_config(default_controller="OSC_POSE"),
            initialization_noise=None,
            use_camera_obs=False,
            ignore_done=True,
        )
        #: The scene's own goal, where another one is to be reached: predicates in BDDL's words.
        self._scene_goal: list[list[str]] | None = None
        if goal_file is not None:
            parsed = self._env.parsed_problem
            self._scene_goal = parsed["goal_state"]
            parsed["goal_state"] = robosuite_parse_problem(str(goal_file))["goal_state"]
        size = 1 + self._model.nq + self._model.nv
        if initial_states is not None and initial_states.shape[1] != size:
            raise AssetsError(
                f"the initial states of {task.name} have {initial_states.shape[1]} numbers, its world has {size}: "
                "they are of another model; install the packages again: make assets"
            )
        self._unplaced: Poses = self._env.unplaced
        self._draw(world_seed)
        self._env.hard_reset = False
        release()
        self._published = self._bodies()
        self._first = np.empty(mujoco.mj_stateSize(self._model, _PHYSICS))
        mujoco.mj_getState(self._model, self._data, self._first, _PHYSICS)
        self._substeps = int(self._env.control_timestep / self._env.model_timestep)
        self._eyes = mujoco.MjData(self._model)  # has the poses that are shown, of which physics must not know
        self.sim._render_context_offscreen.data = SimpleNamespace(_data=self._eyes)
        self._seed, self._t, self._success, self._lit = 0, 0, False, True
        self._scene_goal_reached = False
        self._perturbation: Perturbation | None = None
        self._scene: Scene | None = None
        self._change: Change | None = None

    @property
    def env(self) -> Any:
        """LIBERO's environment, to be looked at."""
        return self._env

    @property
    def sim(self) -> Any:
        return self._env.sim

    @property
    def robots(self) -> Any:
        return self._env.robots

    @property
    def instruction(self) -> str:
        given = self.task.phrasings[self._seed % len(self.task.phrasings)]
        return given if self._change is None else self._change.instruction(given)

    @property
    def t(self) -> int:
        return self._t

    def perturb(self, perturbation: Perturbation | None) -> None:
        """Perturbs the episodes that begin from now on; None to leave them as they are."""
        if self._scene is None:
            self._scene = Scene(self._env)
        self._scene.restore()
        self._perturbation, self._change = perturbation, None

    def begin(self, seed: int) -> None:
        """ValueError for a held-out seed beyond the published initial states."""
        published = self._published_state(seed)
        gripper = self._robot.gripper
        gripper.current_action = np.zeros(len(gripper.current_action))
        if published is None:
            self._draw(seed)
        else:
            self._place(published)
        self._begin_change(seed)
        self._env._check_success()
        self._env._post_process()
        self._seed, self._t, self._success, self._lit = seed, 0, False, True
        self._scene_goal_reached = False
        self._clock = _SampleClock(self._env.control_timestep, self._env.model_timestep)
        self._shown = self._joints = self._data.qpos.copy()

    def step(self, action: npt.NDArray[np.float64]) -> None:
        """One control step."""
        self._light()
        model, data, robot = self._model, self._data, self._robot
        low, high = robot.torque_limits
        with self._solving_only():
            for substep in range(self._substeps):
                mujoco.mj_forward(model, data)
                if substep == 0:
                    robot.controller.set_goal(action[:-1])
                torques = robot.controller.run_controller()
                data.ctrl[robot._ref_joint_actuator_indexes] = np.clip(torques, low, high)
                robot.grip_action(gripper=robot.gripper, gripper_action=action[-1:])
                sampled = self._clock.tick()
                if sampled:  # poses are those before the step of physics, joints those after it
                    self._shown = data.qpos.copy()
                mujoco.mj_step2(model, data)
                if sampled:
                    self._joints = data.qpos.copy()
        self._t += 1
        self._judge()
        self._lit = False

    def outcome(self) -> StepOutcome:
        return StepOutcome(success=self._success, failure=False)

    def premises(self) -> dict[str, bool]:
        """What the task takes for granted, in BDDL's words -> whether it is so now.

        Of its initial relations those of objects with one another and with furniture. Places on the workspace
        itself are left out: LIBERO draws objects in them whose centres then lie beside.
        """
        problem, workspace = self._env.parsed_problem, self._env.workspace_name
        regions = problem["regions"]
        relations = [
            relation
            for relation in problem["initial_state"]
            if relation[-1] not in regions or regions[relation[-1]]["target"] != workspace
        ]
        return {" ".join(relation): bool(self._env._eval_predicate(relation)) for relation in relations}

    def positions_m(self) -> dict[str, npt.NDArray[np.float64]]:
        """Name of an object that can be moved -> float64 [3], its centre in world coordinates."""
        bodies = self._env.obj_body_id
        return {name: np.array(self._data.xpos[bodies[name]]) for name in self._env.objects_dict}

    def picture(self, camera: str, size: int) -> npt.NDArray[np.uint8]:
        self._look()
        seen = rendered(self.sim, camera, size)
        return seen if self._change is None else self._change.picture(seen, camera, self._t)

    def hand(self) -> Hand:
        self._look()
        return hand_of(self._robot, self._eyes, self._joints)

    def episode_array(self) -> npt.NDArray[np.float64]:
        clock = [self._clock.elapsed, float(self._clock.sampled)]
        reached = [] if self._scene_goal is None else [float(self._scene_goal_reached)]
        return np.concatenate([[self._seed, self._t], clock, reached, self._shown, self._joints])

    def load_episode_array(self, array: npt.NDArray[np.float64]) -> None:
        self.begin(int(array[0]))
        self._t, self._clock.elapsed, self._clock.sampled = int(array[1]), float(array[2]), bool(array[3])
        rest = array[4:]
        if self._scene_goal is not None:
            self._scene_goal_reached, rest = bool(rest[0]), rest[1:]
        self._shown, self._joints = np.split(rest, 2)

    def details(self) -> Mapping[str, Any]:
        drawn = {} if self._change is None else dict(self._change.drawn)
        return drawn if self._scene_goal is None else {**drawn, SCENE_GOAL: self._scene_goal_reached}

    def close(self) -> None:
        self._env.close()

    def _judge(self) -> None:
        """Decides the episode by what the world is after a control step."""
        self._success = bool(self._env._check_success())
        if self._scene_goal is not None:
            self._scene_goal_reached |= all(self._env._eval_predicate(wanted) for wanted in self._scene_goal)

    def _published_state(self, seed: int) -> npt.NDArray[np.float64] | None:
        """The initial state of this seed's episode, None if it is drawn."""
        number = seed - Split.HELD_OUT.value
        if self._initial_states is None or number < 0:
            return None
        if number >= len(self._initial_states):
            raise ValueError(
                f"{self.task.name} has {len(self._initial_states)} published initial states; "
                f"trial {number} is beyond them: play fewer episodes per task"
            )
        state: npt.NDArray[np.float64] = self._initial_states[number]
        return state

    def _place(self, state: npt.NDArray[np.float64]) -> None:
        """A published initial state, as in a world that was just built."""
        mujoco.mj_resetData(self._model, self._data)
        self._set_bodies(self._published)
        mujoco.mj_forward(self._model, self._data)
        self._robot.reset()
        mujoco.mj_setState(self._model, self._data, self._first, _PHYSICS)
        self.sim.set_state_from_flattened(state)
        mujoco.mj_forward(self._model, self._data)

    def _draw(self, seed: int) -> None:
        """A layout of LIBERO's own samplers; one that does not fit is drawn again, as there."""
        with _random_numbers(seed):
            while True:
                self._set_bodies(self._unplaced)  # LIBERO draws in a world that was just built
                try:
                    self._env.reset()
                except RandomizationError:
                    continue
                if self._arrange():
                    return

    def _arrange(self) -> bool:
        """Finishes a layout that was just drawn; False for one that does not fit."""
        return True

    def _apart(self, touching: Collection[tuple[str, str]] = ()) -> bool:
        """No two objects touch, nor one a fixture, but for these pairs; LIBERO's samplers know only radii."""
        things = self._env.objects_dict | self._env.fixtures_dict
        pairs = {
            *combinations(self._env.objects_dict, 2),
            *product(self._env.objects_dict, self._env.fixtures_dict),
        }
        apart = pairs - {pair[::step] for pair in touching for step in (1, -1)}
        return not any(self._env.check_contact(things[one], things[other]) for one, other in apart)

    def _begin_change(self, seed: int) -> None:
        if self._perturbation is not None and self._scene is not None:
            self._scene.restore()
            self._change = self._perturbation.change(self.task.name, seed)
            self._change.apply(self._scene)

    def _look(self) -> None:
        """Puts everything where pictures show it."""
        self._eyes.qpos[:] = self._shown
        mujoco.mj_kinematics(self._model, self._eyes)
        mujoco.mj_comPos(self._model, self._eyes)  # cameras and lights may follow it
        mujoco.mj_camlight(self._model, self._eyes)

    def _light(self) -> None:
        """Turns lights on and off as the last step left them: LIBERO does it after that step's pictures."""
        if not self._lit:
            self._env._post_process()
            self._lit = True

    @contextmanager
    def _solving_only(self) -> Iterator[None]:
        """While it lasts, what asks the sim for a forward pass (the controller) gets the solver's part of it."""
        sim, through_velocity = self.sim, mujoco.mjtStage.mjSTAGE_VEL
        sim.forward = partial(mujoco.mj_forwardSkip, self._model, self._data, through_velocity, 1)
        try:
            yield
        finally:
            del sim.forward

    def _bodies(self) -> Poses:
        return self._model.body_pos.copy(), self._model.body_quat.copy()

    def _set_bodies(self, poses: Poses) -> None:
        self._model.body_pos[:], self._model.body_quat[:] = poses

    @property
    def _robot(self) -> Any:
        return self._env.robots[0]

    @property
    def _model(self) -> Any:
        return self.sim.model._model

    @property
    def _data(self) -> Any:
        return self.sim.data._data


class _SampleClock:
    """When robosuite samples its sensors: at the first step of physics after a control step's worth of time.

    Every forced look (one when a world is reset, one when it is put into an initial state) counts as a step of
    physics too, so that samples are taken before a control step ends. The times are summed up as there: rounding
    decides.
    """

    def __init__(self, period: float, timestep: float) -> None:
        self._period, self._timestep = period, timestep
        self.elapsed, self.sampled = 2 * timestep, True

    def tick(self) -> bool:
        """One step of physics more; whether a sample is taken after it."""
        self.elapsed += self._timestep
        due = not self.sampled and self._period >= self.elapsed
        self.sampled |= due
        if self.elapsed >= self._period:
            self.elapsed %= self._period
            self.sampled = False
        return due


def _problem_class(bddl_file: Path) -> Any:
    """LIBERO's class for a task file. AssetsError if it is none."""
    try:
        name = get_problem_info(str(bddl_file))["problem_name"]
    except Exception as error:  # of the parser, of no narrower type
        raise AssetsError(
            f"{bddl_file} is no task file ({error}); install the package again: make assets"
        ) from None
    if name not in TASK_MAPPING:
        raise AssetsError(f"{bddl_file} is of problem {name!r}; LIBERO has {', '.join(sorted(TASK_MAPPING))}")
    return TASK_MAPPING[name]


def _seen_on_demand(problem: type, profile: str, furnish: Callable[[str], str] | None) -> type:
    """LIBERO's problem without sensors to poll, with a renderer that can live beside others."""
    changes = [change for change in (furnish, draw_collision_meshes if profile == "fast" else None) if change]

    def initialize_sim(self: Any, xml_string: str | None = None) -> None:
        if changes:
            self.set_xml_processor(lambda mjcf: reduce(lambda text, change: change(text), changes, mjcf))
        problem._initialize_sim(self, xml_string)  # type: ignore[attr-defined]
        model = self.sim.model._model
        self.unplaced = model.body_pos.copy(), model.body_quat.copy()  # where fixtures are until they are drawn
        if profile == "fast":
            self.sim.model.vis.quality.offsamples = 0
            self.sim.model.vis.quality.shadowsize = _FAST_SHADOWS_PX
        RenderContext(self.sim, device_id=self.render_gpu_device_id)  # makes itself known to the sim

    hooks = {"_setup_observables": lambda self: {}, "_initialize_sim": initialize_sim}
    return type(problem.__name__, (problem,), hooks)  # LIBERO compares this name with the BDDL file's


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """LIBERO draws from NumPy's global generator; others who do are not disturbed."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
