"""The contract: samples, each frame once per epoch over ranks and workers, resumed where it was left."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from integrations.starvla_ecot import (
    FrameDataset,
    FrameLoader,
    collate,
    get_vla_dataset_ecot,
    make_dataloader_ecot,
    save_dataset_statistics,
)
from integrations.starvla_ecot.frames import Member, Visit
from ipvla.data.reasoning.steps import TAGS
from ipvla.data.source import DatasetError
from ipvla.data.statistics import Statistics
from ipvla.reasoning import parse
from tests.data.reasoning import bridge

Cfg = Callable[..., dict[str, Any]]
Sample = dict[str, Any]
ECOT = "datasets.vla_data.ecot"
MODEL = "framework.action_model"
#: Bridge's standard leaves an episode's first and last step out.
KEPT = [(episode, step) for episode, length in enumerate(bridge.LENGTHS) for step in range(1, length - 1)]


def _which(sample: Sample) -> tuple[int, int]:
    """Episode and its own step, read from instruction and first picture."""
    episode = int(sample["lang"].split()[3])
    seen = np.asarray(sample["image"][0]).mean()
    return episode, min(range(bridge.LENGTHS[episode]), key=lambda t: abs(bridge.grey(episode, t, 0) - seen))


def _all(samples: Iterable[Sample]) -> list[tuple[int, int]]:
    return [_which(sample) for sample in samples]


@pytest.mark.parametrize("size", [(224, 224), (336, 336), (32, 40)])
@pytest.mark.parametrize("future", [7, 15])
@pytest.mark.parametrize("stage", [0, 3, 8])
def test_samples_are_as_the_contract_says(make_cfg: Cfg, size: tuple[int, int], future: int, stage: int) -> None:
    cfg = make_cfg(
        **{
            "datasets.vla_data.image_size": list(size),
            f"{MODEL}.future_action_window_size": future,
            f"{ECOT}.scheduled_stage": stage,
        }
    )
    (batch,) = itertools.islice(make_dataloader_ecot(cfg), 1)
    assert isinstance(batch, list)
    assert len(batch) == 4
    for sample in batch:
        episode, step = _which(sample)
        assert len(sample["image"]) == 2, "two views"
        for camera, image in enumerate(sample["image"]):
            assert isinstance(image, Image.Image)
            assert (image.mode, image.size) == ("RGB", size[::-1])
            assert abs(np.asarray(image).mean() - bridge.grey(episode, step, camera)) < 2
        assert sample["lang"] == bridge.instruction(episode)
        assert (sample["action"].shape, sample["action"].dtype) == ((1 + future, 7), np.float32)
        assert (sample["state"].shape, sample["state"].dtype) == ((1, 7), np.float32)
        spoken = episode != bridge.SILENT and (episode, step) != bridge.MISSING_STEP and stage < len(TAGS)
        assert bool(sample["reasoning"]) == spoken
        if spoken:
            assert list(parse(sample["reasoning"])) == list(TAGS[stage:])


def test_reasoning_is_of_the_steps_own_number_although_the_first_is_left_out(make_cfg: Cfg) -> None:
    """Upstream indexes it after Bridge's first step was dropped: every picture has the words of the one before."""
    for sample in get_vla_dataset_ecot(make_cfg()):
        episode, step = _which(sample)
        if sample["reasoning"]:
            read = parse(sample["reasoning"])
            assert read["SUBTASK"] == f"reach {episode}/{step}"
            assert read["TASK"] == f"Put the cup at {episode}/{step}. @home"
            assert read["MOVE REASONING"] == "杯子在左边"
            assert read["VISIBLE OBJECTS"] == f"a cup [{step}, 2, 30, 40], plate [1, 1, 9, 9]"
            last = bridge.LENGTHS[episode] - 1
            ahead = [min(step + i, last) for i in range(5)]
            assert json.loads(read["GRIPPER POSITION"]) == [v for t in ahead for v in (t, 2 * t)]


@pytest.mark.parametrize("past", [0, 2])
def test_a_chunk_is_the_normalised_actions_around_its_step(make_cfg: Cfg, past: int) -> None:
    frames = get_vla_dataset_ecot(
        make_cfg(**{f"{MODEL}.past_action_window_size": past, f"{MODEL}.future_action_window_size": 7})
    )
    statistics = frames.members[0].statistics
    for sample in frames:
        episode, step = _which(sample)
        states, length = bridge.state(episode, bridge.LENGTHS[episode]), bridge.LENGTHS[episode]
        assert sample["action"].shape == (past + 8, 7)
        for row, t in enumerate(range(step - past, step + 8)):
            # kept are steps 1 to length - 2: before them the first action repeats, past them there is none
            at = max(t, 1)
            if at <= length - 2:
                motion = np.append(states[at + 1, :6] - states[at, :6], 0).astype(np.float32)
                expected = statistics.action.normalise(motion)[:6]
            else:
                expected = np.zeros(6)
            np.testing.assert_allclose(sample["action"][row, :6], expected, atol=1e-5)
        gripper = sample["action"][:, 6]
        assert set(gripper.tolist()) <= {0.0, 1.0}
        past_the_end = gripper[past + length - 1 - step :]
        assert (past_the_end == gripper[past + length - 2 - step]).all() if len(past_the_end) else True


