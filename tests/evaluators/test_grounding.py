"""Held-out questions: taken reproducibly, kept unharmed, and tabulated against chance."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluators.grounding import (
    GroundingConfig,
    GroundingRecord,
    answered,
    digest,
    grounding,
    tabulate,
)
from evaluators.intervals import wilson_interval
from ipvla.experiment import ExperimentConfig
from ipvla.sim.simulator import Split
from ipvla.training.parallel import World
from ipvla.types import Observation
from tests.synthetic import SIZE

SMALL = GroundingConfig(tasks=("recall", "ground_red"), episodes=3, per_episode=3, camera_size=32)


def record(
    kind: str = "lit", answer: str = "yes", question: str = "is a button lit", seed: int = 0
) -> GroundingRecord:
    image = np.random.default_rng(seed).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    return GroundingRecord("recall", seed, 0, kind, question, answer, image, np.zeros(8, np.float32))


def test_rows_count_each_kind_against_its_most_frequent_answer() -> None:
    records = [record(answer=a) for a in ("yes", "no", "no", "no")]
    records += [record("side", a, "left or right") for a in ("left", "right")]
    rows = tabulate(records, np.array([True, True, False, False, True, True]))
    assert [(row.name, row.k, row.n, row.chance) for row in rows] == [
        ("side", 2, 2, 0.5),
        ("lit", 2, 4, 0.75),
        ("all", 4, 6, pytest.approx(4 / 6)),
    ]
    assert rows[1].wilson95 == wilson_interval(2, 4)
    assert rows[1].to_dict() == {
        "k": 2, "n": 4, "chance": 0.75, "rate": 0.5, "wilson95": list(wilson_interval(2, 4)),
    }  # fmt: skip


@pytest.mark.parametrize(("records", "answers"), [([], []), ([record()], [True, False])])
def test_answers_must_fit_the_records(records: list[GroundingRecord], answers: list[bool]) -> None:
    with pytest.raises(ValueError, match=f"{len(records)} records and answers of shape"):
        tabulate(records, np.array(answers, bool))


def test_an_answer_counts_if_it_is_the_right_word(make_experiment: Callable[..., ExperimentConfig]) -> None:
    """A backbone that says of every picture what its first pixel says, whatever the batches."""
    policy = make_experiment().build(World()).policy

    def answer(inputs, questions, max_new_tokens):  # type: ignore[no-untyped-def]
        assert questions == ["is a button lit"] * len(inputs.images)
        assert not policy.model.training
        return ["yes" if image[0, 0, 0, 0] < 128 else "no" for image in inputs.images]

    policy.model.backbone.answer = answer
    records = [record(seed=seed) for seed in range(7)]
    policy.model.train()
    right = answered(policy, records, batch=3)
    assert right.tolist() == [bool(r.image[0, 0, 0] < 128) for r in records]
    assert len(set(right.tolist())) == 2
    assert policy.model.training, "left as it was"


def test_a_policy_that_learned_the_answers_gets_them_right(
    make_experiment: Callable[..., ExperimentConfig],
) -> None:
    policy = make_experiment().build(World()).policy
    records = [record(seed=0, answer="yes"), record("side", "left", "is the red button left or right", seed=1)]
    backbone = policy.model.backbone
    observations = [Observation({"agentview": r.image}, r.proprio, "", 0) for r in records]
    seen = policy.transforms.inputs(observations)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=3e-3)
    assert grounding(policy, records)[-1].k == 0
    for _ in range(30):
        optimizer.zero_grad()
        backbone.answer_loss(seen, [r.question for r in records], [r.answer for r in records]).backward()
        optimizer.step()
    assert [(row.name, row.k, row.n) for row in grounding(policy, records)] == [
        ("side", 1, 1),
        ("lit", 1, 1),
        ("all", 2, 2),
    ]


def test_the_digest_depends_on_all_that_a_record_holds() -> None:
    one = record()
    changed = [
        replace(one, answer="no"),
        replace(one, t=1),
        replace(one, image=one.image ^ 1),
        replace(one, proprio=one.proprio + 1),
    ]
    assert len({digest([r]) for r in [one, *changed]}) == 5
    assert digest([one, changed[0]]) != digest([changed[0], one])
    assert digest([one]) == digest([record()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, r"grounding\.tasks is \[\]"),
        ({"tasks": ("recall", "recall")}, "none twice"),
        ({"episodes": 0}, r"grounding\.episodes is 0"),
        ({"first_layout": -1}, r"grounding\.first_layout is -1"),
    ],
)
def test_senseless_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroundingConfig(**change)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
class TestRecordsOfTheSimulator:
    def test_they_are_held_out_and_none_is_asked_twice_about_a_picture(self, cache: Path) -> None:
        records = SMALL.build(cache)
        assert {r.task for r in records} == {"recall", "ground_red"}
        assert {r.seed for r in records} == {Split.HELD_OUT.seed(i) for i in range(3)}
        assert len({(r.task, r.seed, r.t, r.question) for r in records}) == len(records) == 18
        assert all(r.image.shape == (32, 32, 3) and r.image.dtype == np.uint8 for r in records)
        assert {r.t for r in records if r.task == "ground_red"} == {0}
        assert len({r.t for r in records if r.task == "recall"}) > 3

    def test_they_are_kept_and_taken_again_if_harmed(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        records = SMALL.build(cache)
        (path,) = (cache / "grounding").iterdir()
        whole = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("evaluators.grounding.load_suite", None)
            assert digest(SMALL.build(cache)) == digest(records)
            for harmed in (whole[:-10], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
                path.write_bytes(harmed)
                with pytest.raises(TypeError, match="not callable"):
                    SMALL.build(cache)
        assert digest(SMALL.build(cache)) == digest(records)
        monkeypatch.setattr("evaluators.grounding.load_suite", None)
        assert digest(SMALL.build(cache)) == digest(records)

    def test_a_task_that_nothing_can_be_asked_about_is_refused(self, cache: Path) -> None:
        with pytest.raises(ValueError, match="nothing can be asked about 'cups'; leave it out"):
            replace(SMALL, tasks=("cups",), episodes=1).build(cache)
        with pytest.raises(ValueError, match="Did you mean 'recall'"):
            replace(SMALL, tasks=("recal",)).build(cache)
