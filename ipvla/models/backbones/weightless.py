"""Models of transformers at their published sizes without their weights, to be counted and measured.

The tokenizer knows a few words; the weights are on the device `meta`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from ipvla.models.backbones.hugging_face import DTYPES, HuggingFaceConfig
from ipvla.models.backbones.paligemma import PaliGemmaConfig
from ipvla.models.backbones.pi0 import PaliGemmaSizes
from ipvla.models.backbones.protocol import BackboneConfig
from ipvla.models.backbones.qwen_vl import QwenVLBackbone, QwenVLConfig
from ipvla.models.backbones.smolvla import SmolVLMSizes
from ipvla.models.backbones.smolvlm import SmolVLMConfig


def paligemma_3b(directory: Path) -> PaliGemmaConfig:
    """google/paligemma-3b-pt-224; the description goes into `directory`, which must outlive what is built."""
    sizes = replace(PaliGemmaSizes(), vocabulary=257216).hugging_face()
    return _PaliGemma(described_words(directory, sizes))


def qwen_vl_3b(directory: Path) -> QwenVLConfig:
    """Qwen/Qwen2.5-VL-3B-Instruct; as `paligemma_3b`."""
    from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessorPil  # takes seconds

    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config={
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        image_token_id=4, vision_start_token_id=6, vision_end_token_id=7, video_token_id=5,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2VLImageProcessorPil().save_pretrained(directory)
    return _QwenVL(described_words(directory, config))


def smolvlm_500m(directory: Path) -> SmolVLMConfig:
    """HuggingFaceTB/SmolVLM2-500M-Video-Instruct; as `paligemma_3b`."""
    return _SmolVLM(described_words(directory, SmolVLMSizes(layers=32).hugging_face()))


def weightless(config: BackboneConfig) -> BackboneConfig:
    """The same backbone, but that where it would load its weights they stay on `meta`."""
    kinds: dict[type, Callable[..., BackboneConfig]] = {
        PaliGemmaConfig: _PaliGemma,
        QwenVLConfig: _QwenVL,
        SmolVLMConfig: _SmolVLM,
    }
    if type(config) not in kinds or not isinstance(config, HuggingFaceConfig):
        return config
    return kinds[type(config)](**{each.name: getattr(config, each.name) for each in fields(config)})


class _Weightless:
    """In place of `HuggingFaceConfig.weights`: the model of `config.json`, without its weights."""

    pretrained: str
    dtype: str

    def weights(self) -> Any:
        from transformers import AutoConfig, AutoModelForImageTextToText

        with torch.device("meta"):
            vlm = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(self.pretrained))
        return vlm.to(DTYPES[self.dtype])


class _PaliGemma(_Weightless, PaliGemmaConfig): ...


class _QwenVL(_Weightless, QwenVLConfig):
    def build(self, proprio_dim: int, num_views: int, image_size: int) -> QwenVLBackbone:
        with torch.device("cpu"):  # positions are computed
            return super().build(proprio_dim, num_views, image_size)


class _SmolVLM(_Weightless, SmolVLMConfig): ...


def described_words(directory: Path, config: Any = None) -> str:
    """A tokenizer of a few words, and `config.json` beside it; the directory's name."""
    from transformers import PreTrainedTokenizerFast  # takes seconds

    words = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>", "<video>", "<start>", "<end>", "\n")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    wrapped.chat_template = (
        "{% for part in messages[0].content %}{% if part.type == 'image' %}<start> <image> <end> {% else %}"
        "{{ part.text }} {% endif %}{% endfor %}"
    )
    wrapped.save_pretrained(directory)
    if config is not None:
        config.save_pretrained(directory)
    return str(directory)
