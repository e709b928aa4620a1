"""A demonstration's file comes back whole or not at all."""

import numpy as np
import pytest

from ipvla.sim.demonstration import Demonstration


def demonstration(steps=5, reasoning=True):
    rng = np.random.default_rng(1)
    return Demonstration(
        task="ground_red",
        family="ground",
        instruction="press the red button",
        seed=2**31 + 7,
        images={"agentview": rng.integers(0, 255, size=(steps, 8, 8, 3), dtype=np.uint8)},
        state=rng.normal(size=(steps, 8)).astype(np.float32),
        action=rng.normal(size=(steps, 7)).astype(np.float32),
        reasoning=tuple(f"PLAN: press red SUBTASK: {t} press red" for t in range(steps)) if reasoning else (),
        questions=("is a button lit",) * steps,
        answers=("no",) * (steps - 1) + ("yes",),
    )


def assert_equal(one, other):
    assert (one.task, one.family, one.instruction, one.seed) == (
        other.task,
        other.family,
        other.instruction,
        other.seed,
    )
    assert one.images.keys() == other.images.keys()
    for camera, pictures in one.images.items():
        np.testing.assert_array_equal(pictures, other.images[camera], strict=True)
    np.testing.assert_array_equal(one.state, other.state, strict=True)
    np.testing.assert_array_equal(one.action, other.action, strict=True)
    assert one.reasoning == other.reasoning
    assert (one.questions, one.answers) == (other.questions, other.answers)


def test_what_is_saved_is_loaded(tmp_path):
    saved = demonstration()
    saved.save(tmp_path / "deep" / "0.npz")
    assert_equal(Demonstration.load(tmp_path / "deep" / "0.npz"), saved)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["0.npz"]


def test_a_demonstration_without_reasoning_has_none_after_loading(tmp_path):
    demonstration(reasoning=False).save(tmp_path / "0.npz")
    assert Demonstration.load(tmp_path / "0.npz").reasoning == ()


def test_a_file_from_before_reasoning_and_questions_were_recorded_is_read(tmp_path):
    saved = demonstration()
    saved.save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as file:
        later = ("reasoning", "questions", "answers")
        np.savez_compressed(tmp_path / "old.npz", **{name: file[name] for name in file.files if name not in later})
    loaded = Demonstration.load(tmp_path / "old.npz")
    assert loaded.reasoning == loaded.questions == loaded.answers == ()
    np.testing.assert_array_equal(loaded.action, saved.action)


def test_the_same_demonstration_gives_the_same_bytes(tmp_path):
    demonstration().save(tmp_path / "a")
    demonstration().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "demonstration.npz"
    demonstration().save(path)
    whole = path.read_bytes()
    for length in [0, 1, 30, *range(100, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"demonstration\.npz is not a complete demonstration"):
            Demonstration.load(path)


def test_no_flipped_byte_changes_what_is_read(tmp_path):
    path = tmp_path / "demonstration.npz"
    demonstration().save(path)
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 61):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            assert_equal(Demonstration.load(path), demonstration())
        except ValueError:
            refused += 1
    assert refused > 0


def test_unequal_lengths_and_empty_episodes_are_refused():
    whole = demonstration()
    with pytest.raises(ValueError, match="lengths"):
        Demonstration(**{**vars(whole), "state": whole.state[:-1]})
    with pytest.raises(ValueError, match="not 0"):
        Demonstration(
            **{
                **vars(whole),
                "reasoning": (),
                "questions": (),
                "answers": (),
                "images": {},
                "state": whole.state[:0],
                "action": whole.action[:0],
            }
        )


@pytest.mark.parametrize("count", [1, 4, 6])
def test_reasoning_of_another_length_is_refused(count):
    whole = demonstration()
    with pytest.raises(ValueError, match=f"reasoning has {count} strings for 5 control steps; give one per step"):
        Demonstration(**{**vars(whole), "reasoning": ("PLAN:",) * count})


def test_questions_without_answers_are_refused():
    whole = demonstration()
    with pytest.raises(ValueError, match="5 questions and 0 answers; give both or neither"):
        Demonstration(**{**vars(whole), "answers": ()})
    with pytest.raises(ValueError, match="answers has 2 strings for 5 control steps"):
        Demonstration(**{**vars(whole), "answers": ("yes", "no")})
