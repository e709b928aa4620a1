"""Shapes and places in a scene of LIBERO's own suites, measured from the true state.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

import itertools
from typing import Final

import mujoco
import numpy as np
import numpy.typing as npt

from ipvla.sim.standard.problem import StandardProblem

Vector = npt.NDArray[np.float64]

_CORNERS: Final = np.array(list(itertools.product((-1.0, 1.0), repeat=3)))
#: MuJoCo's geoms of this group collide; the others are only seen.
_COLLIDING: Final = 0


class SceneGeometry:
    """Measures a problem in the state that it is in; lengths in metres, in world coordinates."""

    def __init__(self, problem: StandardProblem) -> None:
        self._env, sim = problem.env, problem.sim
        self._model, self._data = sim.model._model, sim.data._data
        gripper = problem.robots[0].gripper
        self._pads = [
            [self._model.geom(name).id for name in gripper.important_geoms[side]]
            for side in ("left_fingerpad", "right_fingerpad")
        ]
        self._eef = problem.robots[0].eef_site_id
        robot = problem.robots[0].robot_model.contact_geoms + gripper.contact_geoms
        self._robot = {self._model.geom(name).id for name in robot}
        solid = [geom for geom in range(self._model.ngeom) if self._model.geom_group[geom] == _COLLIDING]
        planes = [geom for geom in solid if self._model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_PLANE]
        self._solid = [geom for geom in solid if geom not in planes]
        self._floor_m = max((float(self._data.geom_xpos[geom, 2]) for geom in planes), default=0.0)
        self._geoms: dict[str, list[int]] = {}

    def goal(self) -> tuple[str, str, str]:
        """(relation, object, target), of a task with a single goal.

        Raises:
            ValueError: the task wants something else than one object put somewhere.
        """
        goals = self._env.parsed_problem["goal_state"]
        if len(goals) != 1 or len(goals[0]) != 3 or goals[0][0] not in ("on", "in"):
            raise ValueError(
                f"no expert for the goal {goals}; choose a task that puts one object on or in another"
            )
        relation, moved, target = goals[0]
        return relation, moved, target

    def hand(self) -> Vector:
        """float64 [3], the middle between the pads of the fingers."""
        left, right = self._pad_centres()
        return (left + right) / 2

    def opening(self) -> float:
        """The horizontal direction in which the fingers open, as an angle from the x axis in radians."""
        left, right = self._pad_centres()
        x, y, _ = right - left
        return float(np.arctan2(y, x))

    def pointing(self) -> Vector:
        """float64 [3], the unit vector along which the hand points; (0, 0, -1) for straight down."""
        return np.array(self._data.site_xmat[self._eef].reshape(3, 3)[:, 2])

    def apart(self) -> float:
        """Distance between the pads."""
        left, right = self._pad_centres()
        return float(np.linalg.norm(right - left))

    def place(self, name: str) -> Vector:
        """float64 [3], where an object or a region is."""
        if name in self._env.obj_body_id:
            return np.array(self._data.xpos[self._env.obj_body_id[name]])
        return np.array(self._data.site_xpos[self._model.site(name).id])

    def is_object(self, name: str) -> bool:
        """It is an object or a fixture, not a region."""
        return name in self._env.obj_body_id

    def touching(self, name: str, other: str) -> bool:
        """Whether two objects are in contact."""
        return bool(self._env.check_contact(self._env.get_object(name), self._env.get_object(other)))

    def corners(self, name: str) -> Vector:
        """float64 [n, 3], corners of the boxes around everything of an object that collides."""
        rotations, centres, halves = self._boxes(self._colliding(name))
        corners: Vector = np.einsum("gij,gkj->gki", rotations, _CORNERS[None] * halves[:, None]) + centres[:, None]
        return corners.reshape(-1, 3)

    def height(self, points: Vector, *, without: str | None = None) -> Vector:
        """float64 [n], of the highest thing at each of `points`, [n, 2], that is neither robot nor `without`.

        Things count as the boxes around their parts.
        """
        left_out = self._robot | set(self._colliding(without) if without else ())
        geoms = [geom for geom in self._solid if geom not in left_out]
        rotations, centres, halves = self._boxes(geoms)
        radius = np.linalg.norm(halves, axis=1)[:, None]
        near = (
            (centres[:, :2] + radius >= points.min(axis=0)) & (centres[:, :2] - radius <= points.max(axis=0))
        ).all(1)
        rotations, centres, halves = rotations[near], centres[near], halves[near]
        # Where the vertical line through a point leaves a box: the slab test, in the box's own coordinates.
        start = np.concatenate([points, np.zeros((len(points), 1))], axis=1)
        origin = np.einsum("gji,pgj->pgi", rotations, start[:, None] - centres[None])
        slope = rotations[:, 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.stack([(side * halves - origin) / slope for side in (-1, 1)])
        parallel, inside = np.abs(slope) < 1e-9, np.abs(origin) <= halves
        low = np.where(parallel, np.where(inside, -np.inf, np.inf), ends.min(axis=0)).max(axis=-1)
        high = np.where(parallel, np.where(inside, np.inf, -np.inf), ends.max(axis=0)).min(axis=-1)
        heights: Vector = np.where(low <= high, high, self._floor_m).max(axis=1, initial=self._floor_m)
        return heights

    def _boxes(self, geoms: list[int]) -> tuple[Vector, Vector, Vector]:
        """Rotations [n, 3, 3], centres and half sizes [n, 3] of the boxes around geoms."""
        rotations = self._data.geom_xmat[geoms].reshape(-1, 3, 3)
        centres, halves = self._model.geom_aabb[geoms, :3], self._model.geom_aabb[geoms, 3:]
        moved = np.einsum("gij,gj->gi", rotations, centres) + self._data.geom_xpos[geoms]
        return rotations, moved, halves

    def _pad_centres(self) -> tuple[Vector, Vector]:
        left, right = (self._data.geom_xpos[pads].mean(axis=0) for pads in self._pads)
        return left, right

    def _colliding(self, name: str) -> list[int]:
        if name not in self._geoms:
            root = self._env.obj_body_id[name]
            bodies = {root}
            for body in range(root + 1, self._model.nbody):  # children come after their parents
                if int(self._model.body_parentid[body]) in bodies:
                    bodies.add(body)
            self._geoms[name] = [
                geom
                for geom in range(self._model.ngeom)
                if int(self._model.geom_bodyid[geom]) in bodies and self._model.geom_group[geom] == _COLLIDING
            ]
        return self._geoms[name]
