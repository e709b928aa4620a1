"""An imported policy is fine-tuned on the real path, and what it learned goes back into the published layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from ipvla.data.lanes import LaneConfig
from ipvla.data.standards import StandardConfig
from ipvla.experiment import ExperimentConfig
from ipvla.models.adapters import LoRAConfig, adapters, save_adapters
from ipvla.models.backbones.openvla_files import OpenVLAFiles
from ipvla.models.memory import BankMemoryConfig, MemoryConfig, NoMemoryConfig
from ipvla.models.nf4 import NF4Config
from ipvla.policy import Policy
from ipvla.training.loop import TrainingConfig
from ipvla.training.parallel import World
from ipvla.training.step import OptimizerConfig
from ray_jobs.command_line.settings import parse
from ray_jobs.export_policy import ExportConfig, export
from ray_jobs.export_policy import main as export_job
from ray_jobs.import_policy import ImportConfig, ImportedModelConfig, imported, main, oft_files
from tests.checkpoints.conftest import golden_json
from tests.checkpoints.test_oft import CAMERAS
from tests.checkpoints.test_openvla_policy import act, observation
from tests.training.test_loop import loss_of, run

SEEN = [observation("press the button", name) for name in ("picture_0", "picture_1")]


def experiment(
    source: Path, storage_root: Path, directory: Path, memory: MemoryConfig, nf4: NF4Config | None = None
) -> ExperimentConfig:
    """As `ipvla train --config_path POLICY.train.yaml --data.dataset cue ...` has it."""
    config = ImportConfig(
        source,
        directory / "policy",
        "toy_libero_no_noops",
        cameras=CAMERAS[:1],
        model=ImportedModelConfig(memory, nf4),
    )
    main(config)
    given = ["--config_path", str(directory / "policy.train.yaml"), "--data.dataset", "cue", "--name", "tuned"]
    given += ["--model.lora.rank", "4"]
    settings = parse(ExperimentConfig, [*given, "--storage_root", str(storage_root)])
    lora = LoRAConfig(rank=4, modules=("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"), freeze_rest=False)
    return replace(
        settings,
        run_root_dir=directory / "runs",
        data=replace(
            settings.data, standard=StandardConfig({"agentview": "observation/image"}, gripper="open_is_one")
        ),
        model=replace(settings.model, lora=lora),
        lanes=LaneConfig(lanes=4, window=4, stride=settings.lanes.stride),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1),
        training=TrainingConfig(steps=12, precision="fp32", log_every=4, checkpoint_every=100),
    )


@pytest.mark.parametrize("memory", [NoMemoryConfig(), BankMemoryConfig()])
def test_adapters_are_trained_and_go_back(
    openvla: Path, storage_root: Path, tmp_path: Path, memory: MemoryConfig
) -> None:
    config = experiment(openvla, storage_root, tmp_path, memory)
    built = config.build(World())
    start = Policy.load(tmp_path / "policy")
    np.testing.assert_array_equal(act(built.policy, SEEN), act(start, SEEN))  # nothing has been learned yet
    before = loss_of(config, built)
    built.state.model.train()
    run(config, built)
    assert loss_of(config, built) < 0.8 * before
    tuned = built.policy
    tuned.model.eval()
    tuned.save(tmp_path / "tuned")
    learned = act(Policy.load(tmp_path / "tuned"), SEEN)
    assert not np.array_equal(learned, act(start, SEEN))
    save_adapters(tuned.model.backbone, tmp_path / "adapter")
    export(tuned.merged(), tmp_path / "exported", "mine")
    if memory == NoMemoryConfig():
        exported = imported(ImportConfig(tmp_path / "exported", tmp_path / "p", "mine"))
        np.testing.assert_allclose(act(exported, SEEN), learned, rtol=0, atol=1e-6)
        again = imported(
            ImportConfig(openvla, tmp_path / "p", "toy_libero_no_noops", adapter=tmp_path / "adapter")
        )
        np.testing.assert_allclose(act(again, SEEN), learned, rtol=0, atol=1e-6)


#: As OpenVLA's own fine-tuning names them, "all-linear"; the first seven are inside the language layers.
ALL_LINEAR = LoRAConfig(
    rank=4,
    alpha=2,
    modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    extra=(
        *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "patch_embed.proj"),
        *("attn_pool.q", "attn_pool.kv", "attn_pool.proj"),
        *("projector.fc1", "projector.fc2", "projector.fc3", "language_model.lm_head"),
    ),
)


def test_the_published_adapters_modules(openvla: Path, tmp_path: Path) -> None:
    """The same modules get adapters as in OpenVLA's own fine-tuning, and PEFT's file of them is read again."""
    policy = imported(ImportConfig(openvla, tmp_path / "p", "toy_libero"))
    backbone = policy.model.backbone
    ALL_LINEAR.apply(backbone)
    assert sorted(adapters(backbone)) == sorted(golden_json("lora")["adapted_modules"])
    torch.manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapters(backbone, tmp_path / "adapter")
    again = imported(ImportConfig(openvla, tmp_path / "q", "toy_libero", adapter=tmp_path / "adapter"))
    inputs = policy.transforms.inputs(SEEN)
    plain = imported(ImportConfig(openvla, tmp_path / "r", "toy_libero")).model.backbone
    ours = backbone(inputs).hidden_states
    assert not torch.allclose(ours[-1], plain(inputs).hidden_states[-1], atol=1e-2)
    plain.vlm = peft.PeftModel.from_pretrained(plain.vlm, tmp_path / "adapter")
    for other in (again.model.backbone, plain):
        for a, b in zip(ours, other(inputs).hidden_states, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_oft_learns_by_its_own_loss(oft: Path, storage_root: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in oft.iterdir():
        if not path.name.startswith("proprio"):
            (source / path.name).symlink_to(path)
    config = experiment(source, storage_root, tmp_path, NoMemoryConfig())
    built = config.build(World())
    before = loss_of(config, built)
    built.state.model.train()
    run(config, built)
    assert loss_of(config, built) < before


def test_what_was_imported_is_exported_as_it_was(openvla: Path, oft: Path, tmp_path: Path) -> None:
    for source, cameras in ((openvla, CAMERAS[:1]), (oft, CAMERAS)):
        policy, back = tmp_path / f"{source.parent.name}", tmp_path / f"{source.parent.name}-exported"
        main(ImportConfig(source, policy, "toy_libero", cameras=cameras))
        export_job(ExportConfig(policy, back))
        theirs, ours = OpenVLAFiles.read(source), OpenVLAFiles.read(back)
        weights, again = theirs.weights(), ours.weights()
        assert weights.keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
        assert (ours.text, ours.towers, ours.processor) == (theirs.text, theirs.towers, theirs.processor)
        assert oft_files(back).keys() == oft_files(source).keys()
        for kind, path in oft_files(source).items():
            a, b = torch.load(path, weights_only=True), torch.load(oft_files(back)[kind], weights_only=True)
            assert a.keys() == b.keys()
            assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_memory_has_no_place_in_the_published_layout(openvla: Path, tmp_path: Path) -> None:
    main(ImportConfig(openvla, tmp_path / "p", "toy_bridge", model=ImportedModelConfig(BankMemoryConfig())))
    with pytest.raises(ValueError, match="set without_memory to export the rest"):
        export_job(ExportConfig(tmp_path / "p", tmp_path / "out"))
    export_job(ExportConfig(tmp_path / "p", tmp_path / "out", without_memory=True))
    assert imported(ImportConfig(tmp_path / "out", tmp_path / "q", "toy_bridge")).describe()["memory"] == "none"


def test_an_imported_description_alone_cannot_be_trained(
    openvla: Path, storage_root: Path, tmp_path: Path
) -> None:
    config = replace(experiment(openvla, storage_root, tmp_path, NoMemoryConfig()), start_from=None)
    with pytest.raises(ValueError, match="set start_from to that policy"):
        config.build(World())


def test_frozen_and_dead_weights_stay(openvla: Path, tmp_path: Path) -> None:
    """The towers' last blocks and pools never run: nothing asks for their gradients, in any form of the model."""
    main(ImportConfig(openvla, tmp_path / "policy", "toy_bridge"))
    for policy in (
        Policy.load(tmp_path / "policy"),
        imported(ImportConfig(openvla, tmp_path / "p", "toy_bridge")),
    ):
        frozen = {name for name, p in policy.model.named_parameters() if not p.requires_grad}
        assert frozen
        assert all("blocks.3" in n or "blocks.2" in n or "norm" in n or "attn_pool" in n for n in frozen)
        assert all(isinstance(p, torch.nn.Parameter) for p in policy.model.parameters())
