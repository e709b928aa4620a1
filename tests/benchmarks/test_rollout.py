"""The rollout benchmark's ratios, and its parts on a policy that takes no time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rollout import RolloutStudy, targets
from benchmarks.rollout_pictures import difference
from benchmarks.rollout_scaling import (
    CHUNK_S,
    FORWARDS,
    PI0,
    Constants,
    best_rate,
    driver_cpu_ms,
    gpus_for,
    ideal_rate,
    limits,
    measure_scaling,
)
from benchmarks.rollout_speed import (
    CAMERAS,
    EXECUTE,
    MeteredSimulator,
    act_overhead_ms,
    bare_call_ms,
    efficiency,
    save_untrained_policy,
)
from benchmarks.rollout_stub import JITTER, ForwardTime, WaitingPolicies
from benchmarks.tables import record_table
from ipvla.policy import Policy
from ipvla.types import Observation
from tests.rollout.point import PointSimulator

PARTS = RolloutStudy.all_parts
RUN = {"commit": "0123456789abcdef", "machine": {"cpu": "2 x CPU", "os": "Linux"}}


def speed(**changes: Any) -> dict[str, Any]:
    ms = {"serial": [300.0, 330.0, 310.0], "exact": [30.0, 30.0, 62.0], "fast": [20.0, 22.0, 31.0]}
    return {
        "ms_per_step": ms,
        "efficiency": {"exact": [0.9, 0.86, 0.8], "fast": [0.7, 0.7, 0.7]},
        "service": {
            profile: [{"sim_cpu_s": cpu, "steps": 4000, "mean_batch": 1.3}] * 3
            for profile, cpu in (("exact", 100.0), ("fast", 60.0))
        },
        "cores": 2,
        "num_simulators": 3,
        "protocol": "oft v1",
        "suite": "libero_spatial",
        "run": RUN,
        **changes,
    }


def darker() -> dict[str, Any]:
    """Of one picture that is black where it was grey, in a quarter of its pixels, and nearly so in the rest."""
    exact = np.full((4, 4, 3), 60, np.uint8)
    fast = exact - np.uint8(4)
    fast[:2, :2, 0] = 0
    return difference("libero_goal", "agentview", [(fast, exact), (exact, exact)])


def point(actors: int, to_bound: float, cpu: float, forward: str = "light") -> dict[str, Any]:
    bound = 2.0 * actors
    rates = {"answers_per_s": to_bound * bound, "bound": bound, "to_bound": to_bound}
    ideal = {"ideal": 0.96 * bound, "to_ideal": to_bound / 0.96}
    return {"forward": forward, "actors": actors, **rates, **ideal, "mean_batch": 1.0, "cpu": cpu}


def figures() -> dict[str, Any]:
    points = [point(1, 0.97, 0.1), point(2, 0.93, 0.4), point(4, 0.6, 0.97)]
    growth = {"memory_mb": 300.0, "files": 0}
    return {
        "speed": speed(),
        "overhead": {"ms": {"bare": [0.9, 0.8, 1.0], "1": [1.5, 1.4, 3.0], "8": [1.2, 1.3, 0.9]}, "run": RUN},
        "pictures": {"differences": [darker()], "run": RUN},
        "scaling": {
            "points": [*points, *({**one, "forward": "heavy"} for one in points)],
            "driver_cpu_ms": 4.0,
            "run": RUN,
        },
        "chaos": {
            "episodes": 200,
            "kills": {"simulator": 20, "policy": 9},
            "attempts": 31,
            "lost": 0,
            "doubled": 0,
            "different": 1,
            "undisturbed_s": 50.0,
            "disturbed_s": 90.0,
            "run": RUN,
        },
        "soak": {
            "episodes": 6000,
            "wall_s": 420.0,
            "processes": [
                {"kind": "driver", "slope_mb_per_1000": 0.4, **growth},
                {"kind": "policy", "slope_mb_per_1000": -0.2, **growth, "files": 1},
            ],
            "replaced": 0,
            "leases": 0,
            "actors": 2,
            "object_store_mb": 0.0,
            "run": {**RUN, "commit": ["aaaaaaaaaaaa", "bbbbbbbbbbbb"]},
        },
    }


def test_ratios_are_of_what_was_played_in_the_same_round() -> None:
    told = {target.name: target for target in targets({"speed": speed()})}
    assert (told["speedup_exact"].value, told["speedup_exact"].interval) == (10.0, (5.0, 11.0))
    assert (told["speedup_fast"].value, told["speedup_fast"].interval) == (15.0, (10.0, 15.0))
    assert told["efficiency"].value == 0.86, "with exact frames"
    assert all(target.met for target in told.values())


def test_other_parts_have_their_targets() -> None:
    told = {target.name: target for target in targets(figures())}
    assert (told["act_overhead_ms_1"].value, told["act_overhead_ms_1"].met) == (1.5, True)
    assert told["act_overhead_ms_1"].interval == (1.4, 3.0)
    assert "bare call of Ray's with the same pictures takes 0.90 ms" in told["act_overhead_ms_1"].note
    assert not told["act_overhead_ms_8"].met
    assert told["scaling_to_bound"].value == 0.93, "where the cores were not the limit"
    assert told["scaling_to_bound"].met
    assert "would reach 0.96 there" in told["scaling_to_bound"].note
    assert told["scaling_to_ideal"].value == pytest.approx(0.93 / 0.96)
    assert not told["chaos_different"].met
    assert told["chaos_lost"].met
    assert (told["soak_memory_slope_mb_per_1000"].value, told["soak_memory_slope_mb_per_1000"].met) == (0.4, True)
    busy = {"scaling": {"points": [point(8, 0.5, 0.95)], "driver_cpu_ms": 4.0}}
    assert [(t.name, t.value, t.met) for t in targets(busy)] == [
        ("scaling_to_bound", None, False),
        ("scaling_to_ideal", None, False),
    ]


def test_tables_say_what_limits() -> None:
    kinds = (*PARTS, "capacity", "chaos", "soak")
    tables = {kind: record_table({"figures": figures()}, kind) for kind in kinds}
    assert "| service, `exact` | 30.0 | 10.0 x | 0.86 | 1.30 |" in tables["speed"]
    assert "| service, one caller | 1.50 | 1.40 to 3.00 |" in tables["overhead"]
    assert "| `libero_goal` | agentview | 4.3 | 8.7 | 12.5% | 12.5% |" in tables["pictures"]
    assert "| 4 | 4.8 | 4.8 | 0.60 (97%) | 0.60 (97%) | 0.62 (97%) | 0.62 (97%) |" in tables["scaling"]
    assert (
        "| `exact` | pi0, RTX 4090 | 5,000 | 8 | 174 | 6,667 | 6,875 | 173 | policy | 54 |" in tables["capacity"]
    )
    assert (
        "| 200 | 9 x policy, 20 x simulator | 31 | 0 | 0 | 1 | 90 s against 50 s undisturbed |" in tables["chaos"]
    )
    assert "| policy | 300 | -0.20 | 1 |" in tables["soak"]
    assert "0 processes replaced; left behind: 0 leases, 2 actors after it was closed" in tables["soak"]


def test_every_part_says_which_run_it_is_of() -> None:
    tables = {kind: record_table({"figures": figures()}, kind) for kind in (*PARTS, "chaos", "soak")}
    told = {kind: table.rpartition("Commit ")[2] for kind, table in tables.items()}
    assert told.pop("soak") == "`aaaaaaaaaa` or `bbbbbbbbbb`, 2 x CPU, Linux.", "where it was not kept which"
    assert set(told.values()) == {"`0123456789`, 2 x CPU, Linux."}
    record = {"commit": "ffff", "machine": {}, "seeds": [], "figures": figures(), "targets": []}
    assert "ffff" not in record_table(record, "targets")


@given(st.integers(1, 64), st.floats(0.01, 2), st.floats(0.001, 0.5), st.floats(0, 0.1))
def test_no_schedule_exceeds_either_bound(
    simulators: int, chunk_s: float, fixed_s: float, per_row_s: float
) -> None:
    forward = ForwardTime(fixed_s, per_row_s)
    best = best_rate(simulators, chunk_s, forward)
    supply, capacity = simulators / (chunk_s + forward(1)), simulators / forward(simulators)
    assert best <= min(supply, capacity) * (1 + 1e-9)
    assert best <= best_rate(simulators + 1, chunk_s, forward)
    assert best <= best_rate(simulators, chunk_s, forward, replicas=2) <= 2 * best * (1 + 1e-9)


def test_a_lone_simulator_waits_for_every_forward_pass() -> None:
    assert best_rate(1, 0.4, ForwardTime(0.09, 0.01)) == pytest.approx(2.0)
    assert ideal_rate(1, 0.4, ForwardTime(0.09, 0.01)) == pytest.approx(2.0, rel=0.02)


def test_who_asks_while_the_policy_is_at_work_waits_even_where_it_is_ideal() -> None:
    ideal, best = ([rate(n, 0.4, FORWARDS["heavy"]) for n in (2, 16, 1000)] for rate in (ideal_rate, best_rate))
    assert all(one <= 1.01 * other for one, other in zip(ideal, best, strict=True))
    assert ideal[1] < 0.92 * best[1], "where simulators and policy are about as fast"
    assert ideal[2] > 0.95 * best[2]


def test_as_many_gpus_as_simulators_fill() -> None:
    constants = Constants(chunk_s=0.2, answer_s=0.001, driver_s=0.004)
    gpus = gpus_for(constants, 100)
    assert best_rate(100, 0.2, PI0, gpus) >= 0.9 * 100 / (0.2 + PI0(1)) > best_rate(100, 0.2, PI0, gpus - 1)
    full = limits(constants, 10_000, 1_000)
    assert full["reached"] == full["driver"] < min(full["simulators"], full["policy"], full["actors"])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_waiting_simulators_come_close_to_the_bound(tmp_path: Path) -> None:
    points = list(measure_scaling(tmp_path, [2], 3))
    assert [(one["forward"], one["actors"]) for one in points] == [("light", 2), ("heavy", 2)]
    for one in points:
        fastest = 2 / ((1 - JITTER) * CHUNK_S + FORWARDS[one["forward"]](1))
        assert 0.6 * one["ideal"] < one["answers_per_s"] < 1.05 * fastest, (
            "that all chunks were short, nobody can undercut"
        )
        assert 1 <= one["mean_batch"] <= 2
    assert points[0]["answers_per_s"] > points[1]["answers_per_s"], (
        "the heavy policy takes 110 ms, the light one 30"
    )
    began_s = time.process_time()
    per_episode_ms = driver_cpu_ms(tmp_path, 20)
    assert 0 < 20 * per_episode_ms < 1e3 * (time.process_time() - began_s), "starting and ending do not count"


def test_efficiency_is_the_share_of_the_cores_that_episodes_needed() -> None:
    cpu_s = {"physics_cpu_s": 20.0, "frames_cpu_s": 50.0, "act_cpu_s": 10.0, "sim_cpu_s": 85.0}
    assert efficiency({"wall_s": 50.0, **cpu_s}, cores=2) == pytest.approx(0.8)


def test_physics_and_frames_are_metered_and_waiting_is_neither() -> None:
    class Working(PointSimulator):
        def step(self, action: Any) -> Any:
            spin(0.02)
            time.sleep(0.02)
            return super().step(action)

        def observe(self, geometry: bool = False) -> Observation:
            spin(0.05)
            return super().observe(geometry)

    simulator: Any = MeteredSimulator(Working("ground_go"))
    for _ in range(2):
        simulator.reset(3)
        simulator.observe()
        simulator.step(np.ones(1))
        told = simulator.details()
        assert 0.02 <= told["physics_cpu_s"] < 0.03, "of this episode alone"
        assert 0.05 <= told["frames_cpu_s"] < 0.1
    assert (simulator.task.name, told["track"]) == ("ground_go", [0.1])


def spin(cpu_s: float) -> None:
    until_s = time.thread_time() + cpu_s
    while time.thread_time() < until_s:
        pass


def test_the_policy_is_a_real_one_and_always_the_same(tmp_path: Path) -> None:
    one, other = (Policy.load(save_untrained_policy(tmp_path / name)) for name in ("one", "other"))
    images = {camera: np.full((224, 224, 3), 90, np.uint8) for camera in CAMERAS}
    seen = [Observation(images, np.zeros(8, np.float32), "put the bowl on the plate", 0)]
    chunks = [policy.act(seen, policy.initial_memory(1))[0] for policy in (one, other)]
    assert chunks[0].shape == (1, EXECUTE, 7)
    np.testing.assert_array_equal(*chunks)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_what_an_answer_takes_beyond_the_policy_is_measured(tmp_path: Path) -> None:
    """32 MB of memory, into the batch and out of it, take some ms; nothing of the policy's 500 ms may be left."""
    for callers in (1, 2):
        overhead = act_overhead_ms(callers, 4, tmp_path, WaitingPolicies(ForwardTime(0.5, 0.0), width=2**23))
        assert 4 < overhead < 400
    assert 0 < bare_call_ms(4) < 400


def test_a_study_of_nothing_is_refused() -> None:
    for wrong, told in (
        ({"rounds": 0}, "rounds is 0"),
        ({"parts": ("sped",)}, r"parts: \['sped'\] cannot be measured; choose among speed, overhead"),
        ({"actors": (4, 2)}, r"actors: \[4, 2\] must be ascending"),
    ):
        with pytest.raises(ValueError, match=told):
            RolloutStudy(**wrong)  # type: ignore[arg-type]
