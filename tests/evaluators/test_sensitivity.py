"""Does a policy hear? Policies whose answers are known, then a real one, here and behind its server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console

from evaluators.asked_policy import FloatArray, LoadedPolicy, ServedPolicy
from evaluators.sensitivity import Guard, Sensitivity, estimates, sensitivity, sensitivity_table
from ipvla.contract import ContractError
from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.data.geometry import PointTerms
from ipvla.data.rlds import write_rlds
from ipvla.data.standards.standard import EncodedEpisode
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.backbones import TinyConfig
from ipvla.models.heads import FlowConfig
from ipvla.models.memory import GRUMemoryConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.rollout.openpi.client import OpenpiSource
from ipvla.rollout.openpi.server import ServerConfig, serve_until
from ipvla.sim.instructions.sets import InstructionsError, InstructionSet
from ipvla.training.parallel import World
from ipvla.types import Observation
from ray_jobs import sensitivity as job
from ray_jobs.sensitivity import SensitivityConfig
from ray_jobs.serve import ServeConfig, serving
from tests.synthetic import SIZE, cue_episode

#: Instruction -> the first number of all of its demonstrations' actions.
GOALS = {"press the red button": 0.8, "press the blue button": -0.8}
SET = """
one_scene: true
instructions:
  press the red button:
    action: [hit the red button]
    object: [press the red one]
    opposites: [press the blue button]
  press the blue button: {action: [hit the blue button], opposites: [press the red button]}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of two goals in one scene, and one of a third that no set knows."""
    root = tmp_path_factory.mktemp("storage")
    episodes = []
    for seed in range(12):
        text = [*GOALS][seed % 2]
        action = np.zeros_like(cue_episode(seed).action)
        action[:, 0] = GOALS[text]
        episodes.append(replace(cue_episode(seed), instruction=text, action=action))
    episodes.append(replace(cue_episode(12), instruction="dance"))
    write_rlds(root / "datasets", "goals", episodes, SIZE)
    (root / "set.yaml").write_text(SET)
    return root


@pytest.fixture(scope="module")
def dataset(root: Path) -> EpisodeDataset:
    return open_dataset(root / "datasets" / "goals" / "1.0.0")


@pytest.fixture(scope="module")
def instructions(root: Path) -> InstructionSet:
    return InstructionSet.load(root / "set.yaml")


@dataclass
class Made:
    """Answers with `says(observation)` in its first number, which alone varies, plus `noise` times its noise."""

    says: Callable[[Observation], float]
    noise: float = 0.0
    takes_noise: bool | None = None
    cameras: tuple[str, ...] = ("agentview",)
    longest: int = 100
    forgets_noise: bool = False
    asked: int = 0
    points: PointTerms | None = None

    @property
    def varies(self) -> np.ndarray:
        return np.array([True, False])

    def fits(self, instruction: str) -> bool:
        return len(instruction) <= self.longest

    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        answers = np.full((len(observations), 3, 2), 7.0)
        for i, one in enumerate(observations):
            self.asked += 1
            drawn = [self.asked] if self.forgets_noise else [*f"{one.episode}{one.t}".encode()]
            answers[i, :, 0] = self.says(one) + self.noise * np.random.default_rng(drawn).normal()
        return answers

    def targets(self, episode: EncodedEpisode, t: int, length: int) -> tuple[FloatArray, np.ndarray]:
        action = episode.action
        steps = np.minimum(t + np.arange(length), len(action) - 1)
        return action[steps, :2].astype(float), t + np.arange(length) < len(action)

    def close(self) -> None: ...


def asked(policy: Made, dataset: EpisodeDataset, instructions: InstructionSet, **more: int) -> Sensitivity:
    return sensitivity("made", policy, dataset, instructions, **{"observations": 12, **more})


def colour(observation: Observation) -> float:
    return 1.0 if "red" in observation.instruction else -1.0


def test_who_hears_moves_by_an_opposite_and_not_by_a_synonym(
    dataset: EpisodeDataset, instructions: InstructionSet
) -> None:
    found = asked(Made(colour, noise=0.1), dataset, instructions)
    values = {name: estimate.value for name, estimate in found.estimates.items()}
    assert values["baseline_l2"] == 0
    assert values["image_l2"] == values["synonym_l2"] == values["synonym_action_l2"] == 0, "the noise is the same"
    assert values["opposite_l2"] == 2, "from 1 to -1, in the one number that varies"
    assert 0.05 < values["noise_l2"] < 0.3
    assert values["opposite_over_noise"] == pytest.approx(2 / values["noise_l2"])
    assert values["synonym_over_opposite"] == 0
    assert values["direction"] == pytest.approx(1), "where the other demonstrations went"
    assert found.estimates["synonym_object_l2"].n == 6, "one of the two instructions has such a synonym"
    assert found.left_out == ("not in set.yaml: dance",)
    assert set(found.by_instruction) == set(GOALS)


def test_who_runs_the_other_way_hears_but_does_not_understand(
    dataset: EpisodeDataset, instructions: InstructionSet
) -> None:
    found = asked(Made(lambda one: -colour(one)), dataset, instructions)
    assert found.estimates["opposite_l2"].value == 2
    assert found.estimates["direction"].value == pytest.approx(-1)


def test_who_only_sees_is_told_from_who_hears(dataset: EpisodeDataset, instructions: InstructionSet) -> None:
    found = asked(Made(lambda one: float(one.images["agentview"].mean()) / 255), dataset, instructions)
    assert found.estimates["image_l2"].value > 0.05
    assert found.estimates["opposite_l2"].value == 0
    assert "synonym_over_opposite" not in found.estimates, "a ratio to nothing is none"
    assert "direction" not in found.estimates


def test_a_server_with_noise_of_its_own_is_found_out(
    dataset: EpisodeDataset, instructions: InstructionSet
) -> None:
    found = asked(Made(colour, noise=0.5, forgets_noise=True), dataset, instructions)
    assert found.estimates["baseline_l2"].value > 0.2, "not 0: the same question has another answer"


def test_the_sign_of_a_policy_without_noise_is_a_floor_of_zero(
    dataset: EpisodeDataset, instructions: InstructionSet
) -> None:
    policy = Made(colour, takes_noise=False)
    found = asked(policy, dataset, instructions)
    assert found.estimates["noise_l2"].value == 0
    assert policy.asked == 12 * 3 + 6 * (2 + 1) + 6 * (1 + 1), "one draw: the three, synonyms and opposites"


def test_observations_of_one_episode_are_one_value_for_the_interval() -> None:
    measured = np.repeat(np.arange(4.0), 5)[:, None] * np.ones(8)
    few = estimates(measured, np.repeat(np.arange(4), 5))["opposite_l2"]
    many = estimates(measured, np.arange(20))["opposite_l2"]
    assert few.value == many.value == 1.5
    assert few.interval95 is not None
    assert many.interval95 is not None
    assert np.diff(few.interval95) > 1.5 * np.diff(many.interval95)
    assert estimates(measured[:5], np.zeros(5, int))["opposite_l2"].interval95 is None


def test_texts_that_a_prompt_has_no_room_for_are_left_out_and_told(
    dataset: EpisodeDataset, instructions: InstructionSet
) -> None:
    wording = replace(instructions.wordings[0], opposites=("press the blue button", "b" * 30))
    longer = replace(instructions, wordings=(wording, instructions.wordings[1]))
    found = asked(Made(colour, longest=25), dataset, longer)
    assert f"longer than the policy's prompts: {'b' * 30}" in found.left_out
    with pytest.raises(InstructionsError, match=r"set\.yaml: all opposites of 'press the .*' are longer"):
        asked(Made(colour, longest=18), dataset, instructions)


def test_a_set_of_another_suite_is_refused(dataset: EpisodeDataset, instructions: InstructionSet) -> None:
    other = replace(instructions, wordings=(replace(instructions.wordings[0], instruction="swim", also=()),))
    with pytest.raises(InstructionsError, match=r"has no instruction of dataset goals, such as '"):
        asked(Made(colour), dataset, other)


def test_a_guard_fails_whoever_stops_listening(dataset: EpisodeDataset, instructions: InstructionSet) -> None:
    hears = asked(Made(colour, noise=0.1), dataset, instructions)
    deaf = asked(Made(lambda one: 0.0, noise=0.1), dataset, instructions)
    guard = Guard(0.1, 1.0, 0.2, 2.0, 0.5)
    assert guard.broken(hears) == ()
    assert [line.split()[0] for line in guard.broken(deaf)] == [
        "opposite_l2", "synonym_over_opposite", "opposite_over_noise", "direction"
    ]  # fmt: skip
    assert "direction could not be measured, and guard.least_direction is 0.5" in guard.broken(deaf)
    assert Guard().broken(deaf) == ()


@pytest.fixture
def policy(root: Path, dataset: EpisodeDataset) -> Policy:
    """Untrained, of a head that takes noise; it plays whole chunks."""
    config = ExperimentConfig(
        storage_root=root,
        data=DataConfig(dataset="goals", image_size=SIZE),
        model=IPVLAConfig(
            backbone=TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8),
            memory=GRUMemoryConfig(hidden=16),
            head=FlowConfig(hidden=32),
            chunk=4,
        ),
    )
    policy = config.build(World()).policy
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a head begins with layers of zeros, behind which nothing is heard
        for parameter in policy.model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    policy.model.eval()
    return policy


@contextmanager
def served(directory: Path, root: Path) -> Iterator[str]:
    """The address of a policy's server in a thread of this process."""
    loop, stop, started, port = asyncio.new_event_loop(), asyncio.Event(), threading.Event(), list[int]()
    config = ServeConfig(storage_root=root, policy=directory, server=ServerConfig(port=0))

    def told(number: int) -> None:
        port.append(number)
        started.set()

    thread = threading.Thread(
        target=lambda: loop.run_until_complete(serve_until(stop, serving(config, None), told))
    )
    thread.start()
    try:
        assert started.wait(30)
        yield f"ws://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


