"""What can be wrong with a checkpoint: one line that names the file and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_jobs.import_policy import ImportConfig, imported, main
from tests.checkpoints.conftest import HERE


def edited(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def other_family(directory: Path) -> None:
    edited(directory / "config.json", lambda c: c.update(model_type="llava"))


def other_towers(directory: Path) -> None:
    edited(directory / "config.json", lambda c: c.update(vision_backbone_id="clip-vit-l"))


def truncated(directory: Path) -> None:
    shard = directory / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def lost(directory: Path) -> None:
    (directory / "model-00003-of-00003.safetensors").unlink()


def a_weight_less(directory: Path) -> None:
    shard = directory / "model-00001-of-00003.safetensors"
    weights = load_file(shard)
    weights.pop(next(name for name in weights if "projector" in name or "cls_token" in name))
    save_file(weights, shard)


def a_weight_more(directory: Path) -> None:
    shard = directory / "model-00001-of-00003.safetensors"
    save_file(load_file(shard) | {"proprio.fc1.weight": torch.zeros(2)}, shard)


def other_pictures(directory: Path) -> None:
    edited(directory / "preprocessor_config.json", lambda c: c.update(input_sizes=[[3, 224, 224]] * 2))


def plain_tokenizer(directory: Path) -> None:
    def cut(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {word: i for word, i in vocabulary.items() if i < 31744}
        content["model"]["merges"] = []

    edited(directory / "tokenizer.json", cut)


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def no_statistics(directory: Path) -> None:
    edited(directory / "config.json", lambda c: c.pop("norm_stats"))
    (directory / "dataset_statistics.json").unlink()


def pickled_weights(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_family, "model_type 'llava', not 'openvla'"),
        (other_towers, "vision_backbone_id 'clip-vit-l'"),
        (truncated, "model-00002-of-00003.safetensors is missing or damaged"),
        (lost, "model-00003-of-00003.safetensors is missing or damaged"),
        (a_weight_less, "lacks weight"),
        (a_weight_more, "has the unknown weight proprio.fc1.weight"),
        (other_pictures, r"makes pictures of \[224\] pixels, and the towers take \[56\]"),
        (plain_tokenizer, "has no tokens 31744 to 31999, which stand for actions"),
        (no_tokenizer, "tokenizer.json is missing"),
        (no_statistics, "has no statistics of actions"),
        (pickled_weights, "pytorch_model.bin is a pickle, which is not opened"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_spoilt_checkpoint(openvla: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    directory = tmp_path / "model"
    shutil.copytree(openvla, directory)
    spoil(directory)
    with pytest.raises(ValueError, match=message) as refused:
        main(ImportConfig(directory, tmp_path / "policy", "toy_bridge"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "policy").exists()


def test_an_unknown_or_unnamed_dataset(openvla: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no statistics of it; did you mean 'toy_bridge'"):
        imported(ImportConfig(openvla, tmp_path / "p", "toy_brige"))
    with pytest.raises(ValueError, match="set unnorm_key to one of toy_bridge, toy_libero_no_noops"):
        imported(ImportConfig(openvla, tmp_path / "p"))
    assert (
        imported(ImportConfig(openvla, tmp_path / "p", "toy_libero")).transforms.statistics.num_transitions == 4408
    )


def test_an_adapter_of_another_base(openvla: Path, single_tower: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter of another base"):
        imported(ImportConfig(single_tower, tmp_path / "p", adapter=HERE / "lora_adapter"))
    adapter = tmp_path / "adapter"
    shutil.copytree(HERE / "lora_adapter", adapter)
    edited(adapter / "adapter_config.json", lambda c: c.update(use_dora=True))
    with pytest.raises(ValueError, match="no plain LoRA adapter"):
        imported(ImportConfig(openvla, tmp_path / "p", "toy_bridge", adapter=adapter))


def test_a_file_of_more_than_tensors(oft: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(oft, directory)
    head = next(directory.glob("action_head*"))
    torch.save({"path": Path("/etc")}, head)
    with pytest.raises(ValueError, match="nothing else is unpickled"):
        imported(ImportConfig(directory, tmp_path / "p"))
    torch.save({"step": 3}, head)
    with pytest.raises(ValueError, match="holds more than tensors"):
        imported(ImportConfig(directory, tmp_path / "p"))
    torch.save({"model.fc1.weight": torch.zeros(2)}, head)
    with pytest.raises(ValueError, match=r"lacks weight model\.fc1\.bias"):
        imported(ImportConfig(directory, tmp_path / "p"))


def test_a_policy_is_not_written_over(openvla: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is there already"):
        main(ImportConfig(openvla, tmp_path, "toy_bridge"))
