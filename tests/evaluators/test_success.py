from dataclasses import replace
from pathlib import Path

import pytest

from evaluators.console import result_note
from evaluators.episodes import Video
from evaluators.paired import compare
from evaluators.report import Report
from evaluators.success import SuccessConfig, SuccessEvaluation
from ipvla.contract import Contract
from ipvla.rollout.chunking import EnsembleConfig, GuidedConfig
from ipvla.rollout.journal import Journal, JournalError
from ipvla.rollout.policy_actor import PolicySource
from ipvla.sim.perturbations import CameraConfig
from ipvla.sim.protocols import load_protocol
from ipvla.sim.simulator import Split
from ipvla.sim.suite import Suite, SuiteFacts
from ipvla.tracking import JsonlSink, read_jsonl
from ipvla.types import EpisodeResult
from tests.rollout.point import Points, PointSimulator, load_fixed_left, load_point

TASKS = tuple(PointSimulator(name).task for name in ("ground_go", "recall_go"))
SUITE = Suite("point", "1", TASKS, lambda name, *_: PointSimulator(name))


def each(episodes: int, **settings) -> SuccessConfig:
    return SuccessConfig(episodes={task.name: episodes for task in TASKS}, **settings)


def policy(directory: Path, load) -> PolicySource:
    directory.mkdir(exist_ok=True)
    (directory / "model.txt").write_text(load.__name__)
    return PolicySource(load, directory)


@pytest.mark.parametrize(
    "field", ["camera_size", "num_simulators", "max_attempts", "policy_replicas", "policy_lease_s"]
)
def test_a_configuration_that_can_run_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} is 0; pass {field} >= 1"):
        SuccessConfig(**{field: 0})
    with pytest.raises(ValueError, match=r"episodes\.recall is 0"):
        SuccessConfig(episodes={"recall": 0})


def test_the_policys_actors_get_what_was_set_for_them(tmp_path):
    config = each(1, policy_threads=3, policy_capacity=5, policy_lease_s=7.0, policy_max_batch=2)
    service = SuccessEvaluation(config, SUITE, Points())._serve(policy(tmp_path / "policy", load_point))
    assert service.arguments == (3, 5, 7.0, 2)


def test_recall_is_not_said_to_be_drawn_as_it_is_not():
    with pytest.raises(ValueError, match=r"profile is 'fast'; for recall choose among exact$"):
        SuccessConfig(profile="fast")
    assert SuccessConfig(suite="libero_goal", profile="fast").profile == "fast"


def test_a_perturbation_is_part_of_what_a_result_depends_on_and_none_changes_nothing(tmp_path):
    source = policy(tmp_path / "policy", load_point)

    def depends_on(perturbation):
        config = each(1, suite="libero_object", protocol="openvla", perturbation=perturbation)
        return SuccessEvaluation(config, SUITE, Points()).fingerprint(source)

    plain, moved, further = (depends_on(one) for one in (None, CameraConfig(level=2), CameraConfig(level=3)))
    assert "perturbation" not in plain, "journals of before remain valid"
    assert {name: moved[name] for name in plain} == plain
    assert moved.keys() - plain == {"perturbation"}
    Journal(tmp_path / "episodes.sqlite", moved).close()
    for other in (plain, further):
        with pytest.raises(JournalError, match="perturbation"):
            Journal(tmp_path / "episodes.sqlite", other)


#: A hand of one dimension without a gripper, as `PointSimulator`'s.
TERMS = Contract((), action_size=1, gripper="none", state_size=2)


def test_latency_and_chunking_are_part_of_what_a_result_depends_on_and_none_changes_nothing(tmp_path):
    source, suite = policy(tmp_path / "policy", load_point), replace(SUITE, facts=SuiteFacts(contract=TERMS))

    def depends_on(**settings):
        return SuccessEvaluation(each(1, **settings), suite, Points()).fingerprint(source)

    plain = depends_on()
    assert depends_on(latency_steps=0, meanwhile="rest") == depends_on(latency_steps=(0,)) == plain
    assert not plain.keys() & {"latency", "chunking"}, "journals of before remain valid"
    late, averaged = depends_on(latency_steps=(2, 3)), depends_on(chunking=EnsembleConfig())
    assert late == {**plain, "latency": "2 3, hold"}
    assert averaged == {**plain, "chunking": '{"type": "ensemble", "decay": 0.01}'}
    Journal(tmp_path / "episodes.sqlite", late).close()
    with pytest.raises(JournalError, match="latency"):
        Journal(tmp_path / "episodes.sqlite", plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latency_steps": -1}, r"success\.latency_steps is -1; give control steps, 0 or more"),
        ({"latency_steps": ()}, r"success\.latency_steps is empty"),
        ({"latency_steps": 2, "meanwhile": "wait"}, r"success\.meanwhile: 'wait' is unknown"),
        ({"latency_steps": 2, "chunking": GuidedConfig()}, r"success\.meanwhile is hold; set it to rest"),
    ],
)
def test_a_pace_that_cannot_be_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        SuccessConfig(**settings)
    assert "\n" not in str(refused.value)


