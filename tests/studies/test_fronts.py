from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.forgetting import SequenceRun, sequence_figures
from evaluators.pareto import area
from evaluators.tradeoffs import Comparison, Drawn, Entry, Played, Point, Skill, forgetting_at_equal_success
from studies.fronts import figures, joined, targets
from tests.evaluators.made_up import RATES, comparison, exactly, policy

rates = st.lists(st.tuples(*[st.integers(0, 10).map(lambda k: k / 10)] * 2), min_size=1, max_size=4)
SEEDS = (0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def made() -> dict[str, object]:
    return figures(comparison(), draws=300)


def values(of_seeds: tuple[float, ...], layouts: int = 40) -> Comparison:
    """LoRA's retention differs from seed to seed, ours loses nothing; the base keeps .9."""
    points = {Point("lora", "only", 100): of_seeds, Point("ours", "only", 100): (0.9,) * len(of_seeds)}
    played = {
        point: {s: policy(0.5, old, range(layouts)) for s, old in enumerate(olds)}
        for point, olds in points.items()
    }
    base = {s: policy(0.0, 0.9, range(layouts)) for s in range(len(of_seeds))}
    methods = {p.method: Entry("baseline" if p.method == "lora" else "ours", p) for p in points}
    one = comparison()
    return Comparison(one.new, one.old, methods, base, played, "ours")


def test_every_point_has_its_rates_and_intervals_around_them(made: dict[str, object]) -> None:
    for name, of_method in RATES.items():
        method = made["methods"][name]
        assert [(p["new"]["value"], p["old"]["value"]) for p in method["points"]] == of_method
        assert method["final"]["episodes"] == {"new": 5 * 40, "old": 5 * 40 * 4}
        for axis in ("new", "old"):
            final = method["final"][axis]
            assert 0 < final["value"] - final["low"] < 0.2
            assert 0 < final["high"] - final["value"] < 0.2
    assert made["base"]["old"]["value"] == 0.9
    assert made["base"]["families"].keys() == {"ground", "recall", "place"}
    assert made["base"]["questions"]["value"] == pytest.approx(40 / 60, abs=1e-4)
    assert (made["base"]["kl"]["value"], made["base"]["drift"]["value"]) == (0.1, 0.05)


def test_more_layouts_narrow_the_interval_where_seeds_share_them() -> None:
    told = figures(comparison(spread=0.0, apart=0), draws=300)
    early, final = (point["new"]["high"] - point["new"]["low"] for point in told["methods"]["ours"]["points"])
    assert 0 < final < early


def test_points_that_others_beat_are_not_on_the_front() -> None:
    beaten = {**RATES, "ours": [(0.3, 0.8), (0.5, 0.85), (0.8, 0.75)]}
    points = figures(comparison(beaten), draws=1)["methods"]["ours"]["points"]
    assert [point["on_front"] for point in points] == [False, True, True]


@given(rates)
@settings(max_examples=20, deadline=None)
def test_a_methods_area_is_that_of_its_points(of_method: list[tuple[float, float]]) -> None:
    drawn = Drawn(
        comparison({"lora": of_method, "ours": RATES["ours"]}, (0, 1), loop={}, layouts=10, spread=0.0), draws=1
    )
    assert drawn.areas["lora"][0] == pytest.approx(area(np.array(of_method)))


def test_areas_and_their_gaps_are_those_of_the_known_fronts(made: dict[str, object]) -> None:
    methods = made["methods"]
    assert methods["lora"]["area"]["value"] == pytest.approx(0.5 * 0.6 + 0.3 * 0.3)
    assert methods["ours"]["area"]["value"] == pytest.approx(0.5 * 0.85 + 0.3 * 0.75)
    ahead, behind = methods["ours"]["gaps"]["lora"], methods["lora"]["gaps"]["ours"]
    assert ahead["value"] == pytest.approx(0.65 - 0.39)
    assert 0 < ahead["low"] < ahead["value"] < ahead["high"]
    assert behind == pytest.approx({"value": -ahead["value"], "low": -ahead["high"], "high": -ahead["low"]})


def test_the_best_rival_takes_neither_replay_nor_an_extra_loss_and_is_no_control(made: dict[str, object]) -> None:
    assert made["methods"]["replay"]["area"]["value"] > made["methods"]["ours"]["area"]["value"]
    assert made["methods"]["wise_ft"]["area"]["value"] > made["methods"]["lora"]["area"]["value"]
    assert made["best_rival"] == "wise_ft"


def test_success_weighs_families_alike_however_many_tasks_and_layouts_they_have() -> None:
    few, many = range(2), range(20)
    old = {"red": exactly(0.5, many), "blue": exactly(0.0, few), "recall": exactly(1.0, few)}
    played = {0: Played({"yellow": exactly(1.0, few)}, old)}
    points = {Point("lora", "", 1): played, Point("ours", "", 1): played}
    skills = {name: Skill("recall" if name == "recall" else "ground", 0.0) for name in old}
    methods = {p.method: Entry("baseline" if p.method == "lora" else "ours", p) for p in points}
    told = figures(Comparison({"yellow": Skill("ground", 0.0)}, skills, methods, played, points, "ours"), draws=1)
    assert told["base"]["families"]["ground"]["value"] == 0.25
    assert told["base"]["old"]["value"] == (0.25 + 1.0) / 2


def test_a_draw_takes_the_same_seeds_and_layouts_from_every_policy() -> None:
    """Two methods that did the same never differ, though either alone varies."""
    drawn = Drawn(comparison({**RATES, "wise_ft": RATES["lora"]}, loop={}), draws=50)
    assert np.ptp(drawn.areas["lora"]) > 0.05
    assert (drawn.areas["wise_ft"] == drawn.areas["lora"]).all()


def test_layouts_that_seeds_share_are_drawn_and_a_seeds_own_come_with_it() -> None:
    """Which layouts are easy is chance, and more seeds do not average it away where they share the layouts."""

    def deviation(apart: int, spread: float) -> float:
        one = comparison(
            {"lora": [(0.7, 0.7)], "ours": [(0.7, 0.7)]}, range(5), apart=apart, spread=spread, loop={}
        )
        return float(Drawn(one, draws=1000).of(one.points_of("lora"))[1:, 0, 0].std())

    of_layouts = (0.7 * 0.3 / 40) ** 0.5
    of_seeds = float(np.std([-0.1, -0.05, 0.0, 0.05, 0.1])) / 5**0.5
    assert deviation(apart=0, spread=0.0) == pytest.approx(of_layouts, rel=0.1)
    assert deviation(apart=1000, spread=0.0) == pytest.approx(0.0, abs=1e-12)
    assert deviation(apart=1000, spread=0.05) == pytest.approx(of_seeds, rel=0.1)


def test_of_five_seeds_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    tries = 60

    def coins(rate: float, seed: int) -> dict[int, bool]:
        return dict(zip(range(100 * seed, 100 * seed + 40), (rng.random(40) < rate).tolist(), strict=True))

    hits = []
    for _ in range(tries):
        played = {s: Played({"a": coins(r, s)}, {"b": coins(r, s)}) for s, r in enumerate(rng.normal(0.6, 0.1, 5))}
        points = {Point("lora", "", 1): played, Point("ours", "", 1): played}
        methods = {p.method: Entry("baseline" if p.method == "lora" else "ours", p) for p in points}
        one = Comparison({"a": Skill("f", 0.0)}, {"b": Skill("g", 0.0)}, methods, played, points, "ours")
        drawn = Drawn(one, draws=400)
        estimate = drawn.estimate(drawn.points[:, 0, 0])
        hits.append(estimate["low"] <= 0.6 <= estimate["high"])
    assert 0.8 <= np.mean(hits) < 1.0


def test_forgetting_is_compared_at_the_largest_success_that_both_fronts_reach() -> None:
    further = {**RATES, "lora": [(0.5, 0.6), (0.9, 0.2)]}
    level, ours, lora = forgetting_at_equal_success(Drawn(comparison(further), draws=1), "ours", "lora")[0]
    assert level == pytest.approx(0.8)
    assert ours == pytest.approx(0.9 - 0.75)
    assert lora == pytest.approx(0.9 - (0.6 - 0.4 * 0.3 / 0.4)), "on the line between its two points"


def test_the_ratio_of_what_is_forgotten_has_an_interval(made: dict[str, object]) -> None:
    equal = made["methods"]["ours"]["equal_success"]
    assert equal["why"] is None
    assert equal["ratio"]["value"] == pytest.approx((0.9 - 0.75) / (0.9 - 0.3), abs=1e-4)
    assert equal["ratio"]["low"] < equal["ratio"]["value"] < equal["ratio"]["high"] < 0.5
    assert equal["saved"]["value"] == pytest.approx(0.45)
    assert made["methods"]["lora"]["equal_success"] is None


@pytest.mark.parametrize("kept", [0.9, 0.95])
def test_there_is_no_ratio_to_a_baseline_that_forgets_nothing(kept: float) -> None:
    told = figures(values((kept,) * 5), draws=200)
    equal = told["methods"]["ours"]["equal_success"]
    assert equal["ratio"] is None
    assert equal["why"].endswith("too little to divide by")
    target = next(t for t in targets(told) if t.name == "forgetting_ratio_to_lora")
    assert (target.value, target.met, target.interval) == (None, False, None)
    assert "too little to divide by" in target.note


def test_nor_to_one_that_forgets_in_some_seeds_only() -> None:
    """On average it forgets a tenth, but other seeds might as well show none."""
    told = figures(values((0.5, 0.9, 0.9, 0.9, 0.8)), draws=200)["methods"]["ours"]["equal_success"]
    assert told["baseline_forgets"]["value"] == pytest.approx(0.1)
    assert told["baseline_forgets"]["low"] <= 0
    assert told["ratio"] is None


def test_a_method_that_forgets_nothing_has_a_ratio_of_zero() -> None:
    told = figures(values((0.5, 0.55, 0.6, 0.5, 0.45)), draws=200)["methods"]["ours"]["equal_success"]
    assert told["ratio"]["value"] == pytest.approx(0.0, abs=1e-9)


def test_one_seed_gives_values_without_intervals() -> None:
    told = figures(comparison(seeds=(3,), spread=0.0), draws=20)
    assert told["methods"]["ours"]["area"] == {"value": 0.65, "low": None, "high": None}
    assert all(t.interval is None for t in targets(told))
    assert told["methods"]["ours"]["equal_success"]["ratio"]["value"] == pytest.approx(0.25)


def test_joined_sessions_give_the_figures_of_one_session_with_all_their_seeds() -> None:
    earlier, later = (figures(comparison(seeds=seeds), draws=20) for seeds in ((0, 1), (2, 3, 4)))
    both, at_once = joined(earlier, later, draws=20), figures(comparison(), draws=20)
    assert both == at_once
    assert joined(both, later, draws=20) == at_once, "a seed that is there already counts once"


def test_joined_sessions_keep_what_only_one_of_them_measured() -> None:
    matrix = SequenceRun(np.eye(2))
    sequences = [sequence_figures({"a": 0.0, "b": 0.0}, {"lora": {seed: matrix}}, draws=2) for seed in (0, 1)]
    earlier, later = ({**figures(comparison(seeds=(s,)), draws=2), "sequence": sequences[s]} for s in (0, 1))
    both = joined({**earlier, "costs": 1, "recipe": 2}, {**later, "costs": None, "recipe": 2}, draws=2)
    assert (both["costs"], both["recipe"]) == (1, 2)
    assert list(both["sequence"]["methods"]["lora"]["seeds"]) == ["0", "1"]
    del later["sequence"]
    assert joined(earlier, later, draws=2)["sequence"] == sequences[0]


def test_the_same_outcomes_give_the_same_figures(made: dict[str, object]) -> None:
    assert figures(comparison(), draws=300) == made


def test_the_targets_are_those_that_were_promised(made: dict[str, object]) -> None:
    costs = {
        "hsw_step_ratio": {"value": 1.03, "low": 1.02, "high": 1.06},
        "thermostat_step_ratio": {"value": 1.04, "low": 1.03, "high": 1.05},
    }
    found = {target.name: target for target in targets({**made, "costs": costs})}
    assert {name: (t.value, t.bound, t.met) for name, t in found.items()} == {
        "hsw_step_ratio": (1.03, 1.05, True),
        "thermostat_step_ratio": (1.04, 1.02, False),
        "forgetting_ratio_to_lora": (0.25, 0.5, True),
        "front_area_gap_to_best_rival": (pytest.approx(0.65 - 0.455), 0.0, True),
        "closed_loop_gain_over_shuffled": (pytest.approx(0.65 - 0.5), 0.0, True),
    }
    assert all(t.interval is not None and t.interval[0] < t.value < t.interval[1] for t in found.values())
    assert found["front_area_gap_to_best_rival"].note == "ours against wise_ft"
    assert found["forgetting_ratio_to_lora"].note == "ours against lora at a new-task success of 0.80"


def test_what_was_not_measured_meets_no_target() -> None:
    told = figures(comparison(loop={}), draws=20)
    missing = {t.name: t for t in targets(told) if t.value is None}
    assert set(missing) == {"hsw_step_ratio", "thermostat_step_ratio", "closed_loop_gain_over_shuffled"}
    assert not any(t.met for t in missing.values())
    assert all(t.note == "not measured" for t in missing.values())


def test_a_loop_that_never_acts_gains_nothing_and_does_not_meet() -> None:
    told = figures(comparison({**RATES, "shuffled": RATES["ours"]}), draws=20)
    target = targets(told)[-1]
    assert (target.value, target.met) == (0.0, False)


def test_the_loops_are_compared_at_checkpoints_that_both_were_played_at() -> None:
    """The control was played at its last checkpoint alone: the closed loop's earlier ones do not count."""
    one = comparison()
    only_final = {p: played for p, played in one.points.items() if p != Point("shuffled", "only", 100)}
    told = figures(replace(one, points=only_final), draws=50)["loop"]
    assert told["shuffled"]["checkpoints"] == 1
    assert told["shuffled"]["gain"]["value"] == pytest.approx(0.8 * 0.75 - 0.8 * 0.5)
    assert told["closed"]["checkpoints"] == 2
    assert told["closed"]["gain"] is None


def test_other_strengths_of_the_closed_loop_do_not_count() -> None:
    one = comparison()
    better = {
        Point("ours", "another", c): {s: policy(0.9, 0.9, range(1000 * s, 1000 * s + 20)) for s in SEEDS}
        for c in (100, 200)
    }
    told = figures(replace(one, points={**one.points, **better}), draws=20)
    assert told["loop"]["shuffled"]["gain"]["value"] == pytest.approx(0.65 - 0.5)
    assert told["methods"]["ours"]["area"]["value"] == pytest.approx(0.81)


def test_the_best_constant_is_compared_at_the_points_that_were_chosen_whatever_their_checkpoints() -> None:
    one = comparison()
    final, early = Point("wise_ft", "only", 200), Point("wise_ft", "only", 75)
    points = {early if p == final else p: played for p, played in one.points.items()}
    methods = {**one.methods, "wise_ft": Entry("rival", early)}
    changed = replace(one, points=points, methods=methods, loop={**one.loop, "constant": "wise_ft"})
    told = figures(changed, draws=20)["loop"]["constant"]
    assert told["checkpoints"] == 1
    assert told["gain"]["value"] == pytest.approx(0.8 * 0.75 - 0.7 * 0.45)


def test_loops_without_a_common_checkpoint_are_refused() -> None:
    one = comparison()
    moved = {
        Point(p.method, p.strength, p.checkpoint + 7 * (p.method == "shuffled")): q for p, q in one.points.items()
    }
    final = Entry("control", Point("shuffled", "only", 207))
    with pytest.raises(ValueError, match="shuffled and ours share no checkpoint"):
        figures(replace(one, points=moved, methods={**one.methods, "shuffled": final}), draws=1)


def test_what_was_measured_in_some_seeds_only_has_no_figure() -> None:
    one = comparison()
    final = one.methods["lora"].final
    played = {**one.points[final], 0: replace(one.points[final][0], kl=None)}
    told = figures(replace(one, points={**one.points, final: played}), draws=5)["methods"]["lora"]["final"]
    assert told["kl"] is None
    assert told["drift"]["value"] == 0.05


def test_no_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="draws is 0; give at least 1"):
        figures(comparison(), draws=0)
