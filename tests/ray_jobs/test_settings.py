"""A job's settings: YAML first, options over it, and a line that helps when something does not fit."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import draccus
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.command_line.help import help_text
from ray_jobs.command_line.settings import SettingError, parse, with_values


@dataclass(frozen=True)
class Arm(draccus.ChoiceRegistry):
    """A choice by `type`."""


@Arm.register_subclass("left")
@dataclass(frozen=True)
class Left(Arm):
    """The left one.

    Attributes:
        reach, grip: in metres.
    """

    reach: float = 0.5
    grip: float = 0.1

    def __post_init__(self) -> None:
        if self.reach <= 0:
            raise ValueError(f"arm.reach is {self.reach}; it must be above 0")


@Arm.register_subclass("none")
@dataclass(frozen=True)
class NoArm(Arm):
    """No arm."""


@dataclass(frozen=True)
class Camera:
    """What it sees with.

    Attributes:
        size: pixels.
        names: in order.
    """

    size: int = 64
    names: tuple[str, ...] = ("front",)


@dataclass(frozen=True)
class Robot:
    """A robot.

    Attributes:
        name: what it is called.
        counts: task -> how often.
        here: where its files lie.
        fast: hurry.
    """

    name: str = "r2"
    counts: dict[str, int] = field(default_factory=dict)
    here: Path | None = None
    fast: bool = False
    limit: int | None = None
    arm: Arm = field(default_factory=lambda: Left(reach=0.7, grip=0.2))
    camera: Camera = field(default_factory=lambda: Camera(size=32, names=("top",)))
    spare: Camera | None = None


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        path = tmp_path / "robot.yaml"
        path.write_text(text)
        return ["--config_path", str(path)]

    return write


def refusal(*arguments):
    with pytest.raises(SettingError) as error:
        parse(Robot, arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_arguments_the_defaults_hold():
    assert parse(Robot, []) == Robot()


def test_options_override_the_file_and_leave_the_rest_of_it(yaml):
    file = yaml("name: bolt\ncamera: {size: 16}\ncounts: {walk: 1, jump: 2}\n")
    robot = parse(Robot, [*file, "--camera.size=8", "--counts.jump", "5", "--here", "/tmp/x"])
    assert robot.name == "bolt"
    assert robot.camera.size == 8
    assert robot.counts == {"walk": 1, "jump": 5}
    assert robot.here == Path("/tmp/x")


def test_a_mapping_given_as_a_whole_replaces_the_files(yaml):
    assert parse(Robot, [*yaml("counts: {walk: 1}"), "--counts", "{jump: 3}"]).counts == {"jump": 3}


def test_a_group_that_is_given_in_part_keeps_its_other_defaults():
    robot = parse(Robot, ["--camera.size", "8", "--arm.reach", "0.9"])
    assert robot.camera == Camera(size=8, names=("top",))
    assert robot.arm == Left(reach=0.9, grip=0.2)


def test_another_variant_begins_from_its_own_defaults():
    assert parse(Robot, ["--arm.type", "none"]).arm == NoArm()
    assert parse(Robot, ["--arm.type", "left", "--arm.grip", "0.3"]).arm == Left(reach=0.7, grip=0.3)


def test_an_optional_group_appears_when_one_of_its_settings_is_given():
    assert parse(Robot, ["--spare.size", "9"]).spare == Camera(size=9)
    assert parse(Robot, ["--spare", "null"]).spare is None


def test_a_switch_may_stand_alone():
    assert parse(Robot, ["--fast", "--name", "x"]).fast
    assert not parse(Robot, ["--fast", "false"]).fast
    assert refusal("--name") == "name: no value was given; write --name VALUE"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_text_arrives_as_it_was_written(text):
    assert parse(Robot, [f"--name={text}"]).name == text


_WORDS = st.from_regex(r"[a-z][a-z0-9_]*", fullmatch=True).filter(
    lambda word: word not in ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
)


@given(st.integers(), st.lists(_WORDS, min_size=1))
def test_numbers_and_lists_are_read(number, words):
    robot = parse(Robot, [f"--limit={number}", f"--camera.names=[{', '.join(words)}]"])
    assert robot.limit == number
    assert robot.camera.names == tuple(words)


UNKNOWN = "there is no such setting"
HELP = "--help explains it"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nam=x"], f"nam: {UNKNOWN}; did you mean 'name'?"),
        (["--camera.sise=3"], f"camera.sise: {UNKNOWN}; did you mean 'camera.size'?"),
        (["--camera.q=3"], f"camera.q: {UNKNOWN}; choose one of: size, names"),
        (["--arm.type=none", "--arm.reach=3"], f"arm.reach: {UNKNOWN}; there is none to choose"),
        (["--arm.type=lefd"], "arm.type: 'lefd' is unknown; did you mean 'left'? (choices: left, none)"),
        (["--arm.type=q"], "arm.type: 'q' is unknown; choose one of: left, none"),
        (["--arm.reach=-1"], "arm.reach is -1.0; it must be above 0"),
        (["--camera.size=big"], f"camera.size: 'big' is not of type int; {HELP}"),
        (["--camera.size=1.5"], f"camera.size: 1.5 is not of type int; {HELP}"),
        (["--limit=many"], f"limit: 'many' is not of type int | None; {HELP}"),
        (["--camera.size=null"], "camera.size: it has no value; give one, or leave it out"),
        (["--counts=3"], f"counts: 3 is not of type dict[str, int]; {HELP}"),
        (["--counts={a:3}"], "counts: 'a:3' has no value; YAML wants a blank after the colon, `name: value`"),
        (["--counts={walk"], "counts: '{walk' is not valid YAML; quote it, or correct it"),
        (["--camera=x"], "camera: 'x' is not a group of settings; give its fields, as in --camera.NAME VALUE"),
        (["fast"], "argument 'fast' is not an option; settings are given as --name value"),
        (["--config_path"], "config_path: no file was given; write --config_path FILE"),
        (["--config_path=/x"], "config_path: /x cannot be read (No such file or directory); give a YAML file"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line_with_name_value_and_remedy(arguments, line):
    assert refusal(*arguments) == line


def test_files_are_checked_like_options(yaml):
    assert refusal(*yaml("camera: {sise: 3}")).startswith("camera.sise: there is no such setting")
    assert refusal(*yaml("arm: {type: middle}")).startswith("arm.type: 'middle' is unknown")
    assert "it must hold `name: value` lines" in refusal(*yaml("just words"))
    with pytest.raises(SettingError, match="is not valid YAML"):
        parse(Robot, yaml("camera: {size"))


def test_help_tells_name_type_default_and_meaning_of_every_setting():
    text = help_text(Robot, "python -m robot", "Runs a robot.")
    assert text.startswith("usage: python -m robot ")
    for line in (
        "--name STR (default: r2)",
        "--fast true|false (default: false)",
        "--counts '{STR: INT, ...}'",
        "--arm.type {left,none} (default: left)",
        "--arm.grip FLOAT (default: 0.2)",
        "--camera.names '[STR, ...]' (default: ['top'])",
        "--spare.size INT (default: 64)",
        "in metres.",
        "task -> how often.",
    ):
        assert f"  {line}\n" in text + "\n"


def test_values_go_into_a_configuration_as_they_are():
    robot = parse(Robot, ["--name", "x", "--arm.grip", "0.3"])
    changed = with_values(robot, {"camera.size": 9, "arm.reach": 0.25, "counts": {"walk": 2}, "limit": None})
    assert changed == replace(robot, camera=Camera(9, ("top",)), arm=Left(0.25, 0.3), counts={"walk": 2})
    assert with_values(robot, {"arm.type": "none"}).arm == NoArm()
    assert with_values(robot, {"name": "1e-3"}).name == "1e-3", "no text is read as YAML"
    assert with_values(robot, {"spare.size": 5}).spare == Camera(5)
    assert with_values(robot, {}) == robot


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"camera.sise": 3}, f"camera.sise: {UNKNOWN}; did you mean 'camera.size'?"),
        ({"sise": 3}, f"sise: {UNKNOWN}; did you mean 'camera.size'?"),
        ({"arm.reach": -1.0}, "arm.reach is -1.0; it must be above 0"),
        ({"camera.size": 1.5}, f"camera.size: 1.5 is not of type int; {HELP}"),
    ],
)
def test_values_are_checked_like_options(values, line):
    with pytest.raises(SettingError) as error:
        with_values(Robot(), values)
    assert str(error.value) == line
