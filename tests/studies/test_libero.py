"""The study of a policy that learns LIBERO: its settings, its figures, and a whole run in small."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipvla.experiment import ExperimentConfig
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.settings import parse
from ray_jobs.evaluate import EvaluateConfig
from studies.engine import entries
from studies.libero import LiberoStudy, assets_equal, main, targets


@pytest.mark.parametrize("suite", entries("libero"))
def test_presets_fit_one_another(suite: str, tmp_path: Path) -> None:
    study = LiberoStudy(storage_root=tmp_path)
    collected = parse(CollectConfig, study.preset(suite, "collect"))
    trained = parse(ExperimentConfig, study.preset(suite, "train"))
    played = parse(EvaluateConfig, [*study.preset(suite, "evaluate"), "--policies", "[seed0]"])
    assert trained.data.dataset == collected.dataset
    assert trained.data.cameras == collected.cameras
    assert trained.lanes.stride % collected.showing.pictures_every == 0
    assert trained.study == played.study
    assert played.success.suite == collected.suite
    assert set(played.success.episodes) == set(collected.demonstrations)
    assert collected.initial_states == "drawn", "the published ones are for the evaluation alone"


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="suites: nowhere; choose among object"):
        LiberoStudy(suites=("nowhere",))
    with pytest.raises(ValueError, match=r"seeds is \[1, 1\]"):
        LiberoStudy(seeds=(1, 1))


def test_both_packages_have_the_same_tasks() -> None:
    assert assets_equal() == 1.0


def test_success_is_that_of_all_seeds_and_what_was_not_played_meets_nothing() -> None:
    figures = {
        "assets_equal": 1.0,
        "rss_gib_per_simulator": 1.5,
        "suites": {"object": {"all": {"k": 9, "n": 10, "wilson95": [0.6, 0.98]}}},
    }
    by_name = {target.name: target for target in targets(figures)}
    assert by_name["libero_object_success"].value == 0.9
    assert by_name["libero_object_success"].met
    assert not {one.name: one for one in targets({**figures, "suites": {}})}["libero_object_success"].met


@pytest.mark.long
@pytest.mark.slow
def test_a_whole_run_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(LiberoStudy(quick=True, storage_root=tmp_path))
    assert (tmp_path / "runs" / "libero_object_quick" / "seed0" / "policy" / "policy.json").exists()
    assert "libero_object_success" in capsys.readouterr().out