@pytest.mark.parametrize(("horizon", "word"), [(4, "cut"), (20, "padded")])
def test_a_model_of_another_length_gets_cut_or_padded_chunks_and_one_warning(
    make_cfg: Cfg, caplog: pytest.LogCaptureFixture, horizon: int, word: str
) -> None:
    usual = {_which(sample): sample["action"] for sample in get_vla_dataset_ecot(make_cfg())}
    caplog.clear()
    fitted = list(get_vla_dataset_ecot(make_cfg(**{f"{MODEL}.action_horizon": horizon})))
    assert [r.message.count(f"chunks are {word}") for r in caplog.records if "action_horizon" in r.message] == [1]
    for sample in fitted:
        expected, action = usual[_which(sample)], sample["action"]
        assert action.shape == (horizon, 7)
        np.testing.assert_array_equal(action[:16], expected[:horizon])
        assert not action[16:, :6].any()
        assert (action[16:, 6] == expected[-1, 6]).all()


def test_every_kept_frame_comes_once_per_epoch_in_another_order_each_time(make_cfg: Cfg) -> None:
    frames = get_vla_dataset_ecot(make_cfg())
    epochs = [_all(frames) for _ in range(3)]
    assert all(sorted(epoch) == KEPT for epoch in epochs)
    assert len(frames) == len(KEPT)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs == [_all(again) for again in [get_vla_dataset_ecot(make_cfg())] for _ in range(3)]
    assert _all(get_vla_dataset_ecot(make_cfg(seed=1))) != epochs[0]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 3)])
def test_ranks_and_workers_share_an_epoch_without_overlap(make_cfg: Cfg, world_size: int, workers: int) -> None:
    members = get_vla_dataset_ecot(make_cfg()).members
    seen = Counter[tuple[int, int]]()
    for rank in range(world_size):
        frames = FrameDataset(members, _config(make_cfg()), rank, world_size)
        loader = FrameLoader(frames, 3, workers)
        expected, batches = len(loader), list(loader)
        assert len(batches) == expected
        seen.update(_all(itertools.chain.from_iterable(batches)))
    assert seen == Counter(KEPT)


def test_another_loader_may_read_the_dataset_too(make_cfg: Cfg) -> None:
    frames = get_vla_dataset_ecot(make_cfg())
    loader = DataLoader(
        frames, batch_size=5, num_workers=2, collate_fn=collate, multiprocessing_context="forkserver"
    )
    assert sorted(_all(itertools.chain.from_iterable(loader))) == KEPT


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_a_loader_resumes_where_it_was_left(make_cfg: Cfg, workers: int, stop: int) -> None:
    cfg = make_cfg(**{"datasets.vla_data.num_workers": workers, f"{ECOT}.reasoning_dropout_prob": 0.5})
    whole = [_told(batch) for _, batch in zip(range(30), _endless(make_dataloader_ecot(cfg)), strict=False)]
    first = make_dataloader_ecot(cfg)
    assert [_told(batch) for batch in itertools.islice(_endless(first), stop)] == whole[:stop]
    resumed = make_dataloader_ecot(cfg)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [_told(batch) for batch in itertools.islice(_endless(resumed), 30 - stop)] == whole[stop:]


