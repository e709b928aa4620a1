"""RLDS on disk: what is written is read back, by us and by tfds, and damage is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.data.rlds import write_rlds
from ipvla.data.source import DatasetError
from ipvla.types import Episode
from tests.data.conftest import LENGTHS, SIZE, random_episode


def test_reads_back_exactly_what_was_written(dataset: EpisodeDataset, episodes: list[Episode]) -> None:
    assert dataset.lengths.tolist() == list(LENGTHS)
    assert dataset.tasks == tuple(e.task for e in episodes)
    assert dataset.families == tuple(e.family for e in episodes)
    assert dataset.cameras == ("agentview",)
    for index, expected in enumerate(episodes):
        episode = dataset.episode(index)
        assert (episode.task, episode.family, episode.seed) == (expected.task, expected.family, expected.seed)
        assert episode.instruction == expected.instruction
        np.testing.assert_array_equal(episode.state, expected.state)
        np.testing.assert_array_equal(episode.action, expected.action)
        assert episode.reasoning == expected.reasoning
        for t in range(len(episode)):
            np.testing.assert_array_equal(dataset.frame(index, t, "agentview"), expected.images["agentview"][t])


def test_an_observation_is_what_the_simulator_gave(dataset: EpisodeDataset, episodes: list[Episode]) -> None:
    observation = dataset.observation(1, 3, ("agentview",))
    assert observation.t == 3
    assert observation.instruction == episodes[1].instruction
    np.testing.assert_array_equal(observation.proprio, episodes[1].state[3])
    np.testing.assert_array_equal(observation.images["agentview"], episodes[1].images["agentview"][3])


def test_several_cameras_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipvla.data.rlds.writer._EPISODES_PER_SHARD", 2)
    cameras = ("agentview", "robot0_eye_in_hand", "overhead")
    episodes = [random_episode(seed, 3, cameras) for seed in range(5)]
    dataset = open_dataset(write_rlds(tmp_path, "many", episodes, SIZE))
    assert len(list(Path(dataset.location).glob("many-train.array_record-*"))) == 3
    assert set(dataset.cameras) == set(cameras)
    for index in (4, 0, 3):
        for camera in cameras:
            np.testing.assert_array_equal(dataset.frame(index, 2, camera), episodes[index].images[camera][2])


def test_tfds_opens_it_with_liberos_step_features_and_reasoning(written: Path, episodes: list[Episode]) -> None:
    builder = tfds.builder_from_directory(written)
    source = builder.as_data_source(split="train", decoders={"steps": tfds.decode.SkipDecoding()})
    assert len(source) == len(episodes)
    record = source[1]
    steps = record["steps"]
    assert set(steps) == {
        *("observation", "action", "language_instruction", "reward", "discount"),
        *("is_first", "is_last", "is_terminal", "reasoning"),
    }
    assert set(steps["observation"]) == {"image", "state"}
    assert steps["is_first"].tolist() == [True] + [False] * 16
    assert steps["is_last"].tolist() == steps["is_terminal"].tolist() == [False] * 16 + [True]
    assert steps["reward"].tolist() == [0.0] * 16 + [1.0]
    np.testing.assert_array_equal(steps["action"], episodes[1].action)
    assert [text.decode() for text in steps["reasoning"]] == list(episodes[1].reasoning)
    png = cv2.imdecode(np.frombuffer(steps["observation"]["image"][2], np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(png, episodes[1].images["agentview"][2])
    assert record["episode_metadata"]["task"] == episodes[1].task.encode()


def test_an_episode_without_reasoning_lies_beside_one_with_it(tmp_path: Path) -> None:
    plain = replace(random_episode(0, 4), reasoning=())
    dataset = open_dataset(write_rlds(tmp_path, "mixed", [plain, random_episode(1, 3)], SIZE))
    assert dataset.episode(0).reasoning == ()
    assert dataset.episode(1).reasoning == random_episode(1, 3).reasoning


def with_questions(episode: Episode) -> Episode:
    length = len(episode.action)
    return replace(
        episode,
        questions=tuple("" if t == 1 else f"how many buttons at {t}" for t in range(length)),
        answers=tuple("" if t == 1 else "three" for t in range(length)),
    )


def test_questions_are_read_back_and_may_be_missing_in_later_episodes(tmp_path: Path) -> None:
    asked = with_questions(random_episode(0, 4))
    directory = write_rlds(tmp_path, "asked", [asked, random_episode(1, 3)], SIZE)
    dataset = open_dataset(directory)
    assert (dataset.episode(0).questions, dataset.episode(0).answers) == (asked.questions, asked.answers)
    assert (dataset.episode(1).questions, dataset.episode(1).answers) == ((), ())
    assert dataset.episode(0).reasoning == asked.reasoning
    steps = tfds.builder_from_directory(directory).info.features["steps"]
    assert {"question", "answer"} <= set(steps.feature)


def test_episodes_without_questions_are_stored_without_the_features(
    dataset: EpisodeDataset, written: Path
) -> None:
    assert dataset.episode(1).questions == dataset.episode(1).answers == ()
    assert not {"question", "answer"} & set(tfds.builder_from_directory(written).info.features["steps"].feature)


def test_questions_that_begin_in_a_later_episode_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has questions, the first one had none"):
        write_rlds(tmp_path, "late", [random_episode(0, 4), with_questions(random_episode(1, 4))], SIZE)


def test_equal_reasonings_of_an_episode_share_their_memory(dataset: EpisodeDataset) -> None:
    reasoning = dataset.episode(3).reasoning
    assert len({id(text) for text in reasoning}) == len(set(reasoning)) == 8


_WITHOUT_TENSORFLOW = """
    import sys
    from pathlib import Path
    import tensorflow_datasets as tfds
    from ipvla.data.dataset import EpisodeDataset, open_dataset
    from ipvla.data.rlds import write_rlds
    from tests.data.conftest import SIZE, random_episode

    directory = write_rlds(Path(sys.argv[1]), "plain", [random_episode(0, 4)], SIZE)
    open_dataset(directory).frame(0, 3, "agentview")
    builder = tfds.builder_from_directory(directory)
    builder.as_data_source(split="train", decoders={"steps": tfds.decode.SkipDecoding()})[0]
    assert "tensorflow" not in sys.modules