def test_a_suite_that_does_not_say_what_an_action_is_cannot_keep_a_robot_still():
    with pytest.raises(
        ValueError, match=r"what keeps a robot still whose actions are 'unknown'; state `action: hand`"
    ):
        SuccessEvaluation(each(1, latency_steps=2), SUITE, Points())


@pytest.mark.slow
def test_episodes_in_a_world_that_does_not_wait(tmp_path, ray_cluster):
    source, suite = policy(tmp_path / "policy", load_point), replace(SUITE, facts=SuiteFacts(contract=TERMS))
    with SuccessEvaluation(each(3, num_simulators=1, latency_steps=2), suite, Points()) as evaluation:
        table = evaluation.run("gru", source, tmp_path / "late.sqlite")
    with Journal(tmp_path / "late.sqlite", table.fingerprint) as journal:
        for result in table.results:
            trace = journal.trace(result.spec)
            assert trace.asked_t.tolist() == [0, 4, 8][: len(trace.asked_t)]
            assert set(trace.latency.tolist()) == {2}
            assert trace.call[:8].tolist() == [-1, -1, 0, 0, -1, -1, 1, 1], "the robot keeps still for two steps"
            assert not trace.actions[trace.call < 0].any()
    assert {result.steps for result in table.results if result.success} == {11}, "five steps, and six of stillness"