def test_a_served_policy_answers_as_the_loaded_one(
    policy: Policy, dataset: EpisodeDataset, instructions: InstructionSet, root: Path, tmp_path: Path
) -> None:
    """The server draws the noise that an observation names, and forgets what it was asked before."""
    assert policy.execute == policy.config.chunk
    policy.save(tmp_path / "policy")
    loaded = LoadedPolicy(policy)
    seen = dataset.observation(0, 4, loaded.cameras)
    questions = [replace(seen, episode=noise, instruction=text) for noise in "ab" for text in (*GOALS, *GOALS)]
    with served(tmp_path / "policy", root) as url:
        server = ServedPolicy(OpenpiSource(url), dataset)
        answers = server.chunks(questions)
        found = sensitivity("p", server, dataset, instructions, observations=4)
        server.close()
    own = loaded.chunks([replace(one, episode=f"session {one.episode}") for one in questions])
    varying = loaded.varies
    assert varying.tolist() == server.varies.tolist() == [True] + 6 * [False]
    np.testing.assert_allclose(answers[..., varying], own[..., varying].clip(-1, 1), atol=1e-5)
    np.testing.assert_array_equal(own[:2], own[2:4])
    assert np.abs(own[0] - own[1]).max() > 1e-3, "another instruction"
    assert np.abs(own[0] - own[4]).max() > 1e-2, "another noise"
    assert found.estimates["baseline_l2"].value < 1e-6
    assert found.estimates["noise_l2"].value > 0.1


