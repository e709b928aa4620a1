"""What `ipvla doctor --plan` says of a model is what it takes: bytes exactly, activations nearly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from draccus import decode

from ipvla.data.plan import PlanPosition
from ipvla.models.adapters import LoRAConfig
from ipvla.models.memory import GRUMemoryConfig, NoMemoryConfig
from ipvla.models.nf4 import NF4Config, parameter_count
from ipvla.policy import Policy
from ipvla.training.parallel import World
from ray_jobs.doctor import DoctorConfig, main
from ray_jobs.import_policy import ImportConfig, ImportedModelConfig
from ray_jobs.import_policy import main as import_job
from ray_jobs.planning import footprint
from ray_jobs.planning.cards import CARDS, Card, card_named
from ray_jobs.planning.footprint import SavedBytes, activations, keys_values_bytes, prompt_tokens
from ray_jobs.planning.plan import Way, plan
from ray_jobs.planning.published import PUBLISHED, planned
from tests.checkpoints.conftest import openvla
from tests.checkpoints.test_fine_tuning import SEEN, experiment

__all__ = ["openvla"]
#: Of the published weights, with our projection of the cognition, and without the last layer of pi0's expert,
#: which is never used.
PARAMETERS = {
    "openvla": 7_541_237_184,
    "pi0": 3_501_372_176 - 1024 * 257152 + 2048 * 1024,
    "pi05": 3_616_757_520 - 1024 * 257152 + 2048 * 1024,
    "smolvla": 450_046_176 + 960 * 720,
    "paligemma": 2_923_466_480,
    "qwen2.5-vl-3b": 3_754_622_976,
    "smolvlm2-500m": 507_482_304,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_published_models(name: str, tmp_path: Path) -> None:
    found = planned(name, tmp_path / "described")
    model = found.build(None)
    assert all(p.is_meta for p in model.parameters())
    own_head = name in ("paligemma", "qwen2.5-vl-3b", "smolvlm2-500m")
    assert parameter_count(model.backbone if own_head else model) == PARAMETERS[name]


@pytest.fixture(scope="module")
def policies(openvla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain`, and `packed` in 4 bits."""
    directory = tmp_path_factory.mktemp("policies")
    for name, nf4 in (("plain", None), ("packed", NF4Config())):
        model = ImportedModelConfig(NoMemoryConfig(), nf4)
        import_job(
            ImportConfig(openvla, directory / name, "toy_libero_no_noops", cameras=("agentview",), model=model)
        )
    return directory


def test_bytes_are_exact(policies: Path, tmp_path: Path) -> None:
    found = planned(str(policies / "plain"), tmp_path)
    base = found.build(None)
    held = {}
    for name in ("plain", "packed"):
        model = Policy.load(policies / name).model
        held[name] = footprint.tensor_bytes([*model.state_dict().values()])
        unsaved = footprint.weight_bytes(model) - footprint.tensor_bytes(
            [*model.parameters(), *(b for n, b in model.named_buffers() if n in model.state_dict())]
        )
    assert footprint.weight_bytes(base) == held["plain"] + unsaved
    assert footprint.saved_by_nf4(base.backbone, NF4Config()) == held["plain"] - held["packed"]
    plain = Policy.load(policies / "plain")
    features = plain.model.backbone(plain.transforms.inputs(SEEN[:1])).features
    layers = features.layers
    assert layers is not None
    tokens = int(layers.valid.sum())
    assert keys_values_bytes(plain.model.backbone, tokens, 4) == footprint.tensor_bytes(
        [layers.keys, layers.values]
    )


