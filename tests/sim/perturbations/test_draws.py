"""What is drawn for an episode: from task and seed alone, within the level's range, named as in LIBERO-Plus."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.sim.perturbations import (
    DIMENSIONS,
    LEVELS,
    PerturbationConfig,
    language,
    perturbation_config,
    recorded_perturbation,
)
from ipvla.sim.perturbations.camera import CameraConfig, View
from ipvla.sim.perturbations.language import LanguageConfig, instructions, likeness
from ipvla.sim.perturbations.light import LightConfig
from ipvla.sim.perturbations.noise import NoiseConfig
from ipvla.sim.perturbations.robot import RobotConfig
from ipvla.sim.simulator import Split
from ipvla.sim.standard.assets import AssetsError
from ipvla.sim.standard.tasks import HORIZONS, PRO_SUITES, instruction, standard_tasks
from ipvla.sim.suites import SUITES

SUITE, TASK = "libero_object", "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
#: LIBERO's camera on tabletops, position and orientation (w, x, y, z).
AT = np.array([0.6586131746834771, 0.0, 1.6103500240372423])
TOWARDS = np.array([0.6380177736282349, 0.3048497438430786, 0.30484986305236816, 0.6380177736282349])

dimensions = pytest.mark.parametrize("dimension", DIMENSIONS)
levels = st.sampled_from(LEVELS)
seeds = st.integers(0, 2**32 - 1)


@dimensions
def test_an_episodes_draw_depends_on_task_seed_and_perturbation_alone(dimension: str) -> None:
    def drawn(seed: int, task: str = TASK, perturbation_seed: int = 0) -> object:
        return perturbation_config(dimension, 4, perturbation_seed).build(SUITE).change(task, seed).drawn

    first = [drawn(Split.HELD_OUT.seed(trial)) for trial in range(12)]
    np.random.seed(3)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    assert [drawn(Split.HELD_OUT.seed(trial)) for trial in range(11, -1, -1)] == first[::-1]
    np.testing.assert_array_equal(np.random.get_state()[1], before, "nobody's random numbers are touched")
    assert len({str(one) for one in first}) > 4, "episodes differ"
    another_task = "pick_up_the_milk_and_place_it_in_the_basket"
    for other in ({"task": another_task}, {"perturbation_seed": 1}):
        assert [drawn(Split.HELD_OUT.seed(trial), **other) for trial in range(12)] != first  # type: ignore[arg-type]


@given(seeds, levels)
def test_the_camera_is_moved_in_exactly_one_published_way_within_its_levels_fifth(seed: int, level: int) -> None:
    view = CameraConfig(level=level).change(TASK, seed)
    about = math.ceil(abs(view.round) / 15) == level and view.round != 0
    further = math.ceil((view.scale - 100) / 20) == level
    aside = max(abs(view.turn), abs(view.tilt)) == 2 * level
    assert [about, further, aside].count(True) == 1
    assert view.up in ((0, 15) if about else (0,))
    if aside:
        assert {abs(view.turn), abs(view.tilt)} <= {2, 4, 6, 8, 10}
    whole = [int(number) for number in view.drawn["view"].split("_")]
    assert whole == [view.round % 360, view.up, view.scale, view.turn % 360, view.tilt % 360]


def test_every_kind_of_view_is_drawn_in_both_directions() -> None:
    views = [CameraConfig(level=2).change(TASK, seed) for seed in range(200)]
    kinds = {(bool(view.round), view.up > 0, view.scale > 100, bool(view.turn)) for view in views}
    assert len(kinds) == 4
    assert {np.sign(view.round) for view in views} == {np.sign(view.turn) for view in views} == {-1, 0, 1}


@pytest.mark.parametrize(
    ("view", "position", "orientation"),
    [
        (View(round=300), [0.3293, -0.5704, 1.6104], [-0.8715, -0.4164, -0.1116, -0.2335]),
        (View(round=40, up=15), [0.3267, 0.2741, 1.7532], [0.4018, 0.1309, 0.2806, 0.8618]),
        (View(scale=160), [1.0538, 0.0, 2.0966], [0.638, 0.3048, 0.3048, 0.638]),
        (View(turn=8, tilt=-4), [0.6586, 0.0, 1.6104], [-0.5802, -0.3064, -0.3458, -0.6707]),
    ],
)
def test_a_view_is_where_libero_plus_puts_it(view: View, position: list[float], orientation: list[float]) -> None:
    """Numbers from version 0.1.5 of its package."""
    moved, turned = view.pose(AT, TOWARDS)
    np.testing.assert_allclose(moved, position, atol=1e-4)
    assert abs(np.dot(turned / np.linalg.norm(turned), orientation)) == pytest.approx(1, abs=1e-4)


@given(seeds)
def test_levels_of_an_episode_differ_in_strength_alone(seed: int) -> None:
    offsets = [np.array(RobotConfig(level=level).change(TASK, seed).offset_rad) for level in LEVELS]
    np.testing.assert_allclose([np.linalg.norm(offset) for offset in offsets], [0.1, 0.2, 0.3, 0.4, 0.5])
    np.testing.assert_allclose(offsets[4], 5 * offsets[0], rtol=1e-9)
    sensors = [NoiseConfig(level=level).change(TASK, seed) for level in LEVELS]
    assert len({sensor.corruption for sensor in sensors}) == 1
    assert [math.ceil(sensor.severity / 2) for sensor in sensors] == list(LEVELS)
    views = [CameraConfig(level=level).change(TASK, seed) for level in LEVELS]
    for name in ("round", "turn", "tilt", "scale"):
        sizes = [abs(getattr(view, name)) for view in views]
        assert sizes == sorted(sizes)
    gains = [np.abs(np.log(LightConfig(level=level).change(TASK, seed).gain)).max() for level in LEVELS]
    assert gains == sorted(gains)


@given(seeds, levels)
def test_light_stays_within_its_ranges(seed: int, level: int) -> None:
    light, strength = LightConfig(level=level).change(TASK, seed), level / 5
    for gain in light.gain:
        assert (1 / 3) ** strength * (1 - 0.4 * strength) <= gain <= 1.6**strength * (1 + 0.4 * strength)
    assert 0.7 * (strength - 0.2) <= light.highlight <= 0.7 * strength


def test_half_of_the_strongest_lights_or_more_cast_shadows_and_few_of_the_weakest() -> None:
    def shadows(level: int) -> float:
        return float(np.mean([LightConfig(level=level).change(TASK, seed).shadow for seed in range(200)]))

    assert shadows(1) < 0.25
    assert shadows(5) > 0.75


@pytest.mark.parametrize("suite", [suite for suite in HORIZONS if "language" in SUITES[suite].facts.perturbations])
def test_every_task_of_a_suite_has_fifty_instructions_from_the_likest_to_the_least(suite: str) -> None:
    directory = language.PLUS_ROOT / "bddl_files" / suite
    for task in standard_tasks(suite):
        found = instructions(directory, task.name)
        assert sorted(wording.number for wording in found) == list(range(1, 51))
        alike = [likeness(wording.text, instruction(task.name)) for wording in found]
        assert alike == sorted(alike, reverse=True)
        assert alike[0] > 2 * alike[-1]
        assert all("language" not in wording.text and "_" not in wording.text for wording in found)


def test_an_instruction_is_one_of_its_levels_ten() -> None:
    for level in LEVELS:
        rewordings = LanguageConfig(level=level).build(SUITE)
        ten = instructions(rewordings.directory, TASK)[10 * level - 10 : 10 * level]
        said = {rewordings.change(TASK, seed) for seed in range(200)}
        assert said == set(ten)
        assert rewordings.change(TASK, 0).instruction("the task's own") == rewordings.change(TASK, 0).text
    assert LanguageConfig().build("libero_object_swap").change(TASK, 5) == LanguageConfig().build(SUITE).change(
        TASK, 5
    )


def test_without_its_package_language_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "PLUS_ROOT", tmp_path)
    with pytest.raises(AssetsError, match=r"libero_object needs LIBERO-Plus' task files, .* run make assets"):
        LanguageConfig().build(SUITE)
    (tmp_path / "bddl_files" / SUITE).mkdir(parents=True)
    with pytest.raises(
        AssetsError, match=rf"lacks 50 task files, such as {TASK}_language_1\.bddl; run make assets"
    ):
        LanguageConfig().build(SUITE).change(TASK, 0)


def test_suites_can_play_what_is_true_of_them() -> None:
    assert SUITES["recall"].facts.perturbations == ()
    for suite in (*HORIZONS, *PRO_SUITES):
        reworded = suite != "libero_90" and not suite.endswith(("_lan", "_task"))
        missing = set() if reworded else {"language"}
        assert set(SUITES[suite].facts.perturbations) == set(DIMENSIONS) - missing
    assert set(PerturbationConfig.get_known_choices()) == set(DIMENSIONS)


@dimensions
def test_a_recorded_perturbation_is_found_again(dimension: str) -> None:
    config = perturbation_config(dimension, 2, 7)
    assert recorded_perturbation(str(config)) == config
    assert len({str(perturbation_config(dimension, level)) for level in LEVELS} | {str(config)}) == 6
    assert recorded_perturbation(None) is None
    with pytest.raises(ValueError, match="here; replay with what it was played with"):
        recorded_perturbation(str(config).replace('"version": 1', '"version": 0'))


def test_what_there_is_not_is_refused() -> None:
    for level in (0, 6):
        with pytest.raises(ValueError, match=f"perturbation.level is {level}; choose one of 1 to 5"):
            CameraConfig(level=level)
    with pytest.raises(ValueError, match="did you mean 'camera'"):
        perturbation_config("camra", 1)
    with pytest.raises(ValueError, match=r"perturbation\.seed is -1"):
        CameraConfig(seed=-1)
