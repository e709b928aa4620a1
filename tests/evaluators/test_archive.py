import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.archive import decode, encode
from evaluators.success_table import SuccessRow
from evaluators.tradeoffs import Comparison, Entry, Played, Point, Skill
from ipvla.types import EpisodeResult, EpisodeSpec
from tests.evaluators.made_up import NEW, RATES, comparison, policy

FINAL, EARLY = Point("lora", "only", 200), Point("lora", "only", 100)


def episode(task: str, trial: int, success: bool) -> EpisodeResult:
    return EpisodeResult(
        EpisodeSpec("recall", task, 2**31 + trial, trial), "success" if success else "timeout", 9, 2, 1, 1
    )


def test_a_policys_episodes_are_sorted_into_the_new_task_and_the_old_skills() -> None:
    results = [
        episode("recall", 1000, True),
        episode("ground_yellow", 1000, False),
        episode("recall", 1001, False),
    ]
    rows = [SuccessRow("colour", 3, 4, 0.5), SuccessRow("lit", 1, 4, 0.5), SuccessRow("all", 4, 8, 0.5)]
    played = Played.of(results, NEW, rows, kl=0.2)
    assert played.new == {"ground_yellow": {1000: False}}
    assert played.old == {"recall": {1000: True, 1001: False}}
    assert played.questions == {"colour": (3, 4), "lit": (1, 4)}
    assert played.accuracy == 0.5
    assert Played.of(results, NEW).accuracy is None


def test_a_comparison_comes_back_from_json() -> None:
    there = comparison()
    assert decode(json.loads(json.dumps(encode(there)))) == there


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    """One method; the base and its points were played on nested sets of layouts with gaps."""
    seeds = draw(st.sets(st.integers(0, 9), min_size=1, max_size=3))
    places = draw(st.sets(st.tuples(st.sampled_from("ab"), st.integers(1, 3)), min_size=1))
    points = [*(Point("lora", *place) for place in places), Point("ours", "", 1)]
    all_layouts = {s: draw(st.lists(st.integers(0, 3000), min_size=2, max_size=8, unique=True)) for s in seeds}

    def play(seed: int) -> Played:
        few = all_layouts[seed][: draw(st.integers(1, len(all_layouts[seed])))]
        part = st.fixed_dictionaries({"task": st.fixed_dictionaries(dict.fromkeys(few, st.booleans()))})
        old = {"old": draw(part)["task"]}
        counts = {"lit": draw(st.tuples(st.integers(0, 5), st.integers(5, 9)))}
        return Played(draw(part), old, draw(st.sampled_from([{}, counts])), draw(st.none() | st.floats(0, 1)))

    return Comparison(
        new={"task": Skill("f", 0.0)},
        old={"old": Skill("g", 0.5)},
        methods={"lora": Entry("baseline", points[0]), "ours": Entry("ours", points[-1], ("artifact",))},
        base={s: play(s) for s in seeds},
        points={point: {s: play(s) for s in seeds} for point in points},
        ours="ours",
    )


@given(comparisons())
@settings(max_examples=40, deadline=None)
def test_whatever_was_played_comes_back(there: Comparison) -> None:
    assert decode(json.loads(json.dumps(encode(there)))) == there


def test_a_record_reads_as_counts_and_a_mark_per_layout() -> None:
    told = encode(comparison(seeds=(1,), layouts=5, spread=0.0))
    assert told["layouts"]["1"]["recall"] == "1000-1009"
    lora = next(point for point in told["points"] if point["method"] == "lora")
    assert lora["seeds"]["1"]["new"] == "2/5:01010"
    assert lora["seeds"]["1"]["old"] == " ".join(["3/5:01011"] * 4)
    assert lora["seeds"]["1"]["questions"] == "colour:30/40 side:10/20"


def test_a_record_that_was_tampered_with_is_refused() -> None:
    told = encode(comparison(seeds=(1,), layouts=5, spread=0.0))
    told["base"]["1"]["new"] = told["base"]["1"]["new"].replace("0", "1")
    with pytest.raises(ValueError, match="take the record as it was written"):
        decode(told)