def test_an_unknown_suite_or_task_is_refused_with_what_was_meant(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'recall'"):
        SuccessConfig(suite="recal").build(tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'ground_go'"):
        SuccessEvaluation(SuccessConfig(episodes={"ground_og": 3}), SUITE, Points())


def test_a_longer_evaluation_contains_a_shorter_one():
    short, long = (SuccessEvaluation(each(n), SUITE, Points()).specs for n in (2, 5))
    assert {spec.key for spec in short} < {spec.key for spec in long}


def test_every_policy_gets_the_same_held_out_layouts():
    one, two = (SuccessEvaluation(each(3), SUITE, Points()) for _ in range(2))
    assert one.specs == two.specs
    assert [(s.task, s.trial, s.seed) for s in one.specs[:3]] == [
        ("ground_go", trial, Split.HELD_OUT.seed(trial)) for trial in range(3)
    ]


def test_a_study_may_begin_at_layouts_that_others_left_alone():
    first, later = (SuccessEvaluation(each(3, first_layout=n), SUITE, Points()) for n in (0, 100))
    assert [(s.trial, s.seed) for s in later.specs[:3]] == [(t, Split.HELD_OUT.seed(t)) for t in (100, 101, 102)]
    assert not {spec.key for spec in first.specs} & {spec.key for spec in later.specs}
    with pytest.raises(ValueError, match="first_layout is -1; pass first_layout >= 0"):
        each(3, first_layout=-1)


def test_machines_that_share_a_study_by_its_trials_merge_their_journals(tmp_path):
    source, played = policy(tmp_path / "policy", load_point), []
    for first in (0, 3):
        evaluation = SuccessEvaluation(each(3, first_layout=first), SUITE, Points())
        with Journal(tmp_path / f"{first}.sqlite", evaluation.fingerprint(source)) as journal:
            for spec in evaluation.specs:
                journal.record(EpisodeResult(spec, "success", 3, 2, 0.1, 0.0))
        played += evaluation.specs
    with Journal.merged([tmp_path / "0.sqlite", tmp_path / "3.sqlite"], tmp_path / "all.sqlite") as merged:
        assert {result.spec for result in merged.results()} == set(played)
    whole = SuccessEvaluation(each(6), SUITE, Points())
    with Journal(tmp_path / "all.sqlite", whole.fingerprint(source)) as journal:
        assert journal.missing(whole.specs) == [], "one machine tabulates what both have played"


@pytest.mark.slow
def test_an_evaluation_stops_once_it_knows_enough_and_is_the_same_when_resumed(tmp_path, ray_cluster):
    """On these layouts `load_point` succeeds in two of three."""
    source, new = policy(tmp_path / "policy", load_point), []

    def on_status(status):
        new.append(status.new)

    config = each(80, num_simulators=1, stop_width=0.5)
    with SuccessEvaluation(config, SUITE, Points()) as evaluation:
        table = evaluation.run("gru", source, tmp_path / "gru.sqlite", on_status=on_status)
        low, high = table.anytime95
        assert high - low <= 0.5
        assert low < 2 / 3 < high
        trials = sorted({result.spec.trial for result in table.results})
        assert trials == list(range(len(trials))), "whole trials, from the first one on"
        assert new == list(range(len(table.results) + 1))
        assert len(table.results) == 2 * len(trials) < 160
        again = evaluation.run("gru", source, tmp_path / "gru.sqlite", on_status=on_status)
        assert (again.results, again.anytime95) == (table.results, table.anytime95)
        assert new[-1] == 0, "nothing is played again, and nothing more"
    with pytest.raises(ValueError, match=r"stop_width is 1\.0"):
        SuccessConfig(stop_width=1.0)
    with pytest.raises(ValueError, match="as many episodes of every task"):
        SuccessConfig(stop_width=0.2, episodes={"a": 1, "b": 2})


@pytest.mark.slow
def test_where_their_number_is_left_open_simulators_are_added_while_they_wait(tmp_path, ray_cluster):
    """The point world takes no time: its simulators do nothing but wait."""
    source = policy(tmp_path / "policy", load_point)
    with SuccessEvaluation(each(8, num_simulators=None), SUITE, Points()) as evaluation:
        table = evaluation.run("gru", source, tmp_path / "gru.sqlite")
        assert len(evaluation.simulators()) == 4, "two cores, twice as many simulators"
    assert len(table.results) == 16
    with pytest.raises(ValueError, match="num_simulators is 0; pass num_simulators >= 1, or null"):
        SuccessConfig(num_simulators=0)


@pytest.mark.slow
def test_an_evaluation_from_simulators_to_report(tmp_path, ray_cluster):
    remembers, left = policy(tmp_path / "gru", load_point), policy(tmp_path / "none", load_fixed_left)
    journal, shown = tmp_path / "gru.sqlite", []
    with SuccessEvaluation(each(6, num_simulators=1), SUITE, Points()) as evaluation:
        gru = evaluation.run("gru", remembers, journal, sink=JsonlSink(tmp_path / "gru.jsonl"))
        assert [(row.name, row.k, row.n) for row in gru.families] == [("ground", 4, 6), ("recall", 4, 6)]
        (logged,) = read_jsonl(tmp_path / "gru.jsonl")
        suite = f"success/{SUITE.name}"
        of_recall = (logged[suite], logged[f"{suite}/recall_go"], logged[f"{suite}/family/recall"])
        assert of_recall == pytest.approx((2 / 3,) * 3)
        assert logged[f"{suite}/low"] < logged[suite] < logged[f"{suite}/high"]
        assert gru.fingerprint["protocol"] == str(load_protocol("recall"))

        again = evaluation.run("gru", remembers, journal, on_status=lambda status: shown.append(status.new))
        assert again.results == gru.results
        assert shown == [0], "a finished evaluation plays nothing"
        with pytest.raises(JournalError, match="policy_sha256"):
            evaluation.run("none", left, journal)

        none = evaluation.run("none", left, tmp_path / "none.sqlite")
        comparisons = compare(none, gru, evaluation.tasks)
        assert [(c.pairs, c.only_first, c.only_second) for c in comparisons] == [(6, 0, 2)] * 2
        note = result_note([none, gru], comparisons)
        assert "| recall | 2/6  0.33 (0.10-0.70) | 4/6  0.67 (0.30-0.90) | " in note
        assert "| recall | none - gru | 6 | -0.33 (" in note

        videos = evaluation.record(gru, journal, 1, tmp_path / "videos")
        assert [(v.task, v.trial, v.outcome) for v in videos] == [
            (task.name, trial, outcome) for task in TASKS for trial, outcome in ((0, "success"), (2, "timeout"))
        ]
        assert sorted(p.name for p in (tmp_path / "videos").iterdir()) == sorted(v.path.name for v in videos)
        written = [v.path.stat().st_mtime_ns for v in videos]
        assert evaluation.record(gru, journal, 1, tmp_path / "videos") == videos
        assert [v.path.stat().st_mtime_ns for v in videos] == written, "videos that are there are kept"

    report = Report("Quickstart", [none, gru], comparisons=comparisons, videos=videos).write(
        tmp_path / "report.html"
    )
    html = report.read_text()
    assert 'href="videos/recall_go-0-success.mp4"' in html
    assert "-0.33 (" in html, "the difference of both policies"
    assert html.count('src="data:image/png;base64,') == 2, "success bars and failure timeline"


def test_a_report_is_one_self_contained_file(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(5):
        sink.log({"loss": 1 / (step + 1)}, step)
    video = Video("gru <b>", "recall_go", 3, "failure", tmp_path / "videos" / "a b.mp4")
    path = Report(
        "Title & more", [], note="smoke run", curves={"gru": tmp_path / "metrics.jsonl"}, videos=[video]
    ).write(tmp_path / "new" / "report.html")
    html = path.read_text()
    assert "Title &amp; more" in html
    assert "smoke run" in html
    assert "gru &lt;b&gt;" in html
    assert 'src="data:image/png;base64,iVBOR' in html
    assert 'href="../videos/a%20b.mp4"' in html
    assert "http" not in html
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
