"""The study of a policy that learns LIBERO: its settings, its figures, and a whole run in small."""

from __future__ import annotations

from pathlib import Path

import draccus
import numpy as np
import pytest

from evaluators.forgetting import SequenceRun
from ipvla.experiment import ExperimentConfig
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.settings import parse
from ray_jobs.evaluate import EvaluateConfig
from studies.engine import entries
from studies.libero import LiberoStudy, assets_equal, main, targets
from studies.libero_forgetting import SUITES, ForgettingOnLibero, ratios


@pytest.mark.parametrize("suite", entries("libero"))
def test_presets_fit_one_another(suite: str, tmp_path: Path) -> None:
    study = LiberoStudy(storage_root=tmp_path, correction_rounds=2)
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
    rounds = [study.corrections(suite, number) for number in range(1, study.rounds(suite) + 1)]
    assert len({collected.seed, *(one.seed for one in rounds)}) == 1 + len(rounds), "layouts of their own"
    for number, corrections in enumerate(rounds, 1):
        assert set(corrections.demonstrations) == set(collected.demonstrations)
        again = parse(ExperimentConfig, study.training(suite, 0, number))
        assert set(again.data.mixture) == {collected.dataset, *(one.dataset for one in rounds[:number])}
        assert (again.model, again.data.cameras) == (trained.model, trained.data.cameras)
        before = parse(ExperimentConfig, study.training(suite, 0, number - 1)).run_directory / "policy"
        assert corrections.learner is not None
        assert again.start_from == corrections.learner.policy == before


def test_what_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parts: \['nowhere'\] cannot be measured; choose among assets, object"):
        LiberoStudy(parts=("nowhere",))
    with pytest.raises(ValueError, match="precision is 'half'; choose one of auto, bf16"):
        LiberoStudy(precision="half")
    with pytest.raises(ValueError, match=r"seeds is \[1, 1\]"):
        LiberoStudy(seeds=(1, 1))
    with pytest.raises(
        ValueError, match=r'there is no policy in .*seed0-corrected1/policy; run --parts "\[object\]" first'
    ):
        LiberoStudy(storage_root=tmp_path).policy("object", 0)


def test_fine_tunings_differ_in_what_their_methods_say_alone(tmp_path: Path) -> None:
    one = ForgettingOnLibero(0, tmp_path / "base", {"storage_root": tmp_path})
    runs = {name: draccus.encode(parse(ExperimentConfig, one.training(name))) for name in one.methods}
    plain = runs["lora"]
    assert plain["forgetting"] is None
    for name, run in runs.items():
        assert {of for of in run if run[of] != plain[of]} <= {"name", "forgetting", "optimizer"}, name
    new, probe = one.collections()
    assert plain["data"]["dataset"] == new.dataset
    assert (probe.suite, new.suite) == tuple(SUITES)
    assert (one.success("libero_object").suite, one.success("libero_spatial").suite) == tuple(SUITES)
    old = parse(CollectConfig, LiberoStudy(storage_root=tmp_path).preset("object", "collect"))
    assert probe.seed != old.seed, "layouts that nothing is trained on"


def test_what_is_forgotten_is_compared_seed_by_seed() -> None:
    def run(before: float, after: float) -> SequenceRun:
        return SequenceRun(np.array([[before, 0.0], [after, 0.5]]))

    runs = {"lora": {0: run(0.8, 0.2), 1: run(0.6, 0.2)}, "ours": {0: run(0.8, 0.5), 1: run(0.6, 0.4)}}
    found = ratios(runs)
    assert found["lora"]["value"] == found["lora"]["low"] == found["lora"]["high"] == 1.0
    assert found["ours"]["value"] == pytest.approx(0.5)
    assert found["ours"]["low"] == pytest.approx(0.5), "in every seed half of what LoRA forgets"
    assert ratios({"lora": {0: run(0.5, 0.5)}, "ours": {0: run(0.5, 0.4)}}) == {"lora": None, "ours": None}


def test_both_packages_have_the_same_tasks() -> None:
    assert assets_equal() == 1.0


def test_success_is_that_of_all_seeds_and_what_was_not_played_meets_nothing() -> None:
    figures = {
        "assets": {"equal": 1.0, "rss_gib_per_simulator": 1.5},
        "object": {"all": {"k": 9, "n": 10, "wilson95": [0.6, 0.98]}},
    }
    by_name = {target.name: target for target in targets(figures)}
    assert by_name["libero_object_success"].value == 0.9
    assert by_name["libero_object_success"].met
    elsewhere = {"speedup_over_lerobot"}  # of benchmarks.lerobot's own record
    assert {target.name for target in targets({}) if target.met} <= elsewhere


@pytest.mark.long
@pytest.mark.slow
def test_a_whole_run_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(LiberoStudy(quick=True, storage_root=tmp_path, parts=("object", "forgetting")))
    assert (tmp_path / "runs" / "libero_object_quick" / "seed0" / "policy" / "policy.json").exists()
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("libero_object_success", "forgetting_ratio_to_lora_libero"))
