"""Training on the words of ECoT's reasoning beside the actions: Bridge's layout and LIBERO's, both backbones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from ipvla.data.pictures import EncodedPictures
from ipvla.data.plan import PlanPosition
from ipvla.data.reasoning import ReasoningConfig
from ipvla.data.rlds.format import RldsLayout
from ipvla.data.rlds.writer import write_part
from ipvla.data.source import DatasetError, Feature, Trajectory
from ipvla.experiment import DataConfig, Experiment, ExperimentConfig
from ipvla.models.backbones import BackboneConfig, PaliGemmaConfig, TinyConfig
from ipvla.models.backbones.random_paligemma import SMALLEST, save_random_paligemma
from ipvla.models.memory import PromptMemoryConfig
from ipvla.models.plan_readout import PlanReadoutConfig
from ipvla.models.reasoning_loss import ReasoningLossConfig
from ipvla.reasoning import TAGS
from ipvla.storage import SOURCE_TREE
from ipvla.tracking import JsonlSink
from ipvla.training.loop import TrainingConfig, train
from ipvla.training.parallel import World
from ipvla.types import NO_TOKEN, StepBatch
from ray_jobs.command_line.settings import parse
from tests.data.reasoning import bridge

Make = Callable[..., ExperimentConfig]
SIZE = 28
LIBERO = "libero_90_no_noops"
DEMONSTRATIONS = "pick_up_the_cube_demo.hdf5"
WORDS = "pick up the red cube reach it down above far task plan subtask reasoning move : 1 2 . what ?"
DROPPED = ("VISIBLE OBJECTS", "GRIPPER POSITION")


def libero_trajectory(number: int, **metadata: Any) -> Trajectory:
    """As OpenVLA published them, with the number of the demonstration that ECoT's copy has besides."""
    length = 9 + number
    rng = np.random.default_rng(number)
    picture = cv2.imencode(".jpg", np.full((SIZE, SIZE, 3), 40 * number, np.uint8))[1].tobytes()
    steps = {
        "observation/image": EncodedPictures((picture,) * length),
        "observation/wrist_image": EncodedPictures((picture,) * length),
        "observation/state": rng.normal(size=(length, 8)).astype(np.float32),
        "action": rng.uniform(-1, 1, (length, 7)).astype(np.float32),
        "language_instruction": ("pick up the red cube",) * length,
    }
    return Trajectory(steps, f"demonstration {number}", {"file_path": DEMONSTRATIONS, **metadata})


def write_libero(root: Path, metadata: Callable[[int], Mapping[str, int]]) -> None:
    picture = Feature("image", (SIZE, SIZE, 3), "uint8")
    features = {
        "observation/image": picture,
        "observation/wrist_image": picture,
        "observation/state": Feature("number", (8,)),
        "action": Feature("number", (7,)),
        "language_instruction": Feature("text", (), "str"),
    }
    numbers = {name: Feature("number", (), "int32") for name in metadata(0)}
    layout = RldsLayout(
        LIBERO,
        features,
        {"observation/image": "jpeg", "observation/wrist_image": "jpeg"},
        {"file_path": Feature("text", (), "str"), **numbers},
    )
    made = [libero_trajectory(number, **metadata(number)) for number in range(5)]
    write_part(root / LIBERO / "1.0.0", layout, made)


