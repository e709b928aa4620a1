"""The forgetting study: who is compared, on equal terms, and how points are chosen."""

from copy import deepcopy
from dataclasses import asdict, replace

import pytest

from evaluators.success_table import SuccessTable
from evaluators.tradeoffs import ROLES, USES, Played, Point, Skill, success
from ipvla.experiment import ExperimentConfig
from ipvla.types import EpisodeResult, EpisodeSpec
from ray_jobs.command_line.settings import parse
from studies.engine import same_recipe
from studies.forgetting import Choice, ForgettingStudy, Plan, choose, methods, replay_of, replayed

TRAINED = [name for name, method in methods().items() if not (method.replays or method.interpolates)]
NEW = {"yellow": Skill("ground", 1 / 3)}
OLD = {"red": Skill("ground", 1 / 3), "blue": Skill("ground", 1 / 3), "place": Skill("place", 0.0)}


@pytest.fixture
def study(tmp_path):
    return ForgettingStudy(storage_root=tmp_path)


@pytest.fixture
def tuning(study):
    return replace(study, tune=True)


@pytest.mark.parametrize("name", TRAINED)
def test_methods_differ_from_the_baseline_in_what_they_say(study, name):
    baseline = study.training(study.points("lora")[0], 3)
    for point in study.points(name):
        mine = study.training(point, 3)
        same = {"lanes", "seed", "num_workers", "start_from", "training"}
        if "data.dataset" not in methods()[name].settings:
            same.add("data")
        assert all(getattr(mine, part) == getattr(baseline, part) for part in same)
        for part in ("backbone", "memory", "head", "chunk"):
            assert getattr(mine.model, part) == getattr(baseline.model, part)


def test_every_method_tries_as_many_points_at_the_same_checkpoints(study):
    tried = {name: study.points(name) for name in study.names if not methods()[name].replays}
    assert {len(points) for points in tried.values()} == {6}
    assert len({tuple(sorted({p.checkpoint for p in points})) for points in tried.values()}) == 1


def test_methods_say_what_they_are_and_use(study):
    for name, method in methods().items():
        assert method.role in ROLES
        assert set(method.uses) <= set(USES)
        protection = [study.training(p, 0).forgetting for p in study.points(name)] if name in TRAINED else []
        for forgetting in filter(None, protection):
            takes_probe = forgetting.thermostat is not None or forgetting.method.reads_probe
            assert takes_probe == ("probe" in method.uses), name


def test_no_layout_is_both_chosen_on_and_reported(study, tuning):
    def layouts(of, seed):
        config = of.success(seed)
        return {(task, config.first_layout + i) for task, n in config.episodes.items() for i in range(n)}

    chosen_on = layouts(tuning, tuning.tuning_seed)
    reported = [layouts(study, seed) for seed in study.seeds]
    assert not any(chosen_on & each for each in reported)
    assert len(set.union(*reported)) == sum(map(len, reported)), "seeds share none"
    assert tuning.directory == study.directory


def test_each_reported_point_gets_three_hundred_rollouts_on_either_side(study):
    episodes = study.success(0).episodes
    new = sum(n for task, n in episodes.items() if task in study.new_tasks)
    assert study.new_tasks == ("ground_yellow",)
    assert new * len(study.seeds) >= 300
    assert (sum(episodes.values()) - new) * len(study.seeds) >= 300


def test_a_tuning_seed_that_is_reported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tuning_seed 1 is among the seeds"):
        ForgettingStudy(storage_root=tmp_path, tuning_seed=1)
    with pytest.raises(ValueError, match=r"'lorra' is unknown.*lora"):
        ForgettingStudy(storage_root=tmp_path, methods=("lorra",))


def played(new, red, blue, place):
    def layouts(k):
        return {i: i < k for i in range(10)}

    return Played({"yellow": layouts(new)}, {"red": layouts(red), "blue": layouts(blue), "place": layouts(place)})


def test_success_is_a_mean_over_families():
    assert success(played(0, 10, 0, 2).old, OLD) == pytest.approx((0.5 + 0.2) / 2)


