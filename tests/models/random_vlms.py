"""Small vision-language models with random weights, as `from_pretrained` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    SmolVLMConfig,
)

_WORDS: Final = "what action should the robot take to press red blue button ? which is lit"
_QWEN: Final = tuple(
    f"<|{name}|>" for name in ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
)
_SMOL: Final = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>")
#: As the published ones put a user's pictures and words.
_QWEN_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMOL_TEMPLATE: Final = (
    "<|im_start|>{% for message in messages %}{{ message.role }}:{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
_TEXT: Final[dict[str, Any]] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
#: By three axes of a position: half of a head's size.
_ROPE: Final = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 4, 4]}


def save_tokenizer(directory: Path, special: tuple[str, ...], template: str) -> dict[str, int]:
    """Writes a tokenizer of a few words; word -> id."""
    words = ["<pad>", "<eos>", "<unk>", *special, *_WORDS.split(), "user", "assistant", ":", "\n"]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(directory)
    return ids


def save_random_qwen(directory: Path, version: int) -> None:
    """Qwen2.5-VL or Qwen3-VL of 6 layers, 4 image tokens per picture of 56 or 64 pixels."""
    ids = save_tokenizer(directory, _QWEN, _QWEN_TEMPLATE)
    vision: dict[str, Any] = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    text = {**_TEXT, "vocab_size": len(ids)}
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    if version == 3:
        vision |= {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        text |= {"head_dim": 24, "rope_parameters": {**_ROPE, "mrope_interleaved": True}}
        config: Any = Qwen3VLConfig(vision_config=vision, text_config=text, **tokens)
        processor = Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    else:
        vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [2]}
        text |= {"rope_parameters": _ROPE}
        config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **tokens)
        processor = Qwen2VLImageProcessorPil()
    processor.save_pretrained(directory)
    _save(directory, config)


def save_random_smolvlm(directory: Path) -> None:
    """SmolVLM2 of 6 layers, 4 image tokens per picture of 56 pixels."""
    ids = save_tokenizer(directory, _SMOL, _SMOL_TEMPLATE)
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    text = {**_TEXT, "vocab_size": len(ids), "model_type": "llama", "pad_token_id": 0}
    config = SmolVLMConfig(
        vision_config=vision, text_config=text, scale_factor=2, image_token_id=ids["<image>"], pad_token_id=0
    )
    _save(directory, config)


def _save(directory: Path, config: Any) -> None:
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).float().save_pretrained(directory)