def libero_reasoning() -> dict[str, Any]:
    """As `libero_reasonings.json` has it: steps by demonstration."""
    step = {
        "task": "pick up the red cube",
        "plan": "1. reach 2. pick up",
        "subtask": "reach it",
        "subtask_reason": "the cube is far",
        "movement": "down",
        "movement_reason": "above the cube",
    }
    return {DEMONSTRATIONS: {str(n): {str(t): step for t in range(9 + n)} for n in range(5)}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with both datasets and their reasoning; and a PaliGemma that knows some of the words."""
    root = tmp_path_factory.mktemp("storage")
    bridge.write(root / "datasets")
    bridge.write_reasoning(root / "bridge.json")
    write_libero(root / "datasets", lambda number: {"demo_id": number})
    (root / "libero.json").write_text(json.dumps(libero_reasoning()))
    save_random_paligemma(root / "paligemma", SMALLEST, WORDS.split())
    return root


def backbone(name: str, root: Path) -> BackboneConfig:
    if name == "paligemma":
        return PaliGemmaConfig(str(root / "paligemma"), dtype="float32", max_prompt_tokens=40)
    return TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8, max_prompt_tokens=40, max_text_tokens=240)


@pytest.fixture
def config(make_experiment: Make, root: Path) -> Callable[..., ExperimentConfig]:
    def make(
        data: str = "libero",
        model: str = "tiny",
        reasoning: ReasoningConfig | None = None,
        loss: ReasoningLossConfig | None = None,
        **changes: Any,
    ) -> ExperimentConfig:
        name, camera = {"libero": (LIBERO, "agentview"), "bridge": (bridge.NAME, "primary")}[data]
        read = reasoning or ReasoningConfig(root / f"{data}.json", dropped=DROPPED)
        base = make_experiment(storage_root=root)
        changed = {
            "backbone": backbone(model, root),
            "reasoning_loss": loss or ReasoningLossConfig(weight=1.0, share=1.0, tokens=190),
            **changes,
        }
        return replace(
            base,
            data=DataConfig(dataset=name, cameras=(camera,), image_size=SIZE, reasoning=read),
            model=replace(base.model, **changed),
        )

    return make


def check(config: ExperimentConfig) -> None:
    """As the driver does before any worker starts."""
    config.check(config.open_dataset())


def first_batch(experiment: Experiment) -> StepBatch:
    return experiment.lanes.batch(PlanPosition())


def said(experiment: Experiment, batch: StepBatch) -> set[str]:
    """All reasoning of a batch, in words."""
    model = experiment.state.model
    return {model.backbone.detokenize(row.tolist()) for row in batch.plan[(batch.plan != NO_TOKEN).any(-1)]}


@pytest.mark.parametrize("model", ["tiny", "paligemma"])
@pytest.mark.parametrize("data", ["libero", "bridge"])
def test_training_lowers_the_loss_on_the_words(
    config: Callable[..., ExperimentConfig], tmp_path: Path, data: str, model: str
) -> None:
    training = TrainingConfig(steps=24, precision="fp32", log_every=4, checkpoint_every=24)
    made = replace(config(data, model, loss=ReasoningLossConfig(1.0, 0.5, tokens=190)), training=training)
    experiment = made.build(World())
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    train(experiment.state, experiment.lanes, training, made.optimizer, World(), sink, lambda: None)
    sink.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/reasoning_loss"] for line in lines if "train/reasoning_loss" in line]
    assert len(losses) > 4
    assert losses[-1] < 0.8 * losses[0]


def test_the_words_are_those_of_the_step_in_the_generators_order(config: Callable[..., ExperimentConfig]) -> None:
    experiment = config("libero", "paligemma").build(World())
    texts = said(experiment, first_batch(experiment))
    assert texts == {
        "task : pick up the red cube plan : 1 . reach 2 . pick up subtask reasoning : the cube is far "
        "subtask : reach it move reasoning : above the cube move : down".replace("is ", "")
    }


def test_dropped_tags_and_those_of_the_stage_are_not_trained(
    config: Callable[..., ExperimentConfig], root: Path
) -> None:
    dropped = ReasoningConfig(root / "bridge.json", stage=1, dropped=("PLAN", "MOVE", "GRIPPER POSITION"))
    experiment = config("bridge", reasoning=dropped).build(World())
    texts = said(experiment, first_batch(experiment))
    assert texts
    for text in texts:
        found = [tag for tag in TAGS if f" {tag.lower()} :" in f" {text}"]
        assert found == ["VISIBLE OBJECTS", "SUBTASK REASONING", "SUBTASK", "MOVE REASONING"]


def test_the_words_give_the_backbone_its_gradient_and_memory_and_head_none(
    config: Callable[..., ExperimentConfig],
) -> None:
    experiment = config().build(World())
    model, batch = experiment.state.model, first_batch(experiment)
    assert model.reasoning_loss is not None
    loss = model.reasoning_loss.loss(model.backbone, batch)
    assert loss is not None
    loss.backward()
    embedding = model.backbone.network.embed_tokens.weight.grad
    words = batch.plan[batch.plan != NO_TOKEN].unique()
    assert (embedding[words].norm(dim=-1) > 0).all(), "each word of the reasoning is learned"
    assert all(p.grad is None for part in (model.memory, model.head) for p in part.parameters())


def test_its_weight_is_added_to_the_loss(config: Callable[..., ExperimentConfig]) -> None:
    experiment = config(loss=ReasoningLossConfig(0.5, 1.0, tokens=190)).build(World())
    model, batch = experiment.state.model.eval(), first_batch(experiment)
    memory = model.initial_memory(4)
    with torch.no_grad():
        whole = model.loss(batch, memory)[0]
        words = model.terms["reasoning_loss"]
        model.reasoning_loss = None
        torch.testing.assert_close(whole, model.loss(batch, memory)[0] + 0.5 * words)
    assert not model.terms


def test_a_share_of_the_steps_is_drawn_anew_for_each_batch(config: Callable[..., ExperimentConfig]) -> None:
    experiment = config().build(World())
    batch, position = first_batch(experiment), PlanPosition()
    other = experiment.lanes.batch(experiment.lanes.after(position))
    half = ReasoningLossConfig(share=0.5, tokens=190).build(experiment.state.model.backbone)
    drawn = torch.zeros(2, 400, dtype=torch.bool)
    for row, seed in enumerate((0, 1)):  # a batch of many steps, the first of which are the same in both
        many = replace(batch, plan=torch.ones(1, 400, 1), valid=torch.ones(1, 400, dtype=torch.bool))
        many.episode_key, many.t = torch.arange(400)[None].clone(), torch.zeros(1, 400, dtype=torch.long)
        many.t[0, -1] = seed
        drawn[row] = half.drawn(many)[0]
        assert 0.4 < drawn[row].float().mean() < 0.6
    assert 0.3 < (drawn[0] != drawn[1]).float().mean() < 0.7
    every = ReasoningLossConfig(share=1.0, tokens=190).build(experiment.state.model.backbone)
    for one in (batch, other):
        assert torch.equal(every.drawn(one), one.valid & (one.plan != NO_TOKEN).any(-1))
        assert not (half.drawn(one) & ~every.drawn(one)).any()


def test_a_long_reasoning_loses_its_last_tags(
    config: Callable[..., ExperimentConfig], caplog: pytest.LogCaptureFixture
) -> None:
    experiment = config("libero", "paligemma", loss=ReasoningLossConfig(tokens=20)).build(World())
    (text,) = said(experiment, first_batch(experiment))
    assert text == "task : pick up the red cube plan : 1 . reach 2 . pick up"
    assert [record.message for record in caplog.records if "loses its last tags" in record.message] == [
        "a reasoning of 36 tokens loses its last tags to fit model.reasoning_loss.tokens 20"
    ]


def test_a_tag_that_is_too_long_leaves_its_step_without_words(
    config: Callable[..., ExperimentConfig],
) -> None:
    experiment = config("libero", "paligemma", loss=ReasoningLossConfig(share=1.0, tokens=3)).build(World())
    model, batch = experiment.state.model, first_batch(experiment)
    assert (batch.plan == NO_TOKEN).all()
    loss, _ = model.loss(batch, model.initial_memory(4))
    assert torch.isfinite(loss)
    assert not model.terms


def test_a_policy_that_learned_words_is_saved_loaded_and_acts(
    config: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    policy = config().build(World()).policy
    policy.save(tmp_path / "policy")
    loaded = type(policy).load(tmp_path / "policy")
    assert loaded.config == policy.config
    assert loaded.transforms.prompts.plan_tokens == 190


REFUSED = {
    "no number of the demonstration": (
        {},
        lambda: json.loads((Path(__file__).parent / "libero_reasonings.json").read_text()),
        r"libero_90_no_noops: 0 of 5 episodes have reasoning: the metadata has no episode_id or demo_id "
        r"\(it has file_path\); give the reasoning file of this dataset",
    ),
    "another machine's paths": (
        {"demo_id": 0},
        lambda: json.loads((Path(__file__).parent / "libero_reasonings.json").read_text()),
        r"0 of 5 episodes have reasoning: no such file_path \('pick_up_the_cube_demo\.hdf5' in the dataset, "
        r"'a/b/c\.hdf5' in the reasoning file\)",
    ),
    "other demonstrations": (
        {"demo_id": 70},
        libero_reasoning,
        r"no such episode of that file_path \(70 of 'pick_up_the_cube_demo\.hdf5' in the dataset, 0, 1, 2 in",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_reasoning_that_matches_nothing_is_refused_before_training(
    config: Callable[..., ExperimentConfig], tmp_path: Path, case: str
) -> None:
    metadata, content, message = REFUSED[case]
    write_libero(tmp_path / "datasets", lambda _: metadata)
    (tmp_path / "file.json").write_text(json.dumps(content()))
    made = config(reasoning=ReasoningConfig(tmp_path / "file.json"))
    with pytest.raises(DatasetError, match=f"^data.reasoning: .*{message}"):
        check(replace(made, storage_root=tmp_path))


def test_a_mixture_may_have_datasets_without_reasoning(
    config: Callable[..., ExperimentConfig], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_libero(root / "datasets" / "more", lambda number: {"demo_id": number})
    made = config()
    data = replace(
        made.data,
        mixture={LIBERO: 1.0, f"{root}/datasets/more/{LIBERO}/1.0.0": 1.0},
        reasoning=ReasoningConfig(root / "bridge.json", dropped=DROPPED),
    )
    with pytest.raises(DatasetError, match="0 of 5 episodes have reasoning"):
        check(replace(made, data=data))
    part = json.loads((root / "libero.json").read_text())
    (root / "part.json").write_text(json.dumps({DEMONSTRATIONS: {"2": part[DEMONSTRATIONS]["2"]}}))
    with caplog.at_level("INFO", "ipvla.experiment"):
        check(replace(made, data=replace(data, reasoning=ReasoningConfig(root / "part.json"))))
    assert "1 of 5 episodes have reasoning" in caplog.text


def test_a_file_that_is_missing_is_refused(config: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"mine\.json does not exist"):
        config(reasoning=ReasoningConfig(tmp_path / "mine.json")).open_dataset()


WRONG = [
    ({"memory": PromptMemoryConfig()}, "reasoning_loss and model.memory.type prompt are both"),
    ({"plan_readout": PlanReadoutConfig()}, "model.reasoning_loss and model.plan_readout are both"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_two_readers_of_the_same_words_are_refused(
    config: Callable[..., ExperimentConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_words_that_the_backbone_has_no_place_for_are_refused(config: Callable[..., ExperimentConfig]) -> None:
    with pytest.raises(ValueError, match=r"tokens is 200; this backbone has 240 places .* lower it to 199"):
        check(config(loss=ReasoningLossConfig(tokens=200)))


def test_reasoning_that_nothing_is_trained_on_is_refused(config: Callable[..., ExperimentConfig]) -> None:
    made = config()
    with pytest.raises(ValueError, match=r"data\.reasoning is set, and nothing is trained on it"):
        replace(made, model=replace(made.model, reasoning_loss=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": -1}, r"data\.reasoning\.stage is -1"),
        ({"dropped": ("PLANS",)}, "'PLANS' is no tag; did you mean 'PLAN'"),
        ({"stage": 7, "dropped": ("GRIPPER POSITION",)}, "leave no tag"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningConfig(Path("a.json"), **settings)


def test_the_command_line_reaches_all_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--data.reasoning.path", "a.json", "--data.reasoning.dropped", "[PLAN, MOVE]"]
    read = parse(ExperimentConfig, [*given, "--data.reasoning.stage", "1", "--model.reasoning_loss.weight", "0.2"])
    assert read.absolute().data.reasoning == ReasoningConfig(tmp_path / "a.json", 1, ("PLAN", "MOVE"))
    assert read.model.reasoning_loss == ReasoningLossConfig(weight=0.2)


def test_the_preset_is_one_of_this_job(tmp_path: Path) -> None:
    preset = SOURCE_TREE / "ray_jobs" / "experiments" / "reasoning" / "bridge.yaml"
    config = parse(ExperimentConfig, ["--config_path", str(preset), "--storage_root", str(tmp_path)])
    assert config.data.reasoning is not None
    assert config.data.reasoning.tags == TAGS
    assert config.model.reasoning_loss == ReasoningLossConfig()
    assert isinstance(config.model.backbone, PaliGemmaConfig)
