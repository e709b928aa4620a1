"""Grid cells are where the rendered picture shows things."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.sim.recall.scene import GRID, PinholeCamera

LOOKING_DOWN = PinholeCamera(np.array([0.0, 0.0, 2.0]), np.eye(3), fovy_deg=90.0)


def test_a_camera_from_above_sees_right_up_and_the_middle():
    assert LOOKING_DOWN.project(np.zeros(3)) == pytest.approx((0.5, 0.5))
    assert LOOKING_DOWN.project(np.array([2.0, 0.0, 0.0])) == pytest.approx((1.0, 0.5))
    assert LOOKING_DOWN.project(np.array([0.0, 2.0, 0.0])) == pytest.approx((0.5, 0.0))
    assert LOOKING_DOWN.project(np.array([1.0, 0.0, 1.0])) == pytest.approx((1.0, 0.5)), "nearer is larger"


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_a_cell_is_always_one_of_the_grid(x, y):
    column, row = LOOKING_DOWN.cell(np.array([x, y, 0.0]))
    assert 0 <= column < GRID
    assert 0 <= row < GRID


def test_cells_count_from_the_upper_left_corner():
    assert LOOKING_DOWN.cell(np.array([-1.99, 1.99, 0.0])) == (0, 0)
    assert LOOKING_DOWN.cell(np.array([1.99, 1.99, 0.0])) == (15, 0)
    assert LOOKING_DOWN.cell(np.array([-1.99, -1.99, 0.0])) == (0, 15)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["items_3", "cups"])
def test_the_cell_of_an_object_is_covered_by_it_in_the_rendered_picture(simulator_of, task):
    simulator = simulator_of(task)
    problem, size = simulator.problem, 64
    for seed in range(10):
        simulator.reset(seed)
        for _ in range(simulator.task.cue_steps):
            simulator.step(np.zeros(7))  # cups are opaque then
        camera, plain = problem.camera(), simulator.frame(size).astype(int)
        for index, name in enumerate(simulator.task.names):
            thing = problem.objects_dict[name]
            rgba, thing.rgba = thing.rgba, (1.0, 0.0, 1.0, 1.0)
            changed = np.abs(simulator.frame(size) - plain).sum(axis=-1) > 30
            thing.rgba = rgba
            column, row = camera.cell(problem.top_m(index))
            side = size // GRID
            block = changed[row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert block.mean() >= 0.5, (seed, name)