def test_a_resumed_dataset_reads_no_episode_that_is_over(make_cfg: Cfg, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = make_cfg(**{f"{ECOT}.shuffle_buffer_size": 1})
    frames = get_vla_dataset_ecot(cfg)
    whole = _all(frames)
    frames.set_epoch(0)
    iteration = iter(frames)
    assert [_which(sample) for sample in itertools.islice(iteration, 40)] == whole[:40]
    resumed = get_vla_dataset_ecot(cfg)
    resumed.load_state_dict(frames.state_dict())
    read = []
    original = Member.frames
    monkeypatch.setattr(
        Member, "frames", lambda self, visit: (read.append(visit.episode), original(self, visit))[1]
    )
    assert _all(resumed) == whole[40:]
    assert sorted(read) == sorted({episode for episode, _ in whole[40:]})


def test_a_state_of_another_division_is_refused(make_cfg: Cfg) -> None:
    state = make_dataloader_ecot(make_cfg()).state_dict()
    other = make_dataloader_ecot(make_cfg(**{"datasets.vla_data.num_workers": 2}))
    with pytest.raises(ValueError, match=r"workers 1, now it is 2; resume with 1, or start .* set_epoch\(0\)"):
        other.load_state_dict(state)


def test_threads_change_nothing_but_the_time(make_cfg: Cfg) -> None:
    one = [_told([sample]) for sample in get_vla_dataset_ecot(make_cfg())]
    threads = {f"{ECOT}.num_parallel_calls": 4, f"{ECOT}.num_parallel_reads": 2}
    assert [_told([sample]) for sample in get_vla_dataset_ecot(make_cfg(**threads))] == one
    autotuned = {f"{ECOT}.num_parallel_calls": "autotune", f"{ECOT}.num_parallel_reads": "autotune"}
    assert [_told([sample]) for sample in get_vla_dataset_ecot(make_cfg(**autotuned))] == one


def test_the_buffer_keeps_no_picture_that_was_given(make_cfg: Cfg, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits are single encoded pictures: when a frame is given, its bytes are free."""
    frames = get_vla_dataset_ecot(make_cfg(**{f"{ECOT}.shuffle_buffer_size": 1000}))
    (frame, *others) = frames.members[0].frames(Visit(0, 3))
    encoded = {id(pictures.encoded[0]) for pictures, _ in frame.pictures}
    assert all(index == 0 and len(pictures) == 1 for each in (frame, *others) for pictures, index in each.pictures)
    assert not encoded & {id(pictures.encoded[0]) for other in others for pictures, _ in other.pictures}


def test_validation_is_in_order_and_the_same_each_time(make_cfg: Cfg) -> None:
    cfg = make_cfg(**{f"{ECOT}.train": False, f"{ECOT}.image_aug": True, f"{ECOT}.reasoning_dropout_prob": 1.0})
    frames = get_vla_dataset_ecot(cfg)
    samples = [list(frames) for _ in range(2)]
    assert [_all(each) for each in samples] == [KEPT, KEPT]
    assert any(sample["reasoning"] for sample in samples[0]), "dropout is for training"


def test_augmentation_changes_pictures_alone_and_by_seed(make_cfg: Cfg) -> None:
    plain = list(get_vla_dataset_ecot(make_cfg()))
    first, again = (list(get_vla_dataset_ecot(make_cfg(**{f"{ECOT}.image_aug": True}))) for _ in range(2))
    changed = 0
    for a, b, c in zip(plain, first, again, strict=True):
        assert a["reasoning"] == b["reasoning"]
        np.testing.assert_array_equal(a["action"], b["action"])
        pictures = [[np.asarray(image) for image in sample["image"]] for sample in (a, b, c)]
        np.testing.assert_array_equal(pictures[1], pictures[2])
        changed += not np.array_equal(pictures[0], pictures[1])
    assert changed > 0.9 * len(plain)


def test_without_reasoning_training_goes_on(
    make_cfg: Cfg, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = list(get_vla_dataset_ecot(make_cfg(**{f"{ECOT}.reasoning_json": str(tmp_path / "none.json")})))
    assert {sample["reasoning"] for sample in samples} == {""}
    assert sorted(_all(samples)) == KEPT
    assert "training goes on with the actions alone" in caplog.text


def test_without_proprioception_there_is_no_state(make_cfg: Cfg) -> None:
    frames = get_vla_dataset_ecot(make_cfg())
    (member,) = frames.members

    class Blind:
        absolute = member.standard.absolute

        def episode(self, trajectory: Any) -> Any:
            episode = member.standard.episode(trajectory)
            return replace(episode, state=episode.state[:, :0])

    blind = replace(member, standard=Blind())  # type: ignore[arg-type]
    samples = list(FrameDataset([blind], _config(make_cfg())))
    assert len(samples) == len(KEPT)
    assert not any("state" in sample for sample in samples)


def test_episodes_without_an_instruction_are_left_out(make_cfg: Cfg) -> None:
    (member,) = get_vla_dataset_ecot(make_cfg()).members
    survey = replace(member.survey, labelled=np.arange(len(bridge.LENGTHS)) > 1)
    frames = FrameDataset([replace(member, survey=survey)], _config(make_cfg()))
    assert sorted(_all(frames)) == [(episode, step) for episode, step in KEPT if episode > 1]


def test_a_broken_episode_is_left_out_with_one_warning(
    tmp_path: Path, make_cfg: Cfg, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bridge.state
    monkeypatch.setattr(bridge, "state", lambda episode, length: whole(episode, length) / np.float32(episode != 2))
    bridge.write(tmp_path)
    frames = get_vla_dataset_ecot(make_cfg(**{f"{ECOT}.data_root_dir": str(tmp_path)}))
    assert sorted(_all(frames)) == [(episode, step) for episode, step in KEPT if episode != 2]
    (told,) = (record.message for record in caplog.records if "left out" in record.message)
    assert told.startswith("bridge_orig: 1 episodes cannot be used and are left out: bridge_orig:")


@pytest.mark.parametrize("weight", [2.0, 0.5])
def test_a_weight_is_how_often_an_episode_comes(make_cfg: Cfg, weight: float) -> None:
    (member,) = get_vla_dataset_ecot(make_cfg()).members
    frames = FrameDataset([replace(member, weight=weight)], _config(make_cfg()))
    times = Counter(itertools.chain.from_iterable(_all(frames) for _ in range(10)))
    if weight == 2:
        assert times == dict.fromkeys(KEPT, 20)
    else:
        assert 0.2 < sum(times.values()) / 10 / len(KEPT) < 0.8
        assert max(times.values()) <= 10


def test_a_mixtures_name_stands_for_its_datasets(make_cfg: Cfg) -> None:
    frames = get_vla_dataset_ecot(make_cfg(**{f"{ECOT}.data_mix": "bridge"}))
    assert set(frames.dataset_statistics) == {bridge.NAME}
    assert sorted(_all(frames)) == KEPT


def test_validation_is_in_the_units_of_the_training_split(make_cfg: Cfg, tmp_path: Path) -> None:
    bridge.write(tmp_path, splits=("train",))
    root = {f"{ECOT}.data_root_dir": str(tmp_path)}
    with pytest.raises(DatasetError, match="val"):
        get_vla_dataset_ecot(make_cfg(**root, **{f"{ECOT}.train": False}))
    train, validation = (get_vla_dataset_ecot(make_cfg(**{f"{ECOT}.train": train})) for train in (True, False))
    assert train.dataset_statistics == validation.dataset_statistics


def test_the_log_tells_what_is_read_and_no_paths(
    make_cfg: Cfg, bridge_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "integrations.starvla_ecot"):
        get_vla_dataset_ecot(make_cfg(**{f"{ECOT}.scheduled_stage": 3, f"{ECOT}.reasoning_dropout_prob": 0.2}))
    for told in ("dataset_py=ecot_rlds", "data_mix=bridge_orig", "scheduled_stage=3", "prob=0.2", "chunk_len=16"):
        assert told in caplog.text
    assert str(bridge_root) not in caplog.text


def test_statistics_are_written_in_openvlas_schema(make_cfg: Cfg, tmp_path: Path) -> None:
    frames = get_vla_dataset_ecot(make_cfg())
    save_dataset_statistics(tmp_path / "run", frames.dataset_statistics)
    path = tmp_path / "run" / "dataset_statistics.json"
    stored = json.loads(path.read_text())
    assert set(stored) == {bridge.NAME}
    assert {"q01", "q99", "mean", "std", "min", "max", "mask"} <= set(stored[bridge.NAME]["action"])
    assert stored[bridge.NAME]["num_transitions"] == len(KEPT)
    assert Statistics.load(path, 7).to_dict() == frames.members[0].statistics.to_dict()
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_statistics_may_hold_arrays(tmp_path: Path) -> None:
    save_dataset_statistics(tmp_path, {"a": {"action": {"q01": np.zeros(2, np.float32)}, "num": np.int64(3)}})
    stored = json.loads((tmp_path / "dataset_statistics.json").read_text())
    assert stored == {"a": {"action": {"q01": [0.0, 0.0]}, "num": 3}}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{ECOT}.data_mix", "no_such_data", "no dataset no_such_data below"),
        (f"{MODEL}.action_dim", 14, "bridge_orig has 7 action dimensions, .*action_dim is 14; set it to 7"),
    ],
)
def test_data_that_do_not_fit_are_named(make_cfg: Cfg, path: str, value: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        get_vla_dataset_ecot(make_cfg(**{path: value}))


def _config(cfg: dict[str, Any]) -> Any:
    from integrations.starvla_ecot import read_config

    return read_config(cfg)


def _endless(loader: FrameLoader) -> Iterable[list[Sample]]:
    while True:
        yield from loader


def _told(batch: list[Sample]) -> list[tuple[Any, ...]]:
    """All of a batch, comparable."""
    return [
        (
            tuple(image.tobytes() for image in sample["image"]),
            sample["lang"],
            sample["reasoning"],
            sample["action"].tobytes(),
            sample["state"].tobytes(),
        )
        for sample in batch
    ]
