"""Run by LeRobot's own interpreter: loads a policy's directory as LeRobot does, and predicts a chunk.

    python lerobot_chunk.py EXPORTED INPUTS TOKENIZER BESIDE CHUNK

INPUTS and CHUNK are safetensors; BESIDE is a FAST tokenizer's directory (pi0-FAST) or the VLM's config (SmolVLA).
The weights are tiny, and LeRobot's sizes are constants: they are set here, and nothing that computes is changed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies import factory
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

#: Of tests/checkpoints/pi: PaliGemma's language model, the expert, the vision tower.
LANGUAGE = {"width": 32, "depth": 3, "mlp_dim": 64, "num_heads": 8, "num_kv_heads": 1, "head_dim": 8}
EXPERT = LANGUAGE | {"width": 24, "mlp_dim": 48}
VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
VISION |= {"image_size": 56, "patch_size": 14, "projection_dim": 32}
VOCABULARY = 956


def small_pi(module: Any) -> None:
    """The module's models in these sizes."""

    def resized(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(config: Any) -> Any:
            text = getattr(config, "text_config", config)
            text.vocab_size = VOCABULARY
            if text is not config:
                config.image_token_id = config.image_token_index = VOCABULARY
                config.projection_dim = VISION["projection_dim"]
                for name, value in VISION.items():
                    setattr(config.vision_config, name, value)
            return make(config=config)

        return made

    for name in ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM"):
        if hasattr(module, name):
            setattr(module, name, resized(getattr(module, name)))
    kind = module.GemmaConfig
    module.get_gemma_config = lambda variant: kind(**(EXPERT if variant == "gemma_300m" else LANGUAGE))


def fast(directory: Path) -> Any:
    """What LeRobot reads of the FAST tokenizer's processor, whose code is not in our fixture."""
    settings = json.loads((directory / "processor_config.json").read_text())
    bpe = Tokenizer.from_file(str(directory / "tokenizer.json"))
    decode = lambda ids: bpe.decode(ids.tolist())  # noqa: E731
    return SimpleNamespace(
        bpe_tokenizer=SimpleNamespace(decode=decode), scale=settings["scale"], min_token=settings["min_token"]
    )


def prepare(config: Any, tokenizer: str, beside: Path) -> None:
    """Sizes, and the files that LeRobot would fetch."""
    if config.type == "smolvla":
        from lerobot.policies.smolvla import smolvlm_with_expert as module
        from transformers import AutoTokenizer

        directory = Path(tempfile.mkdtemp())
        (directory / "config.json").write_text(beside.read_text())
        config.vlm_model_name = str(directory)
        processor = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(tokenizer))
        module.AutoProcessor = SimpleNamespace(from_pretrained=lambda _: processor)
        return
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi0_fast import modeling_pi0_fast
    from lerobot.policies.pi05 import modeling_pi05

    module = {"pi0": modeling_pi0, "pi05": modeling_pi05, "pi0_fast": modeling_pi0_fast}[config.type]
    small_pi(module)
    if config.type == "pi0_fast":
        config.text_tokenizer_name = tokenizer
        module.AutoProcessor = SimpleNamespace(from_pretrained=lambda *_, **__: fast(beside))


def without_training(exported: Path) -> Path:
    """The preprocessor's files without the step that makes tokens of training's actions."""
    directory = Path(tempfile.mkdtemp())
    for path in exported.glob("policy_*"):
        (directory / path.name).write_bytes(path.read_bytes())
    described = json.loads((directory / "policy_preprocessor.json").read_text())
    described["steps"] = [s for s in described["steps"] if s["registry_name"] != "action_tokenizer_processor"]
    (directory / "policy_preprocessor.json").write_text(json.dumps(described))
    return directory


def main(exported: Path, inputs: Path, tokenizer: str, beside: Path, chunk: Path) -> None:
    given = load_file(inputs)
    texts = json.loads(inputs.with_suffix(".json").read_text())
    config = PreTrainedConfig.from_pretrained(exported)
    prepare(config, tokenizer, beside)
    policy = factory.get_policy_class(config.type).from_pretrained(exported, config=config, strict=True)
    own = load_file(exported / "model.safetensors")
    loaded = policy.state_dict()
    wrong = [
        name for name, x in own.items() if name not in loaded or not torch.equal(loaded[name].float(), x.float())
    ]
    assert not wrong, f"LeRobot did not load {wrong}"
    before, after = factory.make_pre_post_processors(
        config,
        str(without_training(exported)),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer_name": tokenizer}},
    )
    batch = before({name: x for name, x in given.items() if name != "noise"} | {"task": texts})
    noise = {"noise": given["noise"]} if "noise" in given else {}
    with torch.no_grad():
        predicted = policy.predict_action_chunk(batch, **noise)
    save_file({"normalised": predicted.contiguous(), "chunk": after(predicted).contiguous()}, chunk)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
