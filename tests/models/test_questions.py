"""The auxiliary loss that asks the backbone about what it sees."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvla.data.rlds import write_rlds
from ipvla.data.source import DatasetError
from ipvla.experiment import DataConfig, Experiment, ExperimentConfig
from ipvla.models.adapters import LoRAConfig
from ipvla.models.auxiliary_losses import QuestionsConfig
from ipvla.training.parallel import World
from ipvla.types import NO_TOKEN, StepBatch
from tests.synthetic import SIZE, cue_episode

ALL = QuestionsConfig(weight=1.0, share=1.0)


@pytest.fixture(scope="module")
def asked_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes whose first two frames are bright or dark, and which ask about that."""
    root = tmp_path_factory.mktemp("storage")
    episodes = []
    for seed in range(24):
        episode = cue_episode(seed)
        answer = "yes" if episode.images["agentview"][0, 0, 0, 0] > 100 else "no"
        blank = ("",) * (len(episode.action) - 2)
        asked = {"questions": ("is a button lit",) * 2 + blank, "answers": (answer,) * 2 + blank}
        episodes.append(replace(episode, **asked))
    write_rlds(root / "datasets", "asked", episodes, SIZE)
    return root


@pytest.fixture
def build(make_experiment: Callable[..., ExperimentConfig], asked_root: Path) -> Callable[..., Experiment]:
    def make(questions: QuestionsConfig | None, **model: object) -> Experiment:
        config = make_experiment(storage_root=asked_root, data=DataConfig(dataset="asked", image_size=SIZE))
        return replace(config, model=replace(config.model, questions=questions, **model)).build(World())

    return make


def first_batch(experiment: Experiment) -> StepBatch:
    return experiment.lanes.batch(experiment.state.position)


def test_it_teaches_the_backbone_to_answer(build: Callable[..., Experiment]) -> None:
    experiment = build(ALL)
    batch, model = first_batch(experiment), experiment.state.model
    assert model.questions is not None
    optimizer = torch.optim.Adam(model.backbone.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.questions.loss(model.backbone, batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    asked = model.questions.asked(batch)
    expected = [model.backbone.detokenize(ids) for ids in batch.answer[asked].tolist()]
    assert set(expected) == {"yes", "no"}
    inputs = batch.inputs.map(lambda x: x[asked])
    assert model.eval().backbone.answer(inputs, ["is a button lit"] * len(expected), 2) == expected


def test_only_steps_with_a_question_are_asked(build: Callable[..., Experiment]) -> None:
    experiment = build(ALL)
    batch = first_batch(experiment)
    questions = ALL.build()
    assert torch.equal(questions.asked(batch), batch.valid & (batch.t < 2))
    batch.valid[0] = False
    assert not questions.asked(batch)[0].any()
    batch.answer[:] = NO_TOKEN
    assert questions.loss(experiment.state.model.backbone, batch).item() == 0


def test_a_share_is_asked_by_episode_and_step_alone() -> None:
    episode, t = torch.meshgrid(torch.arange(200), torch.arange(50), indexing="ij")
    batch = StepBatch(**{f.name: torch.empty(0) for f in fields(StepBatch)})
    batch.episode_key, batch.t, batch.valid = episode, t, torch.ones_like(t, dtype=torch.bool)
    batch.answer = torch.ones(200, 50, 1, dtype=torch.long)
    quarter, half = (QuestionsConfig(share=share).build().asked(batch) for share in (0.25, 0.5))
    assert quarter.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert half.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (half | ~quarter).all(), "a larger share asks the same steps and more"
    for axis in (0, 1):
        assert quarter.float().mean(axis).std() < (0.12 if axis else 0.05), "no step and no episode is preferred"
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    batch.episode_key, batch.t = episode[order], t[order]
    assert torch.equal(QuestionsConfig(share=0.25).build().asked(batch), quarter[order])


def test_it_adds_its_weight_to_the_loss_and_leaves_memory_and_head_alone(build: Callable[..., Experiment]) -> None:
    experiment = build(QuestionsConfig(weight=0.5, share=1.0))
    batch, model = first_batch(experiment), experiment.state.model
    memory = model.initial_memory(4)
    assert model.questions is not None
    with torch.no_grad():
        whole, alone = model.loss(batch, memory)[0], model.questions.loss(model.backbone, batch)
        one = QuestionsConfig(weight=1.0, share=1.0).build().loss(model.backbone, batch)
        model.questions = None
        torch.testing.assert_close(whole, model.loss(batch, memory)[0] + alone)
    torch.testing.assert_close(2 * alone, one)
    ALL.build().loss(model.backbone, batch).backward()
    assert any(p.grad is not None for p in model.backbone.parameters())
    assert all(p.grad is None for part in (model.memory, model.head) for p in part.parameters())


def test_adapters_learn_from_it(build: Callable[..., Experiment]) -> None:
    experiment = build(ALL, lora=LoRAConfig(rank=2))
    model = experiment.state.model
    ALL.build().loss(model.backbone, first_batch(experiment)).backward()
    taught = {name for name, p in model.backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert taught
    assert all("lora_B" in name for name in taught), "A gets none while B is 0"


def test_off_means_gone(build: Callable[..., Experiment]) -> None:
    """Without it batches carry no questions; with it there is no further weight."""
    plain, on = build(None), build(QuestionsConfig())
    batch = first_batch(plain)
    assert batch.question.shape == batch.answer.shape == (4, 6, 0)
    assert first_batch(on).question.shape == (4, 6, on.policy.model.backbone.max_prompt_tokens)
    assert first_batch(on).answer.shape == (4, 6, 2)
    ours, theirs = on.state.model.state_dict(), plain.state.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_dataset_without_questions_is_refused_where_they_are_asked(
    make_experiment: Callable[..., ExperimentConfig],
) -> None:
    config = make_experiment()
    with pytest.raises(DatasetError, match="has no questions"):
        replace(config, model=replace(config.model, questions=ALL)).build(World())
    assert not first_batch(config.build(World())).question.numel()


def test_a_saved_policy_asks_again_and_an_old_one_does_not(
    build: Callable[..., Experiment], tmp_path: Path
) -> None:
    policy = build(QuestionsConfig(share=0.5)).policy
    policy.save(tmp_path / "policy")
    loaded = type(policy).load(tmp_path / "policy")
    assert loaded.config.questions == QuestionsConfig(share=0.5)
    ids = loaded.transforms.prompts.question("is a button lit")
    np.testing.assert_array_equal(ids, policy.transforms.prompts.question("is a button lit"))
    described = tmp_path / "policy" / "policy.json"
    values = json.loads(described.read_text())
    del (
        values["model"]["questions"],
        values["transforms"]["question_tokens"],
        values["transforms"]["answer_tokens"],
    )
    described.write_text(json.dumps(values))
    assert type(policy).load(tmp_path / "policy").model.questions is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, r"model\.questions\.weight is 0"),
        ({"share": 0}, r"model\.questions\.share is 0"),
        ({"share": 1.5}, r"model\.questions\.share is 1\.5"),
        ({"tokens": 0}, r"model\.questions\.tokens is 0"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionsConfig(**change)  # type: ignore[arg-type]