@pytest.mark.parametrize("lora", [LoRAConfig(rank=4), None], ids=["LoRA", "all"])
def test_activations_and_moments(
    openvla: Path, storage_root: Path, tmp_path: Path, lora: LoRAConfig | None
) -> None:
    """Against what autograd saves, and AdamW holds, in a real step of one frame."""
    config = experiment(openvla, storage_root, tmp_path, NoMemoryConfig())
    config = replace(
        config,
        model=replace(config.model, lora=lora),
        lanes=replace(config.lanes, lanes=1, window=1),
        forgetting=None,
    )
    state, lanes = (built := config.build(World())).state, built.lanes
    _, window = next(iter(lanes.batches(PlanPosition())))
    counter = SavedBytes(state.model)
    state.model.train()
    with counter.counting():
        loss, _ = state.model(window, state.memory)
    loss.backward()
    state.optimizer.step()
    moments = [x for one in state.optimizer.state.values() for x in one.values()]
    found = planned(str(tmp_path / "policy"), tmp_path / "described")
    model = found.build(lora)
    used = [p for p in state.model.parameters() if p.requires_grad and p.grad is None]  # they get no moments
    less = 2 * footprint.tensor_bytes(used) + 4 * len(used)
    assert footprint.optimizer_bytes(model) - less == footprint.tensor_bytes(moments)
    frame = found.frame(model)
    seen = prompt_tokens(model.backbone, 1) - footprint.PROMPT + int(window.inputs.attention_mask.sum())
    saved = activations(model, replace(frame, tokens=seen + frame.actions))
    assert saved.whole == pytest.approx(counter.total, rel=0.15)
    assert saved.checkpointed < saved.whole


def test_what_fits() -> None:
    way = Way("one", weights=10 * 2**30, gradients=2**30, optimizer=2 * 2**30, frame=2**30, checkpointed=2**28)
    card = Card("some", 24)
    assert way.most(card) == int(24 * 0.92 - 13)
    assert way.most(card, checkpointed=True) == int((24 * 0.92 - 13) * 4)
    assert way.most(Card("small", 12)) == 0
    assert card_named("V100") is CARDS["v100"]
    assert card_named("24").gib == 24
    with pytest.raises(ValueError, match="give its memory in GB, or one of 4090"):
        card_named("3090ti")


def test_openvla_on_a_4090(capsys: pytest.CaptureFixture[str]) -> None:
    """As is known of it: weights of 14 GiB; LoRA fits with activations computed again, all weights do not."""
    main(decode(DoctorConfig, {"plan": "openvla", "gpu": "4090", "json": True}))
    told = json.loads(capsys.readouterr().out)
    ways = {way["name"]: way for way in told["ways"]}
    assert told["parameters"] == PARAMETERS["openvla"]
    assert ways["answer"]["weights"] == pytest.approx(14.05, abs=0.01)
    assert ways["answer, NF4"]["weights"] == pytest.approx(5.1, abs=0.01)
    assert ways["LoRA 32, NF4"]["frames_checkpointed"] > ways["LoRA 32"]["frames_checkpointed"] >= 32
    assert ways["all, float32"]["frames_checkpointed"] == 0
    assert ways["answer"]["ms"] > 0


def test_a_table_and_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    main(DoctorConfig(plan="smolvla", gpu="24", gpus=4))
    printed = capsys.readouterr().out
    assert "smolvla: 450,737,376 parameters" in printed
    assert "FSDP over" in printed
    assert "estimated" in printed


def test_a_policy_with_a_memory(openvla: Path, tmp_path: Path) -> None:
    model = ImportedModelConfig(GRUMemoryConfig(hidden=16))
    import_job(ImportConfig(openvla, tmp_path / "p", "toy_bridge", model=model))
    found = plan(str(tmp_path / "p"), card_named("h200"), rank=2)
    policy = Policy.load(tmp_path / "p")
    assert found.memory == footprint.tensor_bytes(policy.initial_memory(1).values())
    assert found.parameters == parameter_count(policy.model)


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean"):
        planned("openvla7", tmp_path)
    with pytest.raises(ValueError, match="gpus is 0"):
        DoctorConfig(gpus=0)
    assert set(PARAMETERS) <= set(PUBLISHED)
    assert torch.get_default_device() == torch.device("cpu")