"""


def test_tensorflow_is_imported_neither_to_write_nor_to_read(tmp_path: Path) -> None:
    poisoned = tmp_path / "packages" / "tensorflow"
    poisoned.mkdir(parents=True)
    (poisoned / "__init__.py").write_text("raise AssertionError('TensorFlow was imported')")
    _python(_WITHOUT_TENSORFLOW, tmp_path, expected_code=0, packages=poisoned.parent)


_KILLED_MIDWAY = """
    import os, signal, sys
    from pathlib import Path
    from ipvla.data.rlds import write_rlds
    from tests.data.conftest import SIZE, random_episode

    def episodes():
        yield random_episode(0, 4)
        yield random_episode(1, 4)
        os.kill(os.getpid(), signal.SIGKILL)

    write_rlds(Path(sys.argv[1]), "killed", episodes(), SIZE)
"""


def test_a_killed_writer_leaves_no_dataset_and_does_not_stand_in_the_way(tmp_path: Path) -> None:
    _python(_KILLED_MIDWAY, tmp_path, expected_code=-signal.SIGKILL)
    directory = tmp_path / "killed" / "1.0.0"
    assert not directory.exists()
    assert list(directory.parent.glob(".*incomplete")), "the writer was killed too early to test anything"
    write_rlds(tmp_path, "killed", [random_episode(2, 6)], SIZE)
    assert open_dataset(directory).lengths.tolist() == [6]
    assert not list(directory.parent.glob(".*incomplete"))


def test_a_failing_source_leaves_nothing_behind(tmp_path: Path) -> None:
    def episodes() -> Iterator[Episode]:
        yield random_episode(0, 4)
        raise RuntimeError("the simulator died")

    with pytest.raises(RuntimeError, match="the simulator died"):
        write_rlds(tmp_path, "failed", episodes(), SIZE)
    assert [path.name for path in (tmp_path / "failed").iterdir()] == [".1.0.0.lock"]


def test_an_existing_dataset_is_never_overwritten(written: Path, episodes: list[Episode]) -> None:
    before = {path: path.read_bytes() for path in written.iterdir()}
    with pytest.raises(DatasetError, match="exists already"):
        write_rlds(written.parents[1], "synthetic", episodes, SIZE)
    assert {path: path.read_bytes() for path in written.iterdir()} == before


def test_two_writers_of_one_dataset_do_not_mix(tmp_path: Path) -> None:
    def episodes() -> Iterator[Episode]:
        yield random_episode(0, 4)
        with pytest.raises(DatasetError, match="another process is writing"):
            write_rlds(tmp_path, "contested", [random_episode(1, 9)], SIZE)

    assert open_dataset(write_rlds(tmp_path, "contested", episodes(), SIZE)).lengths.tolist() == [4]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (replace(random_episode(1, 4), images={}), "cameras"),
        (random_episode(1, 0), "no steps"),
        (replace(random_episode(1, 4), state=np.zeros((3, 8), np.float32)), "3 states for 4 actions"),
        (replace(random_episode(1, 4), reasoning=("PLAN: go",) * 3), "3 reasonings for 4 actions"),
        (replace(random_episode(1, 4), questions=("why",) * 5, answers=("so",) * 5), "5 questions for 4 actions"),
        (replace(random_episode(1, 4), questions=("why",) * 4), "questions or answers alone"),
        (replace(random_episode(1, 4), action=np.full((4, 7), np.nan, np.float32)), "not finite"),
        (replace(random_episode(1, 4), images={"agentview": np.zeros((4, 8, 8, 3), np.uint8)}), r"\(4, 8, 8, 3\)"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused(tmp_path: Path, broken: Episode, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        write_rlds(tmp_path, "bad", [random_episode(0, 4), broken], SIZE)


def test_no_episodes_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no episodes"):
        write_rlds(tmp_path, "empty", [], SIZE)


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "synthetic" / "1.0.0"))


def _shard(directory: Path) -> Path:
    return next(directory.glob("*.array_record-*"))


def test_a_missing_directory_names_itself(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere does not exist; collect it"):
        open_dataset(tmp_path / "nowhere")


def test_the_parent_of_a_version_suggests_the_version(copy: Path) -> None:
    with pytest.raises(DatasetError, match=r"no dataset_info\.json; did you mean .*synthetic/1\.0\.0\?"):
        open_dataset(copy.parent)


def test_any_other_directory_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no dataset_info\.json; give an RLDS version directory"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_shard_names_its_file(copy: Path, kept: float) -> None:
    shard = _shard(copy)
    content = shard.read_bytes()
    shard.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DatasetError, match=f"{shard.name} is truncated or corrupt: 0 of 7 .* collect"):
        open_dataset(copy)


def test_a_missing_shard_names_its_file(copy: Path) -> None:
    shard = _shard(copy)
    shard.unlink()
    with pytest.raises(DatasetError, match=f"{shard.name} is missing"):
        open_dataset(copy)


def test_flipped_bytes_are_found_when_the_episode_is_read(copy: Path) -> None:
    shard = _shard(copy)
    content = bytearray(shard.read_bytes())
    middle = len(content.rstrip(b"\0")) // 2
    content[middle : middle + 64] = bytes(64)
    shard.write_bytes(content)
    dataset = open_dataset(copy)

    def read_all() -> None:
        for index in range(len(dataset)):
            dataset.episode(index)

    with pytest.raises(DatasetError, match=f"{shard.name}, episode . is corrupt"):
        read_all()


def test_unreadable_metadata_is_one_line(copy: Path) -> None:
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(DatasetError, match="unreadable metadata") as caught:
        open_dataset(copy)
    assert "\n" not in str(caught.value)


def test_another_file_format_says_how_to_convert(copy: Path) -> None:
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "riegeli"}))
    with pytest.raises(DatasetError, match="stored as riegeli; known are tfrecord and array_record: convert it"):
        open_dataset(copy)


def test_features_without_actions_are_no_robot_episodes(copy: Path) -> None:
    features = (copy / "features.json").read_text()
    (copy / "features.json").write_text(features.replace('"action"', '"activity"'))
    with pytest.raises(DatasetError, match="the meaning of synthetic's features is unknown: activity"):
        open_dataset(copy)


def test_an_index_of_another_dataset_is_refused(copy: Path) -> None:
    (copy / "episodes.json").write_text(json.dumps([{"length": 3, "task": "a", "family": "b"}]))
    with pytest.raises(DatasetError, match=r"episodes\.json lists 1 episodes of 7"):
        open_dataset(copy)


def test_a_dataset_of_other_hands_needs_none_of_our_files(tmp_path: Path) -> None:
    """JPEG frames, only `file_path` as metadata, no index, no statistics: as the public LIBERO datasets are."""
    directory = tmp_path / "libero_spatial" / "1.0.0"
    directory.mkdir(parents=True)
    actions = _write_foreign(directory)
    dataset = open_dataset(directory)
    assert dataset.lengths.tolist() == [3, 5]
    assert dataset.tasks == ("pick up the bowl",) * 2
    assert dataset.cameras == ("agentview",)
    assert dataset.frame(1, 4, "agentview").shape == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(dataset.episode(1).action, actions[1])
    assert dataset.episode(1).reasoning == ()
    np.testing.assert_allclose(dataset.statistics().action.mean, np.concatenate(actions).mean(0), rtol=1e-5)


def _write_foreign(directory: Path) -> list[np.ndarray]:
    f = tfds.features
    step = {
        "observation": f.FeaturesDict(
            {
                "image": f.Image(shape=(SIZE, SIZE, 3), encoding_format="jpeg"),
                "state": f.Tensor(shape=(8,), dtype=np.float32),
                "joint_state": f.Tensor(shape=(7,), dtype=np.float32),
            }
        ),
        "action": f.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": f.Text(),
    }
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity("libero_spatial", tfds.core.Version("1.0.0"), str(directory), "libero"),
        features=f.FeaturesDict(
            {"steps": f.Dataset(step), "episode_metadata": f.FeaturesDict({"file_path": f.Text()})}
        ),
    )
    writer = tfds.core.SequentialWriter(info, 10, file_format="array_record")
    writer.initialize_splits(["train"])
    jpeg = cv2.imencode(".jpg", np.full((SIZE, SIZE, 3), 128, np.uint8))[1].tobytes()
    actions = [np.random.default_rng(i).normal(size=(n, 7)).astype(np.float32) for i, n in enumerate((3, 5))]
    for action in actions:
        steps = [
            {
                "observation": {
                    "image": io.BytesIO(jpeg),
                    "state": np.zeros(8, np.float32),
                    "joint_state": np.zeros(7, np.float32),
                },
                "action": row,
                "language_instruction": "pick up the bowl",
            }
            for row in action
        ]
        writer.add_examples({"train": [{"steps": steps, "episode_metadata": {"file_path": "x.hdf5"}}]})
    writer.close_all()
    return actions


def _python(code: str, argument: Path, expected_code: int, packages: Path | None = None) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", textwrap.dedent(code), str(argument)]
    path = os.pathsep.join(str(p) for p in (packages, root) if p)
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == expected_code, done.stderr
