"""Probing in the toy world: a policy that is shown a cue once, remembers it, and walks there in five steps."""

import json

import pytest

from evaluators.memory_use import InterventionConfig, LossRow, MemoryUseEvaluation
from evaluators.plots import plot_memory_use
from evaluators.success import SuccessConfig
from ipvla.rollout.journal import Journal, JournalError
from ipvla.rollout.policy_actor import PolicySource
from ipvla.sim.suite import Suite
from ipvla.tracking import JsonlSink, read_jsonl
from tests.rollout.point import HORIZON, Points, PointSimulator, load_fixed_left, load_point

TASK = PointSimulator("recall_go").task
SUITE = Suite("point", "1", (TASK,), lambda name, size: PointSimulator(name))


def evaluation(*kinds: str, times: tuple[int, ...], episodes: int = 6) -> MemoryUseEvaluation:
    success = SuccessConfig(episodes={TASK.name: episodes}, num_simulators=1)
    return MemoryUseEvaluation(InterventionConfig(kinds, times), success, SUITE, Points())


@pytest.fixture(scope="module")
def probing(ray_cluster):
    """An evaluation of several policies."""
    with evaluation("reset", "freeze", "swap", "shuffle", times=(6, 2)) as probing:
        yield probing


def losses(use) -> dict[tuple[str, int], tuple[int, int, int]]:
    """(probe, t) -> episodes touched, lost and won by it."""
    return {(row.intervention, row.t): (row.touched, row.only_undisturbed, row.only_changed) for row in use.tasks}


def source(directory, load) -> PolicySource:
    directory.mkdir(exist_ok=True)
    (directory / "model.txt").write_text(load.__name__)
    return PolicySource(load, directory)


@pytest.mark.slow
def test_what_is_lost_tells_what_the_memory_is_for(tmp_path, probing):
    remembers, directory = source(tmp_path / "policy", load_point), tmp_path / "use"

    def interrupted(what: str, done: int, total: int) -> None:
        if what == "gru swap at 2" and done == 6 * 2 + 3:
            raise KeyboardInterrupt

    # Of six layouts four have a cue and end after five steps; two have none and time out.
    with evaluation("freeze", "swap", times=(2,)) as first, pytest.raises(KeyboardInterrupt):
        first.measure("gru", load_point(tmp_path), remembers, directory, on_progress=interrupted)
    with Journal(directory / "undisturbed.sqlite", first.fingerprint(remembers)) as journal:
        assert len(journal.results()) == 6

    seen: list[tuple[str, int, int]] = []
    seen: list[tuple[str, int, int]] = []
    use = probing.measure(
        "gru", load_point(tmp_path), remembers, directory, on_progress=lambda *now: seen.append(now)
    )
    again = probing.measure("gru", load_point(tmp_path), remembers, directory)
    assert again == use, "a finished measurement plays nothing and says the same"
    assert (use.undisturbed.tasks[0].k, use.undisturbed.tasks[0].n) == (4, 6)
    assert losses(use) == {
        ("reset", 2): (6, 4, 0),  # without the cue it stops
        ("freeze", 2): (6, 0, 0),  # it has seen all it needs
        ("swap", 2): (6, 4, 0),  # it goes where another episode's cue was
        ("shuffle", 2): (6, 0, 0),  # one number has one order
        ("reset", 6): (2, 0, 0),  # the four have arrived before
        ("freeze", 6): (2, 0, 0),
        ("swap", 6): (2, 0, 0),
        ("shuffle", 6): (2, 0, 0),
    }
    swapped = [done for what, done, _ in seen if what == "gru swap at 2"]
    assert [done - swapped[0] for done in swapped] == [0, 3, 4, 5, 6], "three were played before"
    assert seen[-1] == ("gru done", 9 * 6, 9 * 6)

    use.log(JsonlSink(tmp_path / "metrics.jsonl"))
    logged = {
        line["step"]: line for line in read_jsonl(tmp_path / "metrics.jsonl") if any("reset" in k for k in line)
    }
    assert logged[2]["memory_use/recall_go/reset"] == pytest.approx(4 / 6)
    assert logged[6]["memory_use/recall_go/reset"] == 0
    described = json.loads(use.write(tmp_path / "use.json").read_text())
    assert described["families"][0]["name"] == "recall"
    assert described["tasks"][0]["lost95"] == list(use.tasks[0].lost95)
    png, svg = plot_memory_use(use, tmp_path / "use")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()


@pytest.mark.slow
def test_a_policy_without_memory_loses_exactly_nothing(tmp_path, probing):
    left, policy = source(tmp_path / "policy", load_fixed_left), load_fixed_left(tmp_path)
    use = probing.measure("none", policy, left, tmp_path)
    assert {(lost, won) for _, lost, won in losses(use).values()} == {(0, 0)}
    assert {probe for probe, _ in losses(use)} == {"reset", "freeze", "swap"}
    assert "floating-point" in use.left_out["shuffle"]
    with pytest.raises(JournalError, match="policy_sha256"):
        probing.measure("gru", policy, source(tmp_path / "policy", load_point), tmp_path)


def test_a_row_is_read_off_its_four_counts():
    row = LossRow("recall", "reset", t=10, touched=41, both=14, only_undisturbed=5, only_changed=0, neither=22)
    assert (row.n, row.undisturbed, row.k) == (41, 19, 14)
    assert row.lost == pytest.approx(5 / 41)
    assert row.lost95 == pytest.approx((0.011, 0.226), abs=6e-4)
    assert row.p_value == pytest.approx(2 / 2**5)
    low, high = row.wilson95
    assert low < 14 / 41 < high


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"kinds": ("rest",)}, "'rest' is no probe; did you mean 'reset'"),
        ({"kinds": ()}, "kinds is \\[\\]; name at least one"),
        ({"times": (5, 5)}, "times is \\[5, 5\\]; .* none twice"),
        ({"times": (5, -1)}, "-1 lies before the episode"),
    ],
)
def test_probes_that_cannot_be_made_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        InterventionConfig(**arguments)


def test_a_time_that_no_episode_reaches_and_a_swap_with_nobody_are_refused():
    with pytest.raises(ValueError, match=rf"recall_go has a control step {HORIZON}, its horizon is {HORIZON}"):
        evaluation("reset", times=(HORIZON, 1))
    evaluation("reset", times=(HORIZON - 1,))
    with pytest.raises(ValueError, match=r"episodes\.recall_go is 1, which leaves swap no donor"):
        evaluation("swap", times=(1,), episodes=1)
    evaluation("reset", times=(1,), episodes=1)
