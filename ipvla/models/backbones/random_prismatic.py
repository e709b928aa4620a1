"""An OpenVLA of any size with random weights, in the published layout: time and memory depend on sizes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from ipvla.models.backbones.openvla_files import SPACE, OpenVLAFiles
from ipvla.models.backbones.prismatic import PrismaticVLM

_WORDS: Final = 32000
#: openvla/openvla-7b (arXiv 2406.09246); its language model's sizes are LlamaConfig's defaults.
OPENVLA_7B: Final[Mapping[str, Any]] = {
    "image_size": 224,
    "towers": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "text": {},
}
#: 6 layers and towers of 2 blocks, 4 patches per 28-pixel view.
SMALLEST: Final[Mapping[str, Any]] = {
    "image_size": 28,
    "towers": {
        "dino": {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_hidden": 32, "reg_tokens": 4,
                 "class_token": True, "patch_size": 14},
        "siglip": {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_hidden": 32, "reg_tokens": 0,
                   "class_token": False, "patch_size": 14},
    },
    "text": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 2,
             "num_key_value_heads": 2},
}  # fmt: skip


def save_random_prismatic(
    directory: Path,
    sizes: Mapping[str, Any],
    words: Sequence[str],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    weights: bool = True,
) -> None:
    """Writes config, tokenizer, processor and weights, always the same ones on a device.

    Args:
        sizes: `image_size`, `towers` (timm's names, or sizes by names of one's own), `text` (of LlamaConfig).
        words: of the tokenizer, beside the tokens of actions; the first stands for an unknown one.
        device: where the weights are drawn; a GPU is faster.
        weights: False for the description alone.
    """
    directory.mkdir(parents=True, exist_ok=True)
    towers, size = sizes["towers"], sizes["image_size"]
    _tokenizer(words).save(str(directory / "tokenizer.json"))
    config = {
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px" if len(towers) > 1 else "siglip-vit-so400m",
        "timm_model_ids": list(towers),
        "image_sizes": [size] * len(towers),
        "image_resize_strategy": "resize-naive",
        "pad_to_multiple_of": 64,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "text_config": {"model_type": "llama", "vocab_size": _WORDS + 64, "pad_token_id": _WORDS, **sizes["text"]},
    }
    (directory / "config.json").write_text(json.dumps(config))
    if isinstance(towers, Mapping):
        (directory / "towers.json").write_text(json.dumps(towers))
    if not weights:
        return
    torch.manual_seed(0)
    with torch.device(device):
        vlm = PrismaticVLM(OpenVLAFiles.read(directory), 0, False).to(dtype)
    named = {name: tensor.cpu().contiguous() for name, tensor in vlm.state_dict().items()}
    save_file(named, directory / "model.safetensors")


def _tokenizer(words: Sequence[str]) -> Tokenizer:
    """Llama's ids for what OpenVLA takes for granted; words stand from 300 on, and every id is some token."""
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 13: "\n", SPACE: "\u2581"}
    names |= {300 + i: word for i, word in enumerate(words)}
    vocabulary = {names.get(i, f"<{i}>"): i for i in range(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer
