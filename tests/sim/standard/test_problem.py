"""The standard suites are LIBERO's own, bit for bit: compared with the environment that public scripts step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.libero import LiberoSimulator, configure
from ipvla.sim.protocols import EvaluationProtocol
from ipvla.sim.simulator import Split
from ipvla.sim.standard.assets import find_assets
from ipvla.sim.standard.tasks import bddl_file, initial_states
from ipvla.sim.suites import load_suite

pytestmark = pytest.mark.slow

SIZE = 64
CAMERAS = ("agentview", "robot0_eye_in_hand")
#: Suite, task, and the seed of its world: one with a drawer that is drawn open, one with a stove to be lit.
TASKS = [
    (
        "libero_spatial",
        "pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate",
        7,
    ),
    ("libero_goal", "turn_on_the_stove", 0),
]
#: Of the other suites, in short; libero_10 has the scenes of libero_90.
OTHERS = [
    ("libero_object", "pick_up_the_alphabet_soup_and_place_it_in_the_basket", 0),
    ("libero_90", "KITCHEN_SCENE1_open_the_bottom_drawer_of_the_cabinet", 1000),
]
Named = tuple[str, str, int]


@pytest.fixture(scope="module", params=TASKS, ids=[task[:40] for _, task, _ in TASKS])
def named(request: pytest.FixtureRequest) -> Named:
    task: Named = request.param
    return task


def world(cache: Path, named: Named, cameras: tuple[str, ...] = CAMERAS) -> LiberoSimulator:
    suite, task, seed = named
    protocol = EvaluationProtocol("mine", 1, world_seed=seed, cameras=cameras, render_size=SIZE)
    built = SuiteSimulators(cache, protocol=protocol)(suite, task).simulator  # type: ignore[attr-defined]
    assert isinstance(built, LiberoSimulator)
    return built


@pytest.fixture(scope="module")
def simulator(named: Named, standard_cache: Path) -> Iterator[LiberoSimulator]:
    built = world(standard_cache, named)
    yield built
    built.close()


@pytest.fixture(scope="module")
def first_episode(named: Named, standard_cache: Path) -> list[dict[str, npt.NDArray[Any]]]:
    return liberos_own(standard_cache, named, motion(), SIZE)


def liberos_own(
    cache: Path, named: Named, actions: npt.NDArray[np.float64], size: int, **settings: Any
) -> list[dict[str, npt.NDArray[Any]]]:
    """What a public evaluation script sees of trial 3 in an environment that it has just made."""
    configure(cache, find_assets(cache))
    from libero.libero.envs import OffScreenRenderEnv

    suite, task, seed = named
    environment = OffScreenRenderEnv(
        bddl_file_name=str(bddl_file(suite, task)), camera_heights=size, camera_widths=size, **settings
    )
    environment.seed(seed)
    environment.reset()
    seen = [environment.set_init_state(initial_states(suite, task)[3])]
    physics = [environment.get_sim_state()]
    for action in actions:
        seen.append(environment.step(action)[0])
        physics.append(environment.get_sim_state())
    environment.close()
    return [{**observation, "physics": state} for observation, state in zip(seen, physics, strict=True)]


def motion() -> npt.NDArray[np.float64]:
    """float64 [40, 7]: down towards the table, the gripper opening and closing."""
    rng = np.random.default_rng(0)
    actions = np.clip(rng.normal([0.3, 0.2, -0.6, 0, 0, 0, 0], 0.5, size=(40, 7)), -1, 1)
    actions[:, 6] = np.where(np.arange(40) % 20 < 10, -1.0, 1.0)
    return actions


def physics(simulator: LiberoSimulator) -> npt.NDArray[np.float64]:
    flat: npt.NDArray[np.float64] = simulator.problem.sim.get_state().flatten()
    return flat


def test_an_episode_is_what_libero_plays_in_a_new_environment_to_the_last_bit(
    simulator: LiberoSimulator, first_episode: list[dict[str, npt.NDArray[Any]]]
) -> None:
    simulator.reset(Split.HELD_OUT.seed(7))
    for action in -motion()[:15]:
        simulator.step(action)
    simulator.reset(11)  # a layout that is drawn moves the fixtures
    simulator.step(motion()[0])

    simulator.reset(Split.HELD_OUT.seed(3))
    looks = (0, 1, 17, 40)
    for step, theirs in enumerate(first_episode):
        np.testing.assert_array_equal(physics(simulator), theirs["physics"])
        if step in looks:  # looking changes nothing, and what was not looked at was not rendered
            ours = simulator.observe()
            for camera in CAMERAS:
                np.testing.assert_array_equal(ours.images[camera], theirs[f"{camera}_image"][::-1])
            w = 1 - 2 * np.sin(np.linalg.norm(ours.proprio[3:6]) / 4) ** 2
            assert abs(w) == pytest.approx(abs(theirs["robot0_eef_quat"][3]), abs=1e-6)
            np.testing.assert_array_equal(ours.proprio[:3], theirs["robot0_eef_pos"].astype(np.float32))
            np.testing.assert_array_equal(ours.proprio[6:], theirs["robot0_gripper_qpos"].astype(np.float32))
        if step < len(motion()):
            assert not simulator.step(motion()[step]).done


@pytest.mark.parametrize("other", OTHERS, ids=[suite for suite, _, _ in OTHERS])
def test_in_other_suites_too_a_world_that_was_played_in_is_a_new_one_again(
    other: Named, standard_cache: Path
) -> None:
    actions = motion()[:4]
    theirs = liberos_own(standard_cache, other, actions, 16, camera_names=["agentview"])
    simulator = world(standard_cache, other, ("agentview",))
    for seed in (Split.HELD_OUT.seed(7), 11):
        simulator.reset(seed)
        for action in -actions:
            simulator.step(action)
    simulator.reset(Split.HELD_OUT.seed(3))
    for step, seen in enumerate(theirs):
        np.testing.assert_array_equal(physics(simulator), seen["physics"])
        if step < len(actions):
            simulator.step(actions[step])
    simulator.close()


@pytest.mark.parametrize(
    ("task", "site"),
    [
        ("on_the_stove", "flat_stove_1_cook_region"),
        ("on_the_wooden_cabinet", "wooden_cabinet_1_top_side"),
        ("in_the_top_drawer_of_the_wooden_cabinet", "wooden_cabinet_1_top_region"),
    ],
)
def test_what_begins_on_a_fixture_is_drawn_there(task: str, site: str, standard_cache: Path) -> None:
    """LIBERO adds the fixture's new place to the site's, and counts on the fixture standing at its origin."""
    name = f"pick_up_the_black_bowl_{task}_and_place_it_on_the_plate"
    drawn = world(standard_cache, ("libero_spatial", name, 0))
    from ipvla.sim.standard.geometry import SceneGeometry

    scene = SceneGeometry(drawn.problem)  # type: ignore[arg-type]
    asides = []
    for seed in (Split.HELD_OUT.seed(0), *range(4)):
        drawn.reset(seed)
        asides.append(scene.place("akita_black_bowl_1") - scene.place(site))
    published, *others = asides
    for other in others:
        assert np.linalg.norm((other - published)[:2]) < 0.06
        assert abs((other - published)[2]) < 0.02
    drawn.close()


def test_a_drawn_layout_depends_on_its_seed_alone(simulator: LiberoSimulator) -> None:
    def layout(seed: int) -> npt.NDArray[np.float64]:
        simulator.reset(seed)
        simulator.step(motion()[0])
        return physics(simulator)

    first, other = layout(5), layout(6)
    assert not np.array_equal(first, other)
    simulator.reset(Split.HELD_OUT.seed(0))
    np.random.seed(99)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    np.testing.assert_array_equal(layout(5), first)
    np.testing.assert_array_equal(np.random.get_state()[1], before, "nobody's random numbers are touched")


def test_an_episode_goes_on_where_its_state_was_saved(simulator: LiberoSimulator) -> None:
    simulator.reset(Split.HELD_OUT.seed(1))
    for action in motion()[:20]:
        simulator.step(action)
    saved = simulator.state()
    for action in motion()[20:]:
        simulator.step(action)
    end, t = physics(simulator), simulator.observe().t
    simulator.reset(4)
    simulator.restore(saved)
    for action in motion()[20:]:
        simulator.step(action)
    np.testing.assert_array_equal(physics(simulator), end)
    assert simulator.observe().t == t == 40


def test_a_trial_beyond_the_published_states_is_refused(simulator: LiberoSimulator) -> None:
    with pytest.raises(ValueError, match="50 published initial states; trial 50 is beyond them"):
        simulator.reset(Split.HELD_OUT.seed(50))


def test_fast_pictures_change_no_physics_and_little_of_what_is_seen(
    named: Named, simulator: LiberoSimulator, standard_cache: Path
) -> None:
    suite, task, seed = named
    fast = load_suite(suite, standard_cache).simulator(task, SIZE, CAMERAS, "fast", seed)
    assert isinstance(fast, LiberoSimulator)
    for world in (fast, simulator):
        world.reset(Split.HELD_OUT.seed(2))
        for action in motion()[:12]:
            world.step(action)
    np.testing.assert_array_equal(physics(fast), physics(simulator))
    ours, exact = fast.observe(), simulator.observe()
    np.testing.assert_array_equal(ours.proprio, exact.proprio)
    difference = np.abs(ours.images["agentview"].astype(int) - exact.images["agentview"])
    assert 0.1 < difference.mean() < 12, "levels of 255"
    assert (difference.max(-1) > 48).mean() < 0.12, "edges and the robot's skin"
    fast.close()
