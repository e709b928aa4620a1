"""What can be wrong with a checkpoint of pi0, pi0-FAST, pi0.5 or SmolVLA: one line says it, nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_jobs.import_policy import ImportConfig, main
from ray_jobs.importing.pi import PiConfig
from tests.checkpoints.test_bad_checkpoints import edited

HERE = Path(__file__).parent
SOURCES = {
    "pi0": HERE / "pi" / "pi0",
    "pi05": HERE / "pi" / "pi05",
    "pi0_fast": HERE / "pi" / "pi0_fast",
    "smolvla": HERE / "smolvla" / "policy",
}


def tensors(change: Callable[[dict[str, torch.Tensor]], object], pattern: str) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        path = next(directory.glob(pattern))
        content = load_file(path)
        change(content)
        save_file(content, path)

    return changed


def settings(**values: Any) -> Callable[[Path], None]:
    return lambda directory: edited(directory / "config.json", lambda content: content.update(values))


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def no_statistics_file(directory: Path) -> None:
    next(directory.glob("policy_postprocessor_step_*")).unlink()


def less(content: dict[str, torch.Tensor]) -> None:
    content.pop(next(name for name in content if name.endswith("layers.1.mlp.up_proj.weight")))


def without(feature: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Without what either normalisation reads."""
    return lambda content: [content.pop(f"{feature}.{row}") for row in ("std", "q99")]


def fewer_words(content: dict[str, torch.Tensor]) -> None:
    name = next(
        name for name in content if name.endswith(("paligemma.lm_head.weight", "text_model.embed_tokens.weight"))
    )
    content[name] = content[name][:-100].clone()


SPOILT = {
    "another family": (settings(type="act"), "holds a policy of type 'act'"),
    "a truncated shard": (truncated, "model.safetensors is missing or damaged"),
    "no weights": (no_weights, "model.safetensors is missing or damaged"),
    "a weight less": (tensors(less, "model.safetensors"), r"lacks weight .*up_proj\.weight \(1 in all\)"),
    "a weight more": (
        tensors(lambda x: x.update({"model.gripper.weight": torch.zeros(2)}), "model.safetensors"),
        r"has the unknown weight gripper\.weight \(1 in all\)",
    ),
    "another vocabulary": (
        tensors(fewer_words, "model.safetensors"),
        r"tokenizer' has \d+ tokens, and .*model.safetensors has embeddings of \d+; set --pi.tokenizer",
    ),
    "no file of statistics": (no_statistics_file, "unnormalizer_processor.safetensors is missing or damaged"),
    "a row of statistics less": (
        tensors(without("action"), "policy_postprocessor_step_*"),
        "no (std|q99) of the action, which is normalised by (mean and std|q01 and q99)",
    ),
    "a row of the state less": (
        tensors(without("observation.state"), "policy_preprocessor_step_*"),
        "no (std|q99) of the state",
    ),
    "other pictures": (
        settings(image_resolution=[112, 112], resize_imgs_with_padding=[112, 112]),
        r"image_resolution is \[112, 112\]; only \[56, 56\]|makes pictures of \[112, 112\] pixels, and the vision",
    ),
}


def refused(message: str, config: ImportConfig) -> None:
    with pytest.raises(ValueError, match=message) as error:
        main(config)
    assert "\n" not in str(error.value)
    assert config.policy is not None
    assert not config.policy.exists()


def config(source: Path, kind: str, policy: Path, **more: Any) -> ImportConfig:
    tokenizer = HERE / ("smolvla" if kind == "smolvla" else "pi") / "tokenizer"
    fast = str(HERE / "pi" / "fast_tokenizer")
    pi = PiConfig(str(tokenizer), vision_heads=3, head_size=8, action_tokenizer=fast)
    return ImportConfig(source, policy, dtype="float32", pi=pi, **more)


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_spoilt_checkpoint(kind: str, name: str, tmp_path: Path) -> None:
    spoil, message = SPOILT[name]
    shutil.copytree(SOURCES[kind], tmp_path / "source")
    spoil(tmp_path / "source")
    refused(message, config(tmp_path / "source", kind, tmp_path / "policy"))


@pytest.mark.parametrize("kind", SOURCES)
def test_settings_that_a_layout_does_not_read_are_refused(kind: str, tmp_path: Path) -> None:
    adapter = HERE / "openvla" / "lora_adapter"
    given = {
        "adapter": (adapter, r"adapter is '.*lora_adapter'.*merge it with PEFT, and import the result"),
        "unnorm_key": (
            "bridge",
            "unnorm_key is 'bridge', and .* is not in OpenVLA's layout, which alone takes it",
        ),
        "chunk": (4, "chunk is '4'"),
        "statistics": (HERE / "pi" / "stats.json", "statistics is '.*stats.json'"),
    }
    for name, (value, message) in given.items():
        refused(message, config(SOURCES[kind], kind, tmp_path / "policy", **{name: value}))


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_openpis_statistics_without_the_rows_that_are_used(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HERE / "pi" / "openpi_pi05", source)
    shutil.copy(SOURCES[kind] / "model.safetensors", source)
    row = {"pi0": "std", "pi05": "q99"}[kind]
    edited(next(source.glob("assets/**/norm_stats.json")), lambda c: c["norm_stats"]["actions"].pop(row))
    refused(
        {"pi0": "KeyError|'std'", "pi05": "no q99 of the action|no q01"}[kind],
        config(source, kind, tmp_path / "p"),
    )
