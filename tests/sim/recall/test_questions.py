"""Questions are about what the picture shows, their answers are true, and what is unclear is not asked."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.models.backbones.tiny_tokenizer import tiny_tokenizer
from ipvla.sim.recall.expert import Expert
from ipvla.sim.recall.labels import KINDS, MARGIN, Question, Thing, draw, look, questions
from ipvla.sim.recall.tasks import TASKS

RED, GREEN, BLUE = (
    Thing("button", colour, right) for colour, right in [("red", 0.2), ("green", 0.5), ("blue", 0.8)]
)
CUBE, BOWL = Thing("cube", "red", 0.3), Thing("bowl", "white", 0.6)
GRAY = [Thing("button", "gray", right) for right in (0.2, 0.5, 0.8)]


def lit(thing):
    return replace(thing, colour=None, lit=True)


def hidden(thing):
    return replace(thing, seen=False)


def answers(*things):
    """Text -> answer; a text stands for one answer only."""
    asked = questions(things)
    told = {question.text: question.answer for question in asked}
    assert len(told) == len(asked)
    return told


def test_colours_are_asked_by_place():
    told = answers(BLUE, RED, GREEN)
    assert told["what color is the left button"] == "red"
    assert told["what color is the middle button"] == "green"
    assert told["what is the colour of the right button"] == "blue"


def test_sides_are_asked_both_ways_round():
    told = answers(RED, BLUE)
    assert told["is the red button left or right of the blue one"] == "left"
    assert told["is the blue button left or right of the red one"] == "right"
    assert told["on which side of the blue button is the red one"] == "left"
    told = answers(CUBE, BOWL)
    assert told["is the red cube left or right of the white bowl"] == "left"
    assert told["on which side of the red cube is the white bowl"] == "right"


@pytest.mark.parametrize(("count", "word"), [(1, "one"), (2, "two"), (5, "five")])
def test_buttons_are_counted(count, word):
    row = [Thing("button", "gray", 0.1 + 0.15 * i) for i in range(count)]
    assert answers(*row)["how many buttons are there"] == answers(*row)["count the buttons"] == word


def test_a_light_is_there_or_not_and_somewhere():
    assert answers(*GRAY)["is a button lit"] == "no"
    assert "which button is lit" not in answers(*GRAY)
    for place, word in enumerate(("left", "middle", "right")):
        told = answers(*(lit(button) if i == place else button for i, button in enumerate(GRAY)))
        assert told["is any of the buttons lit"] == "yes"
        assert told["which button is lit"] == told["where is the button that is lit"] == word


def test_two_lights_have_no_one_place():
    told = answers(lit(GRAY[0]), lit(GRAY[1]), GRAY[2])
    assert told["is a button lit"] == "yes"
    assert "which button is lit" not in told


def test_a_lit_buttons_colour_is_not_asked():
    told = answers(RED, lit(BLUE))
    assert told["what color is the left button"] == "red"
    assert not any("right button" in text or "blue" in text for text in told)


def test_yellow_buttons_look_lit_so_light_is_not_asked_beside_them():
    yellow = replace(RED, colour="yellow")
    assert not any("lit" in text for text in answers(yellow, BLUE))
    assert any("lit" in text for text in answers(RED, BLUE))


def test_alike_things_have_no_sides():
    assert not any("side" in text or "left or right" in text for text in answers(*GRAY))


def test_of_many_only_the_outermost_have_names():
    row = [Thing("button", "gray", 0.1 + 0.15 * i) for i in range(4)]
    assert {text.split()[4] for text in answers(*row) if text.startswith("what color")} == {"left", "right"}
    assert answers(lit(row[0]), *row[1:])["which button is lit"] == "left"
    assert "which button is lit" not in answers(row[0], lit(row[1]), *row[2:])


def test_near_ties_are_not_asked():
    near = replace(BLUE, right=RED.right + 0.9 * MARGIN)
    assert set(answers(RED, near)) == set(answers(*GRAY)) - {
        f"{start} {place} button"
        for start in ("what color is the", "what is the colour of the")
        for place in ("left", "middle", "right")
    }
    assert "is the red button left or right of the blue one" in answers(
        RED, replace(near, right=RED.right + 1.1 * MARGIN)
    )


def test_nothing_is_asked_about_what_the_arm_hides():
    told = answers(RED, hidden(GREEN), BLUE)
    assert set(told.values()) == {"left", "right"}
    assert not any("green" in text or text.startswith(("what", "count", "how")) or "lit" in text for text in told)
    assert questions([CUBE, hidden(BOWL)]) == ()


def test_a_light_in_sight_is_one_whatever_is_hidden():
    told = answers(lit(GRAY[0]), hidden(GRAY[1]), GRAY[2])
    assert told == {"is a button lit": "yes", "is any of the buttons lit": "yes"}


@given(st.permutations([RED, GREEN, BLUE, CUBE, BOWL]))
def test_the_order_of_things_does_not_matter(things):
    assert set(questions(things)) == set(questions([RED, GREEN, BLUE, CUBE, BOWL]))


def test_every_kind_is_drawn_equally_often():
    asked, rng = questions([RED, GREEN, BLUE]), np.random.default_rng(0)
    drawn = Counter(draw(asked, rng).kind for _ in range(4000))
    assert set(drawn) == set(KINDS)
    assert all(abs(n - 1000) < 150 for n in drawn.values())


def test_every_question_of_a_kind_can_be_drawn():
    asked, rng = questions([RED, BLUE]), np.random.default_rng(0)
    assert {draw(asked, rng) for _ in range(400)} == set(asked)
    assert draw((), rng) is None


sorts = st.sampled_from(
    [("button", colour) for colour in ("red", "green", "blue", "yellow", "gray", None)]
    + [("cube", "red"), ("bowl", "white"), ("cup", "purple")]
)
things = st.lists(
    st.builds(
        lambda sort, right, seen: Thing(*sort, right, seen, lit=sort == ("button", None)),
        sorts,
        st.floats(0, 1),
        st.booleans(),
    ),
    max_size=6,
)


@given(things)
def test_texts_are_unambiguous_and_of_known_words(scene):
    told = answers(*scene)
    tokenizer = tiny_tokenizer()
    for text, answer in told.items():
        assert len(tokenizer.tokenize(text)) == len(text.split()) < 16, "whole words, and a place for <sep>"
        assert tokenizer.tokenize(answer) == [answer]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ground_red", "ground_blue"])
def test_the_picture_shows_the_named_colours_on_the_named_sides(simulator_of, task):
    simulator, checked = simulator_of(task), 0
    for seed in range(12):
        simulator.reset(seed)
        picture = simulator.frame(64).astype(float)
        others = [np.delete(picture, i, -1).max(-1) for i in range(3)]
        masks = {colour: picture[..., i] > 1.6 * others[i] for i, colour in enumerate(("red", "green", "blue"))}
        right = {colour: mask.nonzero()[1].mean() for colour, mask in masks.items()}
        row = sorted(right, key=right.get)
        for question in questions(look(simulator.problem)):
            words = question.text.split()
            if words[:2] == ["is", "the"]:
                assert question.answer == ("left" if right[words[2]] < right[words[9]] else "right"), question
            elif words[:3] == ["what", "color", "is"]:
                assert question.answer == row[("left", "middle", "right").index(words[4])], question
            elif question.kind == "count":
                assert question.answer == "three"
            else:
                continue
            checked += 1
    assert checked > 60


@pytest.mark.slow
def test_the_picture_shows_the_light_where_it_is_said_to_be(simulator_of):
    simulator, places = simulator_of("recall"), Counter()
    for seed in range(12):
        simulator.reset(seed)
        told = {q.text: q.answer for q in questions(look(simulator.problem))}
        assert told["is a button lit"] == "yes"
        before = simulator.frame(64).astype(int)
        cue = simulator.problem.episode.cues[0]
        for _ in range(simulator.task.cue_steps):
            simulator.step(np.zeros(7))
        assert answers(*look(simulator.problem))["is a button lit"] == "no"
        changed = np.abs(simulator.frame(64).astype(int) - before).sum(-1) > 60
        light = changed.nonzero()[1].mean() / 64
        things = look(simulator.problem)
        assert light == pytest.approx(things[cue].right, abs=0.03)
        if word := told.get("which button is lit"):
            rank = sorted(thing.right for thing in things).index(things[cue].right)
            assert word == ("left", "middle", "right")[rank]
            places[word] += 1
    assert len(places) == 3


@pytest.mark.slow
def test_what_counts_as_seen_is_seen(simulator_of):
    """A thing painted magenta: how much of it does the picture show, compared with when the arm was away?"""
    simulator, outcomes = simulator_of("items_2"), Counter()
    simulator.reset(1)
    problem, expert = simulator.problem, Expert(simulator, np.random.default_rng(0))
    while problem.machine.lit:
        simulator.step(expert.act())
    whole = [_visible(simulator, name) for name in simulator.task.names]
    while not problem.machine.success:
        simulator.step(expert.act())
        if problem.t % 2 or problem.machine.locked or problem.machine.flashing is not None:
            continue
        for name, all_of_it, thing in zip(simulator.task.names, whole, look(problem), strict=True):
            share = _visible(simulator, name) / all_of_it
            assert share > 0.3 if thing.seen else share < 0.8, (problem.t, name, share)
            outcomes[thing.seen] += 1
    assert outcomes[True] > 10
    assert outcomes[False] > 3


def _visible(simulator, name):
    plain = simulator.frame(64).astype(int)
    thing = simulator.problem.objects_dict[name]
    rgba, thing.rgba = thing.rgba, (1.0, 0.0, 1.0, 1.0)
    changed = np.abs(simulator.frame(64) - plain).sum(axis=-1) > 30
    thing.rgba = rgba
    return changed.sum()


@pytest.mark.slow
def test_every_listed_task_but_those_of_cups_can_be_asked_about(simulator_of):
    for name in {task.family: task.name for task in TASKS}.values():
        simulator = simulator_of(name)
        asked = ()
        for seed in range(3):
            simulator.reset(seed)
            asked += questions(look(simulator.problem))
        assert bool(asked) == (name not in ("cups", "shuffle")), name
        assert all(isinstance(question, Question) for question in asked)