def test_joining_counts_every_seed_once_as_the_later_session_has_it() -> None:
    earlier = comparison(seeds=(0, 1))
    later = comparison({**RATES, "lora": [(0.1, 0.1), (0.2, 0.2)]}, seeds=(1, 2))
    both = earlier.joined(later)
    assert both.seeds == (0, 1, 2)
    assert both.base == {**earlier.base, **later.base}
    assert both.points[FINAL] == {
        0: earlier.points[FINAL][0],
        1: later.points[FINAL][1],
        2: later.points[FINAL][2],
    }
    assert list(both.methods) == list(earlier.methods)
    assert earlier.joined(earlier) == earlier


def test_sessions_of_different_recipes_are_not_joined() -> None:
    one = comparison(seeds=(0,))
    with pytest.raises(ValueError, match=r"loop is .*only sessions of one recipe can be joined"):
        one.joined(replace(one, loop={}))
    with pytest.raises(ValueError, match=r"lora is .*choose final points once"):
        one.joined(replace(one, methods={**one.methods, "lora": Entry("baseline", EARLY)}))


def test_what_only_one_session_played_cannot_be_joined() -> None:
    less = {name: rates for name, rates in RATES.items() if name != "wise_ft"}
    with pytest.raises(
        ValueError, match=r"wise_ft, .* was played with training seeds \[1\], the base with \[0, 1\]"
    ):
        comparison(less, seeds=(0,)).joined(comparison(seeds=(1,)))


def test_policies_that_did_not_play_the_same_are_not_compared() -> None:
    one = comparison(seeds=(0,))
    with pytest.raises(
        ValueError, match=r"layouts of ground_yellow that .* was not, .*give both the same first layout"
    ):
        replace(one, points={**one.points, EARLY: {0: policy(0.5, 0.5, range(39, 42))}})
    unplayed = replace(one.points[EARLY][0], old={})
    with pytest.raises(ValueError, match="lora, strength only, checkpoint 100 was not played on ground_red"):
        replace(one, points={**one.points, EARLY: {0: unplayed}})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ours": "replay"}, "ours is 'replay'; name a method whose role is ours"),
        ({"ours": "mine"}, "ours is 'mine'"),
        ({"base": {}}, "needs a new task, an old skill, and the base"),
        ({"old": NEW}, r"\['ground_yellow'\] are new and old"),
        ({"loop": {"closed": "ours"}}, "give closed and shuffled"),
        ({"loop": {"closed": "ours", "shuffled": "shaken"}}, r"loop names \['shaken'\]"),
        ({"methods": {"lora": Entry("baseline", FINAL)}}, "say in `methods` what these are"),
    ],
)
def test_names_that_stand_for_nothing_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(comparison(seeds=(0,)), **changes)


def test_there_is_one_baseline_and_a_final_point_is_one_that_was_played() -> None:
    one = comparison(seeds=(0,))
    for name, role in (("lora", "rival"), ("replay", "baseline")):
        methods = {**one.methods, name: replace(one.methods[name], role=role)}
        with pytest.raises(ValueError, match="give exactly one method this role"):
            replace(one, methods=methods)
    methods = {**one.methods, "lora": Entry("baseline", Point("lora", "only", 999))}
    with pytest.raises(ValueError, match=r"final point of lora is .*999; it must be one of its points"):
        replace(one, methods=methods)


def test_roles_uses_and_measures_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="role is 'best'; choose one of baseline, ours"):
        Entry("best", FINAL)
    with pytest.raises(ValueError, match=r"uses \['magic'\]; choose of artifact, probe, loss, replay"):
        Entry("rival", FINAL, ("magic",))
    with pytest.raises(ValueError, match="checkpoint is 0"):
        Point("lora", "only", 0)
    with pytest.raises(ValueError, match="kl is nan"):
        policy(0.5, 0.5, range(2), kl=math.nan)