def test_the_final_point_is_the_largest_sum_and_the_other_adds_most_area():
    tried = {
        Point("m", "weak", 100): played(2, 10, 10, 10),
        Point("m", "weak", 200): played(8, 8, 8, 8),
        Point("m", "strong", 100): played(10, 1, 1, 1),
        Point("m", "strong", 200): played(7, 1, 1, 1),  # behind the others
        Point("m", "middle", 200): played(7, 8, 8, 8),  # behind too
    }
    choice = choose(tried, NEW, OLD)
    assert choice.final("m") == Point("m", "weak", 200)
    assert choice.points["m"] == (Point("m", "weak", 200), Point("m", "weak", 100))
    assert choice.areas["m"] == pytest.approx(0.2 * 1 + 0.6 * 0.8 + 0.2 * 0.1)
    assert Choice.from_dict(asdict(choice)) == choice


def test_a_point_that_adds_nothing_is_not_reported():
    tried = {Point("m", "a", 100): played(8, 8, 8, 8), Point("m", "b", 100): played(8, 8, 8, 8)}
    assert len(choose(tried, NEW, OLD).points["m"]) == 1


def test_the_loop_that_is_replayed_is_the_best_one_on_the_tuning_seed(study):
    choice = study.any_choice
    areas = {**choice.areas, "hsw_thermostat": 0.5, "two_sided_thermostat": 0.6, "two_sided": 0.7}
    plan = Plan.of(study, replace(choice, areas=areas))
    assert plan.ours == "two_sided"
    assert plan.loop == {
        "closed": "two_sided_thermostat",
        "shuffled": "loop_shuffled",
        "mean": "loop_mean",
        "constant": "two_sided",
    }
    closed = choice.final("two_sided_thermostat")
    assert plan.entries["loop_shuffled"].final == replay_of(closed, "loop_shuffled")
    assert replayed(replay_of(closed, "loop_shuffled")) == closed
    places = [point.method for point in plan.points]
    assert places.index("two_sided_thermostat") < places.index("loop_shuffled")


def test_the_second_task_is_learned_from_where_the_first_one_ended_by_the_same_method(study):
    point = study.points("ewc")[-1]
    first, second = study.training(point, 2), parse(ExperimentConfig, study.second_arguments(point, 2))
    assert second.start_from == study.policy(point, 2)
    assert second.forgetting.method == first.forgetting.method
    assert second.forgetting.artifact == study.second_subspaces(point, 2).name != first.forgetting.artifact
    assert second.data.dataset != first.data.dataset
    assert replace(second, data=first.data, start_from=first.start_from, forgetting=first.forgetting) == replace(
        first, name=second.name
    )


def test_the_sequence_scores_old_skills_as_a_mean_over_families(study):
    def result(task, trial, ok):
        outcome = "success" if ok else "timeout"
        return EpisodeResult(EpisodeSpec("recall", task, trial, trial), outcome, 1, 1, 0.0, 0.0)

    rows = {"ground_red": [1, 1], "ground_green": [1, 1], "ground_blue": [1, 1], "recall": [0, 0], "place": [1, 0]}
    rows |= {"ground_yellow": [1, 0], "count_red1_blue1": [0, 0]}
    results = tuple(result(task, i, ok) for task, outcomes in rows.items() for i, ok in enumerate(outcomes))
    scores = study.sequence_scores(SuccessTable("p", (), (), results))
    assert scores == pytest.approx([(1 + 0 + 0.5) / 3, 0.5, 0.0])
    assert list(study.sequence_chance) == ["old skills", "ground_yellow", "count_red1_blue1"]


def test_a_recipe_stays_the_same_when_settings_come_and_has_others_when_they_change(study):
    today = study.recipe
    before = deepcopy(today)
    del before["base"]["training"]["accumulate"]
    assert before != today
    assert same_recipe(before, today)
    for part, name, value in (("training", "accumulate", 2), ("optimizer", "lr", 0.5)):
        other = deepcopy(today)
        other["fine_tuning"][part][name] = value
        assert not same_recipe(before, other)
    assert not same_recipe(before, {**today, "suite_version": "0"})
