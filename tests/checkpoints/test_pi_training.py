"""An imported pi0, pi0.5 or pi0-FAST is fine-tuned by the ordinary training, with a memory and by adapters."""

from pathlib import Path

import draccus
import pytest
import yaml

from ipvla.data.rlds import write_rlds
from ipvla.experiment import ExperimentConfig
from ipvla.models.memory import GRUMemoryConfig
from ipvla.policy import Policy
from ipvla.training.parallel import World
from ray_jobs.import_policy import ImportConfig, ImportedModelConfig, main
from ray_jobs.importing.pi import PiConfig
from tests.synthetic import SIZE, cue_episode
from tests.training.fine_tuning import Log, finish

HERE = Path(__file__).parent / "pi"


@pytest.mark.parametrize("variant", ["pi0", "pi05", "pi0_fast"])
def test_import_then_train_then_act(tmp_path: Path, variant: str) -> None:
    terms, fast = {"gripper": "environment"}, str(HERE / "fast_tokenizer")
    pi = PiConfig(str(HERE / "tokenizer"), execute=5, vision_heads=3, action_tokenizer=fast)
    policy = tmp_path / variant
    memory = ImportedModelConfig(GRUMemoryConfig(hidden=16))
    main(
        ImportConfig(
            HERE / variant, policy, dtype="float32", cameras=("agentview",), terms=terms, pi=pi, model=memory
        )
    )
    write_rlds(tmp_path / "datasets", "cue", [cue_episode(seed) for seed in range(8)], SIZE)
    settings = yaml.safe_load((tmp_path / f"{variant}.train.yaml").read_text())
    settings["storage_root"] = str(tmp_path)
    settings["data"]["dataset"] = "cue"
    settings["lanes"] |= {"lanes": 2, "window": 2}
    settings["model"]["lora"] = {"rank": 4}
    settings["optimizer"] = {"lr": 3e-3, "warmup_steps": 1}
    settings["training"] = {"steps": 30, "precision": "fp32", "log_every": 1, "checkpoint_every": 100}
    config = draccus.decode(ExperimentConfig, settings)
    experiment = config.build(World())
    before = {name: p.detach().clone() for name, p in experiment.state.model.named_parameters()}
    log = Log()
    finish(experiment, config, log)
    losses = [metrics["train/loss"] for _, metrics in log.lines if "train/loss" in metrics]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    changed = {n for n, p in experiment.state.model.named_parameters() if not p.equal(before[n])}
    assert not {n for n in changed if n.startswith("backbone.") and "lora_" not in n}, "only adapters learn there"
    expert = () if variant == "pi0_fast" else ("head.expert.layers.0.mlp", "head.cognition_proj")
    for part in ("lora_B", "memory.", *expert):
        assert any(part in name for name in changed), part
    experiment.policy.save(tmp_path / "tuned")
    tuned = Policy.load(tmp_path / "tuned")
    dataset = config.open_dataset()
    seen = [dataset.observation(0, 0, ("agentview",))]
    ours, _ = tuned.act(seen, tuned.initial_memory(1))
    theirs, _ = experiment.policy.act(seen, experiment.policy.initial_memory(1))
    assert ours.shape == (1, 10, 7)
    assert abs(ours - theirs).max() < 1e-5