def test_a_measurement_that_is_interrupted_leaves_no_connection_to_the_server(
    policy: Policy, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job.EpisodeProgress, "advance", interrupt)
    policy.save(tmp_path / "policy")
    with served(tmp_path / "policy", root) as url:
        port = int(url.rpartition(":")[2])
        config = SensitivityConfig(
            storage_root=root,
            dataset="goals",
            server=url,
            study="ear",
            name="served",
            instructions=root / "set.yaml",
            observations=4,
        )
        with pytest.raises(KeyboardInterrupt):
            job.measure(config, Console(quiet=True))
        there = [one for one in psutil.Process().net_connections("tcp") if one.raddr and one.raddr.port == port]
        assert "ESTABLISHED" not in {one.status for one in there}


def test_the_job_writes_beside_the_policy_and_logs_to_its_run(policy: Policy, root: Path, tmp_path: Path) -> None:
    config = SensitivityConfig(
        storage_root=root,
        run_root_dir=tmp_path / "runs",
        dataset="goals",
        study="ear",
        name="flow",
        instructions=root / "set.yaml",
        observations=4,
    )
    policy.save(config.directory)
    found, path = job.measure(config, Console(quiet=True))
    written = json.loads(path.read_text())
    assert path == tmp_path / "runs" / "ear" / "flow" / "sensitivity.json"
    assert written["opposite_l2"] == found.estimates["opposite_l2"].to_dict()
    assert written["instructions"] == str(root / "set.yaml")
    client = MlflowClient(config.mlflow_uri)
    (logged,) = client.search_runs([client.get_experiment_by_name("ear").experiment_id])
    assert logged.data.metrics["sensitivity/goals/opposite_l2"] == found.estimates["opposite_l2"].value
    assert logged.data.metrics["sensitivity/goals/opposite_l2/low"] <= found.estimates["opposite_l2"].value
    assert job.main(replace(config, guard=Guard(least_direction=1.0))) == 1
    assert job.main(replace(config, guard=Guard(least_direction=-1.0))) == 0
    console = Console(record=True, width=140, quiet=True)
    console.print(sensitivity_table(found))


def test_data_that_the_policy_does_not_read_are_refused(policy: Policy, root: Path, tmp_path: Path) -> None:
    conventions = replace(policy.transforms.conventions, cameras=("chin",))
    replace(policy, transforms=replace(policy.transforms, conventions=conventions)).save(tmp_path / "policy")
    config = SensitivityConfig(
        storage_root=root, dataset="goals", policy=tmp_path / "policy", instructions=root / "set.yaml"
    )
    with pytest.raises(ContractError, match="chin"):
        job.measure(config, Console(quiet=True))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give --policy DIRECTORY or --name RUN"),
        (("--name", "x", "--observations", "1"), "observations is 1; it must be at least 2"),
        (("--name", "x", "--noises", "0"), "noises is 0"),
        (
            ("--name", "x", "--guard.most_synonym_l2", ".5", "--guard.least_opposite_l2", ".1"),
            "guard is upside down: most_synonym_l2 0.5 lets",
        ),
        (("--name", "x", "--guard.most_synonym_over_opposite", "5"), "must lie in 0 to 1"),
        (("--policy", "/p", "--server", "ws://there"), "server needs --name RUN"),
        (("--name", "x", "--instructions", "no_opposites.yaml"), "no_opposites.yaml: 'go' has no opposites"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("no_opposites.yaml").write_text("instructions: {go: {action: [walk]}}")
    given = ("--storage_root", str(tmp_path / "storage"), *arguments)
    assert told in refused(SensitivityConfig, job.main, *given)
