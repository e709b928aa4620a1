"""What does not fit is said before a model is built; what is broken and skipped stops nothing."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import PaliGemmaForConditionalGeneration

from ipvla.contract import ContractError
from ipvla.data.dataset import EpisodeDataset
from ipvla.data.source import DatasetError
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.auxiliary_losses import PlanReadoutConfig, QuestionsConfig
from ipvla.models.backbones import PaliGemmaConfig, TinyConfig
from ipvla.models.memory import GRUMemoryConfig, MemoryConfig, PromptMemoryConfig
from ipvla.models.memory.chain import ChainMemoryConfig
from ipvla.models.memory.kv import KVMemoryConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import CheckpointError, Policy
from ipvla.training.parallel import World
from tests.data.foreign import no_picture, not_a_number, other_words, write_foreign

Make = Callable[..., ExperimentConfig]
QUERY = "model.language_model.layers.0.self_attn.q_proj"
TINY = TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8)


def checked(config: ExperimentConfig) -> None:
    config.check(config.open_dataset())


def of_model(make: Make, **model: object) -> ExperimentConfig:
    return make(model=IPVLAConfig(**({"backbone": TINY, "chunk": 2} | model)))  # type: ignore[arg-type]


def test_settings_that_fit_pass_at_once(make_experiment: Make) -> None:
    config = make_experiment()
    started = time.process_time()
    checked(config)
    assert time.process_time() - started < 2


def test_a_worker_does_not_read_all_instructions_again(
    make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_experiment()
    monkeypatch.setattr(EpisodeDataset, "instructions", lambda _: pytest.fail("the driver has checked them"))
    config.build(World())
    with pytest.raises(pytest.fail.Exception, match="the driver has checked them"):
        checked(config)


def test_a_camera_that_the_data_lack_names_those_that_they_have(make_experiment: Make) -> None:
    config = make_experiment(data=DataConfig(dataset="cue", cameras=("front",), image_size=16))
    with pytest.raises(DatasetError, match=r'names front, .* has agentview: .*--data\.cameras "\[agentview\]"'):
        checked(config)


def test_a_prompt_that_is_too_long_names_the_setting(make_experiment: Make) -> None:
    with pytest.raises(ValueError, match=r"'press the button'; set --model\.backbone\.max_prompt_tokens 4"):
        checked(of_model(make_experiment, backbone=replace(TINY, max_prompt_tokens=3)))
    config = of_model(make_experiment, backbone=replace(TINY, max_prompt_tokens=4))
    checked(config)
    config.build(World())


def test_a_prompt_that_no_limit_holds_says_so(make_experiment: Make, tmp_path: Path) -> None:
    directory = write_foreign(
        tmp_path / "long" / "1.0.0", change=lambda e, t, step: step.update(language_instruction="open it " * 40)
    )
    with pytest.raises(ValueError, match=r"81: .*this backbone takes 64 at most"):
        checked(make_experiment(data=DataConfig(dataset=str(directory))))


def test_a_prompt_of_paligemma_counts_its_pictures(make_experiment: Make, paligemma_directory: Path) -> None:
    backbone = PaliGemmaConfig(str(paligemma_directory), dtype="float32", max_prompt_tokens=24)
    checked(of_model(make_experiment, backbone=backbone))
    with pytest.raises(ValueError, match=r"set --model\.backbone\.max_prompt_tokens (\d+)") as caught:
        checked(of_model(make_experiment, backbone=replace(backbone, max_prompt_tokens=6)))
    needed = int(str(caught.value).rpartition(" ")[2])
    exact = of_model(make_experiment, backbone=replace(backbone, max_prompt_tokens=needed))
    assert len(exact.build(World()).policy.model.backbone.tokenize("press the button")) == needed


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapter_is_no_backbone(paligemma_directory: Path, tmp_path: Path, with_tokenizer: bool) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    if with_tokenizer:
        for file in paligemma_directory.glob("token*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"holds an adapter of PEFT.*merge_and_unload"):
        IPVLAConfig(PaliGemmaConfig(str(tmp_path))).check()


def test_an_adapter_is_a_backbone_once_it_is_merged_as_the_message_says(
    paligemma_directory: Path, tmp_path: Path
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    base = PaliGemmaForConditionalGeneration.from_pretrained(paligemma_directory)
    query = base.get_submodule(QUERY).weight.clone()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"AutoPeftModel.from_pretrained\(DIR\).merge_and_unload\(\)"):
        PaliGemmaConfig(str(adapter)).check([], 1)
    whole = peft.AutoPeftModel.from_pretrained(adapter).merge_and_unload()
    whole.save_pretrained(merged)
    for file in paligemma_directory.glob("token*"):
        (merged / file.name).write_bytes(file.read_bytes())
    config = PaliGemmaConfig(str(merged), dtype="float32")
    config.check(["press the button"], 1)
    loaded = config.build(8, 1, 16).vlm
    assert torch.equal(loaded.get_submodule(QUERY).weight, whole.get_submodule(QUERY).weight)
    assert not torch.equal(loaded.get_submodule(QUERY).weight, query)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_directory_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backbone\.pretrained .* cannot be loaded"):
        PaliGemmaConfig(str(tmp_path)).build(8, 1, 16)


def test_questions_and_plans_that_were_not_recorded(make_experiment: Make, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no questions .* which model\.questions is trained on"):
        checked(of_model(make_experiment, questions=QuestionsConfig()))
    data = DataConfig(dataset=str(write_foreign(tmp_path / "some" / "1.0.0")))
    for model in ({"memory": PromptMemoryConfig()}, {"plan_readout": PlanReadoutConfig()}):
        with pytest.raises(DatasetError, match=r"no plans \(step feature `reasoning`\)"):
            checked(replace(of_model(make_experiment, **model), data=data))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"memory": ChainMemoryConfig([GRUMemoryConfig(), PromptMemoryConfig()])},
            "'prompt' feeds the backbone and must stand first",
        ),
        (
            {"memory": PromptMemoryConfig(plan_tokens=8), "plan_readout": PlanReadoutConfig(tokens=9)},
            r"plan_readout\.tokens 9 exceeds memory\.plan_tokens 8",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other(make_experiment: Make, model: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(of_model(make_experiment, **model))


@pytest.mark.parametrize(
    ("memory", "feeds", "shards", "plans"),
    [
        (GRUMemoryConfig(), False, True, 0),
        (ChainMemoryConfig([KVMemoryConfig(), GRUMemoryConfig()]), True, True, 0),
        (ChainMemoryConfig([PromptMemoryConfig(plan_tokens=7), GRUMemoryConfig()]), True, False, 7),
    ],
)
def test_a_chain_is_what_its_parts_are(memory: MemoryConfig, feeds: bool, shards: bool, plans: int) -> None:
    assert (memory.feeds_backbone, memory.shards, memory.longest_plan) == (feeds, shards, plans)


def test_a_policy_to_start_from_that_is_not_there(make_experiment: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"start_from: no policy in {tmp_path}"):
        checked(make_experiment(start_from=tmp_path))


def test_a_policy_of_data_in_other_terms(make_experiment: Make, tmp_path: Path) -> None:
    config = make_experiment()
    config.build(World()).policy.save(tmp_path)
    checked(replace(config, start_from=tmp_path))
    path = tmp_path / "policy.json"
    path.write_text(path.read_text().replace('"gripper": "environment"', '"gripper": "open_is_one"'))
    with pytest.raises(ContractError, match=r"has gripper 'open_is_one', and dataset cue has 'environment'"):
        checked(replace(config, start_from=tmp_path))


def test_a_policy_whose_state_was_padded_says_which_setting_pads(make_experiment: Make, tmp_path: Path) -> None:
    padded = DataConfig(dataset=str(write_foreign(tmp_path / "libero_goal" / "1.0.0", inner_name="libero_goal")))
    padded = replace(padded, image_size=16, padded_state=True)
    config = make_experiment(data=padded)
    config.build(World()).policy.save(tmp_path / "policy")
    again = replace(config, start_from=tmp_path / "policy")
    checked(again)
    with pytest.raises(ContractError, match=r"has state_size 9, .*has 8; .* --data\.padded_state true"):
        checked(replace(again, data=replace(padded, padded_state=False)))


def test_words_that_change_are_counted(
    make_experiment: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_foreign(tmp_path / "words" / "1.0.0", change=other_words)
    with caplog.at_level(logging.WARNING):
        checked(make_experiment(data=DataConfig(dataset=str(directory), image_size=16)))
    assert "the task in words changes within 2 of 3 episodes" in caplog.text


@pytest.mark.parametrize("damage", [not_a_number, no_picture])
def test_bad_episodes_are_skipped_in_training_too(
    make_experiment: Make, tmp_path: Path, damage: Callable[..., None]
) -> None:
    directory = write_foreign(tmp_path / damage.__name__ / "1.0.0", change=damage)
    config = make_experiment(data=DataConfig(dataset=str(directory), image_size=16))
    with pytest.raises(DatasetError, match=r"not finite|cannot be decoded"):
        config.build(World())
    skipping = replace(config, data=replace(config.data, skip_bad_episodes=True))
    experiment = skipping.build(World())
    batches = experiment.lanes.batches(experiment.state.position)
    for _ in range(4):
        position, batch = next(batches)
        assert batch.actions.isfinite().all()
    batches.close()
    assert experiment.lanes.readings(position)["data/broken_episodes"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda written: {**written, "transforms": {}},
        lambda written: {name: value for name, value in written.items() if name != "transforms"},
        lambda written: {**written, "model": {**written["model"], "backbone": {"type": "nobody"}}},
        lambda written: {**written, "execute": 99},
        lambda written: [],
    ],
)
def test_a_damaged_policy_is_a_checkpoint_error(make_experiment: Make, tmp_path: Path, damage: Callable) -> None:  # type: ignore[type-arg]
    make_experiment().build(World()).policy.save(tmp_path / "policy")
    path = tmp_path / "policy" / "policy.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=r"policy\.json is damaged"):
        Policy.load(tmp_path / "policy")
