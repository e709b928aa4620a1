"""docs/libero.md's suites, rollout.md and gymnasium.md: their commands in order, in small."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.rollout_speed import save_untrained_policy
from ipvla.data.rlds import write_rlds
from ipvla.storage import SOURCE_TREE
from tests.journeys.page import Shell, commands, section
from tests.synthetic import SIZE, cue_episode

DOCS = SOURCE_TREE / "docs"
TASKS = {
    "libero_goal_swap": "open_the_middle_drawer_of_the_cabinet",
    "libero_object": "pick_up_the_butter_and_place_it_in_the_basket",
    "libero_spatial": "pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate",
}
STEPS = [
    *("--training.steps", "2", "--training.log_every", "1", "--training.checkpoint_every", "2"),
    *("--lanes.lanes", "1", "--lanes.window", "2"),
]


def played(task: str) -> list[str]:
    return ["--success.episodes", f"{{{task}: 1}}", "--success.num_simulators", "1", "--videos", "0"]


SMALL = {
    **{f"evaluate *{suite}*": played(task) for suite, task in TASKS.items()},
    "robustness": [
        *("--success.episodes", f"{{{TASKS['libero_object']}: 1}}", "--success.num_simulators", "1"),
        *("--dimensions", "[noise]", "--levels", "[3]"),
    ],
    "collect": ["--demonstrations", "{shown_bowl: 1}", "--camera_size", "64"],
    "train": [*STEPS, "--data.image_size", "64"],
    "evaluate *kitchen*": [*played("shown_bowl"), "--success.camera_size", "64"],
}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_liberos_variants_and_the_kitchen(tmp_path: Path, ray_address: str) -> None:
    page = DOCS / "libero.md"
    variants = commands(section(page, "LIBERO-PRO")) + commands(section(page, "Robustness: LIBERO-Plus"))
    assert [line.split()[1] for line in variants] == ["evaluate", "evaluate", "robustness"]
    memory = commands(page.read_text())
    memory = memory[next(i for i, line in enumerate(memory) if line.startswith("P=")) :]
    assert [line.split()[1] for line in memory[1:]] == ["collect", "train", "train", "evaluate"]
    shell = Shell(tmp_path / "home", SMALL, ray_address=ray_address)
    runs = shell.home / "ipvla_storage" / "runs"
    save_untrained_policy(runs / "recall" / "mine" / "policy", cameras=("agentview",))
    shell.run(variants, 600)
    shell.run(memory, 500)
    assert (runs / "kitchen_recall" / "gru" / "episodes.sqlite").exists()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_published_protocol(tmp_path: Path, ray_address: str) -> None:
    ear = commands(section(DOCS / "rollout.md", "Does it hear?"))
    rollout = [line for line in commands((DOCS / "rollout.md").read_text()) if line not in ear]
    assert [line.split()[1] for line in rollout if line.startswith("ipvla ")] == ["doctor", "evaluate", "paired"]
    shell = Shell(tmp_path / "home", SMALL, ray_address=ray_address)
    runs = shell.home / "ipvla_storage" / "runs"
    for study, name in (("recall", "mine"), ("spatial", "mine"), ("spatial", "theirs")):
        save_untrained_policy(runs / study / name / "policy", cameras=("agentview",))
    shell.run(rollout[:-1], 600)  # the doctor plays every initial state of a suite
    both = "ipvla evaluate --study spatial --policies '[mine, theirs]' --success.suite libero_spatial"
    shell.run([both, rollout[-1]], 300)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_ear(tmp_path: Path, ray_address: str) -> None:
    lines = commands(section(DOCS / "rollout.md", "Does it hear?"))
    assert [line.split()[1] for line in lines] == ["sensitivity", "listening"]
    goals = ("put the bowl on the plate", "put the bowl on the stove")
    shown = [replace(cue_episode(seed), instruction=goals[seed % 2]) for seed in range(6)]
    data = write_rlds(tmp_path, "goals", shown, SIZE)
    small = {
        "sensitivity": ["--observations", "4"],
        "listening": [*played("put_the_bowl_on_the_plate"), "--said", "[]", "--success.profile", "fast"],
    }
    shell = Shell(tmp_path / "home", small, ray_address=ray_address, places={"libero_goal_no_noops": data})
    mine = shell.home / "ipvla_storage" / "runs" / "goal" / "mine"
    save_untrained_policy(mine / "policy", cameras=("agentview",))
    shell.run(lines, 600)
    assert (mine / "sensitivity.json").exists()
    assert (mine.parent / "listening.json").exists()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_gymnasium_environment(tmp_path: Path, ray_address: str) -> None:
    lines = commands((DOCS / "gymnasium.md").read_text())
    chain = [line for line in lines if not line.startswith(("python3.11", "aloha-env"))]
    assert [line.split()[1] for line in chain if line.startswith("ipvla ")] == ["collect", "train", "evaluate"]
    found = subprocess.run([sys.executable, "-c", "import gym_aloha"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("gym-aloha is not installed (requirements-gym.txt)")
    small = {
        "collect": ["--demonstrations", "{transfer_cube: 1}"],
        "train": [*STEPS, "--training.precision", "fp32"],
        "evaluate": [
            *("--success.episodes", "{transfer_cube: 1}", "--success.num_simulators", "1", "--videos", "0"),
        ],
    }
    shell = Shell(tmp_path / "home", small, ray_address=ray_address)
    shell.run(chain, 700)
