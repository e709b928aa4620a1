"""The Recall suite's problem, registered with LIBERO: builds the scene and plays the task's state machine in it.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
from libero.libero.envs import robots as _mounted_robots  # noqa: F401  registers MountedPanda
from libero.libero.envs.bddl_base_domain import BDDLBaseDomain, register_problem
from libero.libero.envs.objects import get_object_fn
from robosuite.controllers import load_controller_config
from robosuite.models.arenas import Arena
from robosuite.models.tasks import ManipulationTask

import ipvla.sim.recall.objects as _objects  # noqa: F401  registers buttons, cubes and the bowl
from ipvla.sim.altered_tasks import SCENE_GOAL
from ipvla.sim.drawing import RenderContext, draw_collision_meshes
from ipvla.sim.libero import CAMERA, Hand, hand_of, rendered
from ipvla.sim.recall.episode import Episode, draw_episode, planned_m
from ipvla.sim.recall.scene import (
    BALL_RGBA,
    BOWL_RADIUS_M,
    BUTTON_HEIGHT_M,
    CUE_RGBA,
    FLASH_RGBA,
    GLASS_RGBA,
    INVISIBLE_RGBA,
    LAMP_OFF_RGBA,
    LAMP_ON_RGBA,
    TABLE_SIZE_M,
    TABLE_TOP_M,
    PinholeCamera,
)
from ipvla.sim.recall.state_machine import StateMachine
from ipvla.sim.recall.tasks import RecallTask
from ipvla.sim.simulator import StepOutcome

#: The hand counts as raised above this height of the fingertips over the buttons.
_RAISED_M = 0.035
#: An object counts as carried above this height of its centre over the table.
_CARRIED_M = 0.06


class RecallProblem(BDDLBaseDomain):
    """A Panda at a table with the task's objects.

    Args:
        bddl_file_name: the task's BDDL file.
        arena_file: the arena's MJCF file.
        task: the same task as data; it also has the timing, which BDDL cannot say.
    """

    def __init__(self, bddl_file_name: Path, arena_file: Path, task: RecallTask) -> None:
        self.task = task
        self._arena_file = str(arena_file)
        super().__init__(
            str(bddl_file_name),
            robots=["MountedPanda"],
            controller_configs=load_controller_config(default_controller="OSC_POSE"),
            initialization_noise=None,
            use_camera_obs=False,
            hard_reset=False,
            ignore_done=True,
            workspace_offset=(0.0, 0.0, TABLE_TOP_M),
            scene_xml=self._arena_file,
        )

    def begin(self, seed: int) -> None:
        self.reset()
        self._start(draw_episode(self.task, seed))
        self._place(self.episode.positions_m)
        robot = self.robots[0]
        # robosuite's soft reset clears MuJoCo's data but keeps the gripper's integrated command; and it builds the
        # controller, which caches the arm's state, before the objects are in their places.
        robot.gripper.current_action = np.zeros(len(robot.gripper.current_action))
        robot._load_controller()

    @property
    def _machines(self) -> list[StateMachine]:
        """The task's, and that of the scene's own goal, if this is another one."""
        return [self.machine] if self.scene_machine is None else [self.machine, self.scene_machine]

    def _place(self, positions_m: npt.NDArray[np.float64]) -> None:
        """Puts the objects down at [objects, 2]."""
        for name, (x, y) in zip(self.task.names, positions_m, strict=True):
            thing = self.objects_dict[name]
            if len(thing.joints) == 1:
                pose = [x, y, TABLE_TOP_M + thing.base_height_m, 1.0, 0.0, 0.0, 0.0]
                self.sim.data.set_joint_qpos(thing.joints[0], np.array(pose))
            else:
                for joint, value in zip(thing.joints, (x, y), strict=True):
                    self.sim.data.set_joint_qpos(joint, value)

    def _start(self, episode: Episode) -> None:
        self.episode = episode
        self.machine = StateMachine(self.task, cues=episode.cues, cue_at=episode.cue_at)
        self.scene_machine: StateMachine | None = None
        if self.task.scene_program:
            self.scene_machine = StateMachine(replace(self.task, program=self.task.scene_program))

    @property
    def instruction(self) -> str:
        return self.episode.instruction

    @property
    def t(self) -> int:
        return self.machine.t

    def outcome(self) -> StepOutcome:
        failure = self.machine.failure
        if self.scene_machine is not None:  # after a wrong press the scene's own goal may still be reached
            failure = failure and (self.scene_machine.success or self.scene_machine.failure)
        return StepOutcome(success=self.machine.success, failure=failure)

    def step(self, action: npt.NDArray[np.float64]) -> None:
        """One control step, as robosuite's `step` does it but for what it repeats every 2 ms to no effect here:
        a second forward pass, polling the sensors, and checks of the action's size. A quarter of the time.

        While the arm is locked nothing moves but the objects that change places: then there is no physics at all.
        """
        if self.machine.locked:
            self._wait()
            return
        if self.machine.t < self.task.rest_from:
            self._place(self.positions_planned_m(1))
        robot, gripper = self.robots[0], np.array(action[-1:])
        model, data = self.sim.model._model, self.sim.data._data
        robot.controller.set_goal(action[:-1])
        low, high = robot.torque_limits
        for _ in range(round(self.control_timestep / self.model_timestep)):
            data.ctrl[robot._ref_joint_actuator_indexes] = np.clip(robot.controller.run_controller(), low, high)
            data.ctrl[self._finger_actuators] = (
                self._finger_centre + self._finger_range * robot.gripper.format_action(gripper)
            )
            mujoco.mj_step(model, data)
        # A physics step leaves poses that are 2 ms old; robosuite shows those, every reader here the new ones.
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        self._judge()

    def _wait(self) -> None:
        for machine in self._machines:
            machine.advance()
        if self.task.rest_from:
            self._place(self.positions_planned_m())
            mujoco.mj_kinematics(self.sim.model._model, self.sim.data._data)

    def positions_planned_m(self, ahead: int = 0) -> npt.NDArray[np.float64]:
        """float64 [objects, 2], x and y of where the episode has put the objects by now, or some steps later."""
        return planned_m(self.task, self.episode, self.machine.t + ahead)

    def picture(self, camera: str, size: int) -> npt.NDArray[np.uint8]:
        self._paint()
        return rendered(self.sim, camera, size)

    def hand(self) -> Hand:
        return hand_of(self.robots[0], self.sim.data._data, self.sim.data.qpos)

    def _paint(self) -> None:
        """Gives every geom the colour that it has now."""
        colours = {i: self.objects_dict[name].rgba for i, name in enumerate(self.task.names)}
        revealed = self.machine.lit if self._balls else ()
        for cup, geom in self._balls.items():
            colours[cup] = GLASS_RGBA if revealed else colours[cup]
            self.sim.model.geom_rgba[geom] = BALL_RGBA if cup in revealed else INVISIBLE_RGBA
        colours |= {button: CUE_RGBA for button in self.machine.lit if button not in self._balls}
        if self.machine.flashing is not None:
            colours[self.machine.flashing] = FLASH_RGBA
        for button, geom in self._caps.items():
            self.sim.model.geom_rgba[geom] = colours[button]
        self.sim.model.geom_rgba[self._lamp] = LAMP_OFF_RGBA if self.machine.locked else LAMP_ON_RGBA

    def episode_array(self) -> npt.NDArray[np.float64]:
        own, *scene = (machine.to_array() for machine in self._machines)
        return np.concatenate([[float(self.episode.seed)], *([[float(len(own))]] if scene else []), own, *scene])

    def load_episode_array(self, array: npt.NDArray[np.float64]) -> None:
        self._start(draw_episode(self.task, int(array[0])))
        if self.scene_machine is None:
            self.machine.load_array(array[1:])
            return
        own, scene = np.split(array[2:], [int(array[1])])
        self.machine.load_array(own)
        self.scene_machine.load_array(scene)

    def details(self) -> Mapping[str, Any]:
        names = self.task.names
        pressed = max((machine.pressed for machine in self._machines), key=len)
        scene = {} if self.scene_machine is None else {SCENE_GOAL: self.scene_machine.success}
        return {
            "pressed": [names[button] for button in pressed],
            "cues": [names[cue] for cue in self.episode.cues],
            "swaps": [[names[first], names[second]] for first, second in self.episode.swaps],
            "instruction": self.instruction,
            **scene,
        }

    def fingertips_m(self) -> npt.NDArray[np.float64]:
        """float64 [3], the point between the fingertips, in world coordinates."""
        return np.array(self.sim.data.site_xpos[self.robots[0].eef_site_id])

    def position_m(self, index: int) -> npt.NDArray[np.float64]:
        """float64 [3], the centre of the task's `index`-th object, in world coordinates."""
        return np.array(self.sim.data.body_xpos[self.obj_body_id[self.task.names[index]]])

    def top_m(self, index: int) -> npt.NDArray[np.float64]:
        """float64 [3], the middle of the upper side of the task's `index`-th object, in world coordinates."""
        top = self.position_m(index)
        top[2] += self.objects_dict[self.task.names[index]].base_height_m
        return top

    def carried(self) -> bool:
        """Place: the first object is up in the air, or over the second one."""
        if not self.task.delivers:
            return False
        cargo, goal = self.position_m(0), self.position_m(1)
        over = np.linalg.norm(cargo[:2] - goal[:2]) < BOWL_RADIUS_M
        return bool(over or cargo[2] > TABLE_TOP_M + _CARRIED_M)

    def camera(self) -> PinholeCamera:
        """The one that observations are taken with."""
        camera, data = self.sim.model.camera_name2id(CAMERA), self.sim.data
        fovy = float(self.sim.model.cam_fovy[camera])
        return PinholeCamera(np.array(data.cam_xpos[camera]), data.cam_xmat[camera].reshape(3, 3).copy(), fovy)

    # ---- robosuite's hooks ----

    def _load_model(self) -> None:
        # BDDLBaseDomain would load LIBERO's own arena, which needs texture files.
        super(BDDLBaseDomain, self)._load_model()
        robot = self.robots[0].robot_model
        robot.set_base_xpos(robot.base_xpos_offset["table"](TABLE_SIZE_M[0]))
        categories = self.parsed_problem["objects"].items()
        self.objects_dict = {name: get_object_fn(c)(name=name) for c, names in categories for name in names}
        self.objects = list(self.objects_dict.values())
        self.model = ManipulationTask(Arena(self._arena_file), [robot], self.objects)

    def _initialize_sim(self, xml_string: str | None = None) -> None:
        self.set_xml_processor(draw_collision_meshes)
        super()._initialize_sim(xml_string)
        self.sim.model.vis.quality.offsamples = 0
        self.sim.model.vis.quality.shadowsize = 0
        RenderContext(self.sim, device_id=self.render_gpu_device_id)  # makes itself known to the sim

    def _setup_references(self) -> None:
        super()._setup_references()
        model = self.sim.model
        self._lamp = model.geom_name2id("go_lamp")
        balls = {i: f"{name}_ball_visual" for i, name in enumerate(self.task.names)}
        self._balls = {i: model.geom_name2id(name) for i, name in balls.items() if name in model.geom_names}
        buttons = {i: n for i, n in enumerate(self.task.names) if f"{n}_cap" in model.geom_names}
        self._caps = {i: model.geom_name2id(f"{name}_cap_visual") for i, name in buttons.items()}
        self._button_of_geom = {model.geom_name2id(f"{name}_cap"): i for i, name in buttons.items()}
        self._finger_actuators = [model.actuator_name2id(name) for name in self.robots[0].gripper.actuators]
        low, high = model.actuator_ctrlrange[self._finger_actuators].T
        self._finger_centre, self._finger_range = (high + low) / 2, (high - low) / 2
        self._hand = {model.geom_name2id(name) for name in self.robots[0].gripper.contact_geoms}

    def _setup_observables(self) -> dict[str, Any]:
        return {}  # the simulator reads what it needs; robosuite would poll some thirty sensors every 2 ms

    def _reset_internal(self) -> None:
        super(BDDLBaseDomain, self)._reset_internal()  # objects are placed by `begin`

    def _judge(self) -> None:
        height = self.fingertips_m()[2] - TABLE_TOP_M - BUTTON_HEIGHT_M
        for machine in self._machines:
            machine.advance(self._touched_button(), raised=height > _RAISED_M, delivered=self._delivered())

    def _touched_button(self) -> int | None:
        for pair in self.sim.data._data.contact.geom.tolist():
            for button, other in (pair, pair[::-1]):
                if button in self._button_of_geom and other in self._hand:
                    return self._button_of_geom[button]
        return None

    def _delivered(self) -> bool:
        """Place: the first object lies in the second, and the hand has let go of it."""
        if not self.task.delivers:
            return False
        cargo, goal = self.position_m(0), self.position_m(1)
        inside = np.linalg.norm(cargo[:2] - goal[:2]) < 0.75 * BOWL_RADIUS_M and cargo[2] < TABLE_TOP_M + 0.05
        return bool(inside and np.linalg.norm(self.fingertips_m() - cargo) > 0.05)


register_problem(RecallProblem)
